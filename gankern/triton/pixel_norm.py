"""Bias, (leaky) ReLU and pixelwise normalisation in one kernel each way.

Formula (Karras et al. 2018, arXiv 1710.10196, section 4.2), means over the channels of a pixel, s one of two slopes by
the sign of x + b, which is that of y:

    a = s (x + b),  r = (mean(a^2) + eps)^(-1/2),  y = a r
    dx = s r (dy - y q),  q = mean(dy y) + r e / C           e: gradient of r, of second order
    with p = s (h + k):   d(dy) = r (p - y mean(p y)),  d(y) = -r (q p + mean(p y) dy),
                          d(r) = C (mean(p dy) - mean(p y) q)

csrc/cpu/pixel_norm.cpp derives them. Split. A program takes PIXELS pixels. Of up to 1,024 channels, or 2,048 where
pixels are neighbours in fp32, it reads all once, and keeps them. Of more it goes through them twice, CHANNELS at a
time: for the means, and for the results; the second reading comes from the cache where that has room. Traffic: forward
reads 1 tensor and writes 1, backward 2 and 1, double backward 3 and 2; bound by it. A program leaves its part of db,
which a second kernel adds up (gankern/triton/sums.py); where it holds all channels, it takes several groups of pixels
for it, so that the parts are few. Channels that are neighbours, but more than a program holds, have their db summed up
by torch, which reads dx once more. Computed in fp32 (fp64 for fp64), in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton.bias_act import gradient_of_bias, layout
from gankern.triton.launch import (
    Blocks,
    ceil_div,
    contiguous,
    dense,
    index_type,
    laid_out_as,
    launch,
    next_power_of_2,
    planned,
    sum_dtype,
    sum_type,
)
from gankern.triton.sums import sum_of_parts

# Values of a tile; where channels are neighbours, the most of them that are channels of one pixel; elsewhere, how many
# are neighbouring pixels. HELD: bytes of neighbouring pixels of which a program has all channels, at most; 0 for none.
# Where it does not, they are read twice: with fewer pixels under way at once, the second reading finds them in a cache
# nearer by.
BLOCKS = Blocks(
    "pixel_norm",
    {"TILE": 2048, "CHANNELS": 1024, "PIXELS": 64, "HELD": 64, "num_warps": 4},
    {"TILE": 1024, "CHANNELS": 1024, "PIXELS": 64, "HELD": 128, "num_warps": 4},
    {"TILE": 2048, "CHANNELS": 1024, "PIXELS": 64, "HELD": 32, "num_warps": 8},
    {"TILE": 4096, "CHANNELS": 1024, "PIXELS": 64, "HELD": 64, "num_warps": 8},
    {"TILE": 2048, "CHANNELS": 256, "PIXELS": 32, "HELD": 0, "num_warps": 4},
    {"TILE": 4096, "CHANNELS": 512, "PIXELS": 64, "HELD": 0, "num_warps": 8},
)
LANE = 32  # values, of 4 bytes, that a lane holds of a tile of all channels
MOST_WARPS = 16
SECTOR = 32  # bytes that memory is read in: fewer neighbours than these are not held

PROGRAMS = 4096  # that leave sums of all channels, at most: some turns of every GPU

# ---- the kernel -------------------------------------------------------------------------------------------------


@triton.jit
def _slope(v, at, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr):
    """A slope of 0 makes 0 of infinities too."""
    if NEGATIVE == 0:
        return tl.where(at <= 0, 0.0, v * POSITIVE)
    else:
        return tl.where(at <= 0, v * NEGATIVE, v * POSITIVE)


@triton.jit
def _tile(
    x,
    vector,
    start,
    first,
    step,
    there,
    C: tl.constexpr,
    SUM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The channels from ``start`` on of pixels that begin at ``first``: which they are, where they lie, which are
    there; the vector's values, and x's."""
    c = start + tl.arange(0, CHANNELS)
    inside = (c < C)[:, None] & there[None, :]
    at = first[None, :] + c.to(first.dtype)[:, None] * step
    v = tl.zeros([CHANNELS, PIXELS], SUM)
    if vector is not None:
        v += tl.load(vector + c, mask=c < C, other=0.0).to(SUM)[:, None]
    return c, at, inside, v, tl.load(x + at, mask=inside, other=0.0).to(SUM)


