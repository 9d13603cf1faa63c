"""Pixelwise feature normalisation in plain PyTorch: the definition that the kernels are held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.reference._bias import plus_bias
from gankern.reference._eps import plus_eps


def pixel_norm(
    x: Tensor, bias: Tensor | None, dim: int, activation: str | None, negative_slope: float, gain: float, eps: float
) -> Tensor:
    """y = a / sqrt(mean(a^2) + eps) with a = act(x + bias) gain and the mean over dimension ``dim``, which bias lies
    along. float16 and bfloat16 are computed in float32.
    """
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    x = plus_bias(x, bias, dim)
    if activation == "relu":
        x = F.relu(x)
    elif activation == "leaky_relu":
        x = F.leaky_relu(x, negative_slope)
    if gain != 1:
        x = x * gain
    return (x * torch.rsqrt(plus_eps(x.square().mean(dim, keepdim=True), eps))).to(dtype)
