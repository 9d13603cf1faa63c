"""Minibatch standard deviation in one read and one write of the batch.

Formula (Karras et al. 2018, arXiv 1710.10196, section 3), for the G samples i of a group and each of the P positions of
a feature (a part of the channels, all pixels), D = G or G - 1:

    d_i = x_i - mean_i x_i        sigma = sqrt(sum_i d_i^2 / D + eps)        result = mean over positions of sigma

First order, k = (sum of the result's gradients) / P:     dx_i = g_i + k d_i / (D sigma)
Second order, for the gradient h of dx, q = sum_i h_i d_i:
    gradient of g_i: h_i, of each of the result's gradients: mean of q / (D sigma)
    gradient of x_i: k / (D sigma) (h_i - mean h - d_i q / (D sigma^2))

Split. One kernel for all orders. A program takes BLOCK neighbouring positions of a group as they lie in memory,
channels last or not, and passes over its samples twice: the second time they come from the cache. It writes the copies
and the gradients, and the sum of its sigma, or of q / (D sigma), of its feature to memory of its own; torch adds these
up in order, and a second kernel writes the channel of the result. No atomics. For channels last tensors a block lies
across features, so a program sums one feature after the other.

Traffic. x is read once from memory and once from the L2 cache, the result is written once; gradients likewise. Bound by
memory. Sums are in fp32 (fp64 for fp64).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.core.layout import empty, memory_format
from gankern.triton.aot import AotEntry

BLOCK = 512  # positions of a program
FILL = 512  # values of the result a program writes
WARPS = 4
FORWARD, BACKWARD, DOUBLE_BACKWARD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# ---- the kernels -------------------------------------------------------------------------------------------


@triton.jit
def _sample(m, i, groups, group_size, STRIDED: tl.constexpr):
    """Sample i of group m."""
    return (i * groups + m if STRIDED else m * group_size + i).to(tl.int64)


@triton.jit
def _positions_kernel(
    x,  # [N, channels, pixels], or [N, pixels, channels]
    grad,  # like the result
    h,  # like x
    k,  # [groups, features]
    out,  # like the result
    out_x,  # like x
    parts,  # [groups, features, blocks]
    groups,
    group_size,
    channels,
    pixels,
    options,  # D and eps, in SUM's type: a float argument would be fp32
    FEATURES: tl.constexpr,
    STRIDED: tl.constexpr,
    LAST: tl.constexpr,
    ORDER: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(tl.cast(channels, tl.int64) * pixels, BLOCK)
    m = (tl.program_id(0) // blocks).to(tl.int32)
    block = tl.program_id(0) % blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(channels, tl.int64) * pixels
    inside = at < size
    channel = at % channels if LAST else at // pixels
    feature = (channel // (channels // FEATURES)).to(tl.int32)
    result_size = size + FEATURES * pixels
    result_at = at + at // channels * FEATURES if LAST else at

    count = tl.zeros([1], SUM) + group_size
    mean = tl.zeros([BLOCK], SUM)
    mean_h = tl.zeros([BLOCK], SUM)
    for i in range(group_size):
        n = _sample(m, i, groups, group_size, STRIDED)
        value = tl.load(x + n * size + at, mask=inside, other=0.0)
        mean += value.to(SUM)
        if ORDER == FORWARD:
            tl.store(out + n * result_size + result_at, value, mask=inside)
        if ORDER == DOUBLE_BACKWARD:
            tangent = tl.load(h + n * size + at, mask=inside, other=0.0)
            mean_h += tangent.to(SUM)
            tl.store(out + n * result_size + result_at, tangent, mask=inside)
    mean /= count
    mean_h /= count
    variance = tl.zeros([BLOCK], SUM)
    q = tl.zeros([BLOCK], SUM)
    for i in range(group_size):
        n = _sample(m, i, groups, group_size, STRIDED)
        d = tl.load(x + n * size + at, mask=inside, other=0.0).to(SUM) - mean
        variance += d * d
        if ORDER == DOUBLE_BACKWARD:
            q += d * tl.load(h + n * size + at, mask=inside, other=0.0).to(SUM)
    divisor = tl.load(options)
    sigma = tl.sqrt(variance / divisor + tl.load(options + 1))
    term = sigma
    if ORDER != FORWARD:
        factor = 1.0 / (divisor * sigma)
        scale = tl.load(k + m * FEATURES + feature, mask=inside, other=0.0) * factor
        term = q * factor
        slope = term / sigma
        for i in range(group_size):
            n = _sample(m, i, groups, group_size, STRIDED)
            d = tl.load(x + n * size + at, mask=inside, other=0.0).to(SUM) - mean
            if ORDER == BACKWARD:
                g = tl.load(grad + n * result_size + result_at, mask=inside, other=0.0).to(SUM)
                result = g + scale * d
            else:
                tangent = tl.load(h + n * size + at, mask=inside, other=0.0).to(SUM)
                result = scale * (tangent - mean_h - d * slope)
            tl.store(out_x + n * size + at, result.to(out_x.dtype.element_ty), mask=inside)
    if ORDER != BACKWARD:
        for f in range(FEATURES):
            part = tl.sum(tl.where(inside & (feature == f), term, 0.0), 0)
            tl.store(parts + (m * FEATURES + f).to(tl.int64) * blocks + block, part)


@triton.jit
def _channel_kernel(
    values,  # [groups, features]
    out,
    groups,
    group_size,
    channels,
    pixels,
    FEATURES: tl.constexpr,
    STRIDED: tl.constexpr,
    LAST: tl.constexpr,
    FILL: tl.constexpr,
):
    """Writes the result's last channels."""
    blocks = tl.cdiv(pixels * FEATURES, FILL)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * FILL + tl.arange(0, FILL)
    inside = at < tl.cast(pixels, tl.int64) * FEATURES
    m = n % groups if STRIDED else n // group_size
    feature = at % FEATURES if LAST else at // pixels
    value = tl.load(values + m * FEATURES + feature, mask=inside, other=0.0)
    size = tl.cast(channels, tl.int64) * pixels
    to = at // FEATURES * (channels + FEATURES) + channels + feature if LAST else size + at
    tl.store(out + n * (size + FEATURES * pixels) + to, value.to(out.dtype.element_ty), mask=inside)


