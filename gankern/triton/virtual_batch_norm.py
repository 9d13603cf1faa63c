"""Virtual batch norm with a leaky ReLU behind it, and the statistics of a reference batch.

Formulas: csrc/cpu/virtual_batch_norm.cpp, whose names the kernels use (Salimans et al. 2016, arXiv 1606.03498, section
3.6). In short: with mu and r = 1 / sqrt(V + eps) of an example and channel, y = w (x - mu) r + b; every order is sums
over the pixels, then values that are linear in what is read, with coefficients a channel.

Split. A program takes an example and a block of channels, and passes over their pixels twice, in tiles [CHANNELS,
PIXELS]: sums, then values, backwards: what was read last is in the caches still. Between the two it computes the
coefficients, in fp64: a few operations a channel. Element (c, p) lies at c * channel_stride + p * pixel_stride: one
kernel for both memory formats, with tiles that are long in the direction in which memory is. The sums over examples go
to memory [4, N, C], and a second kernel adds them up in order.

In channels_last a lane reads up to eight channels at once. So that it does not have the coefficients of all of them in
fp64, of which there are more than registers, the sums of a program, and then its coefficients, go by way of memory,
where each lane finds those of one channel.

Traffic. The second pass comes from a cache where what all programs read that run at once fits there: 1 read and 1 write
forward, 2 and 1 backward, 3 and 2 double backward. In channels_last a program of a large map therefore has as few
channels as fill what memory gives at once, 32 bytes, and asks for DEEP times 16 bytes a lane. Bound by memory. Each
lane of a tile adds up its pixels in fp32 (fp64 for fp64), of x - K with the nearest float K to the mean; a channel's
lanes are added up in fp64, once, behind the loop.
"""

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.core.layout import empty, memory_format
from gankern.triton.launch import (
    Blocks,
    ceil_div,
    contiguous,
    index_type,
    launch,
    next_power_of_2,
    planned,
    sum_dtype,
    sum_type,
)

WARPS = 4  # where neighbours are of one channel
TILE = 1024  # values of a tile there
CHANNELS = 64  # neighbouring channels of a program at most
SHARE = 2**15  # bytes of a map that a program of fewer channels has at most
LARGE = 2**26  # bytes of a map of which the next operation finds nothing in a cache
SETTLED = 32  # channels of a program that adds up
MEGABYTE = 2**20
FEWEST = 128  # programs that fill a GPU with 16-byte loads
# In channels_last. ROW: bytes of a program's neighbouring channels at least, of which fewer make more programs, each of
# which passes over all pixels of an example; DEEP: how many 16 bytes of a map a lane asks for at once in sums; AT_ONCE:
# megabytes that all programs of the first two orders together read twice at a time, 0 for as many as the device takes.
BLOCKS = Blocks(
    "virtual_batch_norm",
    {"ROW": 32, "DEEP": 4, "num_warps": 8, "AT_ONCE": 48},
    {"ROW": 32, "DEEP": 4, "num_warps": 8, "AT_ONCE": 32},
    {"ROW": 32, "DEEP": 4, "num_warps": 8, "AT_ONCE": 96},
    {"ROW": 32, "DEEP": 2, "num_warps": 8, "AT_ONCE": 48},
    {"ROW": 32, "DEEP": 4, "num_warps": 4, "AT_ONCE": 0},
    {"ROW": 64, "DEEP": 4, "num_warps": 8, "AT_ONCE": 64},
    {"ROW": 256, "DEEP": 2, "num_warps": 4, "AT_ONCE": 0},
)

# ---- the kernels -------------------------------------------------------------------------------------------


