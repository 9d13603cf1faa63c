"""torch.nn with gankern's modules: torch's names, argument order, defaults and state_dict keys.

``import gankern.nn as nn`` in place of ``import torch.nn as nn``: what gankern has is gankern's, every other name is
torch's own.
"""

from typing import TYPE_CHECKING

import torch.nn

from gankern.core.torch_internals import refuse_scripting
from gankern.core.torch_names import stand_in
from gankern.nn import functional, init, modules, utils
from gankern.nn.modules.batch_norm_act import (
    BatchNorm2d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    ConditionalBatchNorm3d,
    LinearBatchNorm1d,
    LinearBatchNorm2d,
    LinearBatchNorm3d,
)
from gankern.nn.modules.bias_act import BiasAct, LeakyReLU, PReLU, ReLU
from gankern.nn.modules.convolution import (
    Conv2d,
    ConvDownsample2d,
    ConvTranspose2d,
    EqualizedConv1d,
    EqualizedConv2d,
    EqualizedConv3d,
    EqualizedLinear,
    SubpixelConv1d,
    SubpixelConv2d,
    SubpixelConv3d,
    UpsampleConv2d,
)
from gankern.nn.modules.group_norm_act import GroupNormAct
from gankern.nn.modules.instance_norm_act import (
    InstanceNorm2d,
    InstanceNormAct1d,
    InstanceNormAct2d,
    InstanceNormAct3d,
)
from gankern.nn.modules.minibatch_discrimination import MinibatchDiscrimination
from gankern.nn.modules.minibatch_stddev import MinibatchStdDev
from gankern.nn.modules.pixel_norm import BiasActPixelNorm, PixelNorm
from gankern.nn.modules.self_attention2d import SelfAttention2d
from gankern.nn.modules.upfirdn2d import (
    Blur1d,
    Blur2d,
    Blur3d,
    FIRDownsample1d,
    FIRDownsample2d,
    FIRDownsample3d,
    FIRUpsample1d,
    FIRUpsample2d,
    FIRUpsample3d,
)
from gankern.nn.modules.virtual_batch_norm import (
    VirtualBatchNorm1d,
    VirtualBatchNorm2d,
    VirtualBatchNorm3d,
    freeze_reference_batch,
    set_reference_batch,
)

if TYPE_CHECKING:  # a name that is above stays gankern's
    from torch.nn import *  # type: ignore[assignment,no-redef]  # noqa: F403

__all__ = [
    "BatchNorm2d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BiasAct",
    "BiasActPixelNorm",
    "Blur1d",
    "Blur2d",
    "Blur3d",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
    "Conv2d",
    "ConvDownsample2d",
    "ConvTranspose2d",
    "EqualizedConv1d",
    "EqualizedConv2d",
    "EqualizedConv3d",
    "EqualizedLinear",
    "FIRDownsample1d",
    "FIRDownsample2d",
    "FIRDownsample3d",
    "FIRUpsample1d",
    "FIRUpsample2d",
    "FIRUpsample3d",
    "GroupNormAct",
    "InstanceNorm2d",
    "InstanceNormAct1d",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
    "LeakyReLU",
    "LinearBatchNorm1d",
    "LinearBatchNorm2d",
    "LinearBatchNorm3d",
    "MinibatchDiscrimination",
    "MinibatchStdDev",
    "PReLU",
    "PixelNorm",
    "ReLU",
    "SelfAttention2d",
    "SubpixelConv1d",
    "SubpixelConv2d",
    "SubpixelConv3d",
    "UpsampleConv2d",
    "VirtualBatchNorm1d",
    "VirtualBatchNorm2d",
    "VirtualBatchNorm3d",
    "freeze_reference_batch",
    "functional",
    "init",
    "modules",
    "set_reference_batch",
    "utils",
]
for _name in __all__:
    if isinstance(globals()[_name], type):
        refuse_scripting(globals()[_name])
if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__, __all__ = stand_in(
        __name__, torch.nn, __all__, ("attention", "common_types", "grad", "parallel", "parameter")
    )