@triton.jit
def _gradients(
    grad, h, at, inside, v, y,
    ORDER: tl.constexpr, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """dy and p of a tile, of the orders that have them."""
    SIGN: tl.constexpr = -1 if POSITIVE < 0 else 1
    dy = y
    p = y
    if ORDER != "forward":
        dy = tl.load(grad + at, mask=inside, other=0.0).to(SUM)
        if ORDER == "double_backward":
            if h is not None:
                v += tl.load(h + at, mask=inside, other=0.0).to(SUM)
            p = _slope(v, y * SIGN, POSITIVE, NEGATIVE)
    return dy, p


@triton.jit
def _terms(z, y, dy, p, inside, ORDER: tl.constexpr, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr):
    """What a tile adds to the means; z is x + b. No product is a last step: a compiler would make it one with the first
    addition of a sum over lanes, of which each would then round its own product and not the other's."""
    zero = y * 0
    if ORDER == "forward":
        a = _slope(z, z, POSITIVE, NEGATIVE)
        return tl.where(inside, a * a, 0.0), zero, zero
    elif ORDER == "backward":
        return 0.0 + y * dy, zero, zero
    else:
        return 0.0 + y * dy, tl.where(inside, p * y, 0.0), tl.where(inside, p * dy, 0.0)


@triton.jit
def _result(
    out, out_x, at, inside, z, y, dy, p, r, q, m,
    ORDER: tl.constexpr, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Writes a tile's results; the one that goes to x, or to grad."""
    SIGN: tl.constexpr = -1 if POSITIVE < 0 else 1
    if ORDER == "forward":
        result = _slope(z, z, POSITIVE, NEGATIVE) * r[None, :]
    elif ORDER == "backward":
        result = _slope(r[None, :] * (dy - y * q[None, :]), y * SIGN, POSITIVE, NEGATIVE)
    else:
        result = r[None, :] * (p - y * m[None, :])
        of_y = -r[None, :] * (q[None, :] * p + m[None, :] * dy)
        tl.store(out_x + at, of_y.to(out_x.dtype.element_ty), mask=inside)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    return result


@triton.jit
def _pixel_norm_kernel(
    x,  # the input, or the result
    vector,  # [channels]: the bias; double backward: the gradient of its gradient; or None
    grad,
    h,  # or None
    scale,  # [pixels]
    grad_scale,  # [pixels] or None
    out,
    out_x,
    out_scale,  # [pixels]
    parts,  # [programs, channels], of the bias's gradient, or None
    pixels,
    inner,
    steps,  # groups of pixels of a program, one after the other; more than one where it is HELD
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    LINES: tl.constexpr,  # whether inner is 1
    C: tl.constexpr,
    POSITIVE: tl.constexpr,
    NEGATIVE: tl.constexpr,
    EPS: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,  # what elements are counted in
    HELD: tl.constexpr,  # CHANNELS are all, and kept
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    # Of pixels that are neighbours, a lane has several of each channel, and adds them up at once.
    total = tl.zeros([CHANNELS, PIXELS] if LINES else [CHANNELS], SUM)
    for group in range(steps):
        pixel = (tl.program_id(0).to(INDEX) * steps + group) * PIXELS + tl.arange(0, PIXELS)
        there = pixel < pixels
        if LINES:
            first = pixel * C
            step = 1
        else:
            first = pixel // inner * C * inner + pixel % inner
            step = inner
        if HELD:
            c, at, inside, v, y = _tile(x, vector, 0, first, step, there, C, SUM, CHANNELS, PIXELS)
            dy, p = _gradients(grad, h, at, inside, v, y, ORDER, POSITIVE, NEGATIVE, SUM)
            one, two, three = _terms(y + v, y, dy, p, inside, ORDER, POSITIVE, NEGATIVE)
        else:
            one = tl.zeros([CHANNELS, PIXELS], SUM)
            two = tl.zeros([CHANNELS, PIXELS], SUM)
            three = tl.zeros([CHANNELS, PIXELS], SUM)
            for start in tl.range(0, C, CHANNELS):
                c, at, inside, v, y = _tile(x, vector, start, first, step, there, C, SUM, CHANNELS, PIXELS)
                dy, p = _gradients(grad, h, at, inside, v, y, ORDER, POSITIVE, NEGATIVE, SUM)
                of_one, of_two, of_three = _terms(y + v, y, dy, p, inside, ORDER, POSITIVE, NEGATIVE)
                one += of_one
                two += of_two
                three += of_three

        q = tl.sum(one, 0) / C
        m = tl.sum(two, 0) / C
        if ORDER == "forward":
            r = 1 / tl.sqrt(q + EPS)
            tl.store(scale + pixel, r, mask=there)
        else:
            r = tl.load(scale + pixel, mask=there, other=0.0)
            if grad_scale is not None:
                q += r * tl.load(grad_scale + pixel, mask=there, other=0.0) / C
            if ORDER == "double_backward":
                tl.store(out_scale + pixel, tl.sum(three, 0) - C * m * q, mask=there)

        if HELD:
            result = _result(out, out_x, at, inside, y + v, y, dy, p, r, q, m, ORDER, POSITIVE, NEGATIVE)
            if parts is not None:
                total += result if LINES else tl.sum(result, 1)
        else:
            for start in tl.range(0, C, CHANNELS):
                c, at, inside, v, y = _tile(x, vector, start, first, step, there, C, SUM, CHANNELS, PIXELS)
                dy, p = _gradients(grad, h, at, inside, v, y, ORDER, POSITIVE, NEGATIVE, SUM)
                result = _result(out, out_x, at, inside, y + v, y, dy, p, r, q, m, ORDER, POSITIVE, NEGATIVE)
                if parts is not None:
                    own = parts + tl.program_id(0).to(tl.int64) * C + c
                    tl.store(own, tl.sum(result, 1), mask=c < C)
    if parts is not None:  # noqa: SIM102  (the parts decide what is compiled)
        if HELD:
            c = tl.arange(0, CHANNELS)
            part = tl.sum(total, 1) if LINES else total
            tl.store(parts + tl.program_id(0).to(tl.int64) * C + c, part, mask=c < C)


# ---- launchers: what gankern/ops/pixel_norm.py calls ---------------------------------------------------------
# What they only hand on to the launch is in *options: dim, positive, negative.


def _shape(channels: int, lines: bool, wide: tuple[int, int], blocks: dict[str, int]) -> tuple[int, int, bool, int]:
    """CHANNELS and PIXELS of a tile, long where memory is contiguous; whether it is held, and the program's warps.
    ``wide``: the bytes of an element, and of what is summed up."""
    element, value = wide
    whole = next_power_of_2(channels)
    if lines:
        width = min(whole, blocks["CHANNELS"])
        return width, blocks["TILE"] // width if width >= 32 else 32, width == whole, blocks["num_warps"]
    held = LANE * 32 * MOST_WARPS * 4 // value  # values at most
    pixels = min(max(blocks["HELD"] // element, blocks["TILE"] // whole), held // whole)
    if blocks["HELD"] and pixels * element >= SECTOR:
        warps = pixels * whole * value // (LANE * 32 * 4)
        return whole, pixels, True, max(blocks["num_warps"], warps)
    height = min(whole, blocks["TILE"] // blocks["PIXELS"])
    return height, blocks["PIXELS"], height == whole, blocks["num_warps"]


def _launch(
    order: str,
    x: Tensor,
    vector: Tensor | None,
    grad: Tensor | None,
    h: Tensor | None,
    scale: Tensor,
    grad_scale: Tensor | None,
    out: Tensor,
    out_x: Tensor | None,
    out_scale: Tensor | None,
    dim: int,
    positive: float,
    negative: float,
    *,
    eps: float = 0.0,
    sums: bool = False,
) -> Tensor | None:
    """Returns db where it was asked for and could be summed up in the same pass."""
    outer, channels, inner = layout(x.shape, x.stride(), dim)
    pixels = outer * inner
    if pixels == 0 or channels == 0:
        return None
    blocks = BLOCKS(x.device)
    wide = x.element_size(), scale.element_size()
    height, width, held, warps = _shape(channels, inner == 1, wide, blocks)
    programs, steps, parts = ceil_div(pixels, width), 1, None
    if sums and (inner > 1 or held):
        if held:
            steps = ceil_div(programs, PROGRAMS)
            programs = ceil_div(programs, steps)
        parts = x.new_empty((programs, channels, 1), dtype=scale.dtype)
    launch(
        _pixel_norm_kernel,
        programs,
        x,
        contiguous(vector),
        grad,
        h,
        scale,
        contiguous(grad_scale),
        out,
        out_x,
        out_scale,
        parts,
        pixels,
        inner,
        steps,
        ORDER=order,
        LINES=inner == 1,
        C=channels,
        POSITIVE=positive,
        NEGATIVE=negative,
        EPS=eps,
        SUM=sum_type(x.dtype),
        INDEX=index_type((pixels + width) * channels),
        HELD=held,
        CHANNELS=height,
        PIXELS=width,
        num_warps=warps,
    )
    return None if parts is None else sum_of_parts(parts, x.dtype)


@planned
def forward(x: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The result and each pixel's scale. Launches: 1, after a copy of what is not dense."""
    *options, eps = arguments
    x = dense(x)
    outer, _, inner = layout(x.shape, x.stride(), options[0])
    y = torch.empty_like(x)
    scale = x.new_empty(outer * inner, dtype=sum_dtype(x.dtype))
    _launch("forward", x, bias, None, None, scale, None, y, None, None, *options, eps=eps)
    return y, scale


@planned
def backward(
    grad: Tensor, grad_scale: Tensor | None, y: Tensor, scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias (empty where not asked for). Launches: 1, and one for the bias."""
    *options, sums = arguments
    dx = torch.empty_like(y)
    grad = laid_out_as(grad, y)
    given = None, grad, None, scale, grad_scale
    db = _launch("backward", y, *given, dx, None, None, *options, sums=sums)
    return dx, gradient_of_bias(sums, db, dx, options[0])


@planned
def double_backward(
    h: Tensor | None, h_bias: Tensor | None, grad: Tensor, y: Tensor, scale: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of grad, of y and of scale. Launches: 1."""
    out, out_x, out_scale = torch.empty_like(y), torch.empty_like(y), torch.empty_like(scale)
    grad, h = laid_out_as(grad, y), laid_out_as(h, y)
    _launch("double_backward", y, h_bias, grad, h, scale, None, out, out_x, out_scale, *options)
    return out, out_x, out_scale


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernel."""
    for x in (
        torch.empty(2, 512, 8, 8, dtype=dtype, device=device),
        torch.empty(2, 8, 8, 512, dtype=dtype, device=device).movedim(3, 1),
        # More programs than leave sums.
        torch.empty(64, 64, 32, 128, dtype=dtype, device=device),
        torch.empty(64, 64, 16, 256, dtype=dtype, device=device).movedim(3, 1),
        # More channels than are held.
        torch.empty(1, 4096, 4, 8, dtype=dtype, device=device),
        torch.empty(1, 4, 8, 2048, dtype=dtype, device=device).movedim(3, 1),
    ):
        vector = torch.empty(x.shape[1], dtype=dtype, device=device)
        _, scale = forward(x, vector, 1, 1.0, 0.2, 1e-8)
        backward(x, scale, x, scale, 1, 1.0, 0.2, True)
        double_backward(x, vector, x, x, scale, 1, 1.0, 0.2)
