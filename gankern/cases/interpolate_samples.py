"""Points between samples, of batches of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gankern.functional as GF
from gankern.cases import Case, Work

NAME = "interpolate_samples"


def _make(shape: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2)]
    alpha = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    # Rounded to the dtype first, so that every implementation is given the same.
    return [x.requires_grad_() for x in samples] + [alpha.to(dtype).to(device)]


def _run(implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    return GF.interpolate_samples(*inputs, implementation=implementation)


def _weight(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[2].view(-1, *[1] * (inputs[0].ndim - 1))


def _sum(inputs: Sequence[Tensor]) -> Tensor:
    """As it is usually written."""
    real, fake, _ = inputs
    alpha = _weight(inputs)
    return alpha * fake + (1 - alpha) * real


def _lerp(inputs: Sequence[Tensor]) -> Tensor:
    return torch.lerp(inputs[0], inputs[1], _weight(inputs))


def _work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    size = 4 * inputs[0].numel()
    return {"forward": Work(3 * size), "backward": Work(3 * size)}


def _case(*shape: int, **options: Any) -> Case:
    name = " x ".join(map(str, shape))
    return Case(NAME, name, partial(_make, shape), _run, {"sum": _sum, "lerp": _lerp}, _work, **options)


CASES = [
    _case(64, 3, 64, 64, quick=True),
    _case(16, 3, 256, 256, verify=False),
    _case(8, 3, 1024, 1024, verify=False),
    *(_case(n, 3, 64, 64, along=("batch", n)) for n in (1, 4, 16, 64, 256)),
    _case(5, 3, 9, 7, bench=False, quick=True),
]
