"""The penalty of each sample's gradient norm, in two launches for each order.

Formula (Gulrajani et al. 2017, arXiv 1704.00028; one-sided: 1709.08894), for samples g_n, G the gradient of p, H that
of g's gradient:

    r_n = |g_n|       p_n = e^2 with e = r_n - t, or 0 where e < 0 and one-sided
    dg_n = G_n c_n g_n                                               c = 2 (1 - t/r)
    dG_n = c_n <H_n, g_n>
    dg_n = G_n c_n H_n + G_n d_n <H_n, g_n> g_n                      d = c'(r)/r = 2 t/r^3

c = d = 0 where e < 0 and one-sided. At r = 0 the norm's subgradient is 0, so c = d = 0 there; with t = 0 the penalty is
r^2, c = 2 everywhere.

Split. Each sample's elements, which lie together, are cut into at most 64 parts of whole blocks; `_dots_kernel` sums
up one part of <H_n, g_n> (or <g_n, g_n>) a program, and `_penalties_kernel` or `_combine_kernel` adds the parts up, in
their order. `_combine_kernel` has a program a block.

    launch       programs             reads              writes
    dots         parts of samples     g (H)              partial sums
    penalties    samples              partial sums       p, r
    combine      blocks of samples    g (H), partials    dg, dG

Forward is dots and penalties, 1 read of g; backward is combine alone, 1 read and 1 write; double backward is dots and
combine, 4 reads and 1 write. Bound by memory bandwidth. Sums are in fp32 (fp64 for fp64), without atomics.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton.launch import (
    ceil_div,
    contiguous,
    dense,
    dense_strides,
    laid_out_as,
    launch,
    next_power_of_2,
    planned,
    sum_type,
)

BLOCK = 2048
MAX_PARTS = 64
WARPS = 4

# ---- kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _dots_kernel(a, b, partial, size, part_size, PARTS: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr):
    sample = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    a += sample * size
    b += sample * size
    first = part.to(tl.int64) * part_size
    total = tl.zeros([BLOCK], SUM)
    for start in range(0, part_size, BLOCK):
        i = first + start + tl.arange(0, BLOCK)
        x = tl.load(a + i, mask=i < size, other=0.0).to(SUM)
        y = tl.load(b + i, mask=i < size, other=0.0).to(SUM)
        total += x * y
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _penalties_kernel(partial, values, norms, TARGET: tl.constexpr, ONE_SIDED: tl.constexpr, PARTS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    squares = tl.sum(tl.load(partial + sample * PARTS + tl.arange(0, PARTS)), 0)
    t = tl.full((), TARGET, squares.dtype)
    r = tl.sqrt(squares)
    excess = r - t
    if ONE_SIDED:
        excess = tl.where(excess < 0, 0.0, excess)
    tl.store(norms + sample, r)
    tl.store(values + sample, tl.where(t == 0, squares, excess * excess))


@triton.jit
def _combine_kernel(
    gradient,
    grad_grad,
    grad,
    norms,
    partial,
    out,
    to_grad,
    size,
    blocks,
    TARGET: tl.constexpr,  # a constant: as an argument it would be rounded to fp32
    SECOND: tl.constexpr,  # double backward
    ONE_SIDED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    r = tl.load(norms + sample)
    weight = tl.load(grad + sample)
    t = tl.full((), TARGET, r.dtype)
    ratio = t / tl.where(r == 0, 1.0, r)
    inactive = (r == 0) & (t != 0)
    if ONE_SIDED:
        inactive = inactive | (r < t)
    c = tl.where(inactive, 0.0, 2 * (1 - ratio))
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + sample * size + i, mask=i < size, other=0.0).to(r.dtype)
    if SECOND:
        dot = tl.sum(tl.load(partial + sample * PARTS + tl.arange(0, PARTS)), 0)
        d = tl.where(inactive | (t == 0), 0.0, 2 * ratio / (r * r))
        h = tl.load(grad_grad + sample * size + i, mask=i < size, other=0.0).to(r.dtype)
        value = (weight * c) * h + (weight * d * dot) * g
        if block == 0:
            tl.store(to_grad + sample, c * dot)
    else:
        value = (weight * c) * g
    tl.store(out + sample * size + i, value.to(out.dtype.element_ty), mask=i < size)


# ---- launchers: what gankern/ops/gradient_penalty.py calls --------------------------------------------------


def sample_major(x: Tensor) -> Tensor:
    """x itself where it is dense and each sample's elements lie together, else a copy that is."""
    if x.is_contiguous():
        return x
    if x.shape[0] > 1 and dense_strides(x.shape, x.stride())[0] * x.shape[0] != x.numel():
        return x.contiguous()
    return dense(x)


