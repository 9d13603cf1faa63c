"""Operators and gradients of batch normalisation with a (leaky) ReLU or PReLU behind it.

Kernels: csrc/cpu/batch_norm_act.cpp and gankern/triton/batch_norm_act.py; the formulas stand there. Operators, rule
and call: _norm_act.py. ``stats`` is [3, C]; ``training`` means: with x's own statistics.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gankern.ops._norm_act import NormAct
from gankern.reference.batch_norm_act import batch_norm_act as reference

NAME = "batch_norm_act"


def _plain(options: tuple, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor) -> Tensor:
    """By torch's own batch norm, for who stands in its place: its third derivative takes the statistics that it saved
    for constants."""
    _, training, eps, _ = options
    mean, var = (None, None) if training else (stats[0], stats[2])
    return F.batch_norm(x, mean, var, weight, bias, training, 0.0, eps)


batch_norm_act = NormAct(
    NAME, reference, groups=lambda x, training: x.shape[1:2], plain=_plain, own=("bool training",), running=True
)
primitive = batch_norm_act.primitive
