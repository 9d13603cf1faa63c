"""The memory formats of feature maps [N, C, ...]: what csrc/ops/feature_map.h says, for fake kernels and Triton."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """In which order kernels go through x and lay out what is made of it."""
    if x.is_contiguous() or x.ndim not in (4, 5) or x.shape[1] == 1 or x.stride(1) != 1:
        return torch.contiguous_format
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def empty(x: Tensor, channels: int | None = None) -> Tensor:
    """An uninitialised tensor like x, or with another number of channels."""
    sizes = (x.shape[0], x.shape[1] if channels is None else channels, *x.shape[2:])
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
