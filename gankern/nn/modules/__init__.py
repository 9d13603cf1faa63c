"""torch.nn.modules with gankern's, a file a family; every other name is torch's own."""

from typing import TYPE_CHECKING

import torch.nn.modules

if TYPE_CHECKING:
    from torch.nn.modules import *  # noqa: F403

from gankern.core.torch_names import stand_in, stand_ins
from gankern.nn.modules.activation import LeakyReLU, ReLU
from gankern.nn.modules.batch_norm_act import BatchNorm2d
from gankern.nn.modules.convolution import Conv2d, ConvTranspose2d

__all__ = ["BatchNorm2d", "Conv2d", "ConvTranspose2d", "LeakyReLU", "ReLU"]
stand_ins(__name__, torch.nn.modules, __all__)
__getattr__, __dir__, __all__ = stand_in(__name__, torch.nn.modules, __all__)
