"""What normalisations with an activation behind them share."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern.reference._eps import plus_eps

Affine = Tensor | None  # a value of each channel, [C], or of each sample's channels, [N, C]; None: there are none


def widened(x: Tensor) -> Tensor:
    """float16 and bfloat16 are computed in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def along(values: Tensor, x: Tensor) -> Tensor:
    """Of channels [C], or of each sample's channels [N, C], so that it broadcasts with x."""
    values = values if values.ndim == 2 else values.unsqueeze(0)
    return values.reshape(values.shape + (1,) * (x.ndim - 2))


def moments(x: Tensor, over: list[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of the ``count`` values in the dimensions ``over``, and their unbiased variance."""
    mean = x.mean(over)
    squares = (x - along(mean, x)).square().sum(over)
    return mean, squares / count, squares / (count - 1)


def normalized(
    x: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    affine: tuple[Affine, Affine],
    eps: float,
    negative_slope: float,
    slope: Affine,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """act((x - mean) / sqrt(var + eps) * weight + bias) in ``dtype``, and the statistics [3, ...] that it was computed
    with: mean, 1 / sqrt(var + eps), and the variance that running statistics take up."""
    mean, var, kept_var = statistics
    weight, bias = affine
    rstd = plus_eps(var, eps).rsqrt()
    y = (x - along(mean, x)) * along(rstd, x)
    if weight is not None:
        y = y * along(weight, x)
    if bias is not None:
        y = y + along(bias, x)
    if slope is not None:
        y = torch.where(y > 0, y, y * along(slope.to(y.dtype), x))
    elif negative_slope != 1:
        y = y.relu() if negative_slope == 0 else torch.nn.functional.leaky_relu(y, negative_slope)
    return y.to(dtype), torch.stack([mean, rstd, kept_var]).detach()
