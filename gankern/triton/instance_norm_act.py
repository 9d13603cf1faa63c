"""Instance normalisation and a (leaky) ReLU: group normalisation of as many groups as channels
(gankern/triton/group_norm_act.py). ``stats`` is [3, N, C]."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from gankern.triton import group_norm_act
from gankern.triton.launch import planned, sum_dtype


def _of_each(launcher: Callable[..., Any], x: int, groups: int) -> Callable[..., Any]:
    """The launcher without its number of groups, at ``groups``: as many as argument ``x`` has channels."""

    @planned
    @functools.wraps(launcher)
    def launch(*arguments: Any) -> Any:
        return launcher(*arguments[:groups], arguments[x].shape[1], *arguments[groups:])

    return launch


forward = _of_each(group_norm_act.forward, x=0, groups=3)
backward = _of_each(group_norm_act.backward, x=1, groups=5)
double_backward = _of_each(group_norm_act.double_backward, x=4, groups=8)


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels: a channel has two ranges, or one, or programs take turns."""
    vector = torch.empty(32, dtype=sum_dtype(dtype), device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(4, 32, 192, 192, dtype=dtype, device=device).contiguous(memory_format=layout)
        options = 0.2, True
        y, stats = forward(x, vector, vector, 1e-5, 0.2)
        backward(y, x, vector, vector, stats, *options)
        forward(x, vector, vector, 1e-5, 0.0, vector)
        backward(y, x, vector, vector, stats, *options, vector)
        double_backward(y, vector, vector, y, x, vector, vector, stats, *options)
        x = torch.empty(4, 32, 16, 16, dtype=dtype, device=device).contiguous(memory_format=layout)
        y, stats = forward(x, vector, vector, 1e-5, 0.2)
        backward(y, x, vector, vector, stats, *options)
        x = torch.empty(64, 256, 64, 64, dtype=dtype, device=device, memory_format=layout)
        affine = vector.new_empty(x.shape[1])
        y, stats = forward(x, affine, affine, 1e-5, 0.2)
        backward(y, x, affine, affine, stats, 0.2, True)
