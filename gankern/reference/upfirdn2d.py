"""Up, FIR filter, down in plain PyTorch: the definition that the kernels are held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def upfirdn2d(
    x: Tensor,
    filter: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """Four steps on each channel of x [N, C, H, W]: every sample is followed by up - 1 zeros; zeros are added at the
    edges, or samples removed where the padding (left, right, top, bottom) is negative; the filter is convolved with
    that (correlated with ``flip_filter``), where it lies inside; and every down-th sample is kept.

    up and down are (vertical, horizontal); a 1-D filter stands for its outer product with itself. float16 and bfloat16
    are computed in float32. Differentiable to any order, for x and for the filter.
    """
    dtype = x.dtype
    if dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    filter = filter.to(x.dtype)
    n, c, h, w = x.shape

    x = x[:, :, :, None, :, None]
    x = F.pad(x, [0, up[1] - 1, 0, 0, 0, up[0] - 1]).reshape(n, c, h * up[0], w * up[1])
    x = F.pad(x, list(padding))

    taps = filter if flip_filter else filter.flip(list(range(filter.ndim)))  # torch's convolutions are correlations
    kernels = [taps] if taps.ndim == 2 else [taps[:, None], taps[None, :]]
    x = x.reshape(n * c, 1, *x.shape[2:])
    for kernel in kernels:
        x = F.conv2d(x, kernel[None, None])
    x = x.reshape(n, c, *x.shape[2:])[:, :, :: down[0], :: down[1]]
    return (gain * x).to(dtype)
