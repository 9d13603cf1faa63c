"""Bias, (leaky) ReLU and pixelwise normalisation in one kernel each way.

Formula (Karras et al. 2018, arXiv 1710.10196, section 4.2), means over the channels of a pixel, s one of two slopes by
the sign of x + b, which is that of y:

    a = s (x + b),  r = (mean(a^2) + eps)^(-1/2),  y = a r
    dx = s r (dy - y q),  q = mean(dy y) + r e / C           e: gradient of r, of second order
    with p = s (h + k):   d(dy) = r (p - y mean(p y)),  d(y) = -r (q p + mean(p y) dy),
                          d(r) = C (mean(p dy) - mean(p y) q)

csrc/cpu/pixel_norm.cpp derives them. Split. A program takes PIXELS pixels and goes through their channels twice,
CHANNELS at a time: for the means, and for the results; the second reading comes from the cache. Traffic: forward reads
1 tensor and writes 1, backward 2 and 1, double backward 3 and 2; bound by it. db is a sum of its own, which reads dx
once more. Computed in fp32 (fp64 for fp64), in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton.aot import AotEntry
from gankern.triton.bias_act import dense, laid_out_as, layout, sum_of_channels

TILE = 1024  # elements at a time
WARPS = 4
FORWARD, BACKWARD, DOUBLE_BACKWARD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# ---- the kernel -------------------------------------------------------------------------------------------------


@triton.jit
def _slope(v, at, POSITIVE: tl.constexpr, NEGATIVE: tl.constexpr):
    """A slope of 0 makes 0 of infinities too."""
    if NEGATIVE == 0:
        return tl.where(at <= 0, 0.0, v * POSITIVE)
    else:
        return tl.where(at <= 0, v * NEGATIVE, v * POSITIVE)


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
    pixels,
    inner,
    ORDER: tl.constexpr,
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
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
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
        c = start + tl.arange(0, CHANNELS)
        inside = (c < C)[:, None] & there[None, :]
        at = first[None, :] + c.to(tl.int64)[:, None] * step
        v = tl.zeros([CHANNELS, PIXELS], SUM)
        if vector is not None:
            v += tl.load(vector + c, mask=c < C, other=0.0).to(SUM)[:, None]
        y = tl.load(x + at, mask=inside, other=0.0).to(SUM)
        if ORDER == FORWARD:
            a = _slope(y + v, y + v, POSITIVE, NEGATIVE)
            one += tl.where(inside, a * a, 0.0)
        else:
            dy = tl.load(grad + at, mask=inside, other=0.0).to(SUM)
            one += y * dy
            if ORDER == DOUBLE_BACKWARD:
                if h is not None:
                    v += tl.load(h + at, mask=inside, other=0.0).to(SUM)
                p = _slope(v, y * SIGN, POSITIVE, NEGATIVE)
                two += tl.where(inside, p * y, 0.0)
                three += tl.where(inside, p * dy, 0.0)

    q = tl.sum(one, 0) / C
    m = tl.sum(two, 0) / C
    if ORDER == FORWARD:
        r = 1 / tl.sqrt(q + EPS)
        tl.store(scale + pixel, r, mask=there)
    else:
        r = tl.load(scale + pixel, mask=there, other=0.0)
        if grad_scale is not None:
            q += r * tl.load(grad_scale + pixel, mask=there, other=0.0) / C
        if ORDER == DOUBLE_BACKWARD:
            tl.store(out_scale + pixel, tl.sum(three, 0) - C * m * q, mask=there)

    for start in tl.range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        inside = (c < C)[:, None] & there[None, :]
        at = first[None, :] + c.to(tl.int64)[:, None] * step
        v = tl.zeros([CHANNELS, PIXELS], SUM)
        if vector is not None:
            v += tl.load(vector + c, mask=c < C, other=0.0).to(SUM)[:, None]
        y = tl.load(x + at, mask=inside, other=0.0).to(SUM)
        if ORDER == FORWARD:
            result = _slope(y + v, y + v, POSITIVE, NEGATIVE) * r[None, :]
        else:
            dy = tl.load(grad + at, mask=inside, other=0.0).to(SUM)
            if ORDER == BACKWARD:
                result = _slope(r[None, :] * (dy - y * q[None, :]), y * SIGN, POSITIVE, NEGATIVE)
            else:
                if h is not None:
                    v += tl.load(h + at, mask=inside, other=0.0).to(SUM)
                p = _slope(v, y * SIGN, POSITIVE, NEGATIVE)
                result = r[None, :] * (p - y * m[None, :])
                of_y = -r[None, :] * (q[None, :] * p + m[None, :] * dy)
                tl.store(out_x + at, of_y.to(out_x.dtype.element_ty), mask=inside)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


# ---- launchers: what gankern/ops/pixel_norm.py calls ---------------------------------------------------------


def _shape(channels: int, lines: bool) -> tuple[int, int]:
    """CHANNELS and PIXELS of a tile: long where memory is contiguous."""
    if lines:
        width = min(triton.next_power_of_2(channels), 256)
        return width, TILE // width if width >= 32 else 32
    height = min(triton.next_power_of_2(channels), 16)
    return height, 64


def _launch(order, x, vector, grad, h, scale, grad_scale, out, out_x, out_scale, dim, positive, negative, eps) -> None:
    if x.numel() == 0:
        return
    outer, channels, inner = layout(x, dim)
    height, width = _shape(channels, inner == 1)
    with torch.cuda.device_of(x):
        _pixel_norm_kernel[(triton.cdiv(outer * inner, width),)](
            x,
            None if vector is None else vector.contiguous(),
            grad,
            h,
            scale,
            None if grad_scale is None else grad_scale.contiguous(),
            out,
            out_x,
            out_scale,
            outer * inner,
            inner,
            ORDER=order.value,
            LINES=inner == 1,
            C=channels,
            POSITIVE=positive,
            NEGATIVE=negative,
            EPS=eps,
            SUM=tl.float64 if x.dtype == torch.float64 else tl.float32,
            CHANNELS=height,
            PIXELS=width,
            num_warps=WARPS,
        )


def forward(x: Tensor, bias: Tensor | None, dim: int, positive: float, negative: float, eps: float):
    """The result and each pixel's scale. Launches: 1, after a copy of what is not dense."""
    x = dense(x)
    outer, _, inner = layout(x, dim)
    y = torch.empty_like(x)
    scale = x.new_empty(outer * inner, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    _launch(FORWARD, x, bias, None, None, scale, None, y, None, None, dim, positive, negative, eps)
    return y, scale


def backward(
    grad: Tensor,
    grad_scale: Tensor | None,
    y: Tensor,
    scale: Tensor,
    dim: int,
    positive: float,
    negative: float,
    sums: bool,
):
    """The gradients of x and of the bias (empty where not asked for). Launches: 1, and a sum."""
    dx = torch.empty_like(y)
    grad = laid_out_as(grad, y)
    _launch(BACKWARD, y, None, grad, None, scale, grad_scale, dx, None, None, dim, positive, negative, 0.0)
    return dx, sum_of_channels(dx, dim) if sums else dx.new_empty(0)


def double_backward(
    h: Tensor | None,
    h_bias: Tensor | None,
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    dim: int,
    positive: float,
    negative: float,
):
    """The gradients of grad, of y and of scale. Launches: 1."""
    out, out_x, out_scale = torch.empty_like(y), torch.empty_like(y), torch.empty_like(scale)
    grad, h = laid_out_as(grad, y), laid_out_as(h, y)
    _launch(DOUBLE_BACKWARD, y, h_bias, grad, h, scale, None, out, out_x, out_scale, dim, positive, negative, 0.0)
    return out, out_x, out_scale


# ---- what the ahead-of-time check compiles --------------------------------------------------------------------


def _aot_entries() -> list[AotEntry]:
    """All orders, both ways through memory, in the widest and the narrowest type."""
    entries = []
    for name, element in (("fp64", tl.float64), ("fp32", tl.float32), ("bf16", tl.bfloat16)):
        wide = "fp64" if element == tl.float64 else "fp32"
        for order in (FORWARD, BACKWARD, DOUBLE_BACKWARD):
            for lines in (True, False):
                height, width = _shape(512, lines)
                present = {"x", "scale", "out"}
                present |= {"vector"} if order != BACKWARD else {"grad_scale"}
                present |= {"grad"} if order != FORWARD else set()
                present |= {"h", "out_x", "out_scale"} if order == DOUBLE_BACKWARD else set()
                constexprs = {
                    "ORDER": order.value,
                    "LINES": lines,
                    "C": 512,
                    "POSITIVE": 1.0,
                    "NEGATIVE": 0.2,
                    "EPS": 1e-8,
                    "SUM": tl.float64 if element == tl.float64 else tl.float32,
                    "CHANNELS": height,
                    "PIXELS": width,
                }
                pointers = ("x", "vector", "grad", "h", "scale", "grad_scale", "out", "out_x", "out_scale")
                # A pointer that is None is a constant.
                constexprs.update({pointer: None for pointer in pointers if pointer not in present})
                arguments = {p: f"*{wide if 'scale' in p else name}" for p in pointers if p in present}
                arguments.update(dict.fromkeys(("pixels", "inner"), "i64"))
                entries.append(AotEntry(_pixel_norm_kernel, arguments, constexprs, WARPS))
    return entries


AOT = _aot_entries()
