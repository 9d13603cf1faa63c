"""The 4x4 kernel that a 3x3 convolution and the resampling beside it collapse into, and its gradient, in one kernel.

Formula, of one dimension, for taps w0 w1 w2 and zeros around them (gankern/ops/convolution.py has it in plain PyTorch):

    grow    a_i = w_i + w_(i-1), i = 0 .. 3        the taps of "downsample" after a mean of two, and divided by 2
    shrink  w_i = g_(i+1) + g_i, i = 0 .. 2        its transpose
    "upsample": the transposed convolution's, with taps back to front and the channels exchanged, and not divided

A weight is small, so a launch costs more than its work: this is one where torch's operations are three or four. The
result lies as torch's convolutions want it, contiguous or in channels_last, whatever the strides of what is read. A
program has BLOCK neighbours in the result's memory. Traffic: 9 values read a 16 written, or the other way round; each
is read up to four times, all but once from the cache. Summed in fp32 (fp64 for fp64), rows and then columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.core.layout import lies_in_channels_last
from gankern.triton.launch import ceil_div, index_type, launch, planned, sum_type

BLOCK = 512

# ---- the kernel --------------------------------------------------------------------------------------------


@triton.jit
def _window_sums_kernel(
    x,  # [first, second, taps, taps], by its strides
    out,  # the result, densely
    count,  # of its values
    channels,  # its second dimension
    of_first,
    of_second,
    of_rows,
    of_columns,
    TAPS: tl.constexpr,  # of the result
    GROW: tl.constexpr,
    UP: tl.constexpr,
    LAST: tl.constexpr,  # whether the result is in channels_last
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    OF_X: tl.constexpr = TAPS - 1 if GROW else TAPS + 1
    n = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    if LAST:
        c = n % channels
        tap = n // channels % (TAPS * TAPS)
        k = n // channels // (TAPS * TAPS)
    else:
        tap = n % (TAPS * TAPS)
        k = n // (TAPS * TAPS)
        c = k % channels
        k = k // channels
    row, column = tap // TAPS, tap % TAPS
    # The further one of each two neighbours.
    if UP:
        row, column = 3 - row, 3 - column
        at = c * of_first + k * of_second
    else:
        at = k * of_first + c * of_second
        if not GROW:
            row, column = row + 1, column + 1
    total = tl.zeros([BLOCK], SUM)
    for right in tl.static_range(2):
        j = column - right
        of_column = tl.zeros([BLOCK], SUM)
        for below in tl.static_range(2):
            i = row - below
            inside = (n < count) & (i >= 0) & (i < OF_X) & (j >= 0) & (j < OF_X)
            of_column += tl.load(x + at + i * of_rows + j * of_columns, mask=inside, other=0.0).to(SUM)
        total += of_column
    if not UP:
        total *= 0.25
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < count)


# ---- launcher: what the operator runs ---------------------------------------------------------------------------


@planned
def window_sums(x: Tensor, up: bool, grow: bool) -> Tensor:
    """The collapsed kernel of a weight (``grow``), or the weight's gradient of that kernel's. Launches: 1."""
    first, second, taps, _ = x.shape
    taps += 1 if grow else -1
    if up:
        first, second = second, first
    last = lies_in_channels_last(x)
    memory_format = torch.channels_last if last else torch.contiguous_format
    out = torch.empty((first, second, taps, taps), dtype=x.dtype, device=x.device, memory_format=memory_format)
    count = out.numel()
    if count == 0:
        return out
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    launch(
        _window_sums_kernel,
        ceil_div(count, BLOCK),
        x,
        out,
        count,
        second,
        *x.stride(),
        TAPS=taps,
        GROW=grow,
        UP=up,
        LAST=last,
        SUM=sum_type(x.dtype),
        INDEX=index_type(count, reach),
        BLOCK=BLOCK,
        num_warps=4,
    )
    return out


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernel."""
    for taps, grow in ((3, True), (4, False)):
        weight: Any = torch.empty(48, 32, taps, taps, dtype=dtype, device=device)
        for x in (weight, weight.contiguous(memory_format=torch.channels_last), weight.transpose(0, 1)):
            for up in (False, True):
                window_sums(x, up, grow)
