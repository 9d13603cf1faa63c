"""Modules with torch.nn's names, argument order, defaults and state_dict keys."""

from gankern.nn import utils
from gankern.nn.modules.activation import BiasAct, BiasActPixelNorm, LeakyReLU, PixelNorm, ReLU
from gankern.nn.modules.convolution import (
    Conv2d,
    ConvDownsample2d,
    ConvTranspose2d,
    EqualizedConv2d,
    EqualizedLinear,
    UpsampleConv2d,
)
from gankern.nn.modules.minibatch_discrimination import MinibatchDiscrimination
from gankern.nn.modules.minibatch_stddev import MinibatchStdDev
from gankern.nn.modules.virtual_batch_norm import (
    VirtualBatchNorm1d,
    VirtualBatchNorm2d,
    VirtualBatchNorm3d,
    freeze_reference_batch,
    set_reference_batch,
)

__all__ = [
    "BiasAct",
    "BiasActPixelNorm",
    "Conv2d",
    "ConvDownsample2d",
    "ConvTranspose2d",
    "EqualizedConv2d",
    "EqualizedLinear",
    "LeakyReLU",
    "MinibatchDiscrimination",
    "MinibatchStdDev",
    "PixelNorm",
    "ReLU",
    "UpsampleConv2d",
    "VirtualBatchNorm1d",
    "VirtualBatchNorm2d",
    "VirtualBatchNorm3d",
    "freeze_reference_batch",
    "set_reference_batch",
    "utils",
]
