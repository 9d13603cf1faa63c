"""Batch normalisation and a (leaky) ReLU or PReLU, each order in two sweeps over memory.

Formulas: csrc/cpu/batch_norm_act.cpp. With w = x - mean, every order is sums over each channel (of x and its squares;
of g' and g' w; of these, h, h w and g' h), terms that follow from the sums, and results that are sums of products of
what was read with coefficients made of the terms and of the affine values.

Split. A program takes some channels and a range of their values: BLOCK_M by BLOCK_C of them at a time, one channel
where a channel's values are neighbours, 32 where channels are (channels_last). Where affine values are each sample's
own, no range holds values of two samples. Sums of ranges go to memory, [groups, splits, sums, C], and one program a
block of channels adds them up in a fixed order; the split depends on the shape alone. Where a channel has one range,
its program does all three in one launch. A variant does it for large maps too: programs sum up ranges of some channels
while others make the values of those that were summed up before (`_together_kernel`); who does what is a matter of
tickets, and no sum's order depends on it.

Traffic. Forward reads x twice and writes y; backward reads x and g twice and writes dx; double backward reads x, g and
h twice and writes two. In one launch the second time is from a cache: as much from memory as each order has operands.
The second time all goes backwards, programs and what each of them reads: what was read last is in the caches still.
Bound by memory. Sums are in fp32 (fp64 for fp64), sums of sums in fp64; sums of squares are taken about the mean of a
range's first values.

Of group normalisation the channels are those of all samples, as of instance normalisation, and a statistic is that of
`members` neighbouring ones: their sums are added up where those of ranges are. Of large maps a program does one block
of whole statistics after the other, and as many programs run at once as have room in the second-level cache for what
they read twice (`in_turn`); where neighbours are channels a block is 32 bytes of them, all that memory gives at once.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton.launch import (
    Blocks,
    ceil_div,
    contiguous,
    index_type,
    laid_out_as,
    launch,
    next_power_of_2,
    planned,
    sum_dtype,
    sum_type,
)
from gankern.triton.sums import sum_of_parts

WARPS = 4
BLOCKS = Blocks(
    # Values of a tile; in channels_last how many of them are neighbouring channels; DEEP: tiles that are added up at a
    # time; AHEAD: megabytes that are summed up before values of the first ones are made, by one launch, 0 for a launch
    # of each.
    "batch_norm_act",
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 2, "num_warps": 4, "AHEAD": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 4, "num_warps": 4, "AHEAD": 0},
    {"TILE": 1024, "CHANNELS": 64, "DEEP": 2, "num_warps": 4, "AHEAD": 0},
    {"TILE": 1024, "CHANNELS": 16, "DEEP": 1, "num_warps": 4, "AHEAD": 0},
    {"TILE": 2048, "CHANNELS": 32, "DEEP": 1, "num_warps": 8, "AHEAD": 0},
    {"TILE": 2048, "CHANNELS": 64, "DEEP": 1, "num_warps": 8, "AHEAD": 0},
    {"TILE": 4096, "CHANNELS": 64, "DEEP": 1, "num_warps": 8, "AHEAD": 0},
    {"TILE": 2048, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 8},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 16},
    {"TILE": 2048, "CHANNELS": 32, "DEEP": 1, "num_warps": 8, "AHEAD": 8},
    {"TILE": 2048, "CHANNELS": 32, "DEEP": 1, "num_warps": 8, "AHEAD": 16},
)
# Of instance and group normalisation. AT_ONCE: megabytes that all programs together read twice at a time, where they
# take turns; 0 for launches as above.
TURNS = (
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0, "AT_ONCE": 48},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0, "AT_ONCE": 32},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0, "AT_ONCE": 96},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 0, "AT_ONCE": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 2, "num_warps": 4, "AHEAD": 0, "AT_ONCE": 0},
    {"TILE": 2048, "CHANNELS": 32, "DEEP": 1, "num_warps": 8, "AHEAD": 0, "AT_ONCE": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 8, "AT_ONCE": 0},
    {"TILE": 1024, "CHANNELS": 32, "DEEP": 1, "num_warps": 4, "AHEAD": 16, "AT_ONCE": 0},
)
INSTANCES, GROUPS = Blocks("instance_norm_act", *TURNS), Blocks("group_norm_act", *TURNS)
WHOLE_WARPS, WHOLE_DEEP = 8, 4  # of programs that take turns, whose lanes ask for so many 16 bytes of a map at once
ROW = 32  # bytes of channels of a program's block of whole statistics, at least
MOST = 64  # channels of such a block
FEWEST = 128  # programs that fill a GPU with such tiles
LARGE = 2**26  # bytes of a map of which the next operation finds nothing in a cache
SETTLED = 32  # channels of a program that adds up
PARTS = 8  # of each of them at a time
MANY = 32  # parts, beyond which it has a quarter of the channels, and 16 times the parts at a time: a turn for them all
WHOLE_PARTS, WOVEN_PARTS = 1, 512  # the same, of one range a channel, and of a unit's channels together
VALUES = 16  # blocks of a range, at least, where there are programs enough
PROGRAMS = 1024  # enough for every GPU
MEGABYTE = 2**20
SHORT = 4  # blocks of a range where sums and values are woven: many programs hold their ranges in the cache at once
SUMS = {"backward": 2, "double_backward": 5}
TERMS = 5  # of a channel

Affine = Tensor | None  # a value of each channel, [C], or of each sample's channels, [N, C]; None: there are none

# ---- kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _gate(z, v, SLOPE: tl.constexpr):
    """v where z > 0, SLOPE * v elsewhere; with slope 0, v where z is NaN too, and plain 0 elsewhere."""
    if SLOPE == 1:
        return v
    if SLOPE == 0:
        return tl.where(z <= 0, 0.0, v)
    return tl.where(z > 0, v, v * SLOPE)


@triton.jit
def _activate(z, v, slopes, c, mask, SLOPE: tl.constexpr):
    """:func:`_gate`, by PReLU's slope of each channel where there are such."""
    if slopes is None:
        result = _gate(z, v, SLOPE)
    else:  # what follows a return is compiled, too
        result = tl.where(z > 0, v, v * tl.load(slopes + c, mask=mask, other=1.0)[None, :])
    return result


