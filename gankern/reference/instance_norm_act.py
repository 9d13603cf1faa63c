"""Instance normalisation and a (leaky) ReLU in plain PyTorch: the definition that the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern.reference._eps import plus_eps


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
    slope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """act((x - mean) / sqrt(var + eps) * weight + bias) of x [N, C, ...], and the statistics [3, N, C] that it was
    computed with: mean, 1 / sqrt(var + eps), and the variance that running statistics take up.

    mean and var are those of each sample's channel over its positions (the variance divides by their number; what
    running statistics take up divides by one less). weight and bias are [C], or [N, C] for each sample's own.
    ``negative_slope`` is that of a leaky ReLU: 1 for no activation, 0 for ReLU. ``slope`` [C] is PReLU's, in its place.
    float16 and bfloat16 are computed in float32.
    """
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x = x.float()

    def along(values: Tensor) -> Tensor:
        """Of channels, or of each sample's channels, so that it broadcasts with x."""
        values = values if values.ndim == 2 else values.unsqueeze(0)
        return values.reshape(values.shape + (1,) * (x.ndim - 2))

    if x.numel():
        over = list(range(2, x.ndim))
        count = x[0, 0].numel()
        mean = x.mean(over)
        squares = (x - along(mean)).square().sum(over)
        var, kept_var = squares / count, squares / (count - 1)
    else:
        mean = var = kept_var = x.new_zeros(x.shape[:2])
    rstd = plus_eps(var, eps).rsqrt()
    y = (x - along(mean)) * along(rstd)
    if weight is not None:
        y = y * along(weight)
    if bias is not None:
        y = y + along(bias)
    if slope is not None:
        y = torch.where(y > 0, y, y * along(slope.to(y.dtype)))
    elif negative_slope != 1:
        y = y.relu() if negative_slope == 0 else torch.nn.functional.leaky_relu(y, negative_slope)
    return y.to(dtype), torch.stack([mean, rstd, kept_var]).detach()
