"""Bias, activation, gain and clamp in one kernel each way.

Formula: y = clamp(f(x + b) gain, -clamp, clamp). The backward reads s, the result (for silu, and a leaky ReLU of
negative slope, the input); with a = y / gain, m = 0 where |y| is at the clamp and else 1, and p = m (h + k) for the
gradients h and k of the two gradients:

    dx = m g gain f'          dg = p gain f'          ds = p g df'/da, or p g gain df'/dz where s is the input

csrc/cpu/activation.h has the table of f, f' and df'/ds.

Split. A program takes BLOCK neighbouring elements in the order of memory, whatever the order of the dimensions is: an
element's channel is (element / inner) % channels. Traffic: forward reads 1 tensor and writes 1; backward 2 and 1;
double backward 3 and 1 or 2; bound by it. db is a sum of its own, which reads dx once more. Computed in fp32 (fp64 for
fp64).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton.aot import AotEntry

BLOCK = 1024
WARPS = 4
FORWARD, BACKWARD, DOUBLE_BACKWARD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# As in csrc/cpu/activation.h.
RELU, LEAKY_RELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SILU, LEAKY_RELU_OF_INPUT = (
    tl.constexpr(i) for i in range(1, 10)
)
SELU_SCALE, SELU_NEGATIVE = tl.constexpr(1.0507009873554805), tl.constexpr(1.0507009873554805 * 1.6732632423543772)

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
    if ACT == RELU:
        return tl.where(z <= 0, 0.0, z)
    elif ACT == LEAKY_RELU or ACT == LEAKY_RELU_OF_INPUT:  # noqa: SIM109
        return tl.where(z > 0, z, z * SLOPE)
    elif ACT == TANH:
        m = _expm1_minus(2 * tl.abs(z))
        return tl.where(z < 0, m, -m) / (2 + m)
    elif ACT == SIGMOID:
        return _sigmoid(z)
    elif ACT == ELU:
        return tl.where(z <= 0, _expm1_minus(-z), z)
    elif ACT == SELU:
        return tl.where(z <= 0, SELU_NEGATIVE * _expm1_minus(-z), SELU_SCALE * z)
    elif ACT == SOFTPLUS:
        return tl.where(z < 0, 0.0, z) + _log1p_unit(tl.exp(-tl.abs(z)))
    elif ACT == SILU:
        return z * _sigmoid(z)
    else:
        return z


@triton.jit
def _first(g, s, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """g f'."""
    if ACT == RELU:
        return tl.where(s <= 0, 0.0, g)
    elif ACT == LEAKY_RELU or ACT == LEAKY_RELU_OF_INPUT:  # noqa: SIM109
        return tl.where(s > 0, g, g * SLOPE)
    elif ACT == TANH:
        return g * ((1 - s) * (1 + s))
    elif ACT == SIGMOID:
        return g * (s * (1 - s))
    elif ACT == ELU:
        return tl.where(s > 0, g, g * (s + 1))
    elif ACT == SELU:
        return g * tl.where(s > 0, SELU_SCALE, s + SELU_NEGATIVE)
    elif ACT == SOFTPLUS:
        return -g * _expm1_minus(s)
    elif ACT == SILU:
        t = _sigmoid(s)
        return g * (t * (1 + s * (1 - t)))
    else:
        return g


@triton.jit
def _second(p, s, ACT: tl.constexpr):
    """p df'/ds."""
    if ACT == TANH:
        return p * (-2 * s)
    elif ACT == SIGMOID:
        return p * (1 - 2 * s)
    elif ACT == ELU or ACT == SELU:  # noqa: SIM109
        return tl.where(s >= 0, 0.0, p)
    elif ACT == SOFTPLUS:
        return p * tl.exp(-s)
    elif ACT == SILU:
        t = _sigmoid(s)
        return p * (t * (1 - t) * (2 + s * (1 - 2 * t)))
    else:
        return p * 0


# ---- the kernel -------------------------------------------------------------------------------------------------