@triton.jit
def _affine(vector, at, mask, otherwise: tl.constexpr, DTYPE: tl.constexpr):
    """An affine value of each channel, or a constant where there is no vector."""
    if vector is None:
        value = tl.zeros_like(at).to(DTYPE) + otherwise
    else:
        value = tl.load(vector + at, mask=mask, other=0.0).to(DTYPE)
    return value


@triton.jit
def _channels(number, channels, BLOCK_C: tl.constexpr):
    """A program's channels, and the number of its range, group times splits."""
    blocks = tl.cdiv(channels, BLOCK_C)
    return number % blocks * BLOCK_C + tl.arange(0, BLOCK_C), number // blocks


@triton.jit
def _offsets(m, c, inner, plane, LAST: tl.constexpr, INDEX: tl.constexpr):
    """Where value m (of samples times plane) of channel c is. Of more channels than the ``inner`` ones of a position,
    those behind are of an instance of its own, which has one sample."""
    if LAST:
        behind = (c // inner).to(INDEX) * inner * plane + c % inner
        return m[:, None] * inner + behind[None, :]
    n = m // plane
    return (n * inner * plane + (m - n * plane))[:, None] + (c.to(INDEX) * plane)[None, :]


@triton.jit
def _load(x, offsets, mask, SUM: tl.constexpr, LAST_USE: tl.constexpr = False):
    if LAST_USE:
        return tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(SUM)
    return tl.load(x + offsets, mask=mask, other=0.0).to(SUM)


@triton.jit
def _store(out, offsets, values, mask, LAST_USE: tl.constexpr):
    if LAST_USE:
        tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    else:
        tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _moments(
    x, partial, c, split, channels, inner, plane, count, chunk,
    LAST: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    """Number, mean and squares about it of a range of channels c."""
    begin = split.to(INDEX) * chunk
    end = tl.minimum(begin + chunk, count)
    inside_c = (c < channels)[None, :]

    m = begin + tl.arange(0, BLOCK_M)
    inside = (m < end)[:, None] & inside_c
    first = _load(x, _offsets(m, c, inner, plane, LAST, INDEX), inside, SUM)
    about = tl.sum(first, 0) / tl.minimum(end - begin, BLOCK_M).to(SUM)
    # Once more: the first sum rounds by its size, this one by that of the differences.
    about += tl.sum(tl.where(inside, first - about[None, :], 0.0), 0) / tl.minimum(end - begin, BLOCK_M).to(SUM)

    sums = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    squares = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    for start in range(0, chunk, BLOCK_M * DEEP):
        for tile in tl.static_range(DEEP):
            m = begin + start + tile * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = (m < end)[:, None] & inside_c
            d = _load(x, _offsets(m, c, inner, plane, LAST, INDEX), inside, SUM)
            d = tl.where(inside, d - about[None, :], 0.0)
            sums += d
            squares += d * d
    n = (end - begin).to(tl.float64)
    total = tl.sum(sums, 0).to(tl.float64)
    to = partial + split.to(tl.int64) * 3 * channels + c
    tl.store(to, tl.zeros([BLOCK_C], tl.float64) + n, mask=c < channels)
    tl.store(to + channels, about.to(tl.float64) + total / n, mask=c < channels)
    tl.store(to + 2 * channels, tl.sum(squares, 0).to(tl.float64) - total * (total / n), mask=c < channels)


@triton.jit
def _moments_kernel(
    x,
    partial,  # [splits, 3, C]: number, mean and squares about it
    channels,
    inner,
    plane,
    count,  # values of a channel
    chunk,  # values of a range
    LAST: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,  # what values are counted in: a division of 64 bits costs more than all else
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEEP: tl.constexpr,  # blocks that are added up at a time
):
    c, split = _channels(tl.program_id(0), channels, BLOCK_C)
    _moments(x, partial, c, split, channels, inner, plane, count, chunk, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP)


@triton.jit
def _settle_moments(
    partial, stats, s, channels, members, splits,
    EPS: tl.constexpr, PARTS: tl.constexpr, STATISTICS: tl.constexpr, ALIKE: tl.constexpr = False,
):  # fmt: skip
    """Statistics s of the parts of their channels, PARTS at a time: each part's values are about its own mean. ALIKE:
    the parts of a statistic are PARTS, of as many values each."""
    statistics = channels // members
    mask = s < statistics
    count = tl.zeros([STATISTICS], tl.float64)
    mean = tl.zeros([STATISTICS], tl.float64)
    squares = tl.zeros([STATISTICS], tl.float64)
    for start in range(0, splits * members, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < splits * members)[:, None] & mask[None, :]
        split = part // members
        at = (split.to(tl.int64) * 3 * channels + (part - split * members))[:, None] + (s * members)[None, :]
        n = tl.load(partial + at, mask=inside, other=0.0)
        own = tl.load(partial + channels + at, mask=inside, other=0.0)
        within = tl.load(partial + 2 * channels + at, mask=inside, other=0.0)
        more = tl.sum(n, 0)
        middle = tl.sum(own, 0) * (1.0 / PARTS) if ALIKE else tl.sum(n * own, 0) / tl.where(more == 0, 1.0, more)
        apart = own - middle[None, :]
        within = tl.sum(tl.where(within < 0, 0.0, within) + n * apart * apart, 0)
        if ALIKE:
            squares, mean, count = within, middle, more
        else:
            apart = middle - mean
            share = more / tl.where(more == 0, 1.0, count + more)
            squares += within + apart * apart * (count * share)
            mean += apart * share
            count += more
    kind = stats.dtype.element_ty
    tl.store(stats + s, mean.to(kind), mask=mask)
    tl.store(stats + statistics + s, (1.0 / tl.sqrt(squares / count + EPS)).to(kind), mask=mask)
    tl.store(stats + 2 * statistics + s, (squares / (count - 1.0)).to(kind), mask=mask)


@triton.jit
def _settle_moments_kernel(
    partial,
    stats,  # [3, C / members]: mean, 1 / sqrt(var + EPS), unbiased var
    channels,
    members,  # channels of a statistic
    splits,
    EPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    _settle_moments(partial, stats, s, channels, members, splits, EPS, PARTS, BLOCK_C)


@triton.jit
def _evaluation_kernel(mean, var, stats, channels, EPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The statistics [3, C] of given mean and var."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    kind = stats.dtype.element_ty
    v = tl.load(var + c, mask=mask, other=1.0).to(kind)
    tl.store(stats + c, tl.load(mean + c, mask=mask, other=0.0).to(kind), mask=mask)
    r = 1.0 / tl.sqrt(v.to(tl.float64) + tl.full([1], EPS, tl.float64))
    tl.store(stats + channels + c, r.to(kind), mask=mask)
    tl.store(stats + 2 * channels + c, v, mask=mask)


@triton.jit
def _reduce(
    x, grad, h, weight, bias, slopes, stats, partial, c, at, channels, inner, period, members, plane, group, splits,
    chunk, ORDER: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """The sums of range ``at`` of channels c."""
    mask = c < channels
    own = at.to(INDEX) // splits
    start = (at % splits).to(INDEX) * chunk
    begin = own * group + start
    end = own * group + tl.minimum(start + chunk, group)
    statistic = c // members
    mean = tl.load(stats + statistic, mask=mask, other=0.0)[None, :]
    k = tl.load(stats + channels // members + statistic, mask=mask, other=0.0)
    repeated = c % period
    affine = own * channels + repeated
    k = (k * _affine(weight, affine, mask, 1.0, SUM))[None, :]
    beta = _affine(bias, affine, mask, 0.0, SUM)[None, :]

    sum_g = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    sum_gw = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    sum_h = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    sum_hw = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    sum_gh = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    sum_gz = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    for step in range(0, chunk, BLOCK_M * DEEP):
        for tile in tl.static_range(DEEP):
            m = begin + step + tile * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = (m < end)[:, None] & mask[None, :]
            where = _offsets(m, c, inner, plane, LAST, INDEX)
            w = _load(x, where, inside, SUM) - mean
            z = w * k + beta
            given = _load(grad, where, inside, SUM)
            g = _activate(z, given, slopes, repeated, mask, SLOPE)
            if slopes is not None:
                sum_gz += tl.where(z > 0, 0.0, given * z)
            sum_g += g
            sum_gw += g * w
            if ORDER == "double_backward":
                second = _load(h, where, inside, SUM)
                sum_h += second
                sum_hw += second * w
                sum_gh += g * second
    sums: tl.constexpr = 3 if slopes is not None else 2 if ORDER == "backward" else 5
    to = partial + at.to(tl.int64) * sums * channels + c
    tl.store(to, tl.sum(sum_g, 0).to(tl.float64), mask=mask)
    tl.store(to + channels, tl.sum(sum_gw, 0).to(tl.float64), mask=mask)
    if slopes is not None:
        tl.store(to + 2 * channels, tl.sum(sum_gz, 0).to(tl.float64), mask=mask)
    if ORDER == "double_backward":
        tl.store(to + 2 * channels, tl.sum(sum_h, 0).to(tl.float64), mask=mask)
        tl.store(to + 3 * channels, tl.sum(sum_hw, 0).to(tl.float64), mask=mask)
        tl.store(to + 4 * channels, tl.sum(sum_gh, 0).to(tl.float64), mask=mask)


@triton.jit
def _reduce_kernel(
    x,
    grad,
    h,
    weight,  # [groups, C], or None for 1
    bias,  # the same, or None for 0; so h_weight and h_bias
    slopes,  # [C], PReLU's, or None
    stats,
    partial,  # [groups * splits, sums, C]
    channels,
    inner,
    period,  # after how many channels affine values and slopes repeat
    members,
    plane,
    group,  # values of a channel in a group: all, or a sample's
    splits,  # of a group
    chunk,
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    SLOPE: tl.constexpr,
    LAST: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEEP: tl.constexpr,
):
    c, at = _channels(tl.program_id(0), channels, BLOCK_C)
    _reduce(
        x, grad, h, weight, bias, slopes, stats, partial, c, at, channels, inner, period, members, plane, group, splits,
        chunk, ORDER, SLOPE, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP,
    )  # fmt: skip


@triton.jit
def _total(partial, splits, step, mask, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum over a group's ranges, PARTS at a time."""
    total = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, splits, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < splits)[:, None] & mask[None, :]
        total += tl.sum(tl.load(partial[None, :] + (part.to(tl.int64) * step)[:, None], mask=inside, other=0.0), 0)
    return total


@triton.jit
def _settle(
    partial, weight, h_weight, stats, terms, grad_weight, grad_bias, grad_slope, c, channels, period, members, groups,
    splits, count, ORDER: tl.constexpr, TRAINING: tl.constexpr, GROUPED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Terms and affine gradients of statistics c."""
    statistics = channels // members
    mask = c < statistics
    r = tl.load(stats + statistics + c, mask=mask, other=0.0).to(tl.float64)
    kind = stats.dtype.element_ty
    sums: tl.constexpr = 3 if grad_slope is not None else 2 if ORDER == "backward" else 5
    step = sums * channels
    a = tl.zeros([BLOCK_C], tl.float64)
    aw = tl.zeros([BLOCK_C], tl.float64)
    h = tl.zeros([BLOCK_C], tl.float64)
    hw = tl.zeros([BLOCK_C], tl.float64)
    ha = tl.zeros([BLOCK_C], tl.float64)
    u = tl.zeros([BLOCK_C], tl.float64)
    uw = tl.zeros([BLOCK_C], tl.float64)
    gz = tl.zeros([BLOCK_C], tl.float64)
    first = c.to(tl.int64) * members
    at = partial + first
    affine = first
    given = (c * members % period).to(tl.int64)  # in 32 bits: of 64, a remainder is a call
    next_sums = 1 if GROUPED else splits * step
    next_affine = 1 if GROUPED else channels
    for _ in range(0, members if GROUPED else groups):
        gamma = _affine(weight, given, mask, 1.0, tl.float64)
        g = _total(at, splits, step, mask, PARTS, BLOCK_C)
        gw = _total(at + channels, splits, step, mask, PARTS, BLOCK_C)
        a += gamma * g
        aw += gamma * gw
        if grad_slope is not None:
            gz += _total(at + 2 * channels, splits, step, mask, PARTS, BLOCK_C)
            if GROUPED:
                tl.store(grad_slope + affine, gz.to(kind), mask=mask)
                gz = tl.zeros([BLOCK_C], tl.float64)
        if ORDER == "backward":
            if grad_weight is not None:
                tl.store(grad_weight + affine, (r * gw).to(kind), mask=mask)
            if grad_bias is not None:
                tl.store(grad_bias + affine, g.to(kind), mask=mask)
        else:
            h_gamma = _affine(h_weight, given, mask, 0.0, tl.float64)
            h += _total(at + 2 * channels, splits, step, mask, PARTS, BLOCK_C)
            hw += _total(at + 3 * channels, splits, step, mask, PARTS, BLOCK_C)
            ha += gamma * _total(at + 4 * channels, splits, step, mask, PARTS, BLOCK_C)
            u += h_gamma * g
            uw += h_gamma * gw
        at += next_sums
        affine += next_affine
        given += next_affine
    if grad_slope is not None and not GROUPED:
        tl.store(grad_slope + c, gz.to(kind), mask=mask)
    if TRAINING:  # in evaluation no value depends on the others
        # Means; of r w in place of w.
        scale = 1.0 / (tl.zeros([BLOCK_C], tl.float64) + count)
        a *= scale
        aw *= r * scale
        if ORDER == "backward":
            tl.store(terms + c, -r * r * aw, mask=mask)
            tl.store(terms + statistics + c, -r * a, mask=mask)
        else:
            h *= scale
            hw *= r * scale
            difference = ha * scale - h * a - hw * aw
            u = u * scale - r * (hw * a + aw * h)
            uw = uw * r * scale - 2.0 * r * hw * aw
            tl.store(terms + c, -r * hw, mask=mask)
            tl.store(terms + statistics + c, -h, mask=mask)
            tl.store(terms + 2 * statistics + c, -r * r * aw, mask=mask)
            tl.store(terms + 3 * statistics + c, -r * r * (uw + r * difference), mask=mask)
            tl.store(terms + 4 * statistics + c, -r * u, mask=mask)
    if ORDER == "double_backward" and grad_weight is not None:
        at = partial + first
        affine = first
        for _ in range(0, members if GROUPED else groups):
            value = _total(at + 4 * channels, splits, step, mask, PARTS, BLOCK_C)
            if TRAINING:
                g = _total(at, splits, step, mask, PARTS, BLOCK_C)
                gw = _total(at + channels, splits, step, mask, PARTS, BLOCK_C)
                value -= h * g + hw * r * gw
            tl.store(grad_weight + affine, (r * value).to(kind), mask=mask)
            at += next_sums
            affine += next_affine


@triton.jit
def _settle_kernel(
    partial,
    weight,
    h_weight,
    stats,
    terms,  # [TERMS, C / members]; None in evaluation
    grad_weight,  # [groups, C], or None
    grad_bias,
    grad_slope,  # [C], PReLU's, or None
    channels,
    period,
    members,
    groups,
    splits,
    count,  # values of a statistic
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    TRAINING: tl.constexpr,
    GROUPED: tl.constexpr,  # a statistic is of several channels, which follow one another; else of groups
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    _settle(
        partial, weight, h_weight, stats, terms, grad_weight, grad_bias, grad_slope, c, channels, period, members,
        groups, splits, count, ORDER, TRAINING, GROUPED, PARTS, BLOCK_C,
    )  # fmt: skip


@triton.jit
def _apply(
    x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, terms, out, out_x, c, at, channels, inner, period,
    members, plane, group, splits, chunk, ORDER: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr,
    SUM: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    LAST_USE: tl.constexpr = False,
):  # fmt: skip
    """The results of range ``at`` of channels c. LAST_USE: what is read and written may leave the caches first."""
    mask = c < channels
    own = at.to(INDEX) // splits
    start = (at % splits).to(INDEX) * chunk
    begin = own * group + start
    end = own * group + tl.minimum(start + chunk, group)
    repeated = c % period
    affine = own * channels + repeated
    statistic = c // members
    statistics = channels // members
    mean = tl.load(stats + statistic, mask=mask, other=0.0)[None, :]
    r = tl.load(stats + statistics + statistic, mask=mask, other=0.0)[None, :]
    k = r * _affine(weight, affine, mask, 1.0, SUM)[None, :]
    beta = _affine(bias, affine, mask, 0.0, SUM)[None, :]
    # In evaluation nothing depends on the other values: no terms, not even zeros, of which an infinity makes NaN.
    if terms is not None:
        term0 = tl.load(terms + statistic, mask=mask, other=0.0).to(SUM)[None, :]
        term1 = tl.load(terms + statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
    if ORDER == "double_backward":
        e = r * _affine(h_weight, affine, mask, 0.0, SUM)[None, :]
        f = _affine(h_bias, affine, mask, 0.0, SUM)[None, :]
        if terms is not None:
            e += k * term0
            f += k * term1
            term2 = tl.load(terms + 2 * statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
            term3 = tl.load(terms + 3 * statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
            term4 = tl.load(terms + 4 * statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
    for back in range(BLOCK_M, chunk + BLOCK_M, BLOCK_M):
        m = begin + (chunk - back) + tl.arange(0, BLOCK_M)
        inside = (m < end)[:, None] & mask[None, :]
        where = _offsets(m, c, inner, plane, LAST, INDEX)
        w = _load(x, where, inside, SUM, LAST_USE) - mean
        z = w * k + beta
        if ORDER == "forward":
            result = _activate(z, z, slopes, repeated, mask, SLOPE)
        else:
            g = _activate(z, _load(grad, where, inside, SUM, LAST_USE), slopes, repeated, mask, SLOPE)
            if ORDER == "backward":
                result = k * g
                if terms is not None:
                    result += term0 * w + term1
            else:
                second = _load(h, where, inside, SUM, LAST_USE)
                result = _gate(z, k * second + (e * w + f), SLOPE)
                result_x = e * g
                if terms is not None:
                    result_x += term2 * second + (term3 * w + term4)
                _store(out_x, where, result_x, inside, LAST_USE)
        _store(out, where, result, inside, LAST_USE)


@triton.jit
def _apply_kernel(
    x,
    grad,
    h,
    weight,  # [groups, C], or None for 1
    bias,  # the same, or None for 0; so h_weight and h_bias
    slopes,  # [C], PReLU's, or None
    h_weight,
    h_bias,
    stats,
    terms,  # None in the forward and in evaluation
    out,  # y, dx or dg
    out_x,  # double backward: dx
    channels,
    inner,
    period,
    members,
    plane,
    group,
    splits,
    chunk,
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    SLOPE: tl.constexpr,
    LAST: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LAST_USE: tl.constexpr,
):
    c, at = _channels(tl.num_programs(0) - 1 - tl.program_id(0), channels, BLOCK_C)
    _apply(
        x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, terms, out, out_x, c, at, channels, inner, period,
        members, plane, group, splits, chunk, ORDER, SLOPE, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, LAST_USE,
    )  # fmt: skip


@triton.jit
def _whole(
    number, x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, partial, terms, grad_weight, grad_bias,
    grad_slope, out, out_x, channels, inner, period, members, plane, count, splits, chunk, ORDER: tl.constexpr,
    SLOPE: tl.constexpr, EPS: tl.constexpr, TRAINING: tl.constexpr, GROUPED: tl.constexpr, PARTS: tl.constexpr,
    STATISTICS: tl.constexpr, LAST: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, DEEP: tl.constexpr, IN_TURN: tl.constexpr,
):  # fmt: skip
    """Sums, what follows from them, and values of a block of channels that have one range."""
    c = number * BLOCK_C + tl.arange(0, BLOCK_C)
    at = number * 0
    if ORDER == "forward":
        _moments(x, partial, c, at, channels, inner, plane, count, chunk, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP)
    else:
        _reduce(
            x, grad, h, weight, bias, slopes, stats, partial, c, at, channels, inner, period, members, plane, count,
            splits, chunk, ORDER, SLOPE, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP,
        )  # fmt: skip
    tl.debug_barrier()
    s = number * STATISTICS + tl.arange(0, STATISTICS)
    if ORDER == "forward":
        _settle_moments(partial, stats, s, channels, members, splits, EPS, PARTS, STATISTICS, IN_TURN)
    else:
        _settle(
            partial, weight, h_weight, stats, terms, grad_weight, grad_bias, grad_slope, s, channels, period,
            members, 1, splits, count * members, ORDER, TRAINING, GROUPED, PARTS, STATISTICS,
        )  # fmt: skip
    tl.debug_barrier()
    _apply(
        x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, terms, out, out_x, c, at, channels, inner,
        period, members, plane, count, splits, chunk, ORDER, SLOPE, LAST, SUM, INDEX,
        BLOCK_M * 2 if IN_TURN and (GROUPED or ORDER == "forward") else BLOCK_M, BLOCK_C, IN_TURN,
    )  # fmt: skip


@triton.jit
def _together_kernel(
    x,
    grad,
    h,
    weight,
    bias,
    slopes,
    h_weight,
    h_bias,
    stats,
    partial,
    terms,
    grad_weight,
    grad_bias,
    grad_slope,
    out,
    out_x,
    counters,  # None, or zeros: tickets, then of each unit the ranges that are summed up, and whether it is settled
    channels,
    inner,
    period,
    members,
    plane,
    count,
    splits,
    chunk,
    unit,  # blocks of channels whose sums are settled together
    ahead,  # how many blocks of channels are summed up before values of the first one are made
    ORDER: tl.constexpr,
    SLOPE: tl.constexpr,
    EPS: tl.constexpr,
    TRAINING: tl.constexpr,
    GROUPED: tl.constexpr,
    PARTS: tl.constexpr,
    STATISTICS: tl.constexpr,  # of a unit
    IN_TURN: tl.constexpr,
    LAST: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Sums, what follows from them, and values, in one launch.

    Without counters a program does all of it for a block of channels that have one range, or for one such block after
    the other, in turn with the others. With counters a program takes a ticket. Tickets alternate between a range to sum
    up, of one block of channels, and a range whose values to make, of the block ``ahead`` before. Who sums up a unit's
    last range settles it; who makes values waits until that was done. All whom he waits for have earlier tickets, so
    that they run, and none of those who sum up waits: however few programs run at once, it comes to an end. What was
    summed up is read again after as many ranges as ``ahead`` says, out of the second-level cache."""
    blocks = tl.cdiv(channels, BLOCK_C)
    if IN_TURN:
        # What is the same in all turns is made anew in each: kept in registers, it would spill.
        for number in tl.range(tl.program_id(0), blocks, tl.num_programs(0), disable_licm=True):
            _whole(
                number, x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, partial, terms, grad_weight,
                grad_bias, grad_slope, out, out_x, channels, inner, period, members, plane, count, splits, chunk, ORDER,
                SLOPE, EPS, TRAINING, GROUPED, PARTS, STATISTICS, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP, True,
            )  # fmt: skip
    elif counters is None:
        _whole(
            tl.program_id(0), x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, partial, terms, grad_weight,
            grad_bias, grad_slope, out, out_x, channels, inner, period, members, plane, count, splits, chunk, ORDER,
            SLOPE, EPS, TRAINING, GROUPED, PARTS, STATISTICS, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP, False,
        )  # fmt: skip
    else:
        ticket = tl.atomic_add(counters, 1, sem="relaxed")
        block = ticket // (2 * splits)
        at = ticket // 2 - block * splits
        units = tl.cdiv(blocks, unit)
        if ticket % 2 == 0:
            if block < blocks:
                c = block * BLOCK_C + tl.arange(0, BLOCK_C)
                if ORDER == "forward":
                    _moments(
                        x, partial, c, at, channels, inner, plane, count, chunk, LAST, SUM, INDEX, BLOCK_M, BLOCK_C,
                        DEEP,
                    )  # fmt: skip
                else:
                    _reduce(
                        x, grad, h, weight, bias, slopes, stats, partial, c, at, channels, inner, period, members,
                        plane, count, splits, chunk, ORDER, SLOPE, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, DEEP,
                    )  # fmt: skip
                number = block // unit
                tl.debug_barrier()
                before = tl.atomic_add(counters + 1 + number, 1, sem="acq_rel")
                if before == splits * unit - 1:
                    s = number * STATISTICS + tl.arange(0, STATISTICS)
                    if ORDER == "forward":
                        _settle_moments(partial, stats, s, channels, members, splits, EPS, PARTS, STATISTICS)
                    else:
                        _settle(
                            partial, weight, h_weight, stats, terms, grad_weight, grad_bias, grad_slope, s, channels,
                            period, members, 1, splits, count * members, ORDER, TRAINING, GROUPED, PARTS, STATISTICS,
                        )  # fmt: skip
                    tl.debug_barrier()
                    tl.atomic_add(counters + 1 + units + number, 1, sem="release")
        elif block >= ahead:
            number = (block - ahead) // unit
            while tl.atomic_add(counters + 1 + units + number, 0, sem="acquire") == 0:
                pass
            tl.debug_barrier()
            c = (block - ahead) * BLOCK_C + tl.arange(0, BLOCK_C)
            _apply(
                x, grad, h, weight, bias, slopes, h_weight, h_bias, stats, terms, out, out_x, c, at, channels, inner,
                period, members, plane, count, splits, chunk, ORDER, SLOPE, LAST, SUM, INDEX, BLOCK_M, BLOCK_C, True,
            )  # fmt: skip


# ---- launchers: what gankern/ops/batch_norm_act.py calls ----------------------------------------------------


def _of_each(*values: Affine) -> bool:
    """Whether any of them are each sample's own."""
    return any(v is not None and v.ndim == 2 for v in values)


def _repeated(values: Affine, x: Tensor) -> Tensor | None:
    """[C] or [N, C] as [N C]."""
    return None if values is None else values.expand(x.shape[:2]).reshape(-1)


def _settled(parts: int) -> tuple[int, int]:
    """Of so many parts, the channels of a program that adds them up, and how many it takes at a time."""
    return (SETTLED // 4, 16 * PARTS) if parts > MANY else (SETTLED, PARTS)


class _Call:
    """A tensor x, how it is split, and what all kernels take. With ``instances`` it is one sample, whose channels are
    those of all samples of x; affine values and slopes of C channels are then those of each C of them, and a statistic
    is that of ``members`` of them."""

    def __init__(
        self,
        x: Tensor,
        weight: Affine,
        bias: Affine,
        slope: float,
        others: Sequence[Affine] = (),
        instances: bool = False,
        slopes: Affine = None,
        members: int = 1,
    ) -> None:
        self.given = weight, bias, slopes
        self.last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
        self.x = x if self.last else contiguous(x)
        self.samples, self.channels = x.shape[:2]
        if instances:
            self.samples, self.channels = 1, self.samples * self.channels
        self.period = x.shape[1] if instances and not _of_each(weight, bias, slopes, *others) else self.channels
        self.inner = x.shape[1] if self.last else self.channels
        self.members, self.statistics = members, self.channels // members
        self.plane = math.prod(x.shape[2:])
        self.count = self.samples * self.plane
        self.groups = self.samples if _of_each(weight, bias, *others) and not instances else 1
        if instances and self.period == self.channels:
            weight, bias, slopes, *others = (_repeated(v, x) for v in (weight, bias, slopes, *others))
        self.sum = sum_dtype(x.dtype)
        self.weight, self.bias, *self.others = (contiguous(v) for v in (weight, bias, *others))
        self.slope, self.slopes = slope, contiguous(slopes)
        blocks = (BLOCKS if not instances else INSTANCES if members == 1 else GROUPS)(x.device)
        self.ahead, self.at_once = blocks["AHEAD"] * MEGABYTE, blocks.get("AT_ONCE", 0) * MEGABYTE
        self.large = x.numel() * x.element_size() > LARGE
        self.block_c = blocks["CHANNELS"] if self.last else 1
        self.block_m = blocks["TILE"] // self.block_c
        self.blocks = ceil_div(self.channels, self.block_c)
        self.group = self.count // max(self.groups, 1)
        splits = min(ceil_div(self.group, VALUES * self.block_m), PROGRAMS // max(self.blocks * self.groups, 1))
        self.chunk = ceil_div(ceil_div(self.group, max(splits, 1)), self.block_m) * self.block_m
        self.splits = ceil_div(self.group, max(self.chunk, 1))
        index = index_type(x.numel() + self.chunk * self.groups)
        self.tile = {"LAST": self.last, "SUM": sum_type(x.dtype), "INDEX": index}
        self.tile |= {"BLOCK_M": self.block_m, "BLOCK_C": self.block_c}
        self.tile |= {"DEEP": blocks["DEEP"], "num_warps": blocks["num_warps"]}

    def in_turn(self, maps: int) -> tuple[int, int]:
        """How many programs read so many maps twice, and of how many channels each at a time, where those take turns
        that have room in the second-level cache; otherwise none."""
        size = self.x.element_size()
        channels = max(ROW // size if self.last else 1, self.members)
        if size > 4 or channels % self.members or channels != next_power_of_2(channels) or channels > MOST:
            return 0, 0
        programs = self.at_once // (channels * self.count * size * maps)
        return (programs, channels) if FEWEST <= programs < ceil_div(self.channels, channels) else (0, 0)

    def gradient(self, wanted: bool, values: Affine) -> Tensor | None:
        """What a kernel writes of the affine values' gradient, [groups, C]; None where there is none."""
        if not wanted or values is None:
            return None
        made = self.x.new_empty(self.groups * self.channels, dtype=self.sum)
        return made if self.count else made.zero_()

    def gradient_of_slopes(self) -> Tensor | None:
        """The same of PReLU's slopes, [C]: a group has none of its own."""
        if self.slopes is None:
            return None
        made = self.x.new_empty(self.channels, dtype=self.sum)
        return made if self.count else made.zero_()

    def as_given(self, made: Tensor | None, values: Affine) -> Tensor:
        """A gradient that a kernel wrote, in the shape of the values: where it has one for each sample and they are
        common to all, summed up over these. Empty where there is none."""
        if made is None or values is None:
            return self.x.new_empty(0, dtype=self.sum)
        if made.numel() != values.numel():
            return sum_of_parts(made.view(-1, values.shape[0], 1), self.sum)
        return made if values.ndim == 1 else made.view(values.shape)

    def evaluation(self, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        stats = self.x.new_empty((3, self.channels), dtype=self.sum)
        launch(
            _evaluation_kernel,
            ceil_div(self.channels, SETTLED),
            contiguous(mean),
            contiguous(var),
            stats,
            self.channels,
            EPS=eps,
            BLOCK_C=SETTLED,
            num_warps=1,
        )
        return stats

    def like_x(self, values: Tensor | None) -> Tensor:
        """The values as x lies in memory; zeros for None."""
        return torch.zeros_like(self.x) if values is None else laid_out_as(values, self.x)

    def partial(self, sums: int) -> Tensor:
        return self.x.new_empty((self.groups * self.splits, sums, self.channels), dtype=torch.float64)

    def empty_terms(self) -> Tensor:
        return self.x.new_empty((TERMS, self.statistics), dtype=torch.float64)

    def moments(self, eps: float, stats: Tensor) -> None:
        """Statistics of all samples: their ranges are those of one group."""
        chunk = self.chunk * self.groups
        splits = ceil_div(self.count, chunk)
        partial = self.x.new_empty((splits, 3, self.channels), dtype=torch.float64)
        launch(
            _moments_kernel,
            self.blocks * splits,
            self.x,
            partial,
            self.channels,
            self.inner,
            self.plane,
            self.count,
            chunk,
            **self.tile,
        )
        settled, parts = _settled(splits * self.members)
        launch(
            _settle_moments_kernel,
            ceil_div(self.statistics, settled),
            partial,
            stats,
            self.channels,
            self.members,
            splits,
            EPS=eps,
            PARTS=parts,
            BLOCK_C=settled,
            num_warps=WARPS,
        )

    def forward(self, eps: float, y: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Writes y; returns the statistics of x, [3, statistics], or of another shape."""
        stats = self.x.new_empty(shape or (3, self.statistics), dtype=self.sum)
        if not self.together("forward", None, None, None, None, stats, True, eps, (None, None, None), y, None):
            self.moments(eps, stats)
            self.apply("forward", None, None, None, None, stats, None, y, None)
        return stats

    def together(
        self,
        order: str,
        grad: Tensor | None,
        h: Tensor | None,
        h_weight: Affine,
        h_bias: Affine,
        stats: Tensor,
        training: bool,
        eps: float,
        made: Sequence[Tensor | None],
        out: Tensor,
        out_x: Tensor | None,
    ) -> bool:
        """Sums, terms, affine gradients and results by one launch; False where that is not the way."""
        maps = 1 + (grad is not None) + (h is not None)
        programs, channels = self.in_turn(maps) if h is None and max(self.splits, self.members) > 1 else (0, 0)
        in_turn, tile = programs > 0, self.tile
        statistics = max(1, (channels or self.block_c) // self.members)  # of a unit, which has whole blocks of channels
        unit = 1 if in_turn else statistics * self.members // self.block_c
        if self.groups != 1 or (not in_turn and unit * self.block_c != statistics * self.members):
            return False
        of_block = self.count * self.block_c * self.x.element_size() * maps
        chunk, splits, counters, ahead, parts = self.chunk, self.splits, None, 0, WHOLE_PARTS
        units = ceil_div(self.blocks, unit)
        if in_turn:
            block_m = 32 * WHOLE_WARPS * 16 // self.x.element_size() // channels
            chunk, splits = ceil_div(self.count, 2 * block_m) * 2 * block_m, 1
            parts = self.members if order == "forward" else 1
            tile = {**tile, "BLOCK_M": block_m, "BLOCK_C": channels, "DEEP": WHOLE_DEEP, "num_warps": WHOLE_WARPS}
            tile["INDEX"] = index_type(self.x.numel() + chunk)
        elif self.splits > 1:
            if unit * of_block > self.ahead:
                return False
            chunk = SHORT * self.block_m
            splits = ceil_div(self.count, chunk)
            ahead = min(max(unit, self.ahead // of_block), self.blocks)
            programs = 2 * splits * (self.blocks + ahead)
            counters = self.x.new_zeros(1 + 2 * units, dtype=torch.int32)
            parts = max(WHOLE_PARTS, WOVEN_PARTS // statistics)
        elif unit > 1:
            return False
        else:
            programs = units
        sums = 3 if order == "forward" or self.slopes is not None else SUMS[order]
        partial = self.x.new_empty((splits, sums, self.channels), dtype=torch.float64)
        terms = self.empty_terms() if order != "forward" and training else None
        launch(
            _together_kernel,
            programs,
            self.x,
            grad,
            h,
            self.weight,
            self.bias,
            self.slopes,
            h_weight,
            h_bias,
            stats,
            partial,
            terms,
            *made,
            out,
            out_x,
            counters,
            self.channels,
            self.inner,
            self.period,
            self.members,
            self.plane,
            self.count,
            splits,
            chunk,
            unit,
            ahead,
            ORDER=order,
            SLOPE=self.slope,
            EPS=eps,
            TRAINING=training,
            GROUPED=self.members > 1,
            PARTS=parts,
            STATISTICS=statistics,
            IN_TURN=in_turn,
            **tile,
        )
        return True

    def terms(
        self,
        order: str,
        grad: Tensor | None,
        h: Tensor | None,
        h_weight: Affine,
        stats: Tensor,
        training: bool,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        grad_slope: Tensor | None,
    ) -> Tensor | None:
        """What the results need of each channel's sums, None in evaluation; writes the affine gradients, and PReLU's
        slope's."""
        partial = self.partial(SUMS[order] if self.slopes is None else 3)
        terms = self.empty_terms() if training else None
        launch(
            _reduce_kernel,
            self.blocks * self.groups * self.splits,
            self.x,
            grad,
            h,
            self.weight,
            self.bias,
            self.slopes,
            stats,
            partial,
            self.channels,
            self.inner,
            self.period,
            self.members,
            self.plane,
            self.group,
            self.splits,
            self.chunk,
            ORDER=order,
            SLOPE=self.slope,
            **self.tile,
        )
        # Of statistics of several channels, a double backward has no registers for more parts.
        settled, parts = _settled(self.splits if self.members == 1 else 1)
        launch(
            _settle_kernel,
            ceil_div(self.statistics, settled),
            partial,
            self.weight,
            h_weight,
            stats,
            terms,
            grad_weight,
            grad_bias,
            grad_slope,
            self.channels,
            self.period,
            self.members,
            self.groups,
            self.splits,
            self.count * self.members,
            ORDER=order,
            TRAINING=training,
            GROUPED=self.members > 1,
            PARTS=parts,
            BLOCK_C=settled,
            num_warps=WARPS,
        )
        return terms

    def apply(
        self,
        order: str,
        grad: Tensor | None,
        h: Tensor | None,
        h_weight: Affine,
        h_bias: Affine,
        stats: Tensor,
        terms: Tensor | None,
        out: Tensor,
        out_x: Tensor | None,
    ) -> None:
        launch(
            _apply_kernel,
            self.blocks * self.groups * self.splits,
            self.x,
            grad,
            h,
            self.weight,
            self.bias,
            self.slopes,
            h_weight,
            h_bias,
            stats,
            terms,
            out,
            out_x,
            self.channels,
            self.inner,
            self.period,
            self.members,
            self.plane,
            self.group,
            self.splits,
            self.chunk,
            ORDER=order,
            SLOPE=self.slope,
            **{name: value for name, value in self.tile.items() if name not in ("DEEP", "num_warps")},
            LAST_USE=self.large,
            num_warps=self.tile["num_warps"],
        )

    def backward(
        self, grad: Tensor, stats: Tensor, training: bool, affine: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of x, weight, bias and slope."""
        grad, stats, grad_x = self.like_x(grad), contiguous(stats), torch.empty_like(self.x)
        weight, bias, _ = self.given
        made = self.gradient(affine, weight), self.gradient(affine, bias), self.gradient_of_slopes()
        if self.x.numel():
            if not training and all(gradient is None for gradient in made):
                self.apply("backward", grad, None, None, None, stats, None, grad_x, None)
            elif not self.together("backward", grad, None, None, None, stats, training, 0.0, made, grad_x, None):
                terms = self.terms("backward", grad, None, None, stats, training, *made)
                self.apply("backward", grad, None, None, None, stats, terms, grad_x, None)
        grad_weight, grad_bias, grad_slope = map(self.as_given, made, self.given)
        return grad_x, grad_weight, grad_bias, grad_slope

    def double_backward(
        self, grad_grad_x: Tensor | None, grad: Tensor, stats: Tensor, training: bool, affine: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of ``grad``, x and weight; ``others`` are those of the first weight's and bias's gradients."""
        grad, h, stats = self.like_x(grad), self.like_x(grad_grad_x), contiguous(stats)
        (h_weight, h_bias), weight = self.others, self.given[0]
        grad_grad, grad_x = torch.empty_like(self.x), torch.empty_like(self.x)
        made = self.gradient(affine and grad_grad_x is not None, weight)
        if self.x.numel():
            given, gradients = (grad, h, h_weight, h_bias, stats), (made, None, None)
            if not self.together("double_backward", *given, training, 0.0, gradients, grad_grad, grad_x):
                terms = self.terms("double_backward", grad, h, h_weight, stats, training, *gradients)
                self.apply("double_backward", *given, terms, grad_grad, grad_x)
        if h_weight is None and (grad_grad_x is None or not training):
            grad_x = self.x.new_empty(0)
        return grad_grad, grad_x, self.as_given(made, weight)


@planned
def forward(
    x: Tensor,
    weight: Affine,
    bias: Affine,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    negative_slope: float,
    slope: Affine = None,
) -> tuple[Tensor, Tensor]:
    """The result, and the statistics [3, C]. Launches: 3; 1 where a channel has one range, and in evaluation."""
    call = _Call(x, weight, bias, negative_slope, slopes=slope)
    y = torch.empty_like(call.x)
    if training:
        return y, call.forward(eps, y) if call.count else x.new_zeros((3, call.channels), dtype=call.sum)
    assert running_mean is not None and running_var is not None  # there, in evaluation
    stats = call.evaluation(running_mean, running_var, eps)
    if call.count:
        call.apply("forward", None, None, None, None, stats, None, y, None)
    return y, stats


@planned
def backward(
    grad: Tensor,
    x: Tensor,
    weight: Affine,
    bias: Affine,
    stats: Tensor,
    training: bool,
    negative_slope: float,
    affine: bool,
    slope: Affine = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and slope (empty where not wanted, or there is none). Launches: 3; 1 where
    a channel has one range, and in evaluation without these."""
    call = _Call(x, weight, bias, negative_slope, slopes=slope)
    return call.backward(grad, stats, training, affine)


@planned
def double_backward(
    grad_grad_x: Tensor | None,
    grad_grad_weight: Affine,
    grad_grad_bias: Affine,
    grad: Tensor,
    x: Tensor,
    weight: Affine,
    bias: Affine,
    stats: Tensor,
    training: bool,
    negative_slope: float,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `backward`'s grad, x and weight (empty where there are none). Launches: 3, or 1 where a
    channel has one range."""
    call = _Call(x, weight, bias, negative_slope, (grad_grad_weight, grad_grad_bias))
    return call.double_backward(grad_grad_x, grad, stats, training, affine)


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels: a channel has two ranges, or one."""
    vector = torch.empty(32, dtype=sum_dtype(dtype), device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(4, 32, 64, 128, dtype=dtype, device=device).contiguous(memory_format=layout)
        options = True, 0.2, True
        y, stats = forward(x, vector, vector, None, None, True, 1e-5, 0.2)
        backward(y, x, vector, vector, stats, *options)
        forward(x, vector, vector, None, None, True, 1e-5, 0.0, vector)
        forward(x, None, None, vector, vector, False, 1e-5, 0.2)
        backward(y, x, None, None, stats, False, 0.2, False)
        backward(y, x, vector, vector, stats, *options, vector)
        double_backward(y, vector, vector, y, x, vector, vector, stats, *options)
        # Of many ranges, where channels are neighbours.
        wide = torch.empty(4, 32, 128, 128, dtype=dtype, device=device).contiguous(memory_format=layout)
        y, stats = forward(wide, vector, vector, None, None, True, 1e-5, 0.2)
        backward(y, wide, vector, vector, stats, *options)
        double_backward(y, vector, vector, y, wide, vector, vector, stats, *options)
        x = torch.empty(4, 32, 16, 16, dtype=dtype, device=device).contiguous(memory_format=layout)
        y, stats = forward(x, vector, vector, None, None, True, 1e-5, 0.2)
        backward(y, x, vector, vector, stats, *options)
        double_backward(y, vector, vector, y, x, vector, vector, stats, *options)
