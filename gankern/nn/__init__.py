"""Modules with torch.nn's names, argument order, defaults and state_dict keys."""

from gankern.nn import init, utils
from gankern.nn.modules.minibatch_discrimination import MinibatchDiscrimination
from gankern.nn.modules.resampling import Blur2d, FIRDownsample2d, FIRUpsample2d, SubpixelConv2d

__all__ = [
    "Blur2d",
    "FIRDownsample2d",
    "FIRUpsample2d",
    "MinibatchDiscrimination",
    "SubpixelConv2d",
    "init",
    "utils",
]
