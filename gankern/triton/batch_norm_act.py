"""Batch normalisation and a (leaky) ReLU or PReLU, each order in two sweeps over memory.

Formulas: csrc/cpu/batch_norm_act.cpp. With w = x - mean, every order is sums over each channel (of x and its squares;
of g' and g' w; of these, h, h w and g' h), terms that follow from the sums, and results that are sums of products of
what was read with coefficients made of the terms and of the affine values.

Split. A program takes some channels and a range of their values: BLOCK_M by BLOCK_C of them at a time, one channel
where a channel's values are neighbours, 32 where channels are (channels_last). Where affine values are each sample's
own, no range holds values of two samples. Sums of ranges go to memory, [groups, splits, sums, C], and one program a
block of channels adds them up in their order: no atomics, and the split depends on the shape alone.

Traffic. Forward reads x twice and writes y; backward reads x and g twice and writes dx; double backward reads x, g and
h twice and writes two. Bound by memory. Sums are in fp32 (fp64 for fp64), sums of sums in fp64; sums of squares are
taken about the mean of a range's first values.

Of group normalisation the channels are those of all samples, as of instance normalisation, and a statistic is that of
`members` neighbouring ones: their sums are added up where those of ranges are.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton.launch import Blocks, ceil_div, contiguous, laid_out_as, launch, planned, sum_dtype, sum_type
from gankern.triton.sums import sum_of_parts

WARPS = 4
BLOCKS = Blocks(  # values of a tile, and in channels_last how many of them are neighbouring channels
    "batch_norm_act",
    {"TILE": 1024, "CHANNELS": 32, "num_warps": 4},
    {"TILE": 1024, "CHANNELS": 64, "num_warps": 4},
    {"TILE": 1024, "CHANNELS": 16, "num_warps": 4},
    {"TILE": 2048, "CHANNELS": 32, "num_warps": 8},
    {"TILE": 2048, "CHANNELS": 64, "num_warps": 8},
    {"TILE": 4096, "CHANNELS": 64, "num_warps": 8},
)
SETTLED = 32  # channels of a program that adds up
VALUES = 16  # blocks of a range, at least, where there are programs enough
PROGRAMS = 1024  # enough for every GPU
SUMS = {"backward": 2, "double_backward": 5}
TERMS = 5  # of a channel

Affine = Tensor | None  # a value of each channel, [C], or of each sample's channels, [N, C]; None: there are none

# ---- kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _gate(z, v, SLOPE: tl.constexpr):
    """v where z > 0 (or NaN), SLOPE * v elsewhere; with slope 0, plain 0 there."""
    if SLOPE == 1:
        return v
    if SLOPE == 0:
        return tl.where(z <= 0, 0.0, v)
    return tl.where(z <= 0, v * SLOPE, v)


@triton.jit
def _activate(z, v, slopes, c, mask, SLOPE: tl.constexpr):
    """:func:`_gate`, by PReLU's slope of each channel where there are such."""
    if slopes is None:
        result = _gate(z, v, SLOPE)
    else:  # what follows a return is compiled, too
        result = tl.where(z <= 0, v * tl.load(slopes + c, mask=mask, other=1.0)[None, :], v)
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
def _channels(channels, BLOCK_C: tl.constexpr):
    """This program's channels, and the number of its range, group times splits."""
    blocks = tl.cdiv(channels, BLOCK_C)
    return tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(0) // blocks


