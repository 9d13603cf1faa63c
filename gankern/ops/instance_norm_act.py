"""Operators and gradients of instance normalisation with a (leaky) ReLU or PReLU behind it.

It is batch normalisation of one sample that has N C channels, and runs as that: by the kernels of
csrc/cpu/batch_norm_act.cpp and gankern/triton/batch_norm_act.py, where the formulas stand. Operators, rule and
call: _norm_act.py. ``stats`` is [3, N, C].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gankern.ops._norm_act import NormAct
from gankern.reference.instance_norm_act import instance_norm_act as reference

NAME = "instance_norm_act"


def _plain(options: tuple, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor) -> Tensor:
    """By torch's own instance norm: see batch_norm_act's."""
    return F.instance_norm(x, None, None, weight, bias, True, 0.0, options[1])


instance_norm_act = NormAct(NAME, reference, groups=lambda x: x.shape[:2], plain=_plain)
primitive = instance_norm_act.primitive
