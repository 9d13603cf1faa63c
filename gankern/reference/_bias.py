"""A vector along one dimension."""

from __future__ import annotations

from torch import Tensor


def plus_bias(x: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """x + bias, which lies along dimension ``dim``, in x's dtype; x where there is none."""
    if bias is None:
        return x
    shape = [1] * x.ndim
    shape[dim] = -1
    return x + bias.to(x.dtype).view(shape)
