"""Minibatch discrimination without a tensor of pairs.

Formula (Salimans et al. 2016, arXiv 1606.03498, section 3.2), for points i of one set and points j of the same one
(j != i) or of another one; g is the gradient of the sums o, h that of m's gradient, s_c = sign(m_j[c] - m_i[c]):

    e_ij[b] = exp(-sum_c |m_i[b,c] - m_j[b,c]|)              o_i = sum_j e_ij
    dm_i[c] = sum_j w_ij s_c                                 w_ij = (g_i + g_j) e_ij
    dg_i = sum_j p_ij, and dm_i as above with                w_ij = (g_i + g_j) p_ij
                                                             p_ij = -e_ij sum_c s_c (h_j[c] - h_i[c])

Between two sets only the points of the first one have a g, and the gradient of the second set is the same sum with the
sets exchanged. So one kernel serves all: it sums over `against` for each of `points`.

Split. A program takes one kernel b and a block of points, and passes over all of the others a block at a time; a tile
of pairs lives in registers. Each pair is computed twice, once from either side: what it adds to the other point would
need atomics, or partial sums in memory. For many coordinates the gradient is split among programs, MAX_DIMS each.

Traffic. Each program reads its b's slice of `against` once; copies of m, g and h as [B, C, N], which one kernel makes
before, make these reads contiguous, and a slice stays in the L2 cache for all its programs. Bound by arithmetic:
N^2 B (3 C + 10) operations forward. Sums are in fp32 (fp64 for fp64), in a fixed order, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton.launch import Blocks, ceil_div, contiguous, launch, next_power_of_2, planned, sum_type

BLOCKS = Blocks(  # the tile of pairs of one program; see _against
    "minibatch_discrimination",
    {"POINTS": 16, "AGAINST": 64, "num_warps": 4},
    {"POINTS": 32, "AGAINST": 64, "num_warps": 4},
    {"POINTS": 8, "AGAINST": 64, "num_warps": 2},
    {"POINTS": 16, "AGAINST": 32, "num_warps": 2},
)
TILE = 32  # of a transposition, each side
MAX_DIMS = 64  # coordinates whose gradients one program holds

# ---- the kernel --------------------------------------------------------------------------------------------


@triton.jit
def _sign(x):
    """-1, 0 or 1; 0 of NaN."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def _coordinate(slice_, c, k, count, SUM: tl.constexpr):
    """Coordinate c of the points k, of a slice [C, count]."""
    return tl.load(slice_ + c * count + k, mask=k < count, other=0.0).to(SUM)


