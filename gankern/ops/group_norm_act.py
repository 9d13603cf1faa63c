"""Operators and gradients of group normalisation with a (leaky) ReLU or PReLU behind it.

It is batch normalisation of N G channels, whose samples are the C / G channels of a group, each with affine values of
its own, and runs as that: by the kernels of csrc/cpu/batch_norm_act.cpp and gankern/triton/batch_norm_act.py, where the
formulas stand. Operators, rule and call: _norm_act.py. ``stats`` is [3, N, G].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gankern.ops._norm_act import NormAct
from gankern.reference.group_norm_act import group_norm_act as reference

NAME = "group_norm_act"


def _plain(options: tuple, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor) -> Tensor:
    """By torch's own group norm, which has no affine values of each sample."""
    _, groups, eps, _ = options
    if all(v is None or v.ndim == 1 for v in (weight, bias)):
        return F.group_norm(x, int(groups), weight, bias, eps)
    y = F.group_norm(x, int(groups), None, None, eps)
    weight, bias = (None if v is None else v.reshape(*v.shape, *(1,) * (x.ndim - 2)) for v in (weight, bias))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


group_norm_act = NormAct(
    NAME, reference, groups=lambda x, groups: (x.shape[0], groups), plain=_plain, own=("int groups",)
)
primitive = group_norm_act.primitive