@triton.jit
def _own(task, channels, pixels, channel_stride, CHANNELS: tl.constexpr):
    """A task's sample, its channels, and where these begin."""
    blocks = tl.cdiv(channels, CHANNELS)
    n = (task // blocks).to(tl.int64)
    c = task % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return n, c, n * channels * pixels + c[:, None].to(tl.int64) * channel_stride


@triton.jit
def _load(map_, at, inside, SUM: tl.constexpr, LAST_USE: tl.constexpr = False):
    if LAST_USE:
        return tl.load(map_ + at, mask=inside, other=0.0, eviction_policy="evict_first").to(SUM)
    return tl.load(map_ + at, mask=inside, other=0.0).to(SUM)


@triton.jit
def _store(out, at, values, inside, LAST_USE: tl.constexpr):
    if LAST_USE:
        tl.store(out + at, values.to(out.dtype.element_ty), mask=inside, eviction_policy="evict_first")
    else:
        tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _channel(vector, c, channels):
    """A channel's values, in fp64."""
    return tl.load(vector + c, mask=c < channels, other=0.0).to(tl.float64)


@triton.jit
def _over_pixels(sums):
    """Sums of a tile's lanes, in fp64."""
    return tl.sum(sums.to(tl.float64), 1)


@triton.jit
def _activate(y, value, slope, SLOPE: tl.constexpr):
    """A slope of 0 makes 0 of infinities too."""
    return tl.where(y <= 0, 0.0, value) if SLOPE == 0 else tl.where(y > 0, value, slope * value)


@triton.jit
def _normalize(
    task, x, grad, h, ref_mean, ref_mean_square, weight, bias, h_mean, h_mean_square, h_weight, h_bias, saved, out,
    out_x, sums, parts, terms, count, channels, pixels, channel_stride, pixel_stride, ORDER: tl.constexpr,
    SHARE: tl.constexpr, EPS: tl.constexpr, SLOPE: tl.constexpr, NEED_GRAD: tl.constexpr, NEED_X: tl.constexpr,
    LAST_USE: tl.constexpr, SUM: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pixels = tl.cast(pixels, INDEX)
    n, c, start = _own(task, channels, pixels, channel_stride, CHANNELS)
    own = tl.full([1], SHARE, tl.float64)  # plain numbers would be taken as fp32
    slope = tl.full([1, 1], SLOPE, SUM)
    rest = 1.0 - own
    m = _channel(ref_mean, c, channels)
    m2 = _channel(ref_mean_square, c, channels)
    t = tl.where(m2 - m * m < 0, 0.0, 1.0).to(tl.float64)
    line = tl.cast(count, tl.int64) * channels
    mu_at = saved + n * channels + c
    r_at = mu_at + line
    if parts is not None:
        part = parts + n * channels + c
        term = terms + n * channels + c
    if ORDER == "forward":
        V = rest * t * (m2 - m * m)
        mu = m
        if SHARE > 0:
            K = m.to(SUM)
            sums_d = tl.zeros([CHANNELS, PIXELS], SUM)
            squares = tl.zeros([CHANNELS, PIXELS], SUM)
            for begin in range(0, pixels, PIXELS * DEEP):
                for tile in tl.static_range(DEEP):
                    p = begin + tile * PIXELS + tl.arange(0, PIXELS)
                    inside = (c < channels)[:, None] & (p < pixels)[None, :]
                    d = _load(x, start + p[None, :].to(tl.int64) * pixel_stride, inside, SUM) - K[:, None]
                    d = tl.where(inside, d, 0.0)
                    sums_d += d
                    squares += d * d
            total = _over_pixels(sums_d)
            square = _over_pixels(squares)
            if parts is not None:
                tl.store(part, total, mask=c < channels)
                tl.store(part + line, square, mask=c < channels)
                tl.debug_barrier()
                total = tl.load(part, mask=c < channels, other=0.0)
                square = tl.load(part + line, mask=c < channels, other=0.0)
            mean_d = total / pixels
            difference = mean_d + (K.to(tl.float64) - m)
            V += own * (square / pixels - mean_d * mean_d) + own * rest * difference * difference
            mu = m + own * difference
        r = 1.0 / tl.sqrt(V + tl.full([1], EPS, tl.float64))
        tl.store(mu_at, mu, mask=c < channels)
        tl.store(r_at, r, mask=c < channels)
    else:
        mu = tl.load(mu_at, mask=c < channels, other=0.0)
        r = tl.load(r_at, mask=c < channels, other=0.0)
    w = r if weight is None else _channel(weight, c, channels) * r
    K = mu.to(SUM)
    beside = mu - K.to(tl.float64)
    scale = w.to(SUM)
    b = tl.zeros([CHANNELS], tl.float64) if bias is None else _channel(bias, c, channels)
    shift = (b - beside * w).to(SUM)
    if parts is not None:
        tl.store(term, K, mask=c < channels)
        tl.store(term + line, scale, mask=c < channels)
        tl.store(term + 2 * line, shift, mask=c < channels)
        tl.debug_barrier()
        K = tl.load(term, mask=c < channels, other=0.0)
        scale = tl.load(term + line, mask=c < channels, other=0.0)
        shift = tl.load(term + 2 * line, mask=c < channels, other=0.0)

    if ORDER != "forward":
        sums_g = tl.zeros([CHANNELS, PIXELS], SUM)
        sums_gd = tl.zeros([CHANNELS, PIXELS], SUM)
        sums_h = tl.zeros([CHANNELS, PIXELS], SUM)
        sums_hd = tl.zeros([CHANNELS, PIXELS], SUM)
        sums_hg = tl.zeros([CHANNELS, PIXELS], SUM)
        for begin in range(0, pixels, PIXELS * DEEP):
            for tile in tl.static_range(DEEP):
                p = begin + tile * PIXELS + tl.arange(0, PIXELS)
                inside = (c < channels)[:, None] & (p < pixels)[None, :]
                at = start + p[None, :].to(tl.int64) * pixel_stride
                d = tl.where(inside, _load(x, at, inside, SUM) - K[:, None], 0.0)
                g = _activate(d * scale[:, None] + shift[:, None], _load(grad, at, inside, SUM), slope, SLOPE)
                sums_g += g
                sums_gd += g * d
                if ORDER == "double_backward":
                    tangent = tl.zeros_like(g) if h is None else _load(h, at, inside, SUM)
                    sums_h += tangent
                    sums_hd += tangent * d
                    sums_hg += tangent * g
        P = _over_pixels(sums_g)
        gd = _over_pixels(sums_gd)
        H = _over_pixels(sums_h)
        hd = _over_pixels(sums_hd)
        Hg = _over_pixels(sums_hg)
        if parts is not None:
            tl.store(part, P, mask=c < channels)
            tl.store(part + line, gd, mask=c < channels)
            if ORDER == "double_backward":
                tl.store(part + 2 * line, H, mask=c < channels)
                tl.store(part + 3 * line, hd, mask=c < channels)
                tl.store(part + 4 * line, Hg, mask=c < channels)
            tl.debug_barrier()
            P = tl.load(part, mask=c < channels, other=0.0)
            gd = tl.load(part + line, mask=c < channels, other=0.0)
            if ORDER == "double_backward":
                H = tl.load(part + 2 * line, mask=c < channels, other=0.0)
                hd = tl.load(part + 3 * line, mask=c < channels, other=0.0)
                Hg = tl.load(part + 4 * line, mask=c < channels, other=0.0)
        share = own / pixels
        U = r * (gd - beside * P)
        slope_m = mu - (1.0 - t) * m
        if ORDER == "backward":
            d_mu = -w * P
            d_V = -0.5 * w * r * U
            of_d = -w * r * share * U
            c3 = (-w * share * P - of_d * beside).to(SUM)
            c4 = of_d.to(SUM)
            direct = tl.zeros([CHANNELS], tl.float64)
            d_weight = U
        else:
            Hz = r * (hd - beside * H)
            none = tl.zeros([CHANNELS], tl.float64)
            hm = none if h_mean is None else _channel(h_mean, c, channels)
            hm2 = none if h_mean_square is None else _channel(h_mean_square, c, channels)
            hw = none if h_weight is None else _channel(h_weight, c, channels)
            hb = none if h_bias is None else _channel(h_bias, c, channels)
            km = rest * hm
            kV = rest * (t * hm2 - 2 * slope_m * hm)
            alpha = hb - km * w - w * share * H
            delta = hw - 0.5 * kV * w * r - w * share * Hz
            q = Hg - share * (P * H + U * Hz)
            of_h = -w * share * U
            direct = rest * hm * w * r * U
            d_mu = -r * (delta * P + of_h * H) + direct
            d_V = -0.5 * r * r * (w * q - km * w * P - kV * w * r * U + delta * U + of_h * Hz)
            c3 = (alpha - delta * r * beside).to(SUM)
            c4 = (delta * r).to(SUM)
            c6 = (r * of_h).to(SUM)
            c7 = (share * (d_mu - 2 * d_V * beside)).to(SUM)
            c8 = (share * 2 * d_V).to(SUM)
            d_weight = r * q - km * r * P - 0.5 * kV * r * r * U
        to = sums + n * channels + c
        tl.store(to, rest * (d_mu - 2 * slope_m * d_V) - (1.0 - t) * direct, mask=c < channels)
        tl.store(to + line, rest * t * d_V, mask=c < channels)
        tl.store(to + 2 * line, d_weight, mask=c < channels)
        tl.store(to + 3 * line, P, mask=c < channels)
        if parts is not None:
            tl.store(term + 3 * line, c3, mask=c < channels)
            tl.store(term + 4 * line, c4, mask=c < channels)
            if ORDER == "double_backward":
                tl.store(term + 5 * line, c6, mask=c < channels)
                tl.store(term + 6 * line, c7, mask=c < channels)
                tl.store(term + 7 * line, c8, mask=c < channels)
            tl.debug_barrier()
            c3 = tl.load(term + 3 * line, mask=c < channels, other=0.0)
            c4 = tl.load(term + 4 * line, mask=c < channels, other=0.0)
            if ORDER == "double_backward":
                c6 = tl.load(term + 5 * line, mask=c < channels, other=0.0)
                c7 = tl.load(term + 6 * line, mask=c < channels, other=0.0)
                c8 = tl.load(term + 7 * line, mask=c < channels, other=0.0)

    if NEED_X or NEED_GRAD:
        end = (pixels - 1) // WIDE * WIDE
        for back in range(0, pixels, WIDE):
            p = end - back + tl.arange(0, WIDE)
            inside = (c < channels)[:, None] & (p < pixels)[None, :]
            at = start + p[None, :].to(tl.int64) * pixel_stride
            d = _load(x, at, inside, SUM, LAST_USE) - K[:, None]
            y = d * scale[:, None] + shift[:, None]
            if ORDER == "forward":
                _store(out, at, _activate(y, y, slope, SLOPE), inside, LAST_USE)
            else:
                g = _activate(y, _load(grad, at, inside, SUM, LAST_USE), slope, SLOPE)
                if ORDER == "backward":
                    result = scale[:, None] * g + (d * c4[:, None] + c3[:, None])
                else:
                    tangent = tl.zeros_like(g) if h is None else _load(h, at, inside, SUM, LAST_USE)
                    if NEED_GRAD:
                        of_g = _activate(y, scale[:, None] * tangent + (d * c4[:, None] + c3[:, None]), slope, SLOPE)
                        _store(out, at, of_g, inside, LAST_USE)
                    result = c4[:, None] * g + c6[:, None] * tangent + (d * c8[:, None] + c7[:, None])
                if NEED_X:
                    _store(out_x, at, result, inside, LAST_USE)


@triton.jit
def _normalize_kernel(
    x,
    grad,
    h,  # or None, for zeros
    ref_mean,  # [C]; None where there is none
    ref_mean_square,
    weight,
    bias,
    h_mean,
    h_mean_square,
    h_weight,
    h_bias,
    saved,  # [2, N, C]: mu and r
    out,
    out_x,
    sums,  # [4, N, C]
    parts,  # [5, N, C], or None: what a program hands from all of its lanes to each
    terms,  # [8, N, C], or None: and back
    count,
    channels,
    pixels,
    channel_stride,
    pixel_stride,
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    SHARE: tl.constexpr,  # c
    EPS: tl.constexpr,
    SLOPE: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    NEED_X: tl.constexpr,
    LAST_USE: tl.constexpr,  # what is read again and written may leave the caches first
    IN_TURN: tl.constexpr,  # a program has several blocks of channels, one after the other
    SUM: tl.constexpr,
    INDEX: tl.constexpr,  # what pixels are counted in, with a tile behind the last one
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    DEEP: tl.constexpr,  # tiles that are added up at a time
    WIDE: tl.constexpr,  # pixels of a tile of values
):
    if IN_TURN:
        for task in range(tl.program_id(0), count * tl.cdiv(channels, CHANNELS), tl.num_programs(0)):
            _normalize(
                task, x, grad, h, ref_mean, ref_mean_square, weight, bias, h_mean, h_mean_square, h_weight, h_bias,
                saved, out, out_x, sums, parts, terms, count, channels, pixels, channel_stride, pixel_stride, ORDER,
                SHARE, EPS, SLOPE, NEED_GRAD, NEED_X, LAST_USE, SUM, INDEX, CHANNELS, PIXELS, DEEP, WIDE,
            )  # fmt: skip
    else:
        _normalize(
            tl.program_id(0), x, grad, h, ref_mean, ref_mean_square, weight, bias, h_mean, h_mean_square, h_weight,
            h_bias, saved, out, out_x, sums, parts, terms, count, channels, pixels, channel_stride, pixel_stride, ORDER,
            SHARE, EPS, SLOPE, NEED_GRAD, NEED_X, LAST_USE, SUM, INDEX, CHANNELS, PIXELS, DEEP, WIDE,
        )  # fmt: skip


@triton.jit
def _nearest(x, moments, c, channels, channel_stride, SUM: tl.constexpr):
    """K, what a channel's values are taken relative to: the mean, or without moments the channel's first value."""
    if moments is None:
        K = tl.load(x + c.to(tl.int64) * channel_stride, mask=c < channels, other=0.0).to(SUM)
    else:
        K = _channel(moments, c, channels).to(SUM)
    return K


@triton.jit
def _sums_kernel(
    x,
    h,  # like x; None for x itself less K
    moments,  # [2, C], or None
    sums,  # [2, N, C]: of h and of h (x - K)
    count,
    channels,
    pixels,
    channel_stride,
    pixel_stride,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    DEEP: tl.constexpr,
):
    pixels = tl.cast(pixels, INDEX)
    n, c, start = _own(tl.program_id(0), channels, pixels, channel_stride, CHANNELS)
    K = _nearest(x, moments, c, channels, channel_stride, SUM)
    total = tl.zeros([CHANNELS, PIXELS], SUM)
    product = tl.zeros([CHANNELS, PIXELS], SUM)
    for begin in range(0, pixels, PIXELS * DEEP):
        for tile in tl.static_range(DEEP):
            p = begin + tile * PIXELS + tl.arange(0, PIXELS)
            inside = (c < channels)[:, None] & (p < pixels)[None, :]
            at = start + p[None, :].to(tl.int64) * pixel_stride
            d = tl.where(inside, _load(x, at, inside, SUM) - K[:, None], 0.0)
            value = d if h is None else _load(h, at, inside, SUM)
            total += value
            product += value * d
    to = sums + n * channels + c
    tl.store(to, _over_pixels(total), mask=c < channels)
    tl.store(to + tl.cast(count, tl.int64) * channels, _over_pixels(product), mask=c < channels)


@triton.jit
def _over_examples(sums, c, count, channels):
    """Sums of [N, C] over the examples, in their order."""
    total = tl.zeros_like(c).to(tl.float64)
    for n in range(count):
        total += tl.load(sums + tl.cast(n, tl.int64) * channels + c, mask=c < channels, other=0.0)
    return total


@triton.jit
def _settle_sums_kernel(
    x,
    moments,  # as for _sums_kernel
    sums,
    out,  # [2, C]: without moments these, and else the gradient of their gradient
    count,
    channels,
    values,  # of a channel
    channel_stride,
    SUM: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = _over_examples(sums, c, count, channels) / values
    second = _over_examples(sums + tl.cast(count, tl.int64) * channels, c, count, channels) / values
    K = _nearest(x, moments, c, channels, channel_stride, SUM).to(tl.float64)
    if moments is None:
        variance = second - first * first
        first += K
        second = tl.where(variance < 0, 0.0, variance) + first * first
    else:
        second = 2 * (second + K * first)
    tl.store(out + c, first, mask=c < channels)
    tl.store(out + channels + c, second, mask=c < channels)


@triton.jit
def _store_total(sums, out, c, count, channels):
    total = _over_examples(sums, c, count, channels)
    if out.dtype.element_ty.primitive_bitwidth < 32:  # for which Triton's interpreter has no way from fp64
        total = total.to(tl.float32)
    tl.store(out + c, total.to(out.dtype.element_ty), mask=c < channels)


@triton.jit
def _settle_gradients_kernel(
    sums,  # [4, N, C]
    grad_mean,  # [C], or None where nobody asks; so the others
    grad_mean_square,
    grad_weight,
    grad_bias,
    count,
    channels,
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    step = tl.cast(count, tl.int64) * channels
    if grad_mean is not None:
        _store_total(sums, grad_mean, c, count, channels)
    if grad_mean_square is not None:
        _store_total(sums + step, grad_mean_square, c, count, channels)
    if grad_weight is not None:
        _store_total(sums + 2 * step, grad_weight, c, count, channels)
    if grad_bias is not None:
        _store_total(sums + 3 * step, grad_bias, c, count, channels)


@triton.jit
def _affine_kernel(
    x,
    grad,  # [2, C], of the statistics
    moments,  # [2, C], or None
    out,
    channels,
    pixels,
    values,  # of a channel
    channel_stride,
    pixel_stride,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """x a + b, in terms of x - K where there are moments; without them b is 0. A tile a program."""
    pixels = tl.cast(pixels, INDEX)
    parts = tl.cdiv(pixels, PIXELS)
    blocks = tl.cdiv(channels, CHANNELS)
    task = tl.program_id(0) // parts
    n = (task // blocks).to(tl.int64)
    c = task % blocks * CHANNELS + tl.arange(0, CHANNELS)
    p = tl.program_id(0) % parts * PIXELS + tl.arange(0, PIXELS)
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    at = n * channels * pixels + c[:, None].to(tl.int64) * channel_stride + p[None, :].to(tl.int64) * pixel_stride
    value = _load(x, at, inside, SUM)
    scale = 2 * _channel(grad + channels, c, channels) / values
    if moments is None:
        value = value * scale.to(SUM)[:, None]
    else:
        K = _channel(moments, c, channels).to(SUM)
        shift = _channel(grad, c, channels) / values + scale * K.to(tl.float64)
        value = (value - K[:, None]) * scale.to(SUM)[:, None] + shift.to(SUM)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


# ---- launchers: what gankern/ops/virtual_batch_norm.py calls -------------------------------------------------


class _Map:
    """How a feature map is gone through: sizes, strides and the shape of a tile."""

    def __init__(self, x: Tensor) -> None:
        self.layout = memory_format(x)
        self.x = self.like(x)
        self.count, self.channels = x.shape[:2]
        self.pixels = math.prod(x.shape[2:])
        self.last = self.layout != torch.contiguous_format or self.pixels == 1
        self.strides = (1, self.channels) if self.last else (self.pixels, 1)
        self.sizes = (self.count, self.channels, self.pixels, *self.strides)
        self.sum, self.index = sum_type(x.dtype), index_type(self.pixels)
        self.wide = sum_dtype(x.dtype)
        if self.last:
            size, blocks = x.element_size(), BLOCKS(x.device)
            self.warps = blocks["num_warps"]
            row = max(blocks["ROW"] // size, next_power_of_2(SHARE // (self.pixels * size) + 1) // 2)
            channels = min(row, CHANNELS, next_power_of_2(self.channels))
            values = 32 * self.warps * 16 // size  # of which each lane moves 16 bytes
            pixels = min(next_power_of_2(self.pixels), max(1, values // channels))
            self.at_once = blocks["AT_ONCE"] * MEGABYTE
            self.deep = min(blocks["DEEP"], next_power_of_2(ceil_div(self.pixels, pixels)))
        else:
            self.warps = WARPS
            pixels = min(next_power_of_2(self.pixels), TILE)
            channels = min(next_power_of_2(self.channels), TILE // pixels)
            self.deep, self.at_once = 1, 0
        self.tile = {"CHANNELS": channels, "PIXELS": pixels}
        self.programs = self.count * ceil_div(self.channels, channels)

    def programs_of(self, maps: int) -> int:
        """How many programs read so many maps twice: as many as have room in the second-level cache, and take turns;
        one for each block of channels where these would not fill the device."""
        share = self.tile["CHANNELS"] * self.pixels * self.x.element_size() * maps
        programs = self.at_once // share
        return min(programs, self.programs) if programs >= FEWEST else self.programs

    @overload
    def like(self, y: Tensor) -> Tensor: ...
    @overload
    def like(self, y: None) -> None: ...
    def like(self, y: Tensor | None) -> Tensor | None:
        return None if y is None else y.contiguous(memory_format=self.layout)


def _launch(
    order: str,
    map_: _Map,
    grad: Tensor | None,
    h: Tensor | None,
    vectors: Sequence[Tensor | None],
    seconds: Sequence[Tensor | None],
    saved: Tensor,
    out: Tensor | None,
    out_x: Tensor | None,
    sums: Tensor | None,
    share: float,
    eps: float,
    slope: float,
) -> None:
    parts = terms = None
    maps = 1 + (grad is not None) + (h is not None)
    programs = map_.programs if order == "double_backward" else map_.programs_of(maps)
    if map_.last:
        parts = map_.x.new_empty((5, map_.count, map_.channels), dtype=torch.float64)
        terms = map_.x.new_empty((8, map_.count, map_.channels), dtype=map_.wide)
    launch(
        _normalize_kernel,
        programs,
        map_.x,
        grad,
        h,
        *(contiguous(v) for v in vectors),
        *(contiguous(v) for v in seconds),
        saved,
        out,
        out_x,
        sums,
        parts,
        terms,
        *map_.sizes,
        ORDER=order,
        SHARE=share,
        EPS=eps,
        SLOPE=slope,
        NEED_GRAD=out is not None,
        NEED_X=out_x is not None,
        LAST_USE=map_.last and map_.x.numel() * map_.x.element_size() > LARGE,
        IN_TURN=programs < map_.programs,
        SUM=map_.sum,
        INDEX=map_.index,
        **map_.tile,
        DEEP=map_.deep,
        # A lane has the coefficients of all channels that it reads at once, of which there are eight in the last order.
        WIDE=map_.tile["PIXELS"] * (1 if order == "double_backward" else min(map_.deep, 2)),
        num_warps=map_.warps,
    )


def _sums_of_gradients(x: Tensor) -> Tensor:
    """[4, N, C], which the kernel writes where there is something to sum up."""
    sums = x.new_empty((4, *x.shape[:2]), dtype=torch.float64)
    return sums if x.numel() else sums.zero_()


def _channel_gradients(sums: Tensor, x: Tensor, *vectors: Tensor | None) -> list[Tensor]:
    """Of reference mean and mean of squares, weight, and bias where that is given: empty for None."""
    grads = [None if v is None else v.new_empty(v.shape) for v in vectors]
    outs = [*grads, None] if len(grads) == 3 else grads
    count, channels = x.shape[:2]
    launch(
        _settle_gradients_kernel,
        ceil_div(channels, SETTLED),
        sums,
        *outs,
        count,
        channels,
        CHANNELS=SETTLED,
        num_warps=1,
    )
    return [x.new_empty(0) if grad is None else grad for grad in grads]


@planned
def forward(
    x: Tensor,
    ref_mean: Tensor,
    ref_mean_square: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    own_share: float,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """Launches: 1."""
    out, saved = empty(x), x.new_empty((2, *x.shape[:2]), dtype=torch.float64)
    if x.numel():
        map_, vectors = _Map(x), (ref_mean, ref_mean_square, weight, bias)
        rest = (own_share, eps, negative_slope)
        _launch("forward", map_, None, None, vectors, (None,) * 4, saved, out, None, None, *rest)
    return out, saved


def _gradients(
    order: str,
    grad: Tensor,
    h: Tensor | None,
    seconds: Sequence[Tensor | None],
    x: Tensor,
    given: Sequence[Any],
    need_grad: bool,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of grad (None where nobody asked) and of x (empty), and sums for those of the channels."""
    *vectors, saved, share, eps, slope = given
    grad_grad = empty(x) if need_grad else None
    grad_x = empty(x) if need_x else x.new_empty(0)
    sums = _sums_of_gradients(x)
    if x.numel():
        map_ = _Map(x)
        outs = grad_grad, grad_x if need_x else None
        _launch(order, map_, map_.like(grad), map_.like(h), vectors, seconds, saved, *outs, sums, share, eps, slope)
    return grad_grad, grad_x, sums


# The arguments of both: the two moments of the reference, weight, bias, what the forward saved, own share, eps,
# negative slope, and what is asked for.


@planned
def backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Launches: 2, or 1 without the channels' gradients."""
    *given, need_x, need_channels = arguments
    _, grad_x, sums = _gradients("backward", grad, None, (None,) * 4, x, given, False, need_x)
    if not need_channels:
        return (grad_x, *(x.new_empty(0) for _ in range(4)))
    return (grad_x, *_channel_gradients(sums, x, *given[:4]))


@planned
def double_backward(
    h: Tensor | None,
    h_mean: Tensor | None,
    h_mean_square: Tensor | None,
    h_weight: Tensor | None,
    h_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    """Launches: 2, or 1 without the channels' gradients."""
    *given, need_grad, need_x, need_channels = arguments
    seconds = h_mean, h_mean_square, h_weight, h_bias
    made, grad_x, sums = _gradients("double_backward", grad, h, seconds, x, given, need_grad, need_x)
    grad_grad = x.new_empty(0) if made is None else made
    if not need_channels:
        return (grad_grad, grad_x, *(x.new_empty(0) for _ in range(3)))
    return (grad_grad, grad_x, *_channel_gradients(sums, x, *given[:3]))


def _sums(map_: _Map, h: Tensor | None, moments: Tensor | None) -> Tensor:
    """[2, C], of sums that :func:`_sums_kernel` takes."""
    sums = map_.x.new_empty((2, map_.count, map_.channels), dtype=torch.float64)
    out = map_.x.new_empty((2, map_.channels), dtype=torch.float64)
    launch(
        _sums_kernel,
        map_.programs,
        map_.x,
        h,
        moments,
        sums,
        *map_.sizes,
        SUM=map_.sum,
        INDEX=map_.index,
        **map_.tile,
        DEEP=map_.deep,
        num_warps=map_.warps,
    )
    launch(
        _settle_sums_kernel,
        ceil_div(map_.channels, SETTLED),
        map_.x,
        moments,
        sums,
        out,
        map_.count,
        map_.channels,
        map_.count * map_.pixels,
        map_.strides[0],
        SUM=map_.sum,
        CHANNELS=SETTLED,
        num_warps=1,
    )
    return out


def _affine(map_: _Map, y: Tensor, grad: Tensor, moments: Tensor | None) -> Tensor:
    out = empty(map_.x)
    along, across = (map_.channels, map_.pixels) if map_.last else (map_.pixels, map_.channels)
    first = min(next_power_of_2(along), CHANNELS if map_.last else TILE)
    second = min(next_power_of_2(across), TILE // first)
    channels, pixels = (first, second) if map_.last else (second, first)
    launch(
        _affine_kernel,
        map_.count * ceil_div(map_.channels, channels) * ceil_div(map_.pixels, pixels),
        y,
        contiguous(grad),
        moments,
        out,
        map_.channels,
        map_.pixels,
        map_.count * map_.pixels,
        *map_.strides,
        SUM=map_.sum,
        INDEX=map_.index,
        CHANNELS=channels,
        PIXELS=pixels,
        num_warps=WARPS,
    )
    return out


@planned
def statistics(x: Tensor) -> Tensor:
    """Mean and mean of squares, by way of sums relative to each channel's first value. Launches: 2."""
    return _sums(_Map(x), None, None)


@planned
def statistics_backward(grad: Tensor, x: Tensor, moments: Tensor) -> Tensor:
    """Launches: 1."""
    map_ = _Map(x)
    return _affine(map_, map_.x, grad, contiguous(moments))


@planned
def statistics_double_backward(h: Tensor, grad: Tensor, x: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Launches: 3."""
    map_ = _Map(x)
    h = map_.like(h)
    return _sums(map_, h, contiguous(moments)), _affine(map_, h, grad, None)


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels: in channels_last also by programs that take turns."""
    contiguous, last = torch.contiguous_format, torch.channels_last
    for shape, layout in (((2, 128, 64, 64), contiguous), ((2, 128, 64, 64), last), ((64, 256, 64, 64), last)):
        x = torch.empty(*shape, dtype=dtype, device=device, memory_format=layout)
        mean, square, weight, bias = (torch.empty(shape[1], dtype=sum_dtype(dtype), device=device) for _ in range(4))
        vectors, options = (mean, square, weight, bias), (0.1, 1e-5, 0.2)
        y, saved = forward(x, *vectors, *options)
        backward(y, x, *vectors, saved, *options, True, True)
        double_backward(y, *vectors, y, x, *vectors, saved, *options, True, True, True)
        grad = torch.empty(2, shape[1], dtype=torch.float64, device=device)
        moments = statistics(x)
        statistics_backward(grad, x, moments)
        statistics_double_backward(y, grad, x, moments)
