"""Batch normalisation and a (leaky) ReLU in plain PyTorch: the definition that the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern.reference._norm_act import Affine, moments, normalized, widened


def batch_norm_act(
    x: Tensor,
    weight: Affine,
    bias: Affine,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    negative_slope: float,
    slope: Affine = None,
) -> tuple[Tensor, Tensor]:
    """act((x - mean) / sqrt(var + eps) * weight + bias) of x [N, C, ...], and the statistics [3, C] that it was
    computed with: mean, 1 / sqrt(var + eps), and the variance that running statistics take up.

    While ``training`` mean and var are x's own, of each channel (the variance divides by the number of values; what
    running statistics take up divides by one less); else they are the running ones. weight and bias are [C] or [N, C].
    ``negative_slope`` is that of a leaky ReLU: 1 for no activation, 0 for ReLU. ``slope`` [C] is PReLU's, in its place.
    float16 and bfloat16 are computed in float32.
    """
    values = widened(x)
    if training and x.numel():
        statistics = moments(values, [0, *range(2, x.ndim)], x.numel() // x.shape[1])
    else:
        mean = values.new_zeros(x.shape[1]) if running_mean is None else running_mean.to(values.dtype)
        var = torch.ones_like(mean) if running_var is None else running_var.to(values.dtype)
        statistics = mean, var, var
    return normalized(values, statistics, (weight, bias), eps, negative_slope, slope, x.dtype)
