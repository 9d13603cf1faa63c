"""Attention between the positions of a map, a block of queries at a time: no table of queries by keys is stored.

Of one sample, with queries Q [n, d], keys K [m, d], values V [m, e]:

    S = Q K^T,   P = softmax(S) over the keys,   O = P V

First order, for G = dL/dO:  B = G V^T,  D = P (B - rowsum(P B)),  dQ = D K,  dK = D^T Q,  dV = P^T G.

Second order, for the gradients Hq, Hk, Hv of dQ, dK, dV (products without a name are of elements):

    E = Hq K^T + Q Hk^T,   e = rowsum(E P),   X = P (E - e)
    Y = E (B - rowsum(P B)) - B e + G Hv^T,   Z = P (Y - rowsum(P Y))
    dG = X V + P Hv,   dQ = Z K + D Hk,   dK = Z^T Q + D^T Hq,   dV = X^T G

A row of P needs all keys and no other query, so blocks of queries are independent; P is computed again in each order.
Traffic and work are those of torch's matrix products; memory beyond inputs and results is a few blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gankern.core import autograd

NAME = "attention"
BLOCK = 1 << 18  # values of P at a time: 1 MiB in fp32, which stays in the cache


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """(samples, queries) of each block."""
    samples, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    rows = max(1, min(queries, BLOCK // max(keys, 1)))
    together = max(1, BLOCK // max(rows * keys, 1)) if rows == queries else 1
    for n in range(0, samples, together):
        for row in range(0, queries, rows):
            yield slice(n, n + together), slice(row, row + rows)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _accumulated(like: Tensor) -> Tensor:
    return torch.zeros_like(_wide(like), memory_format=torch.contiguous_format)


def _forward(options: tuple, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    for n, i in _blocks(q, k):
        p = (_wide(q[n, i]) @ _wide(k[n]).mT).softmax(2)
        out[n, i] = p @ _wide(v[n])
    return (out,)


def _backward(options: tuple, needed, grads, saved):
    q, k, v = saved
    dq, dk, dv = torch.empty_like(q, memory_format=torch.contiguous_format), _accumulated(k), _accumulated(v)
    for n, i in _blocks(q, k):
        qs, ks, vs, g = (_wide(x) for x in (q[n, i], k[n], v[n], grads[0][n, i]))
        p = (qs @ ks.mT).softmax(2)
        dv[n] += p.mT @ g
        b = g @ vs.mT
        d = p * (b - (p * b).sum(2, keepdim=True))
        dq[n, i] = d @ ks
        dk[n] += d.mT @ qs
    results = (dq, dk.to(k.dtype), dv.to(v.dtype))
    return tuple(x if need else None for x, need in zip(results, needed))


def _double_backward(options: tuple, needed, grad_grads, grads, saved):
    q, k, v = saved
    (g,) = grads
    dg, dq = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (g, q))
    dk, dv = _accumulated(k), _accumulated(v)
    hq, hk, hv = (torch.zeros_like(x) if h is None else h for h, x in zip(grad_grads, (q, k, v)))
    for n, i in _blocks(q, k):
        qs, ks, vs, gs = (_wide(x) for x in (q[n, i], k[n], v[n], g[n, i]))
        hqs, hks, hvs = (_wide(x) for x in (hq[n, i], hk[n], hv[n]))
        p = (qs @ ks.mT).softmax(2)
        b = gs @ vs.mT
        centred = b - (p * b).sum(2, keepdim=True)
        d = p * centred
        e = hqs @ ks.mT + qs @ hks.mT
        mean = (e * p).sum(2, keepdim=True)
        x = p * (e - mean)
        y = e * centred - b * mean + gs @ hvs.mT
        z = p * (y - (p * y).sum(2, keepdim=True))
        dg[n, i] = x @ vs + p @ hvs
        dq[n, i] = z @ ks + d @ hks
        dk[n] += z.mT @ qs + d.mT @ hqs
        dv[n] += x.mT @ gs
    results = (dg, dq, dk.to(k.dtype), dv.to(v.dtype))
    return tuple(r if need else None for r, need in zip(results, needed))


autograd.Rule(NAME, _forward, lambda options, tensors, outputs: tensors, _backward, _double_backward)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, with the whole table: any order."""
    return ((_wide(q) @ _wide(k).mT).softmax(2) @ _wide(v)).to(q.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of queries [N, n, d], keys [N, m, d] and values [N, m, e]: [N, n, e]."""
    return autograd.differentiate(NAME, ("auto",), q, k, v)[0]
