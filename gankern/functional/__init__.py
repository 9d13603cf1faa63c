"""One function a primitive, in torch.nn.functional's conventions: a file a primitive.

Every function takes ``implementation=``: None (what :func:`gankern.use_implementation` or the variable
GANKERN_IMPLEMENTATION says), "auto", "reference", "cpu", "triton" or "cuda".
"""

from gankern.functional.minibatch_discrimination import l1_similarity, minibatch_discrimination
from gankern.functional.spectral_norm import (
    SPECTRAL_NORM_DIALECTS,
    SpectralNormDialect,
    spectral_norm,
    spectral_norm_group,
)
from gankern.functional.upfirdn2d import (
    downsample2d,
    filter2d,
    fir_downsample_conv2d,
    fir_upsample_conv2d,
    upfirdn2d,
    upsample2d,
)

__all__ = [
    "SPECTRAL_NORM_DIALECTS",
    "SpectralNormDialect",
    "downsample2d",
    "filter2d",
    "fir_downsample_conv2d",
    "fir_upsample_conv2d",
    "l1_similarity",
    "minibatch_discrimination",
    "spectral_norm",
    "spectral_norm_group",
    "upfirdn2d",
    "upsample2d",
]
