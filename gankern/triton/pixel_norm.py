"""Bias, (leaky) ReLU and pixelwise normalisation in one kernel each way.

Formula (Karras et al. 2018, arXiv 1710.10196, section 4.2), means over the channels of a pixel, s one of two slopes by
the sign of x + b, which is that of y:

    a = s (x + b),  r = (mean(a^2) + eps)^(-1/2),  y = a r
    dx = s r (dy - y q),  q = mean(dy y) + r e / C           e: gradient of r, of second order
    with p = s (h + k):   d(dy) = r (p - y mean(p y)),  d(y) = -r (q p + mean(p y) dy),
                          d(r) = C (mean(p dy) - mean(p y) q)

csrc/cpu/pixel_norm.cpp derives them. Split. A program takes PIXELS pixels and goes through their channels twice,
CHANNELS at a time: for the means, and for the results; the second reading comes from the cache. Traffic: forward reads
1 tensor and writes 1, backward 2 and 1, double backward 3 and 2; bound by it. A program leaves its part of db, which a
second kernel adds up (gankern/triton/sums.py); where channels are neighbours, it takes several groups of pixels for it,
so that the parts are few. Channels that are neighbours, but more than a program holds, have their db summed up by
torch, which reads dx once more. Computed in fp32 (fp64 for fp64), in a fixed order.
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
    laid_out_as,
    launch,
    next_power_of_2,
    planned,
    sum_dtype,
    sum_type,
)
from gankern.triton.sums import sum_of_parts

# Values of a tile; where channels are neighbours, the most of them that are channels of one pixel; elsewhere, how many
# are neighbouring pixels. All channels of so many pixels are read twice: where fewer pixels are under way at once, the
# second reading finds them in a cache nearer by.
BLOCKS = Blocks(
    "pixel_norm",
    {"TILE": 1024, "CHANNELS": 256, "PIXELS": 64, "num_warps": 4},
    {"TILE": 2048, "CHANNELS": 256, "PIXELS": 32, "num_warps": 4},
    {"TILE": 2048, "CHANNELS": 256, "PIXELS": 64, "num_warps": 4},
    {"TILE": 2048, "CHANNELS": 512, "PIXELS": 64, "num_warps": 8},
    {"TILE": 4096, "CHANNELS": 512, "PIXELS": 64, "num_warps": 8},
)

PROGRAMS = 2048  # that leave sums of all channels, at most: enough for every GPU

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
    at = first[None, :] + c.to(tl.int64)[:, None] * step
    v = tl.zeros([CHANNELS, PIXELS], SUM)
    if vector is not None:
        v += tl.load(vector + c, mask=c < C, other=0.0).to(SUM)[:, None]
    return c, at, inside, v, tl.load(x + at, mask=inside, other=0.0).to(SUM)


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
    steps,  # groups of pixels of a program, one after the other; more than one where CHANNELS are all
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    LINES: tl.constexpr,  # whether inner is 1
    C: tl.constexpr,
    POSITIVE: tl.constexpr,
    NEGATIVE: tl.constexpr,
    EPS: tl.constexpr,
    SUM: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    SIGN: tl.constexpr = -1 if POSITIVE < 0 else 1
    total = tl.zeros([CHANNELS, PIXELS], SUM)
    for group in range(steps):
        pixel = (tl.program_id(0).to(tl.int64) * steps + group) * PIXELS + tl.arange(0, PIXELS)
        there = pixel < pixels
        if LINES:
            first = pixel * C
            step = 1
        else:
            first = pixel // inner * C * inner + pixel % inner
            step = inner
        one = tl.zeros([CHANNELS, PIXELS], SUM)
        two = tl.zeros([CHANNELS, PIXELS], SUM)
        three = tl.zeros([CHANNELS, PIXELS], SUM)
        for start in tl.range(0, C, CHANNELS):
            c, at, inside, v, y = _tile(x, vector, start, first, step, there, C, SUM, CHANNELS, PIXELS)
            if ORDER == "forward":
                a = _slope(y + v, y + v, POSITIVE, NEGATIVE)
                one += tl.where(inside, a * a, 0.0)
            else:
                dy = tl.load(grad + at, mask=inside, other=0.0).to(SUM)
                one += y * dy
                if ORDER == "double_backward":
                    if h is not None:
                        v += tl.load(h + at, mask=inside, other=0.0).to(SUM)
                    p = _slope(v, y * SIGN, POSITIVE, NEGATIVE)
                    two += tl.where(inside, p * y, 0.0)
                    three += tl.where(inside, p * dy, 0.0)

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

        for start in tl.range(0, C, CHANNELS):
            c, at, inside, v, y = _tile(x, vector, start, first, step, there, C, SUM, CHANNELS, PIXELS)
            if ORDER == "forward":
                result = _slope(y + v, y + v, POSITIVE, NEGATIVE) * r[None, :]
            else:
                dy = tl.load(grad + at, mask=inside, other=0.0).to(SUM)
                if ORDER == "backward":
                    result = _slope(r[None, :] * (dy - y * q[None, :]), y * SIGN, POSITIVE, NEGATIVE)
                    if parts is not None:
                        if CHANNELS >= C:
                            total += result
                        else:
                            own = parts + tl.program_id(0).to(tl.int64) * C + c
                            tl.store(own, tl.sum(result, 1), mask=c < C)
                else:
                    if h is not None:
                        v += tl.load(h + at, mask=inside, other=0.0).to(SUM)
                    p = _slope(v, y * SIGN, POSITIVE, NEGATIVE)
                    result = r[None, :] * (p - y * m[None, :])
                    of_y = -r[None, :] * (q[None, :] * p + m[None, :] * dy)
                    tl.store(out_x + at, of_y.to(out_x.dtype.element_ty), mask=inside)
            tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    if parts is not None:  # noqa: SIM102  (the parts decide what is compiled)
        if CHANNELS >= C:
            c = tl.arange(0, CHANNELS)
            tl.store(parts + tl.program_id(0).to(tl.int64) * C + c, tl.sum(total, 1), mask=c < C)


# ---- launchers: what gankern/ops/pixel_norm.py calls ---------------------------------------------------------
# What they only hand on to the launch is in *options: dim, positive, negative.


def _shape(channels: int, lines: bool, blocks: dict[str, int]) -> tuple[int, int]:
    """CHANNELS and PIXELS of a tile: long where memory is contiguous."""
    if lines:
        width = min(next_power_of_2(channels), blocks["CHANNELS"])
        return width, blocks["TILE"] // width if width >= 32 else 32
    height = min(next_power_of_2(channels), blocks["TILE"] // blocks["PIXELS"])
    return height, blocks["PIXELS"]


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
    height, width = _shape(channels, inner == 1, blocks)
    programs, steps, parts = ceil_div(pixels, width), 1, None
    if sums and (inner > 1 or height >= channels):
        if height >= channels:
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
        CHANNELS=height,
        PIXELS=width,
        num_warps=blocks["num_warps"],
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
    vector = torch.empty(512, dtype=dtype, device=device)
    for x in (
        torch.empty(2, 512, 8, 8, dtype=dtype, device=device),
        torch.empty(2, 8, 8, 512, dtype=dtype, device=device).movedim(3, 1),
        torch.empty(64, 64, 4, 256, dtype=dtype, device=device).movedim(3, 1),
    ):
        vector = vector[: x.shape[1]]
        _, scale = forward(x, vector, 1, 1.0, 0.2, 1e-8)
        backward(x, scale, x, scale, 1, 1.0, 0.2, True)
        double_backward(x, vector, x, x, scale, 1, 1.0, 0.2)
