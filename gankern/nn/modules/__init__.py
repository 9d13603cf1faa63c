"""torch.nn.modules with gankern's, a file a primitive; every other name is torch's own."""

from typing import TYPE_CHECKING

import torch.nn.modules

if TYPE_CHECKING:
    from torch.nn.modules import *  # noqa: F403

from gankern.core.torch_names import former, stand_in, stand_ins
from gankern.nn.modules import batch_norm_act, bias_act, convolution, pixel_norm, upfirdn2d
from gankern.nn.modules.batch_norm_act import BatchNorm2d
from gankern.nn.modules.bias_act import LeakyReLU, PReLU, ReLU
from gankern.nn.modules.convolution import Conv2d, ConvTranspose2d
from gankern.nn.modules.instance_norm_act import InstanceNorm2d

__all__ = ["BatchNorm2d", "Conv2d", "ConvTranspose2d", "InstanceNorm2d", "LeakyReLU", "PReLU", "ReLU"]
stand_ins(__name__, torch.nn.modules, __all__)
former(__name__, "activation", [bias_act.BiasAct, pixel_norm.BiasActPixelNorm, pixel_norm.PixelNorm])
former(__name__, "conditional_batch_norm", [batch_norm_act.ConditionalBatchNorm2d])
former(
    __name__,
    "resampling",
    [convolution.SubpixelConv2d, upfirdn2d.Blur2d, upfirdn2d.FIRDownsample2d, upfirdn2d.FIRUpsample2d],
)
__getattr__, __dir__, __all__ = stand_in(__name__, torch.nn.modules, __all__)