def _per_sample(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _all_dots(a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """Partial sums [samples, parts], and how many parts there are: a power of two."""
    samples, size = a.shape[0], math.prod(a.shape[1:])
    parts = min(MAX_PARTS, next_power_of_2(ceil_div(size, 4 * BLOCK)))
    part_size = ceil_div(ceil_div(size, parts), BLOCK) * BLOCK
    partial = torch.empty((samples, parts), dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    launch(
        _dots_kernel,
        samples * parts,
        a,
        b,
        partial,
        size,
        part_size,
        PARTS=parts,
        SUM=sum_type(a.dtype),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return partial, parts


@planned
def forward(gradient: Tensor, target: float, one_sided: bool) -> tuple[Tensor, Tensor]:
    """The penalties and the norms. Launches: 2."""
    values, norms = _per_sample(gradient), _per_sample(gradient)
    if gradient.numel() == 0:
        return values.fill_(0.0 if one_sided else target * target), norms.zero_()
    g = sample_major(gradient)
    partial, parts = _all_dots(g, g)
    launch(
        _penalties_kernel,
        len(g),
        partial,
        values,
        norms,
        TARGET=target,
        ONE_SIDED=one_sided,
        PARTS=parts,
        num_warps=1,
    )
    return values, norms


@planned
def backward(grad: Tensor, gradient: Tensor, norms: Tensor, target: float, one_sided: bool) -> Tensor:
    """The gradient of gradient. Launches: 1."""
    g = sample_major(gradient)
    out = torch.empty_like(g)
    if g.numel():
        _launch_combine(g, None, grad, norms, None, out, None, 1, target, one_sided)
    return out


@planned
def double_backward(
    grad_grad: Tensor, grad: Tensor, gradient: Tensor, norms: Tensor, target: float, one_sided: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of grad and of gradient. Launches: 2."""
    g = sample_major(gradient)
    to_grad, out = _per_sample(g), torch.empty_like(g)
    if g.numel() == 0:
        return to_grad.zero_(), out
    h = laid_out_as(grad_grad, g)
    partial, parts = _all_dots(h, g)
    _launch_combine(g, h, grad, norms, partial, out, to_grad, parts, target, one_sided)
    return to_grad, out


def _launch_combine(
    g: Tensor,
    h: Tensor | None,
    grad: Tensor,
    norms: Tensor,
    partial: Tensor | None,
    out: Tensor,
    to_grad: Tensor | None,
    parts: int,
    target: float,
    one_sided: bool,
) -> None:
    size = math.prod(g.shape[1:])
    blocks = ceil_div(size, BLOCK)
    launch(
        _combine_kernel,
        len(g) * blocks,
        g,
        h,
        contiguous(grad),
        contiguous(norms),
        partial,
        out,
        to_grad,
        size,
        blocks,
        TARGET=target,
        SECOND=h is not None,
        ONE_SIDED=one_sided,
        PARTS=parts,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels."""
    for size in (3, 4 * BLOCK * MAX_PARTS):
        gradient = torch.empty(2, size, dtype=dtype, device=device)
        penalties, norms = forward(gradient, 1.0, True)
        backward(penalties, gradient, norms, 1.0, True)
        double_backward(gradient, penalties, gradient, norms, 1.0, True)
