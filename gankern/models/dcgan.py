"""DCGAN (Radford 2015, arXiv 1511.06434) and its spectrally normalised form (Miyato 2018, arXiv 1802.05957).

Both share the generator, and the discriminator's stack of 4×4 stride-2 convolutions, which is the generator's
mirror image. They differ in what keeps the discriminator in check: batch normalisation in DCGAN, a spectral
norm of one in every convolution in SN-DCGAN. At 64×64 with the default width, the discriminator is
3-64-128-256-512-1.
"""

from torch import Tensor, nn

from gankern.models import layers as layer_tables
from gankern.models.gan import GAN
from gankern.models.layers import Layers

# Channels double at each halving of the image, up to this multiple of the width (512 at the default width of
# 64).
LARGEST_MULTIPLE = 8


def channel_table(size: int, width: int) -> list[int]:
    """Channels of the feature maps at size/2, size/4, ..., 4: one entry for each 4×4 stride-2 convolution.

    >>> channel_table(64, width=64)
    [64, 128, 256, 512]
    """
    if size < 8 or size & (size - 1):
        below = max(8, 1 << (max(size, 8).bit_length() - 1))
        raise ValueError(
            f"size must be a power of two, at least 8, got {size}; the nearest are {below} and {2 * below}"
        )
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    halvings = size.bit_length() - 3  # from size down to 4
    return [width * min(2**i, LARGEST_MULTIPLE) for i in range(halvings)]


class DCGANGenerator(nn.Module):
    """[N, latent] → 4×4 → 8×8 → ... → [N, channels, size, size] in [−1, 1], by transposed convolutions."""

    def __init__(self, size: int, channels: int, latent: int, width: int, layers: Layers):
        super().__init__()
        maps = channel_table(size, width)[::-1]
        blocks = [layers.conv_transpose(latent, maps[0], 4, stride=1, padding=0, bias=False)]
        for narrower, wider in zip(maps[1:], maps, strict=False):
            blocks += [
                layers.batch_norm(wider),
                nn.ReLU(inplace=True),
                layers.conv_transpose(wider, narrower, 4, stride=2, padding=1, bias=False),
            ]
        blocks += [
            layers.batch_norm(maps[-1]),
            nn.ReLU(inplace=True),
            layers.conv_transpose(maps[-1], channels, 4, stride=2, padding=1, bias=False),
            nn.Tanh(),
        ]
        self.main = nn.Sequential(*blocks)
        self.main.apply(initialise)

    def forward(self, latents: Tensor) -> Tensor:
        return self.main(latents[:, :, None, None])


class DCGANDiscriminator(nn.Module):
    """[N, channels, size, size] → logits [N], by 4×4 stride-2 convolutions with LeakyReLU 0.2 between them.

    With ``spectral`` each convolution has a bias and a spectrally normalised weight and nothing else
    normalises; without it there is batch normalisation after every convolution but the first and the last, as
    in Radford 2015.
    """

    def __init__(self, size: int, channels: int, width: int, spectral: bool, layers: Layers):
        super().__init__()
        maps = channel_table(size, width)
        blocks = []
        for i, (before, after) in enumerate(zip([channels, *maps], maps, strict=False)):
            blocks.append(layers.conv(before, after, 4, stride=2, padding=1, bias=spectral))
            if i > 0 and not spectral:
                blocks.append(layers.batch_norm(after))
            blocks.append(layers.leaky_relu(0.2, inplace=True))
        blocks.append(layers.conv(maps[-1], 1, 4, stride=1, padding=0, bias=spectral))
        self.main = nn.Sequential(*blocks)
        self.main.apply(initialise)
        if spectral:
            for layer in self.main:
                if isinstance(layer, nn.Conv2d):
                    layers.spectral_norm(layer)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images).flatten()


def initialise(module: nn.Module) -> None:
    """Weights ~ N(0, 0.02), batch norm scales ~ N(1, 0.02), biases 0 (Radford 2015, §4)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
        mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
        nn.init.normal_(module.weight, mean, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def dcgan(size: int = 64, channels: int = 3, latent: int = 100, width: int = 64, layers: str = "torch") -> GAN:
    """DCGAN for images of ``size`` × ``size``, 8, 16, 32, ...; ``width`` channels at half that size.

    3,576,704 + 2,765,568 parameters at the defaults.

    >>> sum(p.numel() for p in dcgan().discriminator.parameters())
    2765568
    """
    return _build(size, channels, latent, width, spectral=False, layers=layers)


def sn_dcgan(size: int = 64, channels: int = 3, latent: int = 128, width: int = 64, layers: str = "torch") -> GAN:
    """DCGAN with a spectrally normalised discriminator and no batch normalisation in it.

    This is the plain form of Miyato 2018's network for images: 4×4 stride-2 convolutions only, without the
    3×3 ones between them, and a LeakyReLU slope of 0.2, as in DCGAN, where Miyato has 0.1.

    >>> gan = sn_dcgan(size=32, channels=1, layers="gankern")
    >>> sorted(gan.discriminator.state_dict())[:2]
    ['main.0.bias', 'main.0.parametrizations.weight.0._u']
    """
    return _build(size, channels, latent, width, spectral=True, layers=layers)


def _build(size: int, channels: int, latent: int, width: int, spectral: bool, layers: str) -> GAN:
    for name, value in (("channels", channels), ("latent", latent)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    table = layer_tables.get(layers)
    generator = DCGANGenerator(size, channels, latent, width, table)
    discriminator = DCGANDiscriminator(size, channels, width, spectral, table)
    if spectral:
        discriminator = table.group_spectral_norm(discriminator)
    return GAN(generator, discriminator, latent)
