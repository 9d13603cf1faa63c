"""Complete GANs, each buildable from stock torch layers or from gankern's by one switch.

All for images but ``wgan_gp_toy``, which is for points in the plane. What papers add to them are options of the
builders that have them:

- ``num_classes``: labels; ``generator(latents, labels)`` and ``discriminator(images, labels)``, labels [N] integers.
- ``conditioning``: how labels come in; "projection" or "concatenation", see :mod:`gankern.models.conditional`.
- ``minibatch_discrimination``: how many similarity features the discriminator's last layer gets besides its own.
- ``generator_norm``: "batch" or "virtual", the normalisation of the generator; ``discriminator_norm`` that of DCGAN's
  discriminator, or "none". With "virtual" set the reference batch once:
  ``gankern.nn.set_reference_batch(network, batch)``, labels after the batch if there are classes.

>>> import torch
>>> gan = build("sn_dcgan", size=32, channels=1, layers="torch")
>>> gan.discriminator(gan.generator(torch.randn(4, gan.latent))).shape
torch.Size([4])
"""

from gankern._names import look_up
from gankern.models.dcgan import dcgan, sn_dcgan, wgan
from gankern.models.gan import GAN
from gankern.models.layers import LAYERS, Layers
from gankern.models.mlp import gan
from gankern.models.progan import fade, progan
from gankern.models.sngan import sngan
from gankern.models.wgan_gp import wgan_gp, wgan_gp_toy

MODELS = {
    "dcgan": dcgan,
    "gan": gan,
    "progan": progan,
    "sn_dcgan": sn_dcgan,
    "sngan": sngan,
    "wgan": wgan,
    "wgan_gp": wgan_gp,
    "wgan_gp_toy": wgan_gp_toy,
}


# Those whose networks are resized while they train.
GROWING = ("progan",)


def build(name: str, **options) -> GAN:
    """The model of that name, with its options; a ValueError with the nearest names if there is none."""
    return look_up(MODELS, name, "model")(**options)


__all__ = [
    "GAN",
    "GROWING",
    "LAYERS",
    "MODELS",
    "Layers",
    "build",
    "dcgan",
    "fade",
    "gan",
    "progan",
    "sn_dcgan",
    "sngan",
    "wgan",
    "wgan_gp",
    "wgan_gp_toy",
]
