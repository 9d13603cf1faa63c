"""Minibatch standard deviation in one read and one write of the batch.

Formula (Karras et al. 2018, arXiv 1710.10196, section 3), for the G samples i of a group and each of the P positions of
a feature (a part of the channels, all pixels), D = G or G - 1:

    d_i = x_i - mean_i x_i        sigma = sqrt(sum_i d_i^2 / D + eps)        result = mean over positions of sigma

First order, k = (sum of the result's gradients) / P:     dx_i = g_i + k d_i / (D sigma)
Second order, for the gradient h of dx, q = sum_i h_i d_i:
    gradient of g_i: h_i, of each of the result's gradients: mean of q / (D sigma)
    gradient of x_i: k / (D sigma) (h_i - mean h - d_i q / (D sigma^2))

Split. One kernel for all orders. A program takes BLOCK neighbouring positions of a group as they lie in memory,
channels last or not. Of up to HELD samples a lane asks for all values of its positions at once, and keeps them. Of more
the program passes over them once for the sums, where the forward also copies them; the gradients take another pass, in
which they come from the cache. Sums are of differences from the group's first sample, which lose no more to its size
than the spread allows: variance = sum (x_i - x_0)^2 - (sum (x_i - x_0))^2 / G. The sum of the program's sigma, or of q
/ (D sigma), of its feature goes to memory of its own; a second kernel adds these up in order, each of its programs
again, and writes the channel of the result; where that would be many sums, another one makes them before
(gankern/triton/sums.py). So do those of the result's gradients, 16 parts at most, which each program of the gradient
adds up. No atomics. For channels last tensors a block lies across features, so a program sums one feature after the
other. There a pixel of the result has more channels than one of x and begins anywhere: what is read or written of it
goes by single elements, of neighbouring lanes where it is written.

Traffic. Forward: x is read once, the result written once; gradients: x is read once from memory, and of more than HELD
samples once from the cache. Bound by memory. Sums are in fp32 (fp64 for fp64).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.core.layout import empty, memory_format
from gankern.triton.launch import Blocks, ceil_div, index_type, launch, next_power_of_2, planned, sum_dtype, sum_type
from gankern.triton.sums import sum_of_parts

BLOCKS = Blocks(  # positions of a program, twice as many of half precision
    "minibatch_stddev",
    {"BLOCK": 512, "num_warps": 4},
    {"BLOCK": 1024, "num_warps": 8},
    {"BLOCK": 256, "num_warps": 4},
    {"BLOCK": 128, "num_warps": 1},
)
HELD = 4  # samples of a group whose values a program keeps
FILL = 512  # values of the result a program writes
FACTOR_PARTS = 16  # of the sum of a feature's gradients, at most
AGAIN = 2**21  # parts that all programs together read, each those of its own, at most: some microseconds of a cache
WARPS = 4

# ---- the kernels -------------------------------------------------------------------------------------------


@triton.jit
def _sample(m, i, groups, group_size, STRIDED: tl.constexpr):
    """Sample i of group m."""
    return tl.cast(i * groups + m if STRIDED else m * group_size + i, tl.int64)


@triton.jit
def _places(
    at, channels, pixels, FEATURES: tl.constexpr, C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Of places of a sample: their features, and the places of the result; and how many of these there are."""
    if C > 0:
        channel = at % C
        feature = (channel * 0 if FEATURES == 1 else channel // (C // FEATURES)).to(tl.int32)
        result_at = at + at // C * FEATURES
    else:
        feature = (at * 0 if FEATURES == 1 else at // pixels // (channels // FEATURES)).to(tl.int32)
        result_at = at
    return feature, result_at, (tl.cast(channels, INDEX) + FEATURES) * pixels


@triton.jit
def _factor(k, m, feature, inside, FEATURES: tl.constexpr, PARTS: tl.constexpr):
    """The factors of features, of whose parts each is the sum."""
    if FEATURES == 1:
        return tl.sum(tl.load(k + m * PARTS + tl.arange(0, PARTS)), 0)
    else:
        own = k + (m * FEATURES + feature) * PARTS
        total = tl.load(own, mask=inside, other=0.0)
        for part in tl.static_range(1, PARTS):
            total += tl.load(own + part, mask=inside, other=0.0)
        return total


@triton.jit
def _store_parts(parts, term, m, feature, inside, block, blocks, FEATURES: tl.constexpr):
    """A block's sums of each feature."""
    for f in range(FEATURES):
        part = tl.sum(tl.where(inside & (feature == f), term, 0.0), 0)
        tl.store(parts + (m * FEATURES + f).to(tl.int64) * blocks + block, part)


@triton.jit
def _positions_kernel(
    x,  # [N, channels, pixels], or [N, pixels, channels]
    grad,  # like the result
    h,  # like x
    k,  # [groups, features, PARTS]
    out,  # like the result
    out_x,  # like x
    parts,  # [groups, features, blocks]
    groups,
    group_size,
    channels,
    pixels,
    FEATURES: tl.constexpr,
    STRIDED: tl.constexpr,
    C: tl.constexpr,  # channels, where they are neighbours; else 0
    PARTS: tl.constexpr,
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    UNBIASED: tl.constexpr,  # D is G - 1
    EPS: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,  # what the elements of a sample are counted in
    BLOCK: tl.constexpr,
):
    size = tl.cast(channels, INDEX) * pixels
    blocks = tl.cdiv(size, BLOCK)
    m = (tl.program_id(0) // blocks).to(tl.int32)
    block = tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    feature, result_at, result_size = _places(at, channels, pixels, FEATURES, C, INDEX)

    count = tl.zeros([1], SUM) + group_size
    first = _sample(m, 0, groups, group_size, STRIDED) * size + at
    base = tl.load(x + first, mask=inside, other=0.0).to(SUM)
    sum_d = tl.zeros([BLOCK], SUM)
    squares = tl.zeros([BLOCK], SUM)
    sum_h = tl.zeros([BLOCK], SUM)
    sum_hd = tl.zeros([BLOCK], SUM)
    for i in range(group_size):
        n = _sample(m, i, groups, group_size, STRIDED)
        value = tl.load(x + n * size + at, mask=inside, other=0.0)
        d = value.to(SUM) - base
        sum_d += d
        squares += d * d
        if ORDER == "forward":
            tl.store(out + n * result_size + result_at, value, mask=inside)
        if ORDER == "double_backward":
            tangent = tl.load(h + n * size + at, mask=inside, other=0.0)
            tl.store(out + n * result_size + result_at, tangent, mask=inside)
            sum_h += tangent.to(SUM)
            sum_hd += tangent.to(SUM) * d
    mean = sum_d / count  # less x_0
    mean_h = sum_h / count
    variance = squares - sum_d * mean
    variance = tl.where(variance < 0, 0.0, variance)  # unlike maximum, keeps NaN
    q = sum_hd - mean * sum_h
    divisor = count - 1 if UNBIASED else count
    sigma = tl.sqrt(variance / divisor + tl.full([1], EPS, SUM))  # a plain number would be taken as fp32
    term = sigma
    if ORDER != "forward":
        factor = 1.0 / (divisor * sigma)
        scale = _factor(k, m, feature, inside, FEATURES, PARTS) * factor
        term = q * factor
        slope = term / sigma
        for i in range(group_size):
            n = _sample(m, i, groups, group_size, STRIDED)
            d = tl.load(x + n * size + at, mask=inside, other=0.0).to(SUM) - base - mean
            if ORDER == "backward":
                g = tl.load(grad + n * result_size + result_at, mask=inside, other=0.0).to(SUM)
                result = g + scale * d
            else:
                tangent = tl.load(h + n * size + at, mask=inside, other=0.0).to(SUM)
                result = scale * (tangent - mean_h - d * slope)
            tl.store(out_x + n * size + at, result.to(out_x.dtype.element_ty), mask=inside)
    if ORDER != "backward":
        _store_parts(parts, term, m, feature, inside, block, blocks, FEATURES)


@triton.jit
def _held_kernel(
    x,  # as for _positions_kernel, all of it
    grad,
    h,
    k,
    out,
    out_x,
    parts,
    groups,
    group_size,
    channels,
    pixels,
    FEATURES: tl.constexpr,
    STRIDED: tl.constexpr,
    C: tl.constexpr,  # channels, where they are neighbours; else 0
    PARTS: tl.constexpr,
    ORDER: tl.constexpr,
    UNBIASED: tl.constexpr,
    EPS: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # the samples of a group, or more
    WHOLE: tl.constexpr,  # they are as many, and every block is within a sample: nothing is asked about any value
):
    """A tile of all samples of a group by neighbouring positions, each of which is in one lane."""
    size = tl.cast(channels, INDEX) * pixels
    blocks = tl.cdiv(size, BLOCK)
    m = (tl.program_id(0) // blocks).to(tl.int32)
    block = tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    feature, result_at, result_size = _places(at, channels, pixels, FEATURES, C, INDEX)

    i = tl.arange(0, GROUP)
    n = _sample(m, i, groups, group_size, STRIDED)
    there = (i < group_size)[:, None] & inside[None, :]
    if WHOLE:
        inside = tl.full([BLOCK], True, tl.int1)
        there = tl.full([GROUP, BLOCK], True, tl.int1)
    place = (n * size)[:, None] + at[None, :]
    value = tl.load(x + place, mask=there, other=0.0)
    if ORDER == "forward":
        tl.store((out + n * result_size)[:, None] + result_at[None, :], value, mask=there)
    if ORDER == "double_backward":
        second = tl.load(h + place, mask=there, other=0.0)
        tl.store((out + n * result_size)[:, None] + result_at[None, :], second, mask=there)

    count = tl.zeros([1], SUM) + group_size
    d = value.to(SUM)
    d -= tl.sum(tl.where((i == 0)[:, None], d, 0.0), 0)[None, :]
    d = tl.where(there, d, 0.0)
    d = tl.where(there, d - (tl.sum(d, 0) / count)[None, :], 0.0)
    divisor = count - 1 if UNBIASED else count
    sigma = tl.sqrt(tl.sum(d * d, 0) / divisor + tl.full([1], EPS, SUM))  # a plain number would be taken as fp32
    term = sigma
    if ORDER != "forward":
        factor = 1.0 / (divisor * sigma)
        scale = _factor(k, m, feature, inside, FEATURES, PARTS) * factor
        if ORDER == "backward":
            g = tl.load((grad + n * result_size)[:, None] + result_at[None, :], mask=there, other=0.0)
            result = g.to(SUM) + scale[None, :] * d
        else:
            tangent = second.to(SUM)
            tangent = tl.where(there, tangent - (tl.sum(tangent, 0) / count)[None, :], 0.0)
            term = tl.sum(tangent * d, 0) * factor
            result = scale[None, :] * (tangent - d * (term / sigma)[None, :])
        tl.store(out_x + place, result.to(out_x.dtype.element_ty), mask=there)
    if ORDER != "backward":
        _store_parts(parts, term, m, feature, inside, block, blocks, FEATURES)


@triton.jit
def _factors_kernel(
    grad,  # like the result
    k,  # [groups, features, PARTS]
    groups,
    group_size,
    channels,
    pixels,
    positions,  # of a feature
    part_size,  # of a feature's gradients, those of the group's samples one behind the other
    FEATURES: tl.constexpr,
    STRIDED: tl.constexpr,
    LAST: tl.constexpr,
    PARTS: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,  # what a feature's gradients are counted in, with FILL of them behind the last one
    FILL: tl.constexpr,
):
    """A part of the sum of a feature's gradients over the group and its pixels, over its positions."""
    m = tl.program_id(0) // (FEATURES * PARTS)
    feature = tl.program_id(0) // PARTS % FEATURES
    part = tl.program_id(0) % PARTS
    count = tl.cast(pixels, INDEX) * group_size
    result_size = tl.cast(channels + FEATURES, tl.int64) * pixels
    total = tl.zeros([FILL], SUM)
    for start in range(0, part_size, FILL):
        e = tl.cast(part, INDEX) * part_size + start + tl.arange(0, FILL)
        i = e // pixels
        p = (e - i * pixels).to(tl.int64)
        at = p * (channels + FEATURES) + channels + feature
        if not LAST:
            at = tl.cast(channels + feature, tl.int64) * pixels + p
        n = _sample(m, i, groups, group_size, STRIDED)
        total += tl.load(grad + n * result_size + at, mask=e < count, other=0.0).to(SUM)
    tl.store(k + tl.program_id(0), tl.sum(total, 0) / positions)


@triton.jit
def _channel_kernel(
    parts,  # [groups, features, blocks]: parts of sums over positions
    out,
    groups,
    group_size,
    channels,
    pixels,
    positions,
    blocks,
    FEATURES: tl.constexpr,
    STRIDED: tl.constexpr,
    LAST: tl.constexpr,
    SUM: tl.constexpr,
    FILL: tl.constexpr,
):
    """Writes the result's last channels. Each program adds up the parts of its own, which are few."""
    size = tl.cast(pixels, tl.int64) * FEATURES  # of the channel
    tiles = tl.cdiv(size, FILL)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles).to(tl.int64) * FILL + tl.arange(0, FILL)
    inside = at < size
    m = n % groups if STRIDED else n // group_size
    feature = at % FEATURES if LAST else at // pixels
    value = tl.zeros([FILL], SUM)
    for f in range(FEATURES):
        total = tl.zeros([FILL], SUM)
        for start in range(0, blocks, FILL):
            block = start + tl.arange(0, FILL)
            own = parts + (m * FEATURES + f) * blocks
            total += tl.load(own + block, mask=block < blocks, other=0.0)
        value = tl.where(feature == f, tl.sum(total, 0) / positions, value)
    before = tl.cast(channels, tl.int64) * pixels
    to = at // FEATURES * (channels + FEATURES) + channels + feature if LAST else before + at
    tl.store(out + n * (before + size) + to, value.to(out.dtype.element_ty), mask=inside)


# ---- launchers: what gankern/ops/minibatch_stddev.py calls ---------------------------------------------------


class _Batch:
    """A batch and its groups, as the kernels are told of them."""

    def __init__(self, x: Tensor, group_size: int, num_channels: int, strided: bool) -> None:
        self.layout = memory_format(x)
        self.x = self.like(x)
        self.groups, self.channels, self.pixels = len(x) // group_size, x.shape[1], math.prod(x.shape[2:])
        self.sizes = self.groups, group_size, self.channels, self.pixels
        self.positions = self.channels // num_channels * self.pixels  # of a feature
        self.last = self.layout != torch.contiguous_format
        self.constants = {"FEATURES": num_channels, "STRIDED": strided}
        gradients = group_size * self.pixels  # of a feature
        self.factor_parts = min(FACTOR_PARTS, next_power_of_2(ceil_div(gradients, 2 * FILL)))
        self.part_size = ceil_div(ceil_div(gradients, self.factor_parts), FILL) * FILL
        self.features = num_channels
        self.sum, self.wide = sum_type(x.dtype), sum_dtype(x.dtype)

    def like(self, y: Tensor) -> Tensor:
        """y as x is gone through."""
        return y.contiguous(memory_format=self.layout)


def _launch(
    order: str,
    batch: _Batch,
    grad: Tensor | None,
    h: Tensor | None,
    k: Tensor | None,
    out: Tensor | None,
    out_x: Tensor | None,
    unbiased: bool,
    eps: float,
) -> None:
    x, features = batch.x, batch.features
    tile = dict(BLOCKS(x.device))
    tile["BLOCK"] *= max(1, 4 // x.element_size())  # as many bytes of half precision
    blocks = ceil_div(batch.channels * batch.pixels, tile["BLOCK"])
    parts = None
    if order != "backward":
        parts = x.new_empty((batch.groups, features, blocks), dtype=batch.wide)
    held = batch.sizes[1] <= HELD
    group = next_power_of_2(batch.sizes[1])
    whole = group == batch.sizes[1] and batch.channels * batch.pixels % tile["BLOCK"] == 0
    launch(
        _held_kernel if held else _positions_kernel,
        batch.groups * blocks,
        x,
        grad,
        h,
        k,
        out,
        out_x,
        parts,
        *batch.sizes,
        **batch.constants,
        C=batch.channels if batch.last else 0,
        PARTS=batch.factor_parts,
        ORDER=order,
        UNBIASED=unbiased,
        EPS=eps,
        SUM=batch.sum,
        INDEX=index_type((batch.channels + features) * batch.pixels),
        BLOCK=tile["BLOCK"],
        **({"GROUP": group, "WHOLE": whole} if held else {}),
        num_warps=tile["num_warps"],
    )
    if parts is None:
        return
    programs = len(x) * ceil_div(batch.pixels * features, FILL)
    if programs * features * blocks > AGAIN:
        parts = sum_of_parts(parts.view(1, batch.groups * features, blocks), batch.wide)
        blocks = 1
    launch(
        _channel_kernel,
        programs,
        parts,
        out,
        *batch.sizes,
        batch.positions,
        blocks,
        **batch.constants,
        LAST=batch.last,
        SUM=batch.sum,
        FILL=FILL,
        num_warps=WARPS,
    )


def _factors(grad: Tensor, batch: _Batch) -> Tensor:
    """k, of a gradient that lies as x does."""
    k = grad.new_empty((batch.groups, batch.features, batch.factor_parts), dtype=batch.wide)
    launch(
        _factors_kernel,
        k.numel(),
        grad,
        k,
        *batch.sizes,
        batch.positions,
        batch.part_size,
        **batch.constants,
        LAST=batch.last,
        PARTS=batch.factor_parts,
        SUM=batch.sum,
        INDEX=index_type(batch.factor_parts * batch.part_size),
        FILL=FILL,
        num_warps=WARPS,
    )
    return k


@planned
def forward(x: Tensor, group_size: int, num_channels: int, strided: bool, unbiased: bool, eps: float) -> Tensor:
    """Launches: 2, and one for parts that are many."""
    out = empty(x, x.shape[1] + num_channels)
    if x.numel():
        batch = _Batch(x, group_size, num_channels, strided)
        _launch("forward", batch, None, None, None, out, None, unbiased, eps)
    return out


@planned
def backward(
    grad: Tensor, x: Tensor, group_size: int, num_channels: int, strided: bool, unbiased: bool, eps: float
) -> Tensor:
    """Launches: 2."""
    out = empty(x)
    if x.numel():
        batch = _Batch(x, group_size, num_channels, strided)
        grad = batch.like(grad)
        _launch("backward", batch, grad, None, _factors(grad, batch), None, out, unbiased, eps)
    return out


@planned
def double_backward(
    grad_grad_x: Tensor,
    grad: Tensor,
    x: Tensor,
    group_size: int,
    num_channels: int,
    strided: bool,
    unbiased: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launches: 3, and one for parts that are many."""
    grad_grad, grad_x = empty(x, x.shape[1] + num_channels), empty(x)
    if x.numel():
        batch = _Batch(x, group_size, num_channels, strided)
        k = _factors(batch.like(grad), batch)
        _launch("double_backward", batch, None, batch.like(grad_grad_x), k, grad_grad, grad_x, unbiased, eps)
    return grad_grad, grad_x


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels."""
    for layout in (torch.contiguous_format, torch.channels_last):
        for samples, group_size, features, pixels in ((8, 4, 1, 32), (8, 4, 2, 32), (6, 3, 1, 16), (5, 5, 2, 32)):
            x = torch.empty(samples, 6, pixels, pixels, dtype=dtype, device=device).contiguous(memory_format=layout)
            options = group_size, features, True, False, 1e-8
            y = forward(x, *options)
            backward(y, x, *options)
            double_backward(x, y, x, *options)
