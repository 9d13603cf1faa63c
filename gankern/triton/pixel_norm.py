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

from gankern.triton.bias_act import layout, sum_of_channels
from gankern.triton.launch import Blocks, contiguous, dense, laid_out_as, launch, next_power_of_2, sum_dtype, sum_type

BLOCKS = Blocks(  # values of a tile, and the most of them that are channels of one pixel
    "pixel_norm",
    {"TILE": 1024, "CHANNELS": 256, "num_warps": 4},
    {"TILE": 2048, "CHANNELS": 256, "num_warps": 4},
    {"TILE": 2048, "CHANNELS": 512, "num_warps": 8},
    {"TILE": 4096, "CHANNELS": 512, "num_warps": 8},
    {"TILE": 512, "CHANNELS": 128, "num_warps": 2},
)

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
        c = start + tl.arange(0, CHANNELS)
        inside = (c < C)[:, None] & there[None, :]
        at = first[None, :] + c.to(tl.int64)[:, None] * step
        v = tl.zeros([CHANNELS, PIXELS], SUM)
        if vector is not None:
            v += tl.load(vector + c, mask=c < C, other=0.0).to(SUM)[:, None]
        y = tl.load(x + at, mask=inside, other=0.0).to(SUM)
        if ORDER == "forward":
            result = _slope(y + v, y + v, POSITIVE, NEGATIVE) * r[None, :]
        else:
            dy = tl.load(grad + at, mask=inside, other=0.0).to(SUM)
            if ORDER == "backward":
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


def _shape(channels: int, lines: bool, blocks: dict[str, int]) -> tuple[int, int]:
    """CHANNELS and PIXELS of a tile: long where memory is contiguous."""
    if lines:
        width = min(next_power_of_2(channels), blocks["CHANNELS"])
        return width, blocks["TILE"] // width if width >= 32 else 32
    height = min(next_power_of_2(channels), blocks["TILE"] // 64)
    return height, 64


def _launch(order, x, vector, grad, h, scale, grad_scale, out, out_x, out_scale, dim, positive, negative, eps) -> None:
    outer, channels, inner = layout(x.shape, x.stride(), dim)
    pixels = outer * inner
    if pixels == 0 or channels == 0:
        return
    blocks = BLOCKS(x.device)
    height, width = _shape(channels, inner == 1, blocks)
    launch(
        _pixel_norm_kernel,
        -(-pixels // width),
        x,
        contiguous(vector),
        grad,
        h,
        scale,
        contiguous(grad_scale),
        out,
        out_x,
        out_scale,
        pixels,
        inner,
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


def forward(x: Tensor, bias: Tensor | None, dim: int, positive: float, negative: float, eps: float):
    """The result and each pixel's scale. Launches: 1, after a copy of what is not dense."""
    x = dense(x)
    outer, _, inner = layout(x.shape, x.stride(), dim)
    y = torch.empty_like(x)
    scale = x.new_empty(outer * inner, dtype=sum_dtype(x.dtype))
    _launch("forward", x, bias, None, None, scale, None, y, None, None, dim, positive, negative, eps)
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
    _launch("backward", y, None, grad, None, scale, grad_scale, dx, None, None, dim, positive, negative, 0.0)
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
    _launch("double_backward", y, h_bias, grad, h, scale, None, out, out_x, out_scale, dim, positive, negative, 0.0)
    return out, out_x, out_scale


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernel."""
    vector = torch.empty(512, dtype=dtype, device=device)
    for x in (
        torch.empty(2, 512, 8, 8, dtype=dtype, device=device),
        torch.empty(2, 8, 8, 512, dtype=dtype, device=device).movedim(3, 1),
    ):
        _, scale = forward(x, vector, 1, 1.0, 0.2, 1e-8)
        backward(x, scale, x, scale, 1, 1.0, 0.2, True)
        double_backward(x, vector, x, x, scale, 1, 1.0, 0.2)