@triton.jit
def _pairs_kernel(
    points,  # [B, C, count]
    points_h,
    points_grad,  # [B, count]
    against,  # [B, C, against_count]
    against_h,
    against_grad,
    sums,  # [count, B]: o, or dg
    out,  # [count, B, C]: dm
    count,
    against_count,
    kernels,
    ORDER: tl.constexpr,  # "forward", "backward" or "double_backward"
    SAME: tl.constexpr,  # points and against are one set
    POINTS_GRAD: tl.constexpr,  # which of the two have a g
    AGAINST_GRAD: tl.constexpr,
    SUMS: tl.constexpr,  # whether to write the sums
    DIMS: tl.constexpr,
    UNROLLED: tl.constexpr,  # coordinates at a time; divides DIMS
    OUT_DIMS: tl.constexpr,  # a power of two: the coordinates of this program's gradients
    SUM: tl.constexpr,
    POINTS: tl.constexpr,
    AGAINST: tl.constexpr,
):
    blocks = tl.cdiv(count, POINTS)
    b = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * POINTS + tl.arange(0, POINTS)
    slice_ = b.to(tl.int64) * count
    against_slice = b.to(tl.int64) * against_count
    points += slice_ * DIMS
    against += against_slice * DIMS
    if ORDER == "double_backward":
        points_h += slice_ * DIMS
        against_h += against_slice * DIMS
    if POINTS_GRAD:
        grad_i = tl.load(points_grad + slice_ + i, mask=i < count, other=0.0).to(SUM)

    total = tl.zeros([POINTS, AGAINST], SUM)
    own_dims = tl.program_id(1) * OUT_DIMS + tl.arange(0, OUT_DIMS)
    gradient = tl.zeros([POINTS, OUT_DIMS], SUM)
    for start in range(0, against_count, AGAINST):
        j = start + tl.arange(0, AGAINST)
        distance = tl.zeros([POINTS, AGAINST], SUM)
        q = tl.zeros([POINTS, AGAINST], SUM)
        for first in range(0, DIMS, UNROLLED):
            for k in tl.static_range(UNROLLED):
                x = _coordinate(points, first + k, i, count, SUM)
                y = _coordinate(against, first + k, j, against_count, SUM)
                difference = y[None, :] - x[:, None]
                distance += tl.abs(difference)
                if ORDER == "double_backward":
                    hx = _coordinate(points_h, first + k, i, count, SUM)
                    hy = _coordinate(against_h, first + k, j, against_count, SUM)
                    q += _sign(difference) * (hx[:, None] - hy[None, :])

        counts = (i < count)[:, None] & (j < against_count)[None, :]
        if SAME:
            counts = counts & (i[:, None] != j[None, :])
        value = tl.exp(-distance)
        if ORDER == "double_backward":
            value *= q
        if SUMS:
            total += tl.where(counts, value, 0.0)
        if ORDER != "forward":
            weight = value
            if AGAINST_GRAD:
                grad_j = tl.load(against_grad + against_slice + j, mask=j < against_count, other=0.0).to(SUM)
                if POINTS_GRAD:
                    weight *= grad_i[:, None] + grad_j[None, :]
                else:
                    weight *= grad_j[None, :]
            else:
                weight *= grad_i[:, None]
            weight = tl.where(counts, weight, 0.0)
            for first in range(0, DIMS, UNROLLED):
                for k in tl.static_range(UNROLLED):
                    x = _coordinate(points, first + k, i, count, SUM)
                    y = _coordinate(against, first + k, j, against_count, SUM)
                    part = tl.sum(weight * _sign(y[None, :] - x[:, None]), 1)
                    gradient += tl.where(own_dims[None, :] == first + k, part[:, None], 0.0)

    if SUMS and tl.program_id(1) == 0:
        tl.store(sums + i.to(tl.int64) * kernels + b, tl.sum(total, 1).to(sums.dtype.element_ty), mask=i < count)
    if ORDER != "forward":
        to = out + (i.to(tl.int64)[:, None] * kernels + b) * DIMS + own_dims[None, :]
        inside = (i < count)[:, None] & (own_dims < DIMS)[None, :]
        tl.store(to, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _transposed(x, to, count, width, TILE: tl.constexpr):
    """A tile of x [count, width] as [width, count]; zeros for None."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (i < count)[:, None] & (k < width)[None, :]
    value = tl.zeros([TILE, TILE], to.dtype.element_ty)
    if x is not None:
        value = tl.load(x + i.to(tl.int64)[:, None] * width + k[None, :], mask=inside, other=0.0)
    tl.store(to + k.to(tl.int64)[:, None] * count + i[None, :], tl.trans(value), mask=tl.trans(inside))


@triton.jit
def _slices_kernel(
    m,  # [count, width]
    grad,  # [count, kernels]
    h,  # like m, or None
    m_to,
    grad_to,  # None where there is no grad
    h_to,  # None where nobody asks for h
    count,
    kernels,
    width,  # kernels times coordinates
    TILE: tl.constexpr,
):
    _transposed(m, m_to, count, width, TILE)
    if h_to is not None:
        _transposed(h, h_to, count, width, TILE)
    if grad_to is not None:
        _transposed(grad, grad_to, count, kernels, TILE)


# ---- launchers: what gankern/ops/minibatch_discrimination.py calls ------------------------------------------


def _slices(m: Tensor, grad: Tensor | None = None, h: Tensor | None = None, second: bool = False) -> list:
    """m [N, B, C] as [B, C, N]; grad [N, B] as [B, N]; h like m, which without one is of zeros where ``second`` asks
    for it. Launches: 1."""
    count, kernels, dims = m.shape
    slices = m.new_empty((kernels, dims, count))
    of_grad = None if grad is None else m.new_empty((kernels, count))
    of_h = m.new_empty((kernels, dims, count)) if second else None
    across = ceil_div(kernels * dims, TILE)
    launch(
        _slices_kernel,
        (ceil_div(count, TILE), across),
        m.contiguous(),
        contiguous(grad),
        contiguous(h),
        slices,
        of_grad,
        of_h,
        count,
        kernels,
        kernels * dims,
        TILE=TILE,
        num_warps=4,
    )
    return [slices, of_grad, of_h]


def _against(width: int, order: str, double: bool, of_other: bool) -> int:
    """The width of a tile: narrower where more of it, or wider values, have to stay in registers. ``of_other``: the
    gradient of the second set, in which the g of the tile's other points stay there too."""
    more = order == "double_backward" or (order == "backward" and of_other)
    return width // (2 if double else 1) // (2 if more else 1)


def _unrolled(dims: int) -> int:
    return dims if dims <= 5 else next(n for n in (4, 2, 1) if dims % n == 0)


def _launch(
    order: str,
    points: Tensor,
    points_h: Tensor | None,
    points_grad: Tensor | None,
    against: Tensor,
    against_h: Tensor | None,
    against_grad: Tensor | None,
    same: bool,
    sums: Tensor | None,
    out: Tensor | None,
) -> None:
    """points and against in slices; the others are None where there are none."""
    kernels, dims, count = points.shape
    if count == 0:
        return
    out_dims = 1 if order == "forward" else min(next_power_of_2(dims), MAX_DIMS)
    double = points.dtype == torch.float64
    chunks = 1 if order == "forward" else ceil_div(dims, out_dims)
    blocks = BLOCKS(points.device)
    launch(
        _pairs_kernel,
        (kernels * ceil_div(count, blocks["POINTS"]), chunks),
        points,
        points_h,
        points_grad,
        against,
        against_h,
        against_grad,
        sums,
        out,
        count,
        against.shape[2],
        kernels,
        ORDER=order,
        SAME=same,
        POINTS_GRAD=points_grad is not None,
        AGAINST_GRAD=against_grad is not None,
        SUMS=sums is not None,
        DIMS=dims,
        UNROLLED=_unrolled(dims),
        OUT_DIMS=out_dims,
        SUM=sum_type(points.dtype),
        POINTS=blocks["POINTS"],
        AGAINST=_against(blocks["AGAINST"], order, double, points_grad is None),
        num_warps=blocks["num_warps"],
    )


def _empty(like: Tensor | None, model: Tensor) -> Tensor:
    return model.new_empty(0) if like is None else like.new_empty(like.shape)


@planned
def forward(m: Tensor, other: Tensor | None, include_self: bool) -> Tensor:
    """The sums, [N, B]. Launches: 2, or 3 for two sets."""
    sums = m.new_empty(m.shape[:2])
    points, *_ = _slices(m)
    against = points if other is None else _slices(other)[0]
    _launch("forward", points, None, None, against, None, None, other is None, sums, None)
    if other is None and include_self:
        # The similarity of a point to itself: 1, and NaN where it has an infinity or NaN.
        sums = sums + torch.exp((m - m).sum(2))
    return sums


@planned
def backward(grad: Tensor, m: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of m and of other (empty without one). Launches: 2, or 4 for two sets."""
    grad_m, grad_other = _empty(m, m), _empty(other, m)
    points, g, _ = _slices(m, grad)
    if other is None:
        _launch("backward", points, None, g, points, None, g, True, None, grad_m)
    else:
        against, *_ = _slices(other)
        _launch("backward", points, None, g, against, None, None, False, None, grad_m)
        _launch("backward", against, None, None, points, None, g, False, None, grad_other)
    return grad_m, grad_other


@planned
def double_backward(
    grad_grad_m: Tensor | None, grad_grad_other: Tensor | None, grad: Tensor, m: Tensor, other: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `backward`'s three tensors. Launches: 2, or 4 for two sets."""
    grad_grad, grad_m, grad_other = m.new_empty(m.shape[:2]), _empty(m, m), _empty(other, m)
    points, g, h = _slices(m, grad, grad_grad_m, True)
    if other is None:
        _launch("double_backward", points, h, g, points, h, g, True, grad_grad, grad_m)
    else:
        against, _, against_h = _slices(other, None, grad_grad_other, True)
        _launch("double_backward", points, h, g, against, against_h, None, False, grad_grad, grad_m)
        _launch("double_backward", against, against_h, None, points, h, g, False, None, grad_other)
    return grad_grad, grad_m, grad_other


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernel, for few coordinates and for many."""
    for dims in (5, 100):
        m, other, grad = (torch.empty(n, 4, dims, dtype=dtype, device=device) for n in (48, 32, 48))
        grad = grad[:, :, 0]
        for others in (None, other):
            forward(m, others, False)
            backward(grad, m, others)
            double_backward(m, None, grad, m, others)
