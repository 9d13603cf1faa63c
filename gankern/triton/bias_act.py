"""Bias, activation, gain and clamp in one kernel each way.

Formula: y = clamp(f(x + b) gain, -clamp, clamp). The backward reads s, the result (for silu, and a leaky ReLU of
negative slope, the input); with a = y / gain, m = 0 where |y| is at the clamp and else 1, and p = m (h + k) for the
gradients h and k of the two gradients:

    dx = m g gain f'          dg = p gain f'          ds = p g df'/da, or p g gain df'/dz where s is the input

csrc/cpu/activation.h has the table of f, f' and df'/ds. PReLU, whose slope is a tensor, has a kernel of its own:
csrc/cpu/bias_act.cpp has its formulas. The sums of bias and slope are torch's, of products that the kernel writes.

Split. A program takes BLOCK neighbouring elements in the order of memory, whatever the order of the dimensions is: an
element's channel is (element / inner) % channels, asked for once where a block is of one channel. Traffic: forward
reads 1 tensor and writes 1; backward 2 and 1; double backward 3 and 1 or 2; bound by it. Where a block is of one
channel, of several whole ones (small maps of 4, 16, 64 pixels and so on), or of all in turn, a program writes its part
of db beside, and a second kernel adds up the parts (gankern/triton/sums.py); of blocks of all channels a program takes
several, so that the parts are few. Elsewhere db is a sum of its own, which reads dx once more. Computed in fp32 (fp64
for fp64).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.core.activations import KERNELS
from gankern.triton.launch import (
    Blocks,
    ceil_div,
    contiguous,
    dense,
    index_type,
    kept,
    laid_out_as,
    launch,
    next_power_of_2,
    planned,
    sum_dtype,
    sum_type,
)
from gankern.triton.sums import sum_of_parts

BLOCKS = Blocks(  # elements of a program, twice as many of half precision
    "bias_act",
    {"BLOCK": 1024, "num_warps": 4},
    {"BLOCK": 2048, "num_warps": 4},
    {"BLOCK": 2048, "num_warps": 8},
    {"BLOCK": 4096, "num_warps": 8},
)
PROGRAMS = 2048  # that leave sums of all channels, at most: enough for every GPU
# What ACT is, by number.
ACTIVATIONS = tuple(row.name for row in KERNELS)

# ---- activations ------------------------------------------------------------------------------------------------


@triton.jit
def _expm1_minus(x):
    """exp(-x) - 1 for x >= 0, also where x is small."""
    TERMS: tl.constexpr = 14 if x.dtype == tl.float64 else 8
    p = x * 0 + 1
    for k in tl.static_range(TERMS - 1):
        p = 1 - p * x / (TERMS - k)
    return tl.where(x < 0.35, -x * p, tl.exp(-x) - 1)


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for e in [0, 1]: twice the atanh of s = e / (2 + e)."""
    TERMS: tl.constexpr = 17 if e.dtype == tl.float64 else 8
    s = e / (2 + e)
    p = e * 0
    for k in tl.static_range(TERMS + 1):
        p = p * s * s + 1.0 / (2 * (TERMS - k) + 1)
    return 2 * s * p


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1 + e)


@triton.jit
def _value(z, ACT: tl.constexpr, SLOPE: tl.constexpr):
    if ACT == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACT == "leaky_relu" or ACT == "leaky_relu_of_input":
        return tl.where(z > 0, z, z * SLOPE)
    elif ACT == "tanh":
        m = _expm1_minus(2 * tl.abs(z))
        return tl.where(z < 0, m, -m) / (2 + m)
    elif ACT == "sigmoid":
        return _sigmoid(z)
    elif ACT == "elu":
        return tl.where(z <= 0, _expm1_minus(-z), z)
    elif ACT == "selu":
        SCALE: tl.constexpr = 1.0507009873554805
        ALPHA: tl.constexpr = 1.6732632423543772
        return tl.where(z <= 0, (SCALE * ALPHA) * _expm1_minus(-z), SCALE * z)
    elif ACT == "softplus":
        return tl.where(z < 0, 0.0, z) + _log1p_unit(tl.exp(-tl.abs(z)))
    elif ACT == "silu":
        return z * _sigmoid(z)
    else:
        return z


