"""What is right for self-attention over a map: the formula, with the whole table of queries by keys."""

from __future__ import annotations

import torch
from torch import Tensor


def self_attention2d(q: Tensor, kv: Tensor) -> Tensor:
    """softmax(q^T k) over the keys, times the values: q [N, d, n], kv [N, d + e, m] (keys, then values) to [N, e, n].

    In half precision the table and its sums are float32.
    """
    dtype, dims = q.dtype, q.shape[1]
    if dtype in (torch.float16, torch.bfloat16):
        q, kv = q.float(), kv.float()
    k, v = kv[:, :dims], kv[:, dims:]
    return (v @ (q.mT @ k).softmax(2).mT).to(dtype)
