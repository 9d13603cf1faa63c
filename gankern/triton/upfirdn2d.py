"""Up, FIR filter, down on every plane of a batch: zero-insertion, a filter, decimation, in one pass.

Formula, on each of the two axes, where z[i up] = x[i] and z is 0 elsewhere:

    out[o] = gain sum_j taps[j] z[o down + j - start]

Only every up-th tap meets a sample: with s = o down - start, the first one is j = i up - s for the sample
i = ceil(s / up), and each following sample meets the tap `up` after. A separable filter's sums along a row are weighted
once a row: one pass over 2-D neighbourhoods beats two passes through memory.

Split. A program makes a tile of ROWS by COLUMNS outputs of one plane; a plane of channels_last images is one of all
channels, whose columns are samples times channels. So neighbouring lanes read and write neighbouring addresses. Up by
2, a kernel of its own makes two by two outputs a lane, for a quarter of the instructions an output. Not up, and down by
1 or 2, another one makes four outputs a lane, one below the other, which share the sums along the rows that they read:
7 and 10 loads an output of four taps, in place of 16.

Traffic. x is read once from memory, and again from the L1 cache for each tap of its neighbours; the result is written
once. Bound by memory: ceil(taps / up)^2 multiply-adds an output. Sums are in fp32 (fp64 for fp64).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.core.layout import has_whole_pixels
from gankern.triton.launch import Blocks, ceil_div, contiguous, index_type, launch, planned, sum_type

# Rows and columns of a tile; DOUBLING, STRIPS: with kernels of several outputs a lane; WIDE: as many bytes of columns
# in half precision, so that a lane moves 16 of them where channels are neighbours, and what says where and whether is
# made once for twice as many values.
BLOCKS = Blocks(
    "upfirdn2d",
    {"ROWS": 4, "COLUMNS": 128, "num_warps": 4, "DOUBLING": 1, "STRIPS": 0, "WIDE": 0},
    {"ROWS": 4, "COLUMNS": 128, "num_warps": 4, "DOUBLING": 0, "STRIPS": 0, "WIDE": 0},
    {"ROWS": 8, "COLUMNS": 128, "num_warps": 4, "DOUBLING": 0, "STRIPS": 0, "WIDE": 0},
    {"ROWS": 4, "COLUMNS": 256, "num_warps": 4, "DOUBLING": 1, "STRIPS": 0, "WIDE": 0},
    {"ROWS": 8, "COLUMNS": 64, "num_warps": 2, "DOUBLING": 0, "STRIPS": 0, "WIDE": 0},
    {"ROWS": 8, "COLUMNS": 64, "num_warps": 4, "DOUBLING": 1, "STRIPS": 0, "WIDE": 0},
    {"ROWS": 2, "COLUMNS": 256, "num_warps": 4, "DOUBLING": 1, "STRIPS": 0, "WIDE": 0},
    {"ROWS": 16, "COLUMNS": 64, "num_warps": 4, "DOUBLING": 0, "STRIPS": 0, "WIDE": 0},
    {"ROWS": 4, "COLUMNS": 128, "num_warps": 4, "DOUBLING": 1, "STRIPS": 1, "WIDE": 0},
    {"ROWS": 2, "COLUMNS": 256, "num_warps": 4, "DOUBLING": 1, "STRIPS": 1, "WIDE": 0},
    {"ROWS": 2, "COLUMNS": 128, "num_warps": 4, "DOUBLING": 1, "STRIPS": 1, "WIDE": 0},
    {"ROWS": 4, "COLUMNS": 128, "num_warps": 4, "DOUBLING": 1, "STRIPS": 0, "WIDE": 1},
    {"ROWS": 2, "COLUMNS": 128, "num_warps": 4, "DOUBLING": 1, "STRIPS": 1, "WIDE": 1},
)
WRITTEN_TAPS = 12  # of a filter that is written out for lanes of several outputs, at most
STRIP = 4  # outputs of a lane, one below the other

# ---- the kernel --------------------------------------------------------------------------------------------


@triton.jit
def _first(o, start, UP: tl.constexpr, DOWN: tl.constexpr):
    """For outputs o of an axis, the first sample that each reads, and the tap that it meets."""
    s = o * DOWN - start
    # Of numbers that are not negative, which every division rounds alike.
    sample = tl.where(s > 0, (tl.maximum(s, 0) + UP - 1) // UP, -(tl.maximum(-s, 0) // UP))
    return sample, sample * UP - s


@triton.jit
def _line(columns, channels, INDEX: tl.constexpr):
    """Values of a line of pixels."""
    return tl.cast(columns, INDEX) * channels


@triton.jit
def _counted(rows, columns, out_rows, out_columns, start_y, start_x, INDEX: tl.constexpr):
    """Sizes and starts as what all places are counted in."""
    return (
        tl.cast(rows, INDEX), tl.cast(columns, INDEX), tl.cast(out_rows, INDEX), tl.cast(out_columns, INDEX),
        tl.cast(start_y, INDEX), tl.cast(start_x, INDEX),
    )  # fmt: skip


@triton.jit
def _tile(
    lines, width, channels, GROUPED: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The plane of a program's tile, its lines, its first place of a line and all of them; of these the columns, and
    the channels where those lie within a column."""
    tiles_x = tl.cdiv(width, COLUMNS)
    tiles_y = tl.cdiv(lines, ROWS)
    tile = tl.program_id(0)
    plane = (tile // (tiles_x * tiles_y)).to(tl.int64)
    y = tile // tiles_x % tiles_y * ROWS + tl.arange(0, ROWS)
    first = tile % tiles_x * COLUMNS
    e = first + tl.arange(0, COLUMNS)
    if GROUPED:
        column = e // channels
        within = (e % channels).to(INDEX)
    else:
        column = e
        within = tl.zeros([COLUMNS], INDEX)
    return plane, y, first, e, column, within


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
    INDEX: tl.constexpr,  # what elements of a plane, and places between samples, are counted in: 64 bits cost much more
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, out_rows, out_columns, start_y, start_x = _counted(
        rows, columns, out_rows, out_columns, start_y, start_x, INDEX
    )
    width = _line(out_columns, channels, INDEX)
    plane, oy, _, e, ox, within = _tile(out_rows, width, channels, GROUPED, INDEX, ROWS, COLUMNS)
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
        row = iy.to(INDEX) * tl.cast(row_stride, INDEX)
        line = tl.zeros([ROWS, COLUMNS], SUM)
        if SEPARABLE:
            weight_y = tl.load(filter + jy, mask=inside_y, other=0.0).to(SUM)
        for mx in tl.static_range((TAPS_X + UP_X - 1) // UP_X):
            ix = first_x + mx
            jx = tap_x + mx * UP_X
            inside_x = (ix >= 0) & (ix < columns) & (jx < TAPS_X)
            if not FLIP:
                jx = TAPS_X - 1 - jx
            inside = inside_y[:, None] & inside_x[None, :]
            place = row[:, None] + (ix.to(INDEX) * tl.cast(column_stride, INDEX) + within)[None, :]
            value = tl.load(x + place, mask=inside, other=0.0).to(SUM)
            if SEPARABLE:
                weight_x = tl.load(filter + jx, mask=inside_x, other=0.0).to(SUM)
                line += weight_x[None, :] * value
            else:
                weight = tl.load(filter + jy[:, None] * TAPS_X + jx[None, :], mask=inside, other=0.0).to(SUM)
                line += weight * value
        total += weight_y[:, None] * line if SEPARABLE else line

    place = (oy.to(INDEX) * width)[:, None] + e[None, :]
    tl.store(
        out + plane * out_rows * width + place,
        (total * GAIN).to(out.dtype.element_ty),
        mask=(oy < out_rows)[:, None] & (e < width)[None, :],
    )


@triton.jit
def _tap(filter, j: tl.constexpr, TAPS: tl.constexpr, FLIP: tl.constexpr, SUM: tl.constexpr):
    """Tap j, the same for all lanes."""
    at: tl.constexpr = j if FLIP else TAPS - 1 - j
    return tl.load(filter + at).to(SUM)


@triton.jit
def _doubling_kernel(
    x,
    filter,  # [TAPS]
    out,
    channels,
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
    FLIP: tl.constexpr,
    EVEN_Y: tl.constexpr,  # whether start_y is even
    EVEN_X: tl.constexpr,
    TAPS: tl.constexpr,
    GAIN: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A separable filter, up by 2 on both axes. A lane makes two by two outputs, 2 q and 2 q + 1 of each axis, which
    share their samples. With an even start and p = q - start / 2, the first one meets tap 2 m at sample p + m, and the
    second one tap 2 m - 1; with an odd one and p = q - (start - 1) / 2, tap 2 m + 1, and tap 2 m. So taps are the same
    for all lanes, and a sample is loaded once for four outputs."""
    rows, columns, out_rows, out_columns, start_y, start_x = _counted(
        rows, columns, out_rows, out_columns, start_y, start_x, INDEX
    )
    pairs_x = tl.cdiv(out_columns, 2)
    lines = tl.cdiv(out_rows, 2)
    width = _line(pairs_x, channels, INDEX)
    plane, qy, first, _, qx, within = _tile(lines, width, channels, GROUPED, INDEX, ROWS, COLUMNS)
    x += plane // planes_a_batch * batch_stride + plane % planes_a_batch * channel_stride
    py = qy - (start_y if EVEN_Y else start_y - 1) // 2
    px = qx - (start_x if EVEN_X else start_x - 1) // 2
    FIRST_Y: tl.constexpr = 0 if EVEN_Y else 1
    FIRST_X: tl.constexpr = 0 if EVEN_X else 1
    total_00 = tl.zeros([ROWS, COLUMNS], SUM)
    total_01 = tl.zeros([ROWS, COLUMNS], SUM)
    total_10 = tl.zeros([ROWS, COLUMNS], SUM)
    total_11 = tl.zeros([ROWS, COLUMNS], SUM)
    for my in tl.static_range(TAPS // 2 + 1):
        iy = py + my
        inside_y = (iy >= 0) & (iy < rows)
        row = iy.to(INDEX) * tl.cast(row_stride, INDEX)
        line_0 = tl.zeros([ROWS, COLUMNS], SUM)
        line_1 = tl.zeros([ROWS, COLUMNS], SUM)
        for mx in tl.static_range(TAPS // 2 + 1):
            ix = px + mx
            inside = inside_y[:, None] & ((ix >= 0) & (ix < columns))[None, :]
            place = row[:, None] + (ix.to(INDEX) * tl.cast(column_stride, INDEX) + within)[None, :]
            if 2 * mx + FIRST_X < TAPS or (2 * mx + FIRST_X > 0 and 2 * mx + FIRST_X - 1 < TAPS):
                value = tl.load(x + place, mask=inside, other=0.0).to(SUM)
                if 2 * mx + FIRST_X < TAPS:
                    line_0 += _tap(filter, 2 * mx + FIRST_X, TAPS, FLIP, SUM) * value
                if 2 * mx + FIRST_X > 0 and 2 * mx + FIRST_X - 1 < TAPS:
                    line_1 += _tap(filter, 2 * mx + FIRST_X - 1, TAPS, FLIP, SUM) * value
        if 2 * my + FIRST_Y < TAPS:
            tap = _tap(filter, 2 * my + FIRST_Y, TAPS, FLIP, SUM)
            total_00 += tap * line_0
            total_01 += tap * line_1
        if 2 * my + FIRST_Y > 0 and 2 * my + FIRST_Y - 1 < TAPS:
            tap = _tap(filter, 2 * my + FIRST_Y - 1, TAPS, FLIP, SUM)
            total_10 += tap * line_0
            total_11 += tap * line_1

    out += plane * out_rows * out_columns * channels
    if GROUPED:
        for k in tl.static_range(4):
            oy = 2 * qy + k // 2
            ox = 2 * qx + k % 2
            value = total_00 if k == 0 else total_01 if k == 1 else total_10 if k == 2 else total_11
            place = (oy.to(INDEX) * out_columns * channels)[:, None] + (ox.to(INDEX) * channels + within)[None, :]
            inside = (oy < out_rows)[:, None] & (ox < out_columns)[None, :]
            tl.store(out + place, (value * GAIN).to(out.dtype.element_ty), mask=inside)
    else:
        ox = 2 * first + tl.arange(0, 2 * COLUMNS)
        for k in tl.static_range(2):
            oy = 2 * qy + k
            value = tl.interleave(total_00, total_01) if k == 0 else tl.interleave(total_10, total_11)
            place = (oy.to(INDEX) * out_columns)[:, None] + ox[None, :]
            inside = (oy < out_rows)[:, None] & (ox < out_columns)[None, :]
            tl.store(out + place, (value * GAIN).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _met(total, line, filter, j: tl.constexpr, TAPS: tl.constexpr, FLIP: tl.constexpr, SUM: tl.constexpr):
    """A row's sums, weighted by tap j where there is one, and added."""
    if j >= 0 and j < TAPS:
        total += _tap(filter, j, TAPS, FLIP, SUM) * line
    return total


@triton.jit
def _strip_kernel(
    x,
    filter,  # [TAPS]
    out,
    channels,
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
    FLIP: tl.constexpr,
    DOWN_Y: tl.constexpr,
    DOWN_X: tl.constexpr,
    TAPS: tl.constexpr,
    GAIN: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A separable filter, not up. A lane makes outputs 4 q to 4 q + 3 of a column: output k meets the sample
    4 q DOWN - start + m at tap m - k DOWN. Every sample is loaded once for the four, as is its row's sum taken."""
    rows, columns, out_rows, out_columns, start_y, start_x = _counted(
        rows, columns, out_rows, out_columns, start_y, start_x, INDEX
    )
    width = _line(out_columns, channels, INDEX)
    plane, qy, _, e, ox, within = _tile(tl.cdiv(out_rows, 4), width, channels, GROUPED, INDEX, ROWS, COLUMNS)
    x += plane // planes_a_batch * batch_stride + plane % planes_a_batch * channel_stride
    total_0 = tl.zeros([ROWS, COLUMNS], SUM)
    total_1 = tl.zeros([ROWS, COLUMNS], SUM)
    total_2 = tl.zeros([ROWS, COLUMNS], SUM)
    total_3 = tl.zeros([ROWS, COLUMNS], SUM)
    for my in tl.static_range(TAPS + 3 * DOWN_Y):
        iy = qy * (4 * DOWN_Y) - start_y + my
        inside_y = (iy >= 0) & (iy < rows)
        row = iy.to(INDEX) * tl.cast(row_stride, INDEX)
        line = tl.zeros([ROWS, COLUMNS], SUM)
        for mx in tl.static_range(TAPS):
            ix = ox * DOWN_X - start_x + mx
            inside = inside_y[:, None] & ((ix >= 0) & (ix < columns))[None, :]
            place = row[:, None] + (ix.to(INDEX) * tl.cast(column_stride, INDEX) + within)[None, :]
            line += _tap(filter, mx, TAPS, FLIP, SUM) * tl.load(x + place, mask=inside, other=0.0).to(SUM)
        total_0 = _met(total_0, line, filter, my, TAPS, FLIP, SUM)
        total_1 = _met(total_1, line, filter, my - DOWN_Y, TAPS, FLIP, SUM)
        total_2 = _met(total_2, line, filter, my - 2 * DOWN_Y, TAPS, FLIP, SUM)
        total_3 = _met(total_3, line, filter, my - 3 * DOWN_Y, TAPS, FLIP, SUM)

    out += plane * out_rows * width
    for k in tl.static_range(4):
        oy = 4 * qy + k
        value = total_0 if k == 0 else total_1 if k == 1 else total_2 if k == 2 else total_3
        place = (oy.to(INDEX) * width)[:, None] + e[None, :]
        inside = (oy < out_rows)[:, None] & (e < width)[None, :]
        tl.store(out + place, (value * GAIN).to(out.dtype.element_ty), mask=inside)


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
    blocks = dict(BLOCKS(x.device))
    doubling, strips, wide = (blocks.pop(name) for name in ("DOUBLING", "STRIPS", "WIDE"))
    if wide:
        blocks["COLUMNS"] *= max(1, 4 // x.element_size())
    written = filter.ndim == 1 and filter.shape[0] <= WRITTEN_TAPS
    span = 1 + sum((n - 1) * abs(stride) for n, stride in zip((channels, h, w), x.stride()[1:]))
    # Where outputs lie in what is filtered, with zeros between the samples.
    extents = [extent * factor for extent, factor in zip((h, w, *size), (*up, *down))]
    index = index_type(span, size[0] * size[1] * channels, *(extent + max(map(abs, start)) for extent in extents))
    given: tuple[Any, ...] = (x, contiguous(filter), out, channels, planes_a_batch, h, w, *size, *start, *x.stride())
    shared = {"GAIN": gain, "SUM": sum_type(x.dtype), "INDEX": index, **blocks}
    if doubling and written and [*up, *down] == [2, 2, 1, 1]:
        tiles = ceil_div(ceil_div(size[1], 2) * channels, blocks["COLUMNS"])
        launch(
            _doubling_kernel,
            n * planes_a_batch * tiles * ceil_div(ceil_div(size[0], 2), blocks["ROWS"]),
            *given,
            GROUPED=grouped,
            FLIP=flip_filter,
            EVEN_Y=start[0] % 2 == 0,
            EVEN_X=start[1] % 2 == 0,
            TAPS=filter.shape[0],
            **shared,
        )
        return out
    across = ceil_div(size[1] * channels, blocks["COLUMNS"])
    if strips and written and [*up] == [1, 1] and max(down) <= 2:
        launch(
            _strip_kernel,
            n * planes_a_batch * across * ceil_div(ceil_div(size[0], STRIP), blocks["ROWS"]),
            *given,
            GROUPED=grouped,
            FLIP=flip_filter,
            DOWN_Y=down[0],
            DOWN_X=down[1],
            TAPS=filter.shape[0],
            **shared,
        )
        return out
    tiles = across * ceil_div(size[0], blocks["ROWS"])
    launch(
        _upfirdn2d_kernel,
        n * planes_a_batch * tiles,
        *given,
        GROUPED=grouped,
        SEPARABLE=filter.ndim == 1,
        FLIP=flip_filter,
        UP_Y=up[0],
        UP_X=up[1],
        DOWN_Y=down[0],
        DOWN_X=down[1],
        TAPS_Y=filter.shape[0],
        TAPS_X=filter.shape[-1],
        **shared,
    )
    return out


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernel: up, down and same, of four taps; and a filter of two dimensions."""
    x = torch.empty(2, 3, 32, 32, dtype=dtype, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    taps, square = torch.empty(4, device=device), torch.empty(4, 4, device=device)
    forward(x, taps, [2, 2], [1, 1], [2, 2], [64, 64], False, 4.0)
    for variant in BLOCKS.variants if dtype == torch.float32 else BLOCKS.variants[:2]:
        with BLOCKS.use(variant):
            forward(x, taps, [2, 2], [1, 1], [2, 2], [64, 64], False, 4.0)
            forward(last, taps, [2, 2], [1, 1], [1, 1], [64, 64], True, 4.0)
            if variant["STRIPS"]:
                forward(last, taps, [1, 1], [2, 2], [1, 1], [16, 16], False, 1.0)
                forward(x, taps, [1, 1], [1, 1], [2, 2], [33, 33], False, 1.0)
    forward(last, taps, [1, 1], [2, 2], [1, 1], [16, 16], False, 1.0)
    forward(x, taps, [1, 1], [1, 1], [2, 2], [33, 33], False, 1.0)
    forward(last, square, [1, 1], [1, 1], [2, 2], [33, 33], False, 1.0)