@triton.jit
def _offsets(m, c, inner, plane, LAST: tl.constexpr):
    """Where value m (of samples times plane) of channel c is. Of more channels than the ``inner`` ones of a position,
    those behind are of an instance of its own, which has one sample."""
    n = m // plane
    if LAST:
        behind = (c // inner).to(tl.int64) * inner * plane + c % inner
        return m[:, None] * inner + behind[None, :]
    return (n * inner * plane + (m - n * plane))[:, None] + (c.to(tl.int64) * plane)[None, :]


@triton.jit
def _load(x, offsets, mask, SUM: tl.constexpr):
    return tl.load(x + offsets, mask=mask, other=0.0).to(SUM)


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
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c, split = _channels(channels, BLOCK_C)
    begin = split.to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, count)
    inside_c = (c < channels)[None, :]

    m = begin + tl.arange(0, BLOCK_M)
    inside = (m < end)[:, None] & inside_c
    first = _load(x, _offsets(m, c, inner, plane, LAST), inside, SUM)
    about = tl.sum(first, 0) / tl.minimum(end - begin, BLOCK_M).to(SUM)
    # Once more: the first sum rounds by its size, this one by that of the differences.
    about += tl.sum(tl.where(inside, first - about[None, :], 0.0), 0) / tl.minimum(end - begin, BLOCK_M).to(SUM)

    sums = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    squares = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    for start in range(0, chunk, BLOCK_M):
        m = begin + start + tl.arange(0, BLOCK_M)
        inside = (m < end)[:, None] & inside_c
        d = _load(x, _offsets(m, c, inner, plane, LAST), inside, SUM)
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
def _settle_moments_kernel(
    partial,
    stats,  # [3, C / members]: mean, 1 / sqrt(var + EPS), unbiased var
    channels,
    members,  # channels of a statistic
    splits,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    statistics = channels // members
    mask = c < statistics
    count = tl.zeros([BLOCK_C], tl.float64)
    mean = tl.zeros([BLOCK_C], tl.float64)
    squares = tl.zeros([BLOCK_C], tl.float64)
    for part in range(0, splits * members):
        split = part // members
        at = partial + split * 3 * channels + c * members + (part - split * members)
        n = tl.load(at, mask=mask, other=1.0)
        apart = tl.load(at + channels, mask=mask, other=0.0) - mean
        others = tl.load(at + 2 * channels, mask=mask, other=0.0)
        squares += tl.where(others < 0, 0.0, others) + apart * apart * (count * n / (count + n))
        mean += apart * (n / (count + n))
        count += n
    kind = stats.dtype.element_ty
    tl.store(stats + c, mean.to(kind), mask=mask)
    tl.store(stats + statistics + c, (1.0 / tl.sqrt(squares / count + EPS)).to(kind), mask=mask)
    tl.store(stats + 2 * statistics + c, (squares / (count - 1.0)).to(kind), mask=mask)


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
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c, at = _channels(channels, BLOCK_C)
    mask = c < channels
    own = at.to(tl.int64) // splits
    start = (at % splits).to(tl.int64) * chunk
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
    for step in range(0, chunk, BLOCK_M):
        m = begin + step + tl.arange(0, BLOCK_M)
        inside = (m < end)[:, None] & mask[None, :]
        where = _offsets(m, c, inner, plane, LAST)
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
def _total(partial, splits, step, mask, BLOCK_C: tl.constexpr):
    """The sum over a group's ranges, in their order."""
    total = tl.zeros([BLOCK_C], tl.float64)
    for split in range(0, splits):
        total += tl.load(partial + split * step, mask=mask, other=0.0)
    return total


@triton.jit
def _settle_kernel(
    partial,
    weight,
    h_weight,
    stats,
    terms,  # [TERMS, C / members]
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
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
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
    given = affine % period
    next_sums = 1 if GROUPED else splits * step
    next_affine = 1 if GROUPED else channels
    for _ in range(0, members if GROUPED else groups):
        gamma = _affine(weight, given, mask, 1.0, tl.float64)
        g = _total(at, splits, step, mask, BLOCK_C)
        gw = _total(at + channels, splits, step, mask, BLOCK_C)
        a += gamma * g
        aw += gamma * gw
        if grad_slope is not None:
            gz += _total(at + 2 * channels, splits, step, mask, BLOCK_C)
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
            h += _total(at + 2 * channels, splits, step, mask, BLOCK_C)
            hw += _total(at + 3 * channels, splits, step, mask, BLOCK_C)
            ha += gamma * _total(at + 4 * channels, splits, step, mask, BLOCK_C)
            u += h_gamma * g
            uw += h_gamma * gw
        at += next_sums
        affine += next_affine
        given += next_affine
    if grad_slope is not None and not GROUPED:
        tl.store(grad_slope + c, gz.to(kind), mask=mask)
    # Means; of r w in place of w.
    scale = 1.0 / (tl.zeros([BLOCK_C], tl.float64) + count) if TRAINING else tl.zeros([BLOCK_C], tl.float64)
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
        if grad_weight is not None:
            at = partial + first
            affine = first
            for _ in range(0, members if GROUPED else groups):
                g = _total(at, splits, step, mask, BLOCK_C)
                gw = _total(at + channels, splits, step, mask, BLOCK_C)
                gh = _total(at + 4 * channels, splits, step, mask, BLOCK_C)
                value = r * (gh - h * g - hw * r * gw)
                tl.store(grad_weight + affine, value.to(kind), mask=mask)
                at += next_sums
                affine += next_affine


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
    terms,
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
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c, at = _channels(channels, BLOCK_C)
    mask = c < channels
    own = at.to(tl.int64) // splits
    start = (at % splits).to(tl.int64) * chunk
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
    if terms is None:  # in evaluation nothing depends on the other values
        term0 = tl.zeros_like(r)
        term1 = tl.zeros_like(r)
    elif ORDER != "forward":
        term0 = tl.load(terms + statistic, mask=mask, other=0.0).to(SUM)[None, :]
        term1 = tl.load(terms + statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
    if ORDER == "double_backward":
        e = r * _affine(h_weight, affine, mask, 0.0, SUM)[None, :] + k * term0
        f = _affine(h_bias, affine, mask, 0.0, SUM)[None, :] + k * term1
        term2 = tl.load(terms + 2 * statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
        term3 = tl.load(terms + 3 * statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
        term4 = tl.load(terms + 4 * statistics + statistic, mask=mask, other=0.0).to(SUM)[None, :]
    for step in range(0, chunk, BLOCK_M):
        m = begin + step + tl.arange(0, BLOCK_M)
        inside = (m < end)[:, None] & mask[None, :]
        where = _offsets(m, c, inner, plane, LAST)
        w = _load(x, where, inside, SUM) - mean
        z = w * k + beta
        if ORDER == "forward":
            result = _activate(z, z, slopes, repeated, mask, SLOPE)
        else:
            g = _activate(z, _load(grad, where, inside, SUM), slopes, repeated, mask, SLOPE)
            if ORDER == "backward":
                result = k * g + (term0 * w + term1)
            else:
                second = _load(h, where, inside, SUM)
                result = _gate(z, k * second + (e * w + f), SLOPE)
                result_x = e * g + (term2 * second + (term3 * w + term4))
                tl.store(out_x + where, result_x.to(out_x.dtype.element_ty), mask=inside)
        tl.store(out + where, result.to(out.dtype.element_ty), mask=inside)


# ---- launchers: what gankern/ops/batch_norm_act.py calls ----------------------------------------------------


def _of_each(*values: Affine) -> bool:
    """Whether any of them are each sample's own."""
    return any(v is not None and v.ndim == 2 for v in values)


def _repeated(values: Affine, x: Tensor) -> Tensor | None:
    """[C] or [N, C] as [N C]."""
    return None if values is None else values.expand(x.shape[:2]).reshape(-1)


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
        blocks = BLOCKS(x.device)
        self.block_c = blocks["CHANNELS"] if self.last else 1
        self.block_m = blocks["TILE"] // self.block_c
        self.blocks = ceil_div(self.channels, self.block_c)
        self.group = self.count // max(self.groups, 1)
        splits = min(ceil_div(self.group, VALUES * self.block_m), PROGRAMS // max(self.blocks * self.groups, 1))
        self.chunk = ceil_div(ceil_div(self.group, max(splits, 1)), self.block_m) * self.block_m
        self.splits = ceil_div(self.group, max(self.chunk, 1))
        self.tile = {"LAST": self.last, "SUM": sum_type(x.dtype)}
        self.tile |= {"BLOCK_M": self.block_m, "BLOCK_C": self.block_c}
        self.tile["num_warps"] = blocks["num_warps"]

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

    def moments(self, eps: float) -> Tensor:
        """Statistics of all samples: their ranges are those of one group."""
        chunk = self.chunk * self.groups
        splits = ceil_div(self.count, chunk)
        partial = self.x.new_empty((splits, 3, self.channels), dtype=torch.float64)
        stats = self.x.new_empty((3, self.statistics), dtype=self.sum)
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
        launch(
            _settle_moments_kernel,
            ceil_div(self.statistics, SETTLED),
            partial,
            stats,
            self.channels,
            self.members,
            splits,
            EPS=eps,
            BLOCK_C=SETTLED,
            num_warps=WARPS,
        )
        return stats

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
    ) -> Tensor:
        """What the results need of each channel's sums; writes the affine gradients, and PReLU's slope's."""
        partial = self.partial(SUMS[order] if self.slopes is None else 3)
        terms = self.x.new_empty((TERMS, self.statistics), dtype=torch.float64)
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
        launch(
            _settle_kernel,
            ceil_div(self.statistics, SETTLED),
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
            BLOCK_C=SETTLED,
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
            **self.tile,
        )

    def backward(
        self, grad: Tensor, stats: Tensor, training: bool, affine: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of x, weight, bias and slope."""
        grad, stats, grad_x = self.like_x(grad), contiguous(stats), torch.empty_like(self.x)
        weight, bias, _ = self.given
        made = self.gradient(affine, weight), self.gradient(affine, bias), self.gradient_of_slopes()
        if self.x.numel():
            terms = None
            if training or any(gradient is not None for gradient in made):
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
            terms = self.terms("double_backward", grad, h, h_weight, stats, training, made, None, None)
            self.apply("double_backward", grad, h, h_weight, h_bias, stats, terms, grad_grad, grad_x)
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
    """The result, and the statistics [3, C]. Launches: 3, or 1 in evaluation."""
    call = _Call(x, weight, bias, negative_slope, slopes=slope)
    y = torch.empty_like(call.x)
    if training:
        stats = call.moments(eps) if call.count else x.new_zeros((3, call.channels), dtype=call.sum)
    else:
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
    """The gradients of x, weight, bias and slope (empty where not wanted, or there is none). Launches: 3, or 1 in
    evaluation without these."""
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
    """The gradients of `backward`'s grad, x and weight (empty where there are none). Launches: 3."""
    call = _Call(x, weight, bias, negative_slope, (grad_grad_weight, grad_grad_bias))
    return call.double_backward(grad_grad_x, grad, stats, training, affine)


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels."""
    vector = torch.empty(32, dtype=sum_dtype(dtype), device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(4, 32, 64, 64, dtype=dtype, device=device).contiguous(memory_format=layout)
        options = True, 0.2, True
        y, stats = forward(x, vector, vector, None, None, True, 1e-5, 0.2)
        backward(y, x, vector, vector, stats, *options)
        forward(x, vector, vector, None, None, True, 1e-5, 0.0, vector)
        forward(x, None, None, vector, vector, False, 1e-5, 0.2)
        backward(y, x, None, None, stats, False, 0.2, False)
        backward(y, x, vector, vector, stats, *options, vector)
        double_backward(y, vector, vector, y, x, vector, vector, stats, *options)
