"""How feature maps [N, C, ...] lie in memory, and what kernels accumulate in: every question about it, once.

What csrc/layout.h asks of tensors for the C++ kernels and nodes, these ask for fake kernels, for Triton, and for the
rules of the tangent form. They differ in what they make of gaps, and say so.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """What sums of x's values are kept in: float32, and float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """In which order kernels go through x, gaps or not, and lay out what is made of it. An image of one channel, which
    is both, is contiguous.

    >>> memory_format(torch.zeros(2, 8, 4, 4).to(memory_format=torch.channels_last)[..., :2])
    torch.channels_last
    """
    if x.is_contiguous() or x.ndim not in (4, 5) or x.shape[1] == 1 or x.stride(1) != 1:
        return torch.contiguous_format
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def empty(x: Tensor, channels: int | None = None) -> Tensor:
    """An uninitialised tensor like x, or with another number of channels."""
    sizes = (x.shape[0], x.shape[1] if channels is None else channels, *x.shape[2:])
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def is_dense_channels_last(x: Tensor) -> bool:
    """Whether the memory of x is that of [N, ..., C] without gaps, of any number of dimensions, and not that of
    [N, C, ...] too."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def has_channels_together(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, gaps between pixels or not: what the convolutions' engine reads
    as channels_last. One channel of many that x is a slice of counts too."""
    return x.stride(1) == 1 and not x.is_contiguous()


def lies_in_channels_last(x: Tensor) -> bool:
    """Whether torch takes an image for channels_last, and makes results of it so. Strides decide, also those of
    dimensions of size 1: of a 1x1 kernel nothing else tells."""
    least = 0
    for d in (1, 3, 2, 0):
        size, stride = x.shape[d], x.stride(d)
        if size == 0 or stride < least or (d == 0 and least == x.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return x.stride(1) != 0


def has_whole_pixels(x: Tensor) -> bool:
    """Whether an image's pixels are runs of several channels that do not overlap: what the filters' kernels read as
    channels_last, contiguous or not."""
    return x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) >= x.shape[1]
