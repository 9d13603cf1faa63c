"""One function a primitive, in torch.nn.functional's conventions: a file a primitive.

Every function takes ``implementation=``: None (what :func:`gankern.use_implementation` or the variable
GANKERN_IMPLEMENTATION says), "auto", "reference", "cpu", "triton" or "cuda".
"""

from gankern.functional.minibatch_discrimination import l1_similarity, minibatch_discrimination
from gankern.functional.minibatch_stddev import minibatch_stddev
from gankern.functional.spectral_norm import (
    SPECTRAL_NORM_DIALECTS,
    SpectralNormDialect,
    spectral_norm,
    spectral_norm_group,
)
from gankern.functional.virtual_batch_norm import virtual_batch_norm, virtual_batch_norm_statistics

__all__ = [
    "SPECTRAL_NORM_DIALECTS",
    "SpectralNormDialect",
    "l1_similarity",
    "minibatch_discrimination",
    "minibatch_stddev",
    "spectral_norm",
    "spectral_norm_group",
    "virtual_batch_norm",
    "virtual_batch_norm_statistics",
]
