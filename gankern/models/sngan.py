"""SN-GAN's residual networks (Miyato 2018, arXiv 1802.05957): the discriminator's weights have a spectral norm of 1."""

from gankern.core.arguments import whole
from gankern.models import layers as layer_tables
from gankern.models._record import model
from gankern.models._sizes import SizeError, check_positive
from gankern.models.conditional import Conditioning, generator_norms
from gankern.models.gan import GAN
from gankern.models.resnet import ResNetDiscriminator, ResNetGenerator

# size → channels of the generator's and the discriminator's maps in multiples of the width, and how many of the
# discriminator's blocks halve the image. 32: the paper's CIFAR-10 networks; 64: its ImageNet ones less the 128×128 map.
ARCHITECTURES = {
    32: ([4, 4, 4, 4], [2, 2, 2, 2], 2),
    64: ([16, 8, 4, 2, 1], [1, 2, 4, 8, 16], 5),
}


@model(loss="hinge", latent=128, width=16, beta1=0.0, beta2=0.9, n_critic=5)
def sngan(
    size: int = 32, channels: int = 3, latent: int = 128, width: int = 64, layers: str = "torch", *,
    num_classes: int = 0, conditioning: str = "projection", minibatch_discrimination: int = 0,
    generator_norm: str = "batch",
) -> GAN:  # fmt: skip
    """The residual SN-GAN for images of 32 × 32 or 64 × 64.

    4,276,739 + 1,053,825 parameters at the defaults. ``num_classes``, ``conditioning``,
    ``minibatch_discrimination`` and ``generator_norm``: see :mod:`gankern.models`.

    >>> sum(p.numel() for p in sngan().generator.parameters())
    4276739
    """
    if whole("size", size) not in ARCHITECTURES:
        raise SizeError(
            f"sngan has networks for sizes {' and '.join(map(str, ARCHITECTURES))}, got {size}; "
            "sn_dcgan and wgan_gp are for any power of two from 8 up"
        )
    check_positive(channels=channels, latent=latent, width=width)
    table = layer_tables.get(layers)
    labels = Conditioning(num_classes, conditioning, conditional_norms=generator_norm == "batch")
    generator_maps, discriminator_maps, halvings = ARCHITECTURES[size]
    generator = ResNetGenerator(
        channels,
        latent + labels.latent_classes,
        [multiple * width for multiple in generator_maps],
        generator_norms(generator_norm, labels, table),
        table,
    )
    discriminator = ResNetDiscriminator(
        channels + labels.image_classes,
        [multiple * width for multiple in discriminator_maps],
        halvings,
        "sum",
        table,
        num_classes=labels.head_classes,
        minibatch_discrimination=minibatch_discrimination,
    )
    return labels.wrap(GAN(generator, layer_tables.normalise_spectrally(discriminator, table), latent))
