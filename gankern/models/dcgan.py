"""DCGAN (Radford 2015, arXiv 1511.06434), its spectrally normalised form (Miyato 2018, arXiv 1802.05957), and WGAN.

All share the generator, and the discriminator's stack of 4×4 stride-2 convolutions, which is the generator's
mirror image. The first two differ in what keeps the discriminator in check: batch normalisation in DCGAN, a spectral
norm of one in every convolution in SN-DCGAN. At 64×64 with the default width, the discriminator is
3-64-128-256-512-1.
"""

from functools import partial
from typing import Any, TypedDict, Unpack

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gankern.core.names import look_up, with_options_of
from gankern.models import layers as layer_tables
from gankern.models._record import model
from gankern.models._sizes import check_positive, check_size
from gankern.models.conditional import NORMS, Conditioning, GeneratorNorms, Head, apply_norm_act, generator_norms
from gankern.models.gan import GAN
from gankern.models.layers import Layers
from gankern.nn.coupling import apart

# Channels double at each halving of the image, up to this multiple of the width (512 at the default width of
# 64).
LARGEST_MULTIPLE = 8


def channel_table(size: int, width: int) -> list[int]:
    """Channels of the feature maps at size/2, size/4, ..., 4: one entry for each 4×4 stride-2 convolution.

    >>> channel_table(64, width=64)
    [64, 128, 256, 512]
    """
    check_positive(width=width)
    halvings = check_size(size, 8)  # from size down to 4
    return [width * min(2**i, LARGEST_MULTIPLE) for i in range(halvings)]


@apart
class DCGANGenerator(nn.Module):
    """[N, latent] → 4×4 → 8×8 → ... → [N, channels, size, size] in [−1, 1], by transposed convolutions."""

    def __init__(self, size: int, channels: int, latent: int, width: int, norms: GeneratorNorms, layers: Layers):
        super().__init__()
        maps = channel_table(size, width)[::-1]
        self.main = nn.ModuleList([layers.conv_transpose(latent, maps[0], 4, stride=1, padding=0, bias=False)])
        for before, after in zip(maps, [*maps[1:], channels], strict=True):
            self.main += [
                norms.inner(before),
                layers.conv_transpose(before, after, 4, stride=2, padding=1, bias=False),
            ]
        self.main.apply(initialise)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        x = latents[:, :, None, None]
        for layer in self.main:
            x = apply_norm_act(layer, x, labels)
        return x.tanh()


