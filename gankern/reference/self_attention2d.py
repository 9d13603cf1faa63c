"""What is right for self-attention over a map: the formula, with the whole table of queries by keys."""

from __future__ import annotations

import torch
from torch import Tensor


def self_attention2d(q: Tensor, kv: Tensor) -> Tensor:
    """softmax(q^T k) over the keys, times the values: q [N, d, n], kv [N, d + e, m] (keys, then values) to [N, e, n].

    In half precision the table and its sums are float32.
    """
    if q.dtype not in (torch.float16, torch.bfloat16):
        return _formula(q, kv)
    if q.device.type not in ("cpu", "cuda"):
        return _formula(q.float(), kv.float()).to(q.dtype)
    with torch.autocast(q.device.type, enabled=False):  # which would round the table
        return _formula(q.float(), kv.float()).to(q.dtype)


def _formula(q: Tensor, kv: Tensor) -> Tensor:
    k, v = kv[:, : q.shape[1]], kv[:, q.shape[1] :]
    return v @ (q.mT @ k).softmax(2).mT
