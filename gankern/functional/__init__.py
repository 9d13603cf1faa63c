"""One function a primitive, in torch.nn.functional's conventions: a file a primitive.

Every function takes ``implementation=``: None (what :func:`gankern.use_implementation` or the variable
GANKERN_IMPLEMENTATION says), "auto", "reference", "cpu", "triton" or "cuda".
"""

from gankern.functional.batch_norm_act import batch_norm_act
from gankern.functional.minibatch_discrimination import l1_similarity, minibatch_discrimination
from gankern.functional.spectral_norm import (
    SPECTRAL_NORM_DIALECTS,
    SpectralNormDialect,
    spectral_norm,
    spectral_norm_group,
)

__all__ = [
    "SPECTRAL_NORM_DIALECTS",
    "SpectralNormDialect",
    "batch_norm_act",
    "l1_similarity",
    "minibatch_discrimination",
    "spectral_norm",
    "spectral_norm_group",
]
