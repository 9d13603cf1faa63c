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

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.core.layout import empty, memory_format
from gankern.triton.launch import Blocks, ceil_div, index_type, launch, sum_dtype, sum_type

BLOCKS = Blocks(  # positions of a program
    "minibatch_stddev",
    {"BLOCK": 512, "num_warps": 4},
    {"BLOCK": 1024, "num_warps": 4},
    {"BLOCK": 256, "num_warps": 4},
    {"BLOCK": 128, "num_warps": 1},
)
FILL = 512  # values of the result a program writes
WARPS = 4

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
    FEATURES: tl.constexpr,
    STRIDED: tl.constexpr,
    LAST: tl.constexpr,
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
        if ORDER == "forward":
            tl.store(out + n * result_size + result_at, value, mask=inside)
        if ORDER == "double_backward":
            tangent = tl.load(h + n * size + at, mask=inside, other=0.0)
            mean_h += tangent.to(SUM)
            tl.store(out + n * result_size + result_at, tangent, mask=inside)
    mean /= count
    mean_h /= count
    rest = tl.zeros([BLOCK], SUM)  # what the mean lost in x's precision: the mean of the differences
    for i in range(group_size):
        n = _sample(m, i, groups, group_size, STRIDED)
        rest += tl.load(x + n * size + at, mask=inside, other=0.0).to(SUM) - mean
    rest /= count
    variance = tl.zeros([BLOCK], SUM)
    q = tl.zeros([BLOCK], SUM)
    for i in range(group_size):
        n = _sample(m, i, groups, group_size, STRIDED)
        d = tl.load(x + n * size + at, mask=inside, other=0.0).to(SUM) - mean - rest
        variance += d * d
        if ORDER == "double_backward":
            q += d * tl.load(h + n * size + at, mask=inside, other=0.0).to(SUM)
    divisor = count - 1 if UNBIASED else count
    sigma = tl.sqrt(variance / divisor + tl.full([1], EPS, SUM))  # a plain number would be taken as fp32
    term = sigma
    if ORDER != "forward":
        factor = 1.0 / (divisor * sigma)
        scale = tl.load(k + m * FEATURES + feature, mask=inside, other=0.0) * factor
        term = q * factor
        slope = term / sigma
        for i in range(group_size):
            n = _sample(m, i, groups, group_size, STRIDED)
            d = tl.load(x + n * size + at, mask=inside, other=0.0).to(SUM) - mean - rest
            if ORDER == "backward":
                g = tl.load(grad + n * result_size + result_at, mask=inside, other=0.0).to(SUM)
                result = g + scale * d
            else:
                tangent = tl.load(h + n * size + at, mask=inside, other=0.0).to(SUM)
                result = scale * (tangent - mean_h - d * slope)
            tl.store(out_x + n * size + at, result.to(out_x.dtype.element_ty), mask=inside)
    if ORDER != "backward":
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
    last = layout != torch.contiguous_format
    return x.contiguous(memory_format=layout), last, math.prod(x.shape[2:])


def _launch(order, x, grad, h, k, out, out_x, group_size, num_channels, strided, unbiased, eps, last, pixels):
    groups, channels = len(x) // group_size, x.shape[1]
    wide = sum_dtype(x.dtype)
    sizes = BLOCKS(x.device)
    blocks = ceil_div(channels * pixels, sizes["BLOCK"])
    parts = None
    if order != "backward":
        parts = x.new_empty((groups, num_channels, blocks), dtype=wide)
    launch(
        _positions_kernel,
        groups * blocks,
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
        FEATURES=num_channels,
        STRIDED=strided,
        LAST=last,
        ORDER=order,
        UNBIASED=unbiased,
        EPS=eps,
        SUM=sum_type(x.dtype),
        INDEX=index_type((channels + num_channels) * pixels),
        **sizes,
    )
    if parts is None:
        return
    launch(
        _channel_kernel,
        len(x) * ceil_div(pixels * num_channels, FILL),
        parts.sum(2) / (channels // num_channels * pixels),
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
    samples = grad[:, channels:].reshape(len(x), num_channels, -1).sum(2, dtype=sum_dtype(x.dtype))
    by_group = samples.unflatten(0, (group_size, groups) if strided else (groups, group_size))
    positions = channels // num_channels * max(math.prod(x.shape[2:]), 1)
    return by_group.sum(0 if strided else 1).div(positions).contiguous()


def forward(x: Tensor, group_size: int, num_channels: int, strided: bool, unbiased: bool, eps: float) -> Tensor:
    """Launches: 2, and a sum."""
    out = empty(x, x.shape[1] + num_channels)
    if x.numel():
        x, last, pixels = _geometry(x)
        options = (group_size, num_channels, strided, unbiased, eps, last, pixels)
        _launch("forward", x, None, None, None, out, None, *options)
    return out


def backward(
    grad: Tensor, x: Tensor, group_size: int, num_channels: int, strided: bool, unbiased: bool, eps: float
) -> Tensor:
    """Launches: 1, after sums of the result's gradients."""
    out = empty(x)
    if x.numel():
        layout = memory_format(x)
        x, last, pixels = _geometry(x)
        grad = grad.contiguous(memory_format=layout)
        k = _factors(grad, x, group_size, num_channels, strided)
        options = (group_size, num_channels, strided, unbiased, eps, last, pixels)
        _launch("backward", x, grad, None, k, None, out, *options)
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
        layout = memory_format(x)
        x, last, pixels = _geometry(x)
        h = grad_grad_x.contiguous(memory_format=layout)
        k = _factors(grad, x, group_size, num_channels, strided)
        options = (group_size, num_channels, strided, unbiased, eps, last, pixels)
        _launch("double_backward", x, None, h, k, grad_grad, grad_x, *options)
    return grad_grad, grad_x


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(8, 6, 16, 16, dtype=dtype, device=device).contiguous(memory_format=layout)
        options = 4, 2, True, False, 1e-8
        y = forward(x, *options)
        backward(y, x, *options)
        double_backward(x, y, x, *options)
