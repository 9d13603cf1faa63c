"""Minibatch standard deviation in plain PyTorch: the definition that the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern.reference._eps import plus_eps


def minibatch_stddev(
    x: Tensor, group_size: int, num_channels: int, strided: bool, unbiased: bool, eps: float
) -> Tensor:
    """x [N, C, ...] with ``num_channels`` more channels: for each group of samples and each C / num_channels channels,
    the mean of sqrt(variance over the group + eps).

    ``group_size`` divides N, ``num_channels`` divides C. ``strided``: sample i is in group i mod N / group_size, else
    neighbouring samples make a group. float16 and bfloat16 are computed in float32.
    """
    groups = x.shape[0] // max(group_size, 1)
    y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    # [group_size, groups, num_channels, the rest]
    y = y.reshape(x.shape[0], num_channels, -1)
    y = y.unflatten(0, (group_size, groups) if strided else (groups, group_size))
    y = y if strided else y.transpose(0, 1)
    difference = y - y.mean(0)
    variance = difference.square().sum(0) / (group_size - 1 if unbiased else group_size)
    stddev = plus_eps(variance, eps).sqrt().mean(2)
    per_sample = stddev.repeat(group_size, 1) if strided else stddev.repeat_interleave(group_size, 0)
    per_sample = per_sample.reshape(x.shape[0], num_channels, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return torch.cat([x, per_sample.to(x.dtype)], 1)
