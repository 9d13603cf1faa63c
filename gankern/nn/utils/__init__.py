"""torch.nn.utils with gankern's spectral norm: every other name is torch's own."""

import sys
from typing import TYPE_CHECKING

import torch.nn.utils

import gankern.nn.utils.parametrizations as parametrizations
from gankern.core.torch_names import stand_in
from gankern.nn.utils import _spectral_norm
from gankern.nn.utils._group import group_spectral_norm
from gankern.nn.utils._spectral_norm import spectral_norm

if TYPE_CHECKING:  # a name that is above stays gankern's
    from torch.nn.utils import *  # type: ignore[assignment,no-redef]  # noqa: F403

# As torch's: a module and, in this one, the function.
sys.modules[f"{__name__}.spectral_norm"] = _spectral_norm

__all__ = ["group_spectral_norm", "parametrizations", "spectral_norm"]
__getattr__, __dir__, __all__ = stand_in(
    __name__,
    torch.nn.utils,
    __all__,
    (
        "clip_grad",
        "convert_parameters",
        "fusion",
        "init",
        "memory_format",
        "parametrize",
        "prune",
        "rnn",
        "stateless",
        "weight_norm",
    ),
)
