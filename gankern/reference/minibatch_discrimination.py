"""Similarities by L1 distance in plain PyTorch: the definition that the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor


def minibatch_discrimination(m: Tensor, other: Tensor | None, include_self: bool) -> Tensor:
    """o[i, b] = sum_j exp(-sum_c |m[i, b, c] - other[j, b, c]|) for m [N, B, C] and other [K, B, C].

    Without ``other`` it is m itself, and the pair of a point with itself is left out unless ``include_self``.
    Equal infinities have the distance NaN, as in floating-point arithmetic. float16 and bfloat16 are computed in
    float32. Makes tensors of N K B C elements.
    """
    dtype = m.dtype
    if dtype in (torch.float16, torch.bfloat16):
        m = m.float()
        other = None if other is None else other.float()
    difference = m.unsqueeze(1) - (m if other is None else other).unsqueeze(0)
    without_self = other is None and not include_self
    if without_self:
        # Before the distance as well as after it: an infinite point's NaN would come back in the gradient.
        own = torch.eye(m.shape[0], dtype=torch.bool, device=m.device)
        difference = difference.masked_fill(own[:, :, None, None], 0)
    similarity = torch.exp(-difference.abs().sum(3))
    if without_self:
        similarity = similarity.masked_fill(own[:, :, None], 0)
    return similarity.sum(1).to(dtype)
