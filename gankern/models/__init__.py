"""Complete GANs, each buildable from stock torch layers or from gankern's by one switch.

>>> import torch
>>> gan = build("sn_dcgan", size=32, channels=1, layers="torch")
>>> gan.discriminator(gan.generator(torch.randn(4, gan.latent))).shape
torch.Size([4])
"""

from gankern._names import look_up
from gankern.models.dcgan import dcgan, sn_dcgan
from gankern.models.gan import GAN
from gankern.models.layers import LAYERS, Layers

MODELS = {"sn_dcgan": sn_dcgan, "dcgan": dcgan}


def build(name: str, **options) -> GAN:
    """The model of that name, with its options; a ValueError with the nearest names if there is none."""
    return look_up(MODELS, name, "model")(**options)


__all__ = ["GAN", "LAYERS", "MODELS", "Layers", "build", "dcgan", "sn_dcgan"]
