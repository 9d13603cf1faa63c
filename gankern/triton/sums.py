"""Sums of the parts that programs of another kernel left, in a fixed order: the small second kernel behind a gradient
of a bias, a slope, or affine values.

Traffic: the parts are read once; they are a small share of what the first kernel read. A program takes CHANNELS
channels and passes over their parts, PARTS at a time. What it takes is the time of its turns, one of memory each: of
many parts a program has few channels, and asks for many parts at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton.launch import ceil_div, launch, sum_dtype

VALUES = 1024  # of a tile
TOGETHER = 32  # channels of a program, where neighbours in memory are channels
MANY = 128  # parts, from which on it has as many values of fewer channels: 32 bytes of each part
FEW = 8
LARGE = 4096  # values of a tile of many parts

# ---- the kernel --------------------------------------------------------------------------------------------


@triton.jit
def _parts_kernel(
    parts,  # [outer, channels, inner]
    out,  # [channels]
    count,  # outer * inner
    channels,
    inner,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([PARTS, CHANNELS], parts.dtype.element_ty)
    for start in range(0, count, PARTS):
        k = start + tl.arange(0, PARTS)
        outer = k // inner
        at = outer.to(tl.int64) * channels * inner + (k - outer * inner)
        inside = (k < count)[:, None] & (c < channels)[None, :]
        total += tl.load(parts + at[:, None] + (c * inner)[None, :], mask=inside, other=0.0)
    tl.store(out + c, tl.sum(total, 0).to(out.dtype.element_ty), mask=c < channels)


# ---- launcher: what other launchers call ---------------------------------------------------------------------


def sum_of_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[channels], of parts [outer, channels, inner]; in parts' dtype until the end. Launches: 1."""
    outer, channels, inner = parts.shape
    out = parts.new_empty(channels, dtype=dtype)
    count = outer * inner
    together = 1 if inner >= TOGETHER else TOGETHER if count < MANY else FEW
    values = VALUES if count * together < LARGE else LARGE
    launch(
        _parts_kernel,
        ceil_div(channels, together),
        parts,
        out,
        count,
        channels,
        inner,
        CHANNELS=together,
        PARTS=values // together,
        num_warps=values // 32 // 8,
    )
    return out


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernel."""
    for outer, inner in ((4, 1), (4, 64), (MANY, 1), (1024, 1), (8, 1024)):
        sum_of_parts(torch.empty(outer, 48, inner, dtype=sum_dtype(dtype), device=device), dtype)
