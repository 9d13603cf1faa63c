"""Modules with torch.nn's names, argument order, defaults and state_dict keys."""

from gankern.nn import utils
from gankern.nn.modules.convolution import (
    Conv2d,
    ConvDownsample2d,
    ConvTranspose2d,
    EqualizedConv2d,
    EqualizedLinear,
    UpsampleConv2d,
)
from gankern.nn.modules.minibatch_discrimination import MinibatchDiscrimination

__all__ = [
    "Conv2d",
    "ConvDownsample2d",
    "ConvTranspose2d",
    "EqualizedConv2d",
    "EqualizedLinear",
    "MinibatchDiscrimination",
    "UpsampleConv2d",
    "utils",
]
