"""Attention between the positions of a map without a table of queries by keys.

Formulas: csrc/cpu/self_attention2d.cpp; the names here are those there. A tile of the table, scores, P and what the
gradients need of B, E, W, is computed from queries, keys and values where it is needed and never leaves the program:

    forward          a program takes a block of queries over all keys, its sums scaled where a larger score comes
    backward         programs of queries: the means of B, which are kept, then dQ; programs of keys: dK and dV
    double backward  programs of queries: the means of B and E, then that of Y, all kept, then dG and dQ; programs of
                     keys: dK and dV

No atomics: each result has one program, which adds in a fixed order. All products are of numbers in the accumulation
dtype, in full precision ("ieee"): fp32 for fp16, bf16 and fp32, fp64 for fp64.

Traffic. A program reads the other side once a pass, which the L2 cache has; bound by arithmetic, as on the CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.core.layout import accumulation_dtype
from gankern.triton.launch import ceil_div, launch, planned, sum_type

# Queries and keys of a tile: of the forward, and of the gradients, which hold more at a time.
FORWARD = {"BLOCK": 32, "num_warps": 4}
GRADIENTS = {"BLOCK": 16, "num_warps": 8}
LEAST = 16  # of each side of a product

# ---- the kernels -------------------------------------------------------------------------------------------


@triton.jit
def _own(count, BLOCK: tl.constexpr):
    """A program's sample, and its positions of so many."""
    tiles = tl.cdiv(count, BLOCK)
    return (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _block(x, first, channels, count, at, C: tl.constexpr, SUM: tl.constexpr):
    """[positions, C] of a map whose sample begins at ``first``: zeros beyond its channels and its end."""
    c = tl.arange(0, C)
    inside = (at < count)[:, None] & (c < channels)[None, :]
    return tl.load(x + first + c.to(tl.int64)[None, :] * count + at[:, None], mask=inside, other=0.0).to(SUM)


@triton.jit
def _store(x, first, channels, count, at, value, C: tl.constexpr):
    c = tl.arange(0, C)
    inside = (at < count)[:, None] & (c < channels)[None, :]
    tl.store(x + first + c.to(tl.int64)[None, :] * count + at[:, None], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b, SUM: tl.constexpr):
    return tl.dot(a, b, input_precision="ieee", out_dtype=SUM)


@triton.jit
def _dot_t(a, b, SUM: tl.constexpr):
    return _dot(a, tl.trans(b), SUM)


@triton.jit
def _forward_kernel(
    q,  # [samples, dims, queries]
    kv,  # [samples, dims + values, keys]
    o,  # [samples, values, queries]
    stats,  # [samples, 2, queries]: the largest score, 1 over the sum of exponentials
    dims,
    values,
    queries,
    keys,
    LOWEST: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, i = _own(queries, BLOCK)
    of_kv = sample * (dims + values) * keys
    qs = _block(q, sample * dims * queries, dims, queries, i, D, SUM)
    most = tl.full([BLOCK], LOWEST, SUM)
    total = tl.zeros([BLOCK], SUM)
    result = tl.zeros([BLOCK, E], SUM)
    for start in range(0, keys, BLOCK):
        j = start + tl.arange(0, BLOCK)
        s = _dot_t(qs, _block(kv, of_kv, dims, keys, j, D, SUM), SUM)
        s = tl.where((j < keys)[None, :], s, -float("inf"))
        now = tl.maximum(most, tl.max(s, 1))
        factor = tl.exp(most - now)
        p = tl.exp(s - now[:, None])
        total = total * factor + tl.sum(p, 1)
        v = _block(kv, of_kv + tl.cast(dims, tl.int64) * keys, values, keys, j, E, SUM)
        result = result * factor[:, None] + _dot(p, v, SUM)
        most = now
    scale = 1.0 / total
    _store(o, sample * values * queries, values, queries, i, result * scale[:, None], E)
    tl.store(stats + sample * 2 * queries + i, most, mask=i < queries)
    tl.store(stats + sample * 2 * queries + queries + i, scale, mask=i < queries)


@triton.jit
def _stats(stats, sample, i, queries):
    at = stats + sample * 2 * queries + i
    return tl.load(at, mask=i < queries, other=0.0), tl.load(at + queries, mask=i < queries, other=0.0)


@triton.jit
def _probabilities(qs, ks, most, scale, inside, SUM: tl.constexpr):
    p = tl.exp(_dot_t(qs, ks, SUM) - most[:, None]) * scale[:, None]
    return tl.where(inside[None, :], p, 0.0)


@triton.jit
def _query_kernel(
    q,
    kv,
    grad,  # like the result
    stats,
    h_q,  # like q
    h_kv,  # like kv
    means,  # [samples, 3, queries]: of B, of E and of Y
    out,  # like the result
    out_q,  # like q
    dims,
    values,
    queries,
    keys,
    SECOND: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, i = _own(queries, BLOCK)
    of_k = sample * (dims + values) * keys
    of_v = of_k + tl.cast(dims, tl.int64) * keys
    qs = _block(q, sample * dims * queries, dims, queries, i, D, SUM)
    gs = _block(grad, sample * values * queries, values, queries, i, E, SUM)
    most, scale = _stats(stats, sample, i, queries)
    if SECOND:
        hs = _block(h_q, sample * dims * queries, dims, queries, i, D, SUM)
    mean = tl.zeros([BLOCK], SUM)
    mean_e = tl.zeros([BLOCK], SUM)
    for start in range(0, keys, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ks = _block(kv, of_k, dims, keys, j, D, SUM)
        p = _probabilities(qs, ks, most, scale, j < keys, SUM)
        mean += tl.sum(p * _dot_t(gs, _block(kv, of_v, values, keys, j, E, SUM), SUM), 1)
        if SECOND:
            e = _dot_t(hs, ks, SUM) + _dot_t(qs, _block(h_kv, of_k, dims, keys, j, D, SUM), SUM)
            mean_e += tl.sum(p * e, 1)
    mean_y = tl.zeros([BLOCK], SUM)
    if SECOND:
        for start in range(0, keys, BLOCK):
            j = start + tl.arange(0, BLOCK)
            ks = _block(kv, of_k, dims, keys, j, D, SUM)
            p = _probabilities(qs, ks, most, scale, j < keys, SUM)
            b = _dot_t(gs, _block(kv, of_v, values, keys, j, E, SUM), SUM)
            e = _dot_t(hs, ks, SUM) + _dot_t(qs, _block(h_kv, of_k, dims, keys, j, D, SUM), SUM)
            w = _dot_t(gs, _block(h_kv, of_v, values, keys, j, E, SUM), SUM)
            mean_y += tl.sum(p * (e * (b - mean[:, None]) - b * mean_e[:, None] + w), 1)
    at = means + sample * 3 * queries + i
    tl.store(at, mean, mask=i < queries)
    tl.store(at + queries, mean_e, mask=i < queries)
    tl.store(at + 2 * queries, mean_y, mask=i < queries)
    result = tl.zeros([BLOCK, D], SUM)
    result_g = tl.zeros([BLOCK, E], SUM)
    for start in range(0, keys, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ks = _block(kv, of_k, dims, keys, j, D, SUM)
        vs = _block(kv, of_v, values, keys, j, E, SUM)
        p = _probabilities(qs, ks, most, scale, j < keys, SUM)
        b = _dot_t(gs, vs, SUM)
        d = p * (b - mean[:, None])
        if SECOND:
            h_ks = _block(h_kv, of_k, dims, keys, j, D, SUM)
            h_vs = _block(h_kv, of_v, values, keys, j, E, SUM)
            e = _dot_t(hs, ks, SUM) + _dot_t(qs, h_ks, SUM)
            y = e * (b - mean[:, None]) - b * mean_e[:, None] + _dot_t(gs, h_vs, SUM)
            result += _dot(p * (y - mean_y[:, None]), ks, SUM) + _dot(d, h_ks, SUM)
            result_g += _dot(p * (e - mean_e[:, None]), vs, SUM) + _dot(p, h_vs, SUM)
        else:
            result += _dot(d, ks, SUM)
    _store(out_q, sample * dims * queries, dims, queries, i, result, D)
    if SECOND:
        _store(out, sample * values * queries, values, queries, i, result_g, E)


@triton.jit
def _key_kernel(
    q,
    kv,
    grad,
    stats,
    h_q,
    h_kv,
    means,
    out_kv,  # like kv
    dims,
    values,
    queries,
    keys,
    SECOND: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, j = _own(keys, BLOCK)
    of_q = sample * dims * queries
    of_k = sample * (dims + values) * keys
    of_v = of_k + tl.cast(dims, tl.int64) * keys
    ks = _block(kv, of_k, dims, keys, j, D, SUM)
    vs = _block(kv, of_v, values, keys, j, E, SUM)
    if SECOND:
        h_ks = _block(h_kv, of_k, dims, keys, j, D, SUM)
        h_vs = _block(h_kv, of_v, values, keys, j, E, SUM)
    result_k = tl.zeros([BLOCK, D], SUM)
    result_v = tl.zeros([BLOCK, E], SUM)
    for start in range(0, queries, BLOCK):
        i = start + tl.arange(0, BLOCK)
        qs = _block(q, of_q, dims, queries, i, D, SUM)
        gs = _block(grad, sample * values * queries, values, queries, i, E, SUM)
        most, scale = _stats(stats, sample, i, queries)
        at = means + sample * 3 * queries + i
        mean = tl.load(at, mask=i < queries, other=0.0)
        p = _probabilities(qs, ks, most, scale, j < keys, SUM)
        b = _dot_t(gs, vs, SUM)
        d = p * (b - mean[:, None])
        if SECOND:
            hs = _block(h_q, of_q, dims, queries, i, D, SUM)
            mean_e = tl.load(at + queries, mask=i < queries, other=0.0)
            mean_y = tl.load(at + 2 * queries, mask=i < queries, other=0.0)
            e = _dot_t(hs, ks, SUM) + _dot_t(qs, h_ks, SUM)
            y = e * (b - mean[:, None]) - b * mean_e[:, None] + _dot_t(gs, h_vs, SUM)
            z = p * (y - mean_y[:, None])
            result_k += _dot(tl.trans(z), qs, SUM) + _dot(tl.trans(d), hs, SUM)
            result_v += _dot(tl.trans(p * (e - mean_e[:, None])), gs, SUM)
        else:
            result_k += _dot(tl.trans(d), qs, SUM)
            result_v += _dot(tl.trans(p), gs, SUM)
    _store(out_kv, of_k, dims, keys, j, result_k, D)
    _store(out_kv, of_v, values, keys, j, result_v, E)


# ---- launchers -------------------------------------------------------------------------------------------------


def _sizes(q: Tensor, kv: Tensor, tile: dict[str, int]) -> tuple[tuple[int, int, int, int], dict]:
    """What all kernels are told last, and their constants and warps."""
    dims, values = q.shape[1], kv.shape[1] - q.shape[1]
    constants = {
        "D": max(LEAST, triton.next_power_of_2(dims)),
        "E": max(LEAST, triton.next_power_of_2(values)),
        "SUM": sum_type(q.dtype),
        **tile,
    }
    return (dims, values, q.shape[2], kv.shape[2]), constants


@planned
def forward(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """The result and its statistics. Launches: 1."""
    q, kv = q.contiguous(), kv.contiguous()
    sizes, constants = _sizes(q, kv, FORWARD)
    o = q.new_empty(q.shape[0], sizes[1], sizes[2])
    stats = q.new_empty(q.shape[0], 2, sizes[2], dtype=accumulation_dtype(q))
    if q.shape[0]:
        programs = q.shape[0] * ceil_div(sizes[2], constants["BLOCK"])
        lowest = torch.finfo(stats.dtype).min
        launch(_forward_kernel, programs, q, kv, o, stats, *sizes, LOWEST=lowest, **constants)
    return o, stats


def _gradients(
    q: Tensor, kv: Tensor, grad: Tensor, stats: Tensor, h_q: Tensor | None, h_kv: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, kv, grad = q.contiguous(), kv.contiguous(), grad.contiguous()
    second = out is not None
    sizes, constants = _sizes(q, kv, GRADIENTS)
    grad_q, grad_kv = torch.empty_like(q), torch.empty_like(kv)
    if q.shape[0]:
        means = q.new_empty(q.shape[0], 3, sizes[2], dtype=stats.dtype)
        block = constants["BLOCK"]
        given = (q, kv, grad, stats, h_q, h_kv, means)
        programs = q.shape[0] * ceil_div(sizes[2], block)
        launch(_query_kernel, programs, *given, out, grad_q, *sizes, SECOND=second, **constants)
        programs = q.shape[0] * ceil_div(sizes[3], block)
        launch(_key_kernel, programs, *given, grad_kv, *sizes, SECOND=second, **constants)
    return grad_q, grad_kv


@planned
def backward(grad: Tensor, q: Tensor, kv: Tensor, o: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of queries, and of keys and values. Launches: 2."""
    return _gradients(q, kv, grad, stats, None, None, None)


@planned
def double_backward(
    h_q: Tensor | None, h_kv: Tensor | None, grad: Tensor, q: Tensor, kv: Tensor, o: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `backward`'s first three tensors. Launches: 2."""
    h_q = torch.zeros_like(q) if h_q is None else h_q
    h_kv = torch.zeros_like(kv) if h_kv is None else h_kv
    out = grad.new_empty(grad.shape)
    return out, *_gradients(q, kv, grad, stats, h_q.contiguous(), h_kv.contiguous(), out)


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels."""
    q, kv, grad = (torch.empty(2, c, n, dtype=dtype, device=device) for c, n in ((8, 64), (40, 16), (32, 64)))
    o, stats = forward(q, kv)
    backward(grad, q, kv, o, stats)
    double_backward(q, kv, grad, q, kv, o, stats)