# ---- launchers: what gankern/ops/minibatch_stddev.py calls ---------------------------------------------------


def _geometry(x: Tensor) -> tuple[Tensor, bool, int]:
    """x as it is gone through, whether that is channels last, and its pixels."""
    layout = memory_format(x)
    return x.contiguous(memory_format=layout), layout != torch.contiguous_format, x[0, 0].numel() if len(x) else 0


def _launch(order, x, grad, h, k, out, out_x, group_size, num_channels, strided, unbiased, eps, last, pixels):
    """Returns the means over positions of what a program sums, [groups, features]."""
    groups, channels = len(x) // group_size, x.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    blocks = triton.cdiv(channels * pixels, BLOCK)
    parts = None
    if order != BACKWARD:
        parts = x.new_empty((groups, num_channels, blocks), dtype=wide)
    _positions_kernel[(groups * blocks,)](
        x,
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
        torch.tensor([group_size - 1 if unbiased else group_size, eps], dtype=wide, device=x.device),
        FEATURES=num_channels,
        STRIDED=strided,
        LAST=last,
        ORDER=order.value,
        SUM=tl.float64 if x.dtype == torch.float64 else tl.float32,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    if parts is None:
        return
    values = parts.sum(2) / (channels // num_channels * pixels)
    _channel_kernel[(len(x) * triton.cdiv(pixels * num_channels, FILL),)](
        values,
        out,
        groups,
        group_size,
        channels,
        pixels,
        FEATURES=num_channels,
        STRIDED=strided,
        LAST=last,
        FILL=FILL,
        num_warps=WARPS,
    )


def _factors(grad: Tensor, x: Tensor, group_size: int, num_channels: int, strided: bool) -> Tensor:
    """k: the sums of the gradients of the result over the group and its pixels, over its positions."""
    groups, channels = len(x) // group_size, x.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    samples = grad[:, channels:].reshape(len(x), num_channels, -1).sum(2, dtype=wide)
    by_group = samples.unflatten(0, (group_size, groups) if strided else (groups, group_size))
    positions = channels // num_channels * max(x[0, 0].numel(), 1)
    return by_group.sum(0 if strided else 1).div(positions).contiguous()


def forward(x: Tensor, group_size: int, num_channels: int, strided: bool, unbiased: bool, eps: float) -> Tensor:
    """Launches: 2, and a sum."""
    out = empty(x, x.shape[1] + num_channels)
    if x.numel():
        with torch.cuda.device_of(x):
            x, last, pixels = _geometry(x)
            options = (group_size, num_channels, strided, unbiased, eps, last, pixels)
            _launch(FORWARD, x, None, None, None, out, None, *options)
    return out


def backward(
    grad: Tensor, x: Tensor, group_size: int, num_channels: int, strided: bool, unbiased: bool, eps: float
) -> Tensor:
    """Launches: 1, after sums of the result's gradients."""
    out = empty(x)
    if x.numel():
        with torch.cuda.device_of(x):
            layout = memory_format(x)
            x, last, pixels = _geometry(x)
            grad = grad.contiguous(memory_format=layout)
            k = _factors(grad, x, group_size, num_channels, strided)
            options = (group_size, num_channels, strided, unbiased, eps, last, pixels)
            _launch(BACKWARD, x, grad, None, k, None, out, *options)
    return out


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
    """Launches: 2, and sums."""
    grad_grad, grad_x = empty(x, x.shape[1] + num_channels), empty(x)
    if x.numel():
        with torch.cuda.device_of(x):
            layout = memory_format(x)
            x, last, pixels = _geometry(x)
            h = grad_grad_x.contiguous(memory_format=layout)
            k = _factors(grad, x, group_size, num_channels, strided)
            options = (group_size, num_channels, strided, unbiased, eps, last, pixels)
            _launch(DOUBLE_BACKWARD, x, None, h, k, grad_grad, grad_x, *options)
    return grad_grad, grad_x


# ---- what the ahead-of-time check compiles -----------------------------------------------------------------


def _aot_entries() -> list[AotEntry]:
    entries = []
    counts = dict.fromkeys(("groups", "group_size", "channels", "pixels"), "i32")
    for element, name in ((tl.float64, "fp64"), (tl.float32, "fp32"), (tl.bfloat16, "bf16")):
        wide = "fp64" if element == tl.float64 else "fp32"
        for order, last in ((FORWARD, False), (FORWARD, True), (BACKWARD, True), (DOUBLE_BACKWARD, True)):
            arguments = {"x": f"*{name}", **counts, "options": f"*{wide}"}
            constexprs = {
                "FEATURES": 2,
                "STRIDED": True,
                "LAST": last,
                "ORDER": order.value,
                "SUM": tl.float64 if element == tl.float64 else tl.float32,
                "BLOCK": BLOCK,
            }
            present = {
                "grad": order == BACKWARD,
                "h": order == DOUBLE_BACKWARD,
                "k": order != FORWARD,
                "out": order != BACKWARD,
                "out_x": order != FORWARD,
                "parts": order != BACKWARD,
            }
            for argument, is_there in present.items():
                if is_there:
                    arguments[argument] = f"*{wide if argument in ('k', 'parts') else name}"
                else:
                    constexprs[argument] = None
            entries.append(AotEntry(_positions_kernel, arguments, constexprs, WARPS))
        fill = {"FEATURES": 2, "STRIDED": True, "LAST": True, "FILL": FILL}
        entries.append(AotEntry(_channel_kernel, {"values": f"*{wide}", "out": f"*{name}", **counts}, fill, WARPS))
    return entries


AOT = _aot_entries()
