"""The one switch between stock PyTorch and gankern: a table of layer constructors.

A model is written once, against a ``Layers`` record. Both records make modules of the same names, parameters,
random draws and state_dict keys, so a checkpoint moves freely between them and a comparison of the two
measures the kernels and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.utils.parametrizations
from torch import nn

import gankern.nn.utils.parametrizations
from gankern._names import look_up
from gankern.nn.utils import group_spectral_norm


def _layer_by_layer(network: nn.Module) -> nn.Module:
    return network


@dataclass(frozen=True)
class Layers:
    """Constructors with the arguments of their torch namesakes.

    ``spectral_norm(layer)`` normalises a layer's weight. ``group_spectral_norm(network)`` is called once on a
    complete network that has such layers: it may change how they are computed, never what they compute.
    """

    name: str
    conv: Callable[..., nn.Module]
    conv_transpose: Callable[..., nn.Module]
    batch_norm: Callable[..., nn.Module]
    leaky_relu: Callable[..., nn.Module]
    spectral_norm: Callable[[nn.Module], nn.Module]
    group_spectral_norm: Callable[[nn.Module], nn.Module]


TORCH = Layers(
    name="torch",
    conv=nn.Conv2d,
    conv_transpose=nn.ConvTranspose2d,
    batch_norm=nn.BatchNorm2d,
    leaky_relu=nn.LeakyReLU,
    spectral_norm=torch.nn.utils.parametrizations.spectral_norm,
    group_spectral_norm=_layer_by_layer,
)

GANKERN = replace(
    TORCH,
    name="gankern",
    spectral_norm=gankern.nn.utils.parametrizations.spectral_norm,
    group_spectral_norm=group_spectral_norm,  # all layers' weights in one call, once a forward
)

LAYERS = {layers.name: layers for layers in (TORCH, GANKERN)}


def get(name: str) -> Layers:
    """The set of layers of that name; a ValueError with the nearest names if there is none."""
    return look_up(LAYERS, name, "set of layers")
