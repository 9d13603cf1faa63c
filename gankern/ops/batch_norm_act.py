"""Operators and gradients of batch normalisation with a (leaky) ReLU or PReLU behind it.

Kernels: csrc/cpu/batch_norm_act.cpp and gankern/triton/batch_norm_act.py; the formulas stand there. In training also
csrc/cuda/batch_norm_act.cu, for maps of which the next pass finds nothing in a cache. Operators, rule and call:
_norm_act.py. ``stats`` is [3, C]; ``training`` means: with x's own statistics.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from gankern.core.layout import is_dense_channels_last
from gankern.ops._norm_act import NormAct
from gankern.reference.batch_norm_act import batch_norm_act as reference

NAME = "batch_norm_act"


def _plain(options: tuple, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor) -> Tensor:
    """By torch's own batch norm, for who stands in its place: its third derivative takes the statistics that it saved
    for constants."""
    _, training, eps, _ = options
    mean, var = (None, None) if training else (stats[0], stats[2])
    return F.batch_norm(x, mean, var, weight, bias, training, 0.0, eps)


def _beyond_cuda(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    training: bool,
    eps: float,
    negative_slope: float,
) -> str | None:
    """Why the kernels in CUDA C++ do not take these; None where they do."""
    if not training:
        return "is for training"
    if slope is not None:
        return "has no slopes of PReLU"
    if any(v is not None and v.ndim == 2 for v in (weight, bias)):
        return "takes weight and bias of [C], got [N, C]"
    last = is_dense_channels_last(x) and not x.is_contiguous()
    together = x.shape[1] if last else math.prod(x.shape[2:])
    if together * x.element_size() % 16:
        what = "channels of a pixel in channels_last" if last else "values of a plane"
        return f"takes multiples of 16 bytes, got {together} {what}"
    return None


batch_norm_act = NormAct(
    NAME,
    reference,
    groups=lambda x, training: x.shape[1:2],
    plain=_plain,
    own=("bool training",),
    running=True,
    beyond_cuda=_beyond_cuda,
)
primitive = batch_norm_act.primitive