@apart
class DCGANDiscriminator(nn.Module):
    """[N, channels, size, size] → logits [N], by 4×4 stride-2 convolutions with LeakyReLU 0.2 between them.

    ``norm`` ("batch", "virtual") follows every convolution but the first and the last layer, as in Radford 2015;
    where it is "none" the convolutions have biases.
    """

    def __init__(self, size: int, channels: int, width: int, norm: str, layers: Layers, **head: Any):
        super().__init__()
        plain = norm == "none"
        maps = channel_table(size, width)
        blocks = []
        for i, (before, after) in enumerate(zip([channels, *maps], maps, strict=False)):
            blocks.append(layers.conv(before, after, 4, stride=2, padding=1, bias=plain))
            if i > 0 and not plain:
                blocks.append(NORMS[norm](layers)(after, negative_slope=0.2))
            else:
                blocks.append(layers.leaky_relu(0.2, inplace=True))
        self.main = nn.Sequential(*blocks)
        # The papers' last layer, a 4×4 convolution of a 4×4 map, is a linear layer.
        self.head = Head(maps[-1] * 16, layers, linear=partial(layers.linear, bias=plain), **head)
        self.apply(initialise)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.main(images).flatten(1), labels)


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """Weights ~ N(0, std²), batch norm scales ~ N(1, std²), biases 0 (Radford 2015, §4)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | _NormBase):
        mean = 1.0 if isinstance(module, _NormBase) else 0.0
        if module.weight is not None:
            nn.init.normal_(module.weight, mean, std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Options(TypedDict, total=False):
    """What papers add to these networks: see :mod:`gankern.models`."""

    num_classes: int
    conditioning: str
    minibatch_discrimination: int
    generator_norm: str
    discriminator_norm: str


def _build(
    size: int, channels: int, latent: int, width: int, spectral: bool, layers: str, num_classes: int = 0,
    conditioning: str = "projection", minibatch_discrimination: int = 0, generator_norm: str = "batch",
    discriminator_norm: str | None = None,
) -> GAN:  # fmt: skip
    check_positive(channels=channels, latent=latent)
    table = layer_tables.get(layers)
    labels = Conditioning(num_classes, conditioning, conditional_norms=generator_norm == "batch")
    discriminator_norm = discriminator_norm or ("none" if spectral else "batch")
    look_up({**NORMS, "none": None}, discriminator_norm, "discriminator_norm")
    if size == 8 and discriminator_norm == "virtual":
        raise ValueError(
            "discriminator_norm must be batch or none at 8x8, where no layer of the discriminator is normalised; got "
            "'virtual'"
        )
    generator = DCGANGenerator(
        size, channels, latent + labels.latent_classes, width, generator_norms(generator_norm, labels, table), table
    )
    discriminator: nn.Module = DCGANDiscriminator(
        size,
        channels + labels.image_classes,
        width,
        discriminator_norm,
        table,
        num_classes=labels.head_classes,
        minibatch_discrimination=minibatch_discrimination,
    )
    if spectral:
        discriminator = layer_tables.normalise_spectrally(discriminator, table)
    return labels.wrap(GAN(generator, discriminator, latent))


@model(loss="non_saturating", latent=100, width=32)
@with_options_of(_build)
def dcgan(
    size: int = 64, channels: int = 3, latent: int = 100, width: int = 64, layers: str = "torch",
    **options: Unpack[Options],
) -> GAN:  # fmt: skip
    """DCGAN for images of ``size`` × ``size``, 8, 16, 32, ...; ``width`` channels at half that size.

    3,576,704 + 2,765,568 parameters at the defaults. ``options``: see :mod:`gankern.models`.

    >>> sum(p.numel() for p in dcgan().discriminator.parameters())
    2765568
    """
    return _build(size, channels, latent, width, spectral=False, layers=layers, **options)


@model(loss="wasserstein", latent=100, width=32, optimiser="rmsprop", lr=5e-5, clip=0.01, n_critic=5)
@with_options_of(_build)
def wgan(
    size: int = 64, channels: int = 3, latent: int = 100, width: int = 64, layers: str = "torch",
    **options: Unpack[Options],
) -> GAN:  # fmt: skip
    """The first Wasserstein GAN (Arjovsky 2017, arXiv 1701.07875): DCGAN's networks, the discriminator as a critic.

    What makes it a WGAN is how it is trained: the Wasserstein loss, every critic weight clipped to ±0.01 after each
    step (:func:`gankern.losses.clip_weights_`), RMSProp, five critic steps a generator step.
    """
    return _build(size, channels, latent, width, spectral=False, layers=layers, **options)


# Without momentum the two players do not chase each other in circles, and a larger step is stable.
@model(loss="hinge", latent=128, width=16, lr=1e-3, beta1=0.0, beta2=0.99, ema=0.99, steps=1500)
@with_options_of(_build)
def sn_dcgan(
    size: int = 64, channels: int = 3, latent: int = 128, width: int = 64, layers: str = "torch",
    **options: Unpack[Options],
) -> GAN:  # fmt: skip
    """DCGAN with a spectrally normalised discriminator and no batch normalisation in it.

    This is the plain form of Miyato 2018's network for images: 4×4 stride-2 convolutions only, without the
    3×3 ones between them, and a LeakyReLU slope of 0.2, as in DCGAN, where Miyato has 0.1.

    >>> gan = sn_dcgan(size=32, channels=1, layers="gankern")
    >>> sorted(gan.discriminator.state_dict())[-2:]
    ['main.4.parametrizations.weight.0._v', 'main.4.parametrizations.weight.original']
    """
    return _build(size, channels, latent, width, spectral=True, layers=layers, **options)