@triton.jit
def _first(g, s, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """g f'."""
    if ACT == "relu":
        return tl.where(s <= 0, 0.0, g)
    elif ACT == "leaky_relu" or ACT == "leaky_relu_of_input":
        return tl.where(s > 0, g, g * SLOPE)
    elif ACT == "tanh":
        return g * ((1 - s) * (1 + s))
    elif ACT == "sigmoid":
        return g * (s * (1 - s))
    elif ACT == "elu":
        return tl.where(s > 0, g, g * (s + 1))
    elif ACT == "selu":
        SCALE: tl.constexpr = 1.0507009873554805
        ALPHA: tl.constexpr = 1.6732632423543772
        return g * tl.where(s > 0, SCALE, s + SCALE * ALPHA)
    elif ACT == "softplus":
        return -g * _expm1_minus(s)
    elif ACT == "silu":
        t = _sigmoid(s)
        return g * (t * (1 + s * (1 - t)))
    else:
        return g


@triton.jit
def _second(p, s, ACT: tl.constexpr):
    """p df'/ds."""
    if ACT == "tanh":
        return p * (-2 * s)
    elif ACT == "sigmoid":
        return p * (1 - 2 * s)
    elif ACT == "elu" or ACT == "selu":
        return tl.where(s >= 0, 0.0, p)
    elif ACT == "softplus":
        return p * tl.exp(-s)
    elif ACT == "silu":
        t = _sigmoid(s)
        return p * (t * (1 - t) * (2 + s * (1 - 2 * t)))
    else:
        return p * 0


# ---- the kernel -------------------------------------------------------------------------------------------------


@triton.jit
def _store_sums(values, parts, size, COLUMNS: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """This program's share of each channel's sum: of the one channel that its values are of, of each RUN of neighbours,
    which are a channel's, or of all channels, in turn."""
    if COLUMNS == 0 and RUN == 0:
        tl.store(parts + tl.program_id(0), tl.sum(values, 0))
    elif COLUMNS == 0:
        RUNS: tl.constexpr = BLOCK // RUN
        run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
        tl.store(parts + run, tl.sum(tl.reshape(values, [RUNS, RUN]), 1), mask=run * RUN < size)
    else:
        ROWS: tl.constexpr = BLOCK // COLUMNS
        sums = tl.sum(tl.reshape(values, [ROWS, COLUMNS]), 0)
        tl.store(parts + tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS), sums)


@triton.jit
def _of_channel(vector, c, inside, ALIKE: tl.constexpr):
    """A vector's values for elements; one for all of them where they are alike."""
    if ALIKE:
        return tl.load(vector + c)
    else:
        return tl.load(vector + c, mask=inside, other=0.0)


@triton.jit
def _tangent(h, h_bias, e, c, inside, ALIKE: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of dx and its channel's: either may be missing."""
    p = tl.zeros([BLOCK], SUM)
    if h is not None:
        p += tl.load(h + e, mask=inside, other=0.0).to(SUM)
    if h_bias is not None:
        p += _of_channel(h_bias, c, inside, ALIKE).to(SUM)
    return p


@triton.jit
def _bias_act_kernel(
    x,  # the input, or what was saved
    bias,  # [channels] or None
    grad,
    h,  # or None
    h_bias,  # [channels] or None
    out,  # or None
    out_x,  # or None
    parts,  # or None: sums of what goes to the input, [programs], [size // RUN], or [programs, COLUMNS]
    size,
    channels,
    inner,
    steps,  # blocks of a program, one after the other
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,  # 0 for none
    SUM: tl.constexpr,
    COLUMNS: tl.constexpr,  # channels, where they are neighbours and a block has all of them; else 0
    RUN: tl.constexpr,  # a channel's neighbours, where a block has several whole channels; else 0
    ALIKE: tl.constexpr,  # every block is whole, and of one channel
    INDEX: tl.constexpr,  # what elements are counted in: divisions of 64 bits would cost more than all else
    BLOCK: tl.constexpr,
):
    OF_INPUT: tl.constexpr = ACT == "silu" or ACT == "leaky_relu_of_input"
    total = tl.zeros([BLOCK], SUM)
    for step in range(steps):
        first = (tl.program_id(0).to(INDEX) * steps + step) * BLOCK
        e = first + tl.arange(0, BLOCK)
        inside = e < size
        if ALIKE:
            inside = tl.full([BLOCK], True, tl.int1)
            c = first // inner % channels
        else:
            c = e // inner % channels
        bound = tl.full([BLOCK], CLAMP, SUM)  # a plain number would be taken as fp32
        z = tl.load(x + e, mask=inside, other=0.0).to(SUM)
        if ORDER == "forward" or OF_INPUT:  # noqa: SIM102
            if bias is not None:
                z += _of_channel(bias, c, inside, ALIKE).to(SUM)
        if ORDER == "forward":
            y = _value(z, ACT, SLOPE) * GAIN
            if CLAMP > 0:
                y = tl.where(y > bound, bound, y)
                y = tl.where(y < -bound, -bound, y)
            tl.store(out + e, y.to(out.dtype.element_ty), mask=inside)
        else:
            # The result, as it was stored.
            if OF_INPUT:
                y = (_value(z, ACT, SLOPE) * GAIN).to(x.dtype.element_ty).to(SUM)
            else:
                y = z
                z = y * (0.0 if GAIN == 0 else 1.0 / GAIN)
            if ORDER == "backward":
                g = tl.load(grad + e, mask=inside, other=0.0).to(SUM)
                dx = _first(g * GAIN, z, ACT, SLOPE)
                if CLAMP > 0:
                    dx = tl.where(tl.abs(y) >= bound, 0.0, dx)
                tl.store(out + e, dx.to(out.dtype.element_ty), mask=inside)
                if parts is not None:
                    total += tl.where(inside, dx, 0.0)
            else:
                p = _tangent(h, h_bias, e, c, inside, ALIKE, SUM, BLOCK)
                if CLAMP > 0:
                    p = tl.where(tl.abs(y) >= bound, 0.0, p)
                if out is not None:
                    tl.store(out + e, _first(p * GAIN, z, ACT, SLOPE).to(out.dtype.element_ty), mask=inside)
                if out_x is not None:
                    p *= tl.load(grad + e, mask=inside, other=0.0).to(SUM)
                    if OF_INPUT:
                        p *= GAIN
                    second = _second(p, z, ACT)
                    tl.store(out_x + e, second.to(out_x.dtype.element_ty), mask=inside)
                    if parts is not None:
                        total += tl.where(inside, second, 0.0)
    if parts is not None:
        _store_sums(total, parts, size, COLUMNS, RUN, BLOCK)


@triton.jit
def _prelu_kernel(
    x,
    bias,  # [channels] or None
    slope,  # [channels]
    grad,
    h,  # or None
    h_bias,  # [channels] or None
    h_slope,  # [channels] or None
    out,
    out_x,  # or None
    out_slope,  # or None: what sums up to the slope's gradient, like x, in the dtype of sums
    size,
    channels,
    inner,
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,  # 0 for none
    SUM: tl.constexpr,
    ALIKE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(INDEX) * BLOCK
    e = first + tl.arange(0, BLOCK)
    inside = e < size
    if ALIKE:
        inside = tl.full([BLOCK], True, tl.int1)
        c = first // inner % channels
    else:
        c = e // inner % channels
    bound = tl.full([BLOCK], CLAMP, SUM)
    z = tl.load(x + e, mask=inside, other=0.0).to(SUM)
    if bias is not None:
        z += _of_channel(bias, c, inside, ALIKE).to(SUM)
    a = _of_channel(slope, c, inside, ALIKE).to(SUM)
    y = tl.where(z > 0, z, z * a) * GAIN
    if ORDER == "forward":
        if CLAMP > 0:
            y = tl.where(y > bound, bound, y)
            y = tl.where(y < -bound, -bound, y)
        tl.store(out + e, y.to(out.dtype.element_ty), mask=inside)
    else:
        y = y.to(x.dtype.element_ty).to(SUM)  # as it was stored
        factor = tl.full([BLOCK], GAIN, SUM)  # m gain
        if CLAMP > 0:
            factor = tl.where(tl.abs(y) >= bound, 0.0, factor)
        below = tl.where(z > 0, 0.0, factor)
        g = tl.load(grad + e, mask=inside, other=0.0).to(SUM)
        if ORDER == "backward":
            dx = tl.where(factor == 0, 0.0, tl.where(z > 0, g, g * a) * factor)
            tl.store(out + e, dx.to(out.dtype.element_ty), mask=inside)
            if out_slope is not None:
                tl.store(out_slope + e, tl.where(below == 0, 0.0, below * g * z), mask=inside)
        else:
            p = _tangent(h, h_bias, e, c, inside, ALIKE, SUM, BLOCK)
            dg = tl.where(factor == 0, 0.0, tl.where(z > 0, p, p * a) * factor)
            if h_slope is not None:
                q = below * _of_channel(h_slope, c, inside, ALIKE).to(SUM)
                dg += tl.where(below == 0, 0.0, q * z)
                if out_x is not None:
                    tl.store(out_x + e, (q * g).to(out_x.dtype.element_ty), mask=inside)
            tl.store(out + e, dg.to(out.dtype.element_ty), mask=inside)
            if out_slope is not None:
                tl.store(out_slope + e, tl.where(below == 0, 0.0, below * g * p), mask=inside)


# ---- launchers: what gankern/ops/bias_act.py calls --------------------------------------------------------------
# What they only hand on to the launch is in *arguments: dim, activation, slope, gain, clamp; PReLU's: dim, gain, clamp.


@kept
def layout(shape: Sequence[int], strides: Sequence[int], dim: int) -> tuple[int, int, int]:
    """Outer, channels, inner of a dense tensor, as in csrc/cpu/kernels.h."""
    channels = shape[dim] if shape else 1
    size = math.prod(shape)
    if size == 0:
        return 0, channels, 1
    inner = size if channels == 1 else strides[dim]
    return size // (channels * inner), channels, inner


def sum_of_channels(dx: Tensor, dim: int) -> Tensor:
    """db: the sum over all but the channels."""
    others = [d for d in range(dx.ndim) if d != dim]
    if not others:
        return dx.clone()
    total = dx.sum(others, dtype=sum_dtype(dx.dtype))
    return total if total.dtype == dx.dtype else total.to(dx.dtype)


def gradient_of_bias(asked: bool, db: Tensor | None, dx: Tensor, dim: int) -> Tensor:
    """db, or where the kernel did not sum it up, what torch does; empty where nobody asked."""
    if not asked:
        return dx.new_empty(0)
    return sum_of_channels(dx, dim) if db is None else db


@kept
def _held(clamp: float | None, dtype: torch.dtype) -> float:
    """The clamp as the dtype holds it; 0 for none."""
    return 0.0 if clamp is None else torch.tensor(clamp, dtype=dtype).item()


def _blocks(x: Tensor) -> dict[str, int]:
    """The block sizes for x: as many bytes of half precision, for which a lane asks at once."""
    blocks = dict(BLOCKS(x.device))
    blocks["BLOCK"] *= max(1, 4 // x.element_size())
    return blocks


def _launch(
    order: str,
    x: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    h: Tensor | None,
    h_bias: Tensor | None,
    out: Tensor | None,
    out_x: Tensor | None,
    dim: int,
    activation: int,
    slope: float,
    gain: float,
    clamp: float | None,
    *,
    sums: bool = False,
) -> Tensor | None:
    """Returns db where it was asked for and could be summed up in the same pass."""
    outer, channels, inner = layout(x.shape, x.stride(), dim)
    size = outer * channels * inner
    if size == 0:
        return None
    blocks = _blocks(x)
    block = blocks["BLOCK"]
    programs = ceil_div(size, block)
    parts, columns, run, steps = None, 0, 0, 1
    if sums and inner % block == 0:
        parts = x.new_empty((outer, channels, inner // block), dtype=sum_dtype(x.dtype))
    elif sums and inner > 2 and block % inner == 0:
        run = inner
        parts = x.new_empty((outer, channels, 1), dtype=sum_dtype(x.dtype))
    elif sums and inner == 1 and channels == next_power_of_2(channels) <= block:
        columns, steps = channels, ceil_div(programs, PROGRAMS)
        programs = ceil_div(programs, steps)
        parts = x.new_empty((programs, channels, 1), dtype=sum_dtype(x.dtype))
    launch(
        _bias_act_kernel,
        programs,
        x,
        contiguous(bias),
        grad,
        h,
        contiguous(h_bias),
        out,
        out_x,
        parts,
        size,
        channels,
        inner,
        steps,
        ORDER=order,
        ACT=ACTIVATIONS[activation],
        SLOPE=slope,
        GAIN=gain,
        CLAMP=_held(clamp, x.dtype),
        SUM=sum_type(x.dtype),
        COLUMNS=columns,
        RUN=run,
        ALIKE=inner % block == 0,
        INDEX=index_type(size),
        **blocks,
    )
    return None if parts is None else sum_of_parts(parts, x.dtype)


@planned
def forward(x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """The result. Launches: 1, after a copy of what is not dense."""
    x = dense(x)
    y = torch.empty_like(x)
    _launch("forward", x, bias, None, None, None, y, None, *arguments)
    return y


@planned
def forward_(x: Tensor, bias: Tensor | None, *arguments: Any) -> None:
    """Overwrites x with the result. Launches: 1."""
    values = dense(x)
    _launch("forward", values, bias, None, None, None, values, None, *arguments)
    if values is not x:
        x.copy_(values)


@planned
def backward(grad: Tensor, saved: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias (empty where not asked for). Launches: 1, and a sum."""
    *options, sums = arguments
    saved = dense(saved)
    dx = torch.empty_like(saved)
    db = _launch("backward", saved, bias, laid_out_as(grad, saved), None, None, dx, None, *options, sums=sums)
    return dx, gradient_of_bias(sums, db, dx, options[0])


@planned
def double_backward(
    h: Tensor | None, h_bias: Tensor | None, grad: Tensor, saved: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of grad, of what was saved and of the bias (empty where not asked for). Launches: 1, and a sum."""
    *options, needs_grad, needs_saved, sums = arguments
    saved = dense(saved)
    out = torch.empty_like(saved) if needs_grad else None
    out_x = torch.empty_like(saved) if needs_saved or sums else None
    h, grad = laid_out_as(h, saved), laid_out_as(grad, saved)
    db = _launch("double_backward", saved, bias, grad, h, h_bias, out, out_x, *options, sums=sums)
    none = saved.new_empty(0)
    grad_saved = none if out_x is None else out_x
    return none if out is None else out, grad_saved, gradient_of_bias(sums, db, grad_saved, options[0])


def _launch_prelu(
    order: str,
    x: Tensor,
    bias: Tensor | None,
    slope: Tensor,
    grad: Tensor | None,
    h: Tensor | None,
    h_bias: Tensor | None,
    h_slope: Tensor | None,
    out: Tensor,
    out_x: Tensor | None,
    out_slope: Tensor | None,
    dim: int,
    gain: float,
    clamp: float | None,
) -> None:
    outer, channels, inner = layout(x.shape, x.stride(), dim)
    size = outer * channels * inner
    if size == 0:
        return
    blocks = BLOCKS(x.device)
    launch(
        _prelu_kernel,
        ceil_div(size, blocks["BLOCK"]),
        x,
        contiguous(bias),
        contiguous(slope),
        grad,
        h,
        contiguous(h_bias),
        contiguous(h_slope),
        out,
        out_x,
        out_slope,
        size,
        channels,
        inner,
        ORDER=order,
        GAIN=gain,
        CLAMP=_held(clamp, x.dtype),
        SUM=sum_type(x.dtype),
        ALIKE=inner % blocks["BLOCK"] == 0,
        INDEX=index_type(size),
        **blocks,
    )


def _summed(values: Tensor | None, x: Tensor, dim: int) -> Tensor:
    """The sum over all but the channels, in x's dtype; empty for None."""
    if values is None:
        return x.new_empty(0)
    total = sum_of_channels(values, dim)
    return total if total.dtype == x.dtype else total.to(x.dtype)


@planned
def prelu(x: Tensor, bias: Tensor | None, slope: Tensor, *options: Any) -> Tensor:
    """PReLU's result. Launches: 1, after a copy of what is not dense."""
    x = dense(x)
    y = torch.empty_like(x)
    _launch_prelu("forward", x, bias, slope, None, None, None, None, y, None, None, *options)
    return y


@planned
def prelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, slope: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, bias and slope (empty where not asked for). Launches: 1, and two sums."""
    *options, sums, slope_sums = arguments
    x = dense(x)
    dx, grad = torch.empty_like(x), laid_out_as(grad, x)
    products = torch.empty_like(x, dtype=sum_dtype(x.dtype)) if slope_sums else None
    _launch_prelu("backward", x, bias, slope, grad, None, None, None, dx, None, products, *options)
    dim = options[0]
    return dx, _summed(dx if sums else None, x, dim), _summed(products, x, dim)


@planned
def prelu_double_backward(
    h: Tensor | None,
    h_bias: Tensor | None,
    h_slope: Tensor | None,
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    slope: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of grad, x, bias and slope (empty where not asked for). Launches: 1, and two sums."""
    *options, needs_x, sums, slope_sums = arguments
    x = dense(x)
    h, grad, out = laid_out_as(h, x), laid_out_as(grad, x), torch.empty_like(x)
    # Without a gradient of the slope's gradient there is none of x, and nobody asks.
    out_x = torch.empty_like(x) if (needs_x or sums) and h_slope is not None else None
    products = torch.empty_like(x, dtype=sum_dtype(x.dtype)) if slope_sums else None
    given = h, h_bias, h_slope, out, out_x, products
    _launch_prelu("double_backward", x, bias, slope, grad, *given, *options)
    dim, grad_x = options[0], x.new_empty(0) if out_x is None else out_x
    return out, grad_x, _summed(out_x if sums else None, x, dim), _summed(products, x, dim)


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernel."""
    # Neither whole blocks nor whole channels, for what asks about each element.
    odd, bias = torch.empty(2, 4, 8, 11, dtype=dtype, device=device), torch.empty(4, dtype=dtype, device=device)
    options = 1, 2, 0.2, 1.5, 256.0
    forward(odd, bias, *options)
    backward(odd, odd, bias, *options, True)
    double_backward(odd, bias, odd, odd, bias, *options, True, True, True)
    x, bias = torch.empty(2, 4, 64, 64, dtype=dtype, device=device), torch.empty(4, dtype=dtype, device=device)
    # All activations in the type that mostly runs, and the longest in the others.
    prelu(x, bias, bias, 1, 1.5, 256.0)
    prelu_backward(x, x, bias, bias, 1, 1.5, 256.0, True, True)
    prelu_double_backward(x, bias, bias, x, x, bias, bias, 1, 1.5, 256.0, True, True, True)
    for row in KERNELS[:-1]:
        if dtype != torch.float32 and row.name not in ("leaky_relu", "softplus", "silu"):
            continue
        options = 1, row.index, 0.2, 1.5, 256.0
        forward(x, bias, *options)
        backward(x, x, bias, *options, True)
        double_backward(x, bias, x, x, bias, *options, True, True, True)
    small = torch.empty(4, 4, 8, 8, dtype=dtype, device=device)
    backward(small, small, bias, *options, True)
    last = x.contiguous(memory_format=torch.channels_last)
    for sums in (True, False):
        backward(last, last, bias, *options, sums)
        double_backward(last, bias, last, last, bias, *options, True, True, sums)
