"""Bias, activation, gain and clamp in plain PyTorch: the definition that the kernels are held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linear": lambda z, slope: z,
    "relu": lambda z, slope: F.relu(z),
    "leaky_relu": F.leaky_relu,
    "tanh": lambda z, slope: torch.tanh(z),
    "sigmoid": lambda z, slope: torch.sigmoid(z),
    "elu": lambda z, slope: F.elu(z),
    "selu": lambda z, slope: F.selu(z),
    # Above torch's own threshold of 20 the result would be z, which in float64 is off by 2e-9.
    "softplus": lambda z, slope: F.softplus(z, threshold=40),
    "silu": lambda z, slope: F.silu(z),
}


def bias_act(
    x: Tensor,
    bias: Tensor | None,
    dim: int,
    activation: str | None,
    negative_slope: float,
    gain: float,
    clamp: float | None,
    slope: Tensor | None = None,
) -> Tensor:
    """y = clamp(act(x + bias) gain, -clamp, clamp), bias along dimension ``dim``.

    ``slope``, [1] or [channels], is that of "prelu". The gradient is 0 where the result is at the clamp. float16 and
    bfloat16 are computed in float32.
    """
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    shape = [-1 if d == dim else 1 for d in range(x.ndim)]
    if bias is not None:
        x = x + bias.to(x.dtype).view(shape)
    if slope is not None:
        y = torch.where(x > 0, x, x * slope.to(x.dtype).view(shape))
    else:
        y = ACTIVATIONS[activation or "linear"](x, negative_slope)
    if gain != 1:
        y = y * gain
    if clamp is not None:
        # In the dtype that the result is stored in: what rounds to the clamp is at the clamp.
        limit, stored = y.new_full((), clamp, dtype=dtype), y.detach().to(dtype)
        y = torch.where(stored >= limit, limit.to(y.dtype), y)
        y = torch.where(stored <= -limit, -limit.to(y.dtype), y)
    return y.to(dtype)
