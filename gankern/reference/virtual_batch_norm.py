"""Virtual batch norm in plain PyTorch: the definition that the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern.reference._eps import plus_eps


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (x.ndim - 2))


def virtual_batch_norm(
    x: Tensor,
    ref_mean: Tensor,
    ref_mean_square: Tensor,
    own_share: float | Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
) -> Tensor:
    """x [N, C, ...] normalised with the statistics of a reference batch [C] and, for the part ``own_share``, of each
    example itself; then a leaky ReLU of slope ``negative_slope`` (1: none, 0: ReLU).

    The definition's s - mu^2 with mu = c a + (1 - c) m and s = c (v + a^2) + (1 - c) s_r, for an example's own mean a
    and variance v, is c v + (1 - c) (s_r - m^2) + c (1 - c) (a - m)^2, where only the reference's part can cancel: the
    statistics and what is computed of them are float64.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    pixels = tuple(range(2, x.ndim))
    c = own_share
    m, s = ref_mean.double(), ref_mean_square.double()
    variance = (s - m * m).clamp_min(0)
    mean, variance = _channels(m, x), (1 - c) * _channels(variance, x)
    if isinstance(c, Tensor) or c:
        own_mean = wide.mean(pixels, keepdim=True, dtype=torch.float64) if pixels else wide.double()
        own_variance = (wide - own_mean.to(wide.dtype)).double().square()
        own_variance = own_variance.mean(pixels, keepdim=True) if pixels else own_variance
        variance = variance + c * own_variance + c * (1 - c) * (own_mean - mean).square()
        mean = c * own_mean + (1 - c) * mean
    # In two steps: what the mean loses in x's precision is subtracted from the difference, which is small.
    coarse = mean.detach().to(wide.dtype)
    y = (wide - coarse) - (mean - coarse).to(wide.dtype)
    y = y * plus_eps(variance, eps).rsqrt().to(wide.dtype)
    if weight is not None:
        y = y * _channels(weight.to(wide.dtype), x)
    if bias is not None:
        y = y + _channels(bias.to(wide.dtype), x)
    if negative_slope == 0:
        y = torch.relu(y)
    elif negative_slope != 1:
        y = torch.nn.functional.leaky_relu(y, negative_slope)
    return y.to(x.dtype)


def virtual_batch_norm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the mean of squares of x [N, C, ...] for each channel, in float64."""
    wide = x.double().transpose(0, 1).flatten(1)
    return wide.mean(1), wide.square().mean(1)
