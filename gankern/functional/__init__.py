"""One function a primitive, in torch.nn.functional's conventions: a file a primitive.

Every function takes ``implementation=``: None (what :func:`gankern.use_implementation` or the variable
GANKERN_IMPLEMENTATION says), "auto", "reference", "cpu", "triton" or "cuda".

``import gankern.functional as F`` in place of ``import torch.nn.functional as F``: what gankern has is gankern's, every
other name is torch's own.
"""

from typing import TYPE_CHECKING

import torch.nn.functional

from gankern.core.torch_internals import refuse_scripting
from gankern.core.torch_names import stand_in
from gankern.functional.batch_norm_act import batch_norm_act
from gankern.functional.bias_act import ACTIVATIONS, bias_act, leaky_relu, prelu, relu
from gankern.functional.convolution import conv2d, conv2d_downsample, conv_transpose2d, upsample_conv2d
from gankern.functional.gradient_penalty import gradient_penalty
from gankern.functional.group_norm_act import group_norm_act
from gankern.functional.instance_norm_act import instance_norm_act
from gankern.functional.minibatch_discrimination import l1_similarity, minibatch_discrimination
from gankern.functional.minibatch_stddev import minibatch_stddev
from gankern.functional.pixel_norm import bias_act_pixel_norm, pixel_norm
from gankern.functional.self_attention2d import self_attention2d
from gankern.functional.spectral_norm import (
    SPECTRAL_NORM_DIALECTS,
    SpectralNormDialect,
    spectral_norm,
    spectral_norm_group,
)
from gankern.functional.upfirdn2d import (
    downsample1d,
    downsample2d,
    downsample3d,
    filter1d,
    filter2d,
    filter3d,
    fir_downsample_conv2d,
    fir_upsample_conv2d,
    upfirdn1d,
    upfirdn2d,
    upfirdn3d,
    upsample1d,
    upsample2d,
    upsample3d,
)
from gankern.functional.virtual_batch_norm import virtual_batch_norm, virtual_batch_norm_statistics

if TYPE_CHECKING:  # a name that is above stays gankern's
    from torch.nn.functional import *  # type: ignore[assignment]  # noqa: F403

__all__ = [
    "ACTIVATIONS",
    "SPECTRAL_NORM_DIALECTS",
    "SpectralNormDialect",
    "batch_norm_act",
    "bias_act",
    "bias_act_pixel_norm",
    "conv2d",
    "conv2d_downsample",
    "conv_transpose2d",
    "downsample1d",
    "downsample2d",
    "downsample3d",
    "filter1d",
    "filter2d",
    "filter3d",
    "fir_downsample_conv2d",
    "fir_upsample_conv2d",
    "gradient_penalty",
    "group_norm_act",
    "instance_norm_act",
    "l1_similarity",
    "leaky_relu",
    "minibatch_discrimination",
    "minibatch_stddev",
    "pixel_norm",
    "prelu",
    "relu",
    "self_attention2d",
    "spectral_norm",
    "spectral_norm_group",
    "upfirdn1d",
    "upfirdn2d",
    "upfirdn3d",
    "upsample1d",
    "upsample2d",
    "upsample3d",
    "upsample_conv2d",
    "virtual_batch_norm",
    "virtual_batch_norm_statistics",
]
for _name in __all__:
    if callable(globals()[_name]):
        refuse_scripting(globals()[_name])
if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__, __all__ = stand_in(__name__, torch.nn.functional, __all__)
