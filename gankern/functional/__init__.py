"""One function a primitive, in torch.nn.functional's conventions: a file a primitive.

Every function takes ``implementation=``: None (what :func:`gankern.use_implementation` or the variable
GANKERN_IMPLEMENTATION says), "auto", "reference", "cpu", "triton" or "cuda".
"""

from gankern.functional.convolution import conv2d, conv2d_downsample, conv_transpose2d, upsample_conv2d
from gankern.functional.gradient_penalty import gradient_penalty
from gankern.functional.interpolate_samples import interpolate_samples
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
    "conv2d",
    "conv2d_downsample",
    "conv_transpose2d",
    "gradient_penalty",
    "interpolate_samples",
    "l1_similarity",
    "minibatch_discrimination",
    "spectral_norm",
    "spectral_norm_group",
    "upsample_conv2d",
]
