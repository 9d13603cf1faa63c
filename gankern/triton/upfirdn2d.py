"""Up, FIR filter, down on every plane of a batch: zero-insertion, a filter, decimation, in one pass.

Formula, on each of the two axes, where z[i up] = x[i] and z is 0 elsewhere:

    out[o] = gain sum_j taps[j] z[o down + j - start]

Only every up-th tap meets a sample: with s = o down - start, the first one is j = i up - s for the sample
i = ceil(s / up), and each following sample meets the tap `up` after. A separable filter's weights are multiplied as
they are needed: one pass over 2-D neighbourhoods beats two passes through memory.

Split. A program makes a tile of ROWS by COLUMNS outputs of one plane; a plane of channels_last images is one of all
channels, whose columns are samples times channels. So neighbouring lanes read and write neighbouring addresses.

Traffic. x is read once from memory, and again from the L1 cache for each tap of its neighbours; the result is written
once. Bound by memory: ceil(taps / up)^2 multiply-adds an output. Sums are in fp32 (fp64 for fp64).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.core.layout import has_whole_pixels
from gankern.triton.launch import Blocks, ceil_div, contiguous, launch, planned, sum_type

BLOCKS = Blocks(  # rows and columns of a tile
    "upfirdn2d",
    {"ROWS": 4, "COLUMNS": 128, "num_warps": 4},
    {"ROWS": 8, "COLUMNS": 128, "num_warps": 4},
    {"ROWS": 4, "COLUMNS": 256, "num_warps": 4},
    {"ROWS": 8, "COLUMNS": 64, "num_warps": 2},
    {"ROWS": 16, "COLUMNS": 64, "num_warps": 4},
)

# ---- the kernel --------------------------------------------------------------------------------------------


@triton.jit
def _first(o, start, UP: tl.constexpr, DOWN: tl.constexpr):
    """For outputs o of an axis, the first sample that each reads, and the tap that it meets."""
    s = o * DOWN - start
    # Of numbers that are not negative, which every division rounds alike.
    sample = tl.where(s > 0, (tl.maximum(s, 0) + UP - 1) // UP, -(tl.maximum(-s, 0) // UP))
    return sample, sample * UP - s


@triton.jit
def _upfirdn2d_kernel(
    x,
    filter,  # [TAPS_Y, TAPS_X], or [TAPS_X] where it is separable
    out,  # [planes][out_rows][out_columns][GROUPED: channels]
    channels,  # of a sample where GROUPED, else 1
    planes_a_batch,
    rows,
    columns,
    out_rows,
    out_columns,
    start_y,
    start_x,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    GROUPED: tl.constexpr,
    SEPARABLE: tl.constexpr,
    FLIP: tl.constexpr,  # correlate
    UP_Y: tl.constexpr,
    UP_X: tl.constexpr,
    DOWN_Y: tl.constexpr,
    DOWN_X: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    GAIN: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    width = out_columns * channels
    tiles_x = tl.cdiv(width, COLUMNS)
    tiles_y = tl.cdiv(out_rows, ROWS)
    tile = tl.program_id(0)
    plane = (tile // (tiles_x * tiles_y)).to(tl.int64)
    oy = tile // tiles_x % tiles_y * ROWS + tl.arange(0, ROWS)
    e = tile % tiles_x * COLUMNS + tl.arange(0, COLUMNS)
    if GROUPED:
        ox = e // channels
        within = (e % channels).to(tl.int64)
    else:
        ox = e
        within = tl.zeros([COLUMNS], tl.int64)
    x += plane // planes_a_batch * batch_stride + plane % planes_a_batch * channel_stride

    first_y, tap_y = _first(oy, start_y, UP_Y, DOWN_Y)
    first_x, tap_x = _first(ox, start_x, UP_X, DOWN_X)
    total = tl.zeros([ROWS, COLUMNS], SUM)
    for my in range((TAPS_Y + UP_Y - 1) // UP_Y):  # not unrolled: filters of many taps
        iy = first_y + my
        jy = tap_y + my * UP_Y
        inside_y = (iy >= 0) & (iy < rows) & (jy < TAPS_Y)
        if not FLIP:
            jy = TAPS_Y - 1 - jy
        row = iy.to(tl.int64) * row_stride
        if SEPARABLE:
            weight_y = tl.load(filter + jy, mask=inside_y, other=0.0).to(SUM)
        for mx in tl.static_range((TAPS_X + UP_X - 1) // UP_X):
            ix = first_x + mx
            jx = tap_x + mx * UP_X
            inside_x = (ix >= 0) & (ix < columns) & (jx < TAPS_X)
            if not FLIP:
                jx = TAPS_X - 1 - jx
            inside = inside_y[:, None] & inside_x[None, :]
            place = row[:, None] + (ix.to(tl.int64) * column_stride + within)[None, :]
            value = tl.load(x + place, mask=inside, other=0.0).to(SUM)
            if SEPARABLE:
                weight_x = tl.load(filter + jx, mask=inside_x, other=0.0).to(SUM)
                total += weight_y[:, None] * weight_x[None, :] * value
            else:
                weight = tl.load(filter + jy[:, None] * TAPS_X + jx[None, :], mask=inside, other=0.0).to(SUM)
                total += weight * value

    place = (plane * out_rows + oy.to(tl.int64))[:, None] * width + e[None, :]
    tl.store(
        out + place,
        (total * GAIN).to(out.dtype.element_ty),
        mask=(oy < out_rows)[:, None] & (e < width)[None, :],
    )


# ---- launcher: what gankern/ops/upfirdn2d.py calls ---------------------------------------------------------


@planned
def forward(
    x: Tensor,
    filter: Tensor,
    up: list[int],
    down: list[int],
    start: list[int],
    size: list[int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """The filtered images; channels_last where x is. Launches: 1."""
    n, c, h, w = x.shape
    grouped = has_whole_pixels(x)
    layout = torch.channels_last if grouped else torch.contiguous_format
    out = torch.empty((n, c, *size), dtype=x.dtype, device=x.device, memory_format=layout)
    if out.numel() == 0:
        return out
    channels, planes_a_batch = (c, 1) if grouped else (1, c)
    blocks = BLOCKS(x.device)
    tiles = ceil_div(size[1] * channels, blocks["COLUMNS"]) * ceil_div(size[0], blocks["ROWS"])
    launch(
        _upfirdn2d_kernel,
        n * planes_a_batch * tiles,
        x,
        contiguous(filter),
        out,
        channels,
        planes_a_batch,
        h,
        w,
        *size,
        *start,
        *x.stride(),
        GROUPED=grouped,
        SEPARABLE=filter.ndim == 1,
        FLIP=flip_filter,
        UP_Y=up[0],
        UP_X=up[1],
        DOWN_Y=down[0],
        DOWN_X=down[1],
        TAPS_Y=filter.shape[0],
        TAPS_X=filter.shape[-1],
        GAIN=gain,
        SUM=sum_type(x.dtype),
        **blocks,
    )
    return out


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernel: up, down and same, of four taps; and a filter of two dimensions."""
    x = torch.empty(2, 3, 32, 32, dtype=dtype, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    taps, square = torch.empty(4, device=device), torch.empty(4, 4, device=device)
    forward(x, taps, [2, 2], [1, 1], [2, 2], [64, 64], False, 4.0)
    forward(last, taps, [1, 1], [2, 2], [1, 1], [16, 16], False, 1.0)
    forward(x, taps, [1, 1], [1, 1], [2, 2], [33, 33], False, 1.0)
    forward(last, square, [1, 1], [1, 1], [2, 2], [33, 33], False, 1.0)