@triton.jit
def _bias_act_kernel(
    x,  # the input, or what was saved
    bias,  # [channels] or None
    grad,
    h,  # or None
    h_bias,  # [channels] or None
    out,  # or None
    out_x,  # or None
    size,
    channels,
    inner,
    ORDER: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    CLAMP: tl.constexpr,  # 0 for none
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    OF_INPUT: tl.constexpr = ACT >= SILU  # silu, and leaky_relu of a negative slope
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    c = e // inner % channels
    bound = tl.full([BLOCK], CLAMP, SUM)  # a plain number would be taken as fp32
    z = tl.load(x + e, mask=inside, other=0.0).to(SUM)
    if ORDER == FORWARD or OF_INPUT:  # noqa: SIM102
        if bias is not None:
            z += tl.load(bias + c, mask=inside, other=0.0).to(SUM)
    if ORDER == FORWARD:
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
        if ORDER == BACKWARD:
            g = tl.load(grad + e, mask=inside, other=0.0).to(SUM)
            dx = _first(g * GAIN, z, ACT, SLOPE)
            if CLAMP > 0:
                dx = tl.where(tl.abs(y) >= bound, 0.0, dx)
            tl.store(out + e, dx.to(out.dtype.element_ty), mask=inside)
        else:
            p = tl.zeros([BLOCK], SUM)
            if h is not None:
                p += tl.load(h + e, mask=inside, other=0.0).to(SUM)
            if h_bias is not None:
                p += tl.load(h_bias + c, mask=inside, other=0.0).to(SUM)
            if CLAMP > 0:
                p = tl.where(tl.abs(y) >= bound, 0.0, p)
            if out is not None:
                tl.store(out + e, _first(p * GAIN, z, ACT, SLOPE).to(out.dtype.element_ty), mask=inside)
            if out_x is not None:
                p *= tl.load(grad + e, mask=inside, other=0.0).to(SUM)
                if OF_INPUT:
                    p *= GAIN
                tl.store(out_x + e, _second(p, z, ACT).to(out_x.dtype.element_ty), mask=inside)


# ---- launchers: what gankern/ops/bias_act.py calls -----------------------------------------------------------


def dense(x: Tensor) -> Tensor:
    """x where its elements lie densely in some order, else a dense copy."""
    like = torch.empty_like(x)
    return x if x.stride() == like.stride() else like.copy_(x)


def laid_out_as(x: Tensor | None, model: Tensor) -> Tensor | None:
    """x where it lies in memory as ``model`` does, else a copy that does."""
    if x is None or x.stride() == model.stride():
        return x
    return torch.empty_like(model).copy_(x)


def layout(x: Tensor, dim: int) -> tuple[int, int, int]:
    """Outer, channels, inner of a dense tensor, as in csrc/cpu/layout.h."""
    channels = x.shape[dim] if x.ndim else 1
    if x.numel() == 0:
        return 0, channels, 1
    inner = x.numel() if channels == 1 else x.stride(dim)
    return x.numel() // (channels * inner), channels, inner


def sum_of_channels(dx: Tensor, dim: int) -> Tensor:
    """db: the sum over all but the channels."""
    others = [d for d in range(dx.ndim) if d != dim]
    total = torch.float64 if dx.dtype == torch.float64 else torch.float32
    return (dx.sum(others, dtype=total) if others else dx).to(dx.dtype)


def _launch(order, x, bias, grad, h, h_bias, out, out_x, dim, activation, slope, gain, clamp) -> None:
    if x.numel() == 0:
        return
    _, channels, inner = layout(x, dim)
    # As x's dtype holds it.
    clamp = 0.0 if clamp is None else torch.tensor(clamp, dtype=x.dtype).item()
    with torch.cuda.device_of(x):
        _bias_act_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x,
            None if bias is None else bias.contiguous(),
            grad,
            h,
            None if h_bias is None else h_bias.contiguous(),
            out,
            out_x,
            x.numel(),
            channels,
            inner,
            ORDER=order.value,
            ACT=activation,
            SLOPE=slope,
            GAIN=gain,
            CLAMP=clamp,
            SUM=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def forward(x: Tensor, bias: Tensor | None, *arguments) -> Tensor:
    """The result. Launches: 1, after a copy of what is not dense."""
    x = dense(x)
    y = torch.empty_like(x)
    _launch(FORWARD, x, bias, None, None, None, y, None, *arguments)
    return y


def forward_(x: Tensor, bias: Tensor | None, *arguments) -> None:
    """Overwrites x with the result. Launches: 1."""
    values = dense(x)
    _launch(FORWARD, values, bias, None, None, None, values, None, *arguments)
    if values is not x:
        x.copy_(values)


def backward(grad: Tensor, saved: Tensor, bias: Tensor | None, dim: int, *arguments) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias (empty where not asked for). Launches: 1, and a sum."""
    *arguments, sums = arguments
    saved = dense(saved)
    dx = torch.empty_like(saved)
    _launch(BACKWARD, saved, bias, laid_out_as(grad, saved), None, None, dx, None, dim, *arguments)
    return dx, sum_of_channels(dx, dim) if sums else dx.new_empty(0)


def double_backward(
    h: Tensor | None, h_bias: Tensor | None, grad: Tensor, saved: Tensor, bias: Tensor | None, dim: int, *arguments
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of grad, of what was saved and of the bias (empty where not asked for). Launches: 1, and a sum."""
    *arguments, needs_grad, needs_saved, sums = arguments
    saved = dense(saved)
    out = torch.empty_like(saved) if needs_grad else None
    out_x = torch.empty_like(saved) if needs_saved or sums else None
    h, grad = laid_out_as(h, saved), laid_out_as(grad, saved)
    _launch(DOUBLE_BACKWARD, saved, bias, grad, h, h_bias, out, out_x, dim, *arguments)
    none = saved.new_empty(0)
    db = sum_of_channels(out_x, dim) if sums else none
    return none if out is None else out, none if out_x is None else out_x, db


# ---- what the ahead-of-time check compiles --------------------------------------------------------------------


def _aot_entries() -> list[AotEntry]:
    """All orders and activations in fp32, and the longest in fp64 and bf16."""
    entries = []
    for name, element, activations in (
        ("fp32", tl.float32, range(10)),
        ("fp64", tl.float64, (SOFTPLUS.value, SILU.value)),
        ("bf16", tl.bfloat16, (LEAKY_RELU.value, SILU.value)),
    ):
        for activation in activations:
            for order in (FORWARD, BACKWARD, DOUBLE_BACKWARD):
                present = {"x", "bias", "out"}
                present |= {"grad"} if order != FORWARD else set()
                present |= {"h", "h_bias", "out_x"} if order == DOUBLE_BACKWARD else set()
                constexprs = {
                    "ORDER": order.value,
                    "ACT": activation,
                    "SLOPE": 0.2,
                    "GAIN": 1.5,
                    "CLAMP": 256.0,
                    "SUM": tl.float64 if element == tl.float64 else tl.float32,
                    "BLOCK": BLOCK,
                }
                # A pointer that is None is a constant.
                pointers = ("x", "bias", "grad", "h", "h_bias", "out", "out_x")
                constexprs.update({pointer: None for pointer in pointers if pointer not in present})
                arguments = {pointer: f"*{name}" for pointer in pointers if pointer in present}
                arguments.update(dict.fromkeys(("size", "channels", "inner"), "i64"))
                entries.append(AotEntry(_bias_act_kernel, arguments, constexprs, WARPS))
    return entries


AOT = _aot_entries()
