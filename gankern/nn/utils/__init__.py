"""torch.nn.utils with gankern's spectral norm: every other name is torch's own."""

from torch.nn import utils as _torch_utils
from torch.nn.utils import *  # noqa: F403

import gankern.nn.utils.parametrizations as parametrizations
from gankern.nn.utils._group import group_spectral_norm
from gankern.nn.utils._spectral_norm import spectral_norm

__all__ = [*_torch_utils.__all__, "group_spectral_norm", "parametrizations", "spectral_norm"]
