"""Complete GANs, each buildable from stock torch layers or from gankern's by one switch.

All for images but ``wgan_gp_toy``, which is for points in the plane. What papers add to them are options of the
builders that have them:

- ``num_classes``: labels; ``generator(latents, labels)`` and ``discriminator(images, labels)``, labels [N] integers.
- ``conditioning``: how labels come in; "projection" or "concatenation", see :mod:`gankern.models.conditional`. With
  "vector_projection" or "vector_concatenation" the condition is vectors [N, num_classes] of real numbers.
- ``minibatch_discrimination``: how many similarity features the discriminator's last layer gets besides its own.
- ``generator_norm``: "batch" or "virtual", the normalisation of the generator; ``discriminator_norm`` that of DCGAN's
  discriminator, or "none". With "virtual" set the reference batch once:
  ``gankern.nn.set_reference_batch(network, batch)``, labels after the batch if there are classes.

>>> import torch
>>> gan = build("sn_dcgan", size=32, channels=1, layers="torch")
>>> gan.discriminator(gan.generator(torch.randn(4, gan.latent))).shape
torch.Size([4])
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from gankern.core.names import look_up
from gankern.models._record import RECORDS
from gankern.models._sizes import SizeError
from gankern.models.dcgan import dcgan, sn_dcgan, wgan
from gankern.models.gan import GAN
from gankern.models.layers import LAYERS, Layers
from gankern.models.mlp import gan
from gankern.models.progan import fade, progan
from gankern.models.sngan import sngan
from gankern.models.wgan_gp import wgan_gp, wgan_gp_toy

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
MODELS: dict[str, Callable[..., GAN]] = {name: record.make for name, record in sorted(RECORDS.items())}
globals().update(MODELS)  # above are those that type checkers know

# Those whose networks are resized while they train, and those for points in the plane.
GROWING = tuple(name for name in MODELS if RECORDS[name].growing)
FOR_POINTS = tuple(name for name in MODELS if RECORDS[name].for_points)

# What papers add, by the models that have it; size, channels, latent, width and layers have all but those for points.
_ADDED = ("num_classes", "conditioning", "minibatch_discrimination", "generator_norm", "discriminator_norm")
OPTIONS: dict[str, tuple[str, ...]] = {
    name: tuple(option for option in _ADDED if option in inspect.signature(make).parameters)
    for name, make in MODELS.items()
}


def build(name: str, **options: Any) -> GAN:
    """The model of that name, with its options; a ValueError if there is none of that name, or no such option of it."""
    make = look_up(MODELS, name, "model")
    for option in (o for o in ("conditioning", *_ADDED) if o in options and o not in OPTIONS[name]):
        having = [model for model, theirs in OPTIONS.items() if option in theirs]
        raise ValueError(f"{name} has no option {option}; {', '.join(having)} have")
    return make(**options)


__all__ = [
    "FOR_POINTS",
    "GAN",
    "GROWING",
    "LAYERS",
    "MODELS",
    "OPTIONS",
    "Layers",
    "SizeError",
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
