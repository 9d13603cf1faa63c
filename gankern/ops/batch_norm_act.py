"""Operators and gradients of batch normalisation with a (leaky) ReLU or PReLU behind it.

Kernels: csrc/cpu/batch_norm_act.cpp and gankern/triton/batch_norm_act.py; the formulas stand there. Operators and rule:
_norm_act.py. ``stats`` is [3, C]. ``training`` means: with x's own statistics.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gankern.ops._norm_act import NormAct, widened
from gankern.reference.batch_norm_act import batch_norm_act as reference

NAME = "batch_norm_act"


def _plain(options: tuple, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor) -> Tensor:
    """By torch's own batch norm, for who stands in its place: its third derivative takes the statistics that it saved
    for constants."""
    _, training, eps, _ = options
    mean, var = (None, None) if training else (stats[0], stats[2])
    return F.batch_norm(x, mean, var, weight, bias, training, 0.0, eps)


_norm = NormAct(NAME, reference, lambda x: x.shape[1:2], _plain, own=("bool training",), running=True)
primitive, ANY_ORDER = _norm.primitive, _norm.any_order


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    negative_slope: float,
    implementation: str | None,
    any_order: bool = False,
    slope: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See :meth:`NormAct.__call__`."""
    running = (None, None) if training else widened(x, running_mean, running_var)
    return _norm(x, (weight, bias, slope), running, (training, eps, negative_slope), implementation, any_order)
