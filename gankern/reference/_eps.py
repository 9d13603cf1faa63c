"""What is added so that nothing is divided by zero."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL, _SCALE = 1e-6, 2.0**24


def plus_eps(x: Tensor, eps: float) -> Tensor:
    """x + eps. While exporting it is the same sum of numbers that are larger by a power of two: the optimiser that
    torch.onnx.export runs takes a constant of 1e-8 or less for zero and leaves the addition out, and a pixel norm of a
    black pixel would be NaN. (The flag, for torch.compiler.is_exporting() is True in all that torch.compile of torch
    2.11 traces.)"""
    if torch.compiler._is_exporting_flag and 0 < eps < _SMALL:
        return (x * _SCALE + eps * _SCALE) * (1 / _SCALE)
    return x + eps
