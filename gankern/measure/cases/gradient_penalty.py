"""The penalty of each sample's gradient norm, on the gradients of a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import Case, Work

NAME = "gradient_penalty"


def _make(shape: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = torch.Size(shape[1:]).numel()
    # Norms of about 2, as far from the target as critics are.
    x = 2 / max(size, 1) ** 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    return [x.to(device, dtype).requires_grad_()]


def _run(implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    return GF.gradient_penalty(inputs[0], implementation=implementation)


def _torch(inputs: Sequence[Tensor]) -> Tensor:
    return (inputs[0].flatten(1).norm(dim=1) - 1).square()


def _linalg(inputs: Sequence[Tensor]) -> Tensor:
    """Over the dimensions as they lie: no copy of channels_last."""
    return (torch.linalg.vector_norm(inputs[0], dim=tuple(range(1, inputs[0].ndim))) - 1).square()


def _work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    size, out = 4 * inputs[0].numel(), 4 * len(inputs[0])
    return {"forward": Work(size + out), "backward": Work(2 * size + out), "double backward": Work(5 * size + 2 * out)}


def _case(*shape: int, **options: Any) -> Case:
    name = " x ".join(map(str, shape))
    return Case(NAME, name, partial(_make, shape), _run, {"norm": _torch, "vector_norm": _linalg}, _work, **options)


CASES = [
    _case(4, 8, host=True),
    _case(64, 3, 64, 64, quick=True),
    _case(16, 3, 256, 256, verify=False),
    _case(8, 3, 1024, 1024, verify=False),
    _case(256, 2, verify=False),
    *(_case(n, 3, 64, 64, along=("batch", n)) for n in (1, 4, 16, 64, 256)),
    _case(5, 3, 9, 7, bench=False, quick=True),
    _case(1, 8193, bench=False, quick=True),
]
