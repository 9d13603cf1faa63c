"""What all families draw with: one generator a case, and tensors whose values and strides are drawn apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A case is wrong with this text, or right with None.
Problem = str | None


class Draw(random.Random):
    """Draws of one case: Python's and torch's generators, of the same seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def maybe(self, value: Any, chance: float = 0.5) -> Any:
        return value if self.random() < chance else None

    def values(self, shape: Sequence[int], scale: float = 1.0) -> Tensor:
        """Normal numbers in double precision."""
        return scale * torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)

    def positive(self, shape: Sequence[int]) -> Tensor:
        return 0.25 + 2 * torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64)

    def dtype(self) -> torch.dtype:
        return self.choices((torch.float64, torch.float32, torch.bfloat16, torch.float16), (4, 4, 1, 1))[0]

    def strided(self, t: Tensor) -> tuple[Tensor, str]:
        """A view in other strides, and what they are; of the same values, but for an expanded one."""
        name = self.choice(("contiguous", *FORMS))
        if name == "contiguous" or not t.ndim or not t.numel():
            return t, "contiguous"
        return FORMS[name](t, self.randrange(t.ndim)), name


def _permuted(t: Tensor, order: Sequence[int]) -> Tensor:
    back = [list(order).index(d) for d in range(t.ndim)]
    return t.permute(*order).contiguous().permute(*back)


def _gaps(t: Tensor, dim: int) -> Tensor:
    """Every second element of a longer tensor, which begins at an odd one and is NaN elsewhere."""
    shape = list(t.shape)
    shape[dim] = 2 * shape[dim] + 1
    view = t.new_full(shape, float("nan"))[(slice(None),) * dim + (slice(1, None, 2),)]
    return view.copy_(t)


FORMS = {
    "transposed": lambda t, dim: _permuted(t, list(range(t.ndim))[::-1]),
    "channels_last": lambda t, dim: _permuted(t, [0, *range(2, t.ndim), 1]) if t.ndim > 1 else t,
    "dimension in front": lambda t, dim: _permuted(t, [dim, *(d for d in range(t.ndim) if d != dim)]),
    "gaps": _gaps,
    "offset": lambda t, dim: torch.cat([t.new_full((1,), float("nan")), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t, dim: t.narrow(dim, 0, 1).expand(t.shape),
    "negated view": lambda t, dim: torch._neg_view(-t),
}


def difference(ours: Tensor, right: Tensor) -> float:
    """The largest; infinite where one is not finite and the other is."""
    if ours.shape != right.shape:
        return float("inf")
    if not right.numel():
        return 0.0
    ours, right = ours.detach().double(), right.detach().double()
    if not torch.equal(ours.isfinite(), right.isfinite()):
        return float("inf")
    finite = right.isfinite()
    return (ours - right)[finite].abs().max().item() if finite.any() else 0.0


def size(tensors: Sequence[Tensor]) -> float:
    largest = [t[t.isfinite()].abs().max().item() for t in tensors if t.isfinite().any()]
    return max(largest, default=0.0) or 1.0
