"""Minibatch discrimination: the core, l1_similarity, at the size of the paper's code (B = 100, C = 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import Case, Work

NAME = "minibatch_discrimination"


def _make(count: int, kernels: int, dims: int, other: int | None, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def points(n: int) -> Tensor:
        # Distances of about 2, as the authors' initialisation makes them.
        return (2 / dims * torch.randn(n, kernels, dims, generator=generator)).to(device, dtype).requires_grad_()

    return [points(count)] if other is None else [points(count), points(other)]


def _run(implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    return GF.l1_similarity(*inputs, implementation=implementation)


def _broadcast(inputs: Sequence[Tensor]) -> Tensor:
    """The textbook form; one set's own terms, each 1, are subtracted."""
    m, other = inputs[0], inputs[-1]
    sums = torch.exp(-(m.unsqueeze(1) - other.unsqueeze(0)).abs().sum(3)).sum(1)
    return sums - 1 if len(inputs) == 1 else sums


def _cdist(inputs: Sequence[Tensor]) -> Tensor:
    """Has no second order."""
    m, other = inputs[0].transpose(0, 1), inputs[-1].transpose(0, 1)
    sums = torch.exp(-torch.cdist(m, other, p=1)).sum(2).t()
    return sums - 1 if len(inputs) == 1 else sums


# Vector instructions, of one lane each, for a pair and a kernel: see csrc/cpu/minibatch_discrimination.cpp.
def operations(mode: str, dims: int) -> int:
    return {"forward": 3 * dims + 10, "backward": 7 * dims + 10, "double backward": 10 * dims + 13}[mode]


def _work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    count, kernels, dims = inputs[0].shape
    pairs = count * (count - 1) // 2 if len(inputs) == 1 else count * len(inputs[1])
    m, sums = 4 * sum(x.numel() for x in inputs), 4 * count * kernels
    least_bytes = {"forward": m + sums, "backward": 2 * m + sums, "double backward": 3 * m + 2 * sums}
    return {mode: Work(least, pairs * kernels * operations(mode, dims)) for mode, least in least_bytes.items()}


def _case(
    name: str, count: int, kernels: int, dims: int, other: int | None = None, *, peers: bool = True, **options: Any
) -> Case:
    formulations: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {"cdist": _cdist}
    if count * count * kernels * dims < 2**28:  # of elements in the tensor of pairs
        formulations["broadcast"] = _broadcast
    return Case(
        NAME,
        name,
        partial(_make, count, kernels, dims, other),
        _run,
        formulations if peers else {},
        _work,
        **options,
    )


CASES = [
    _case("N=4 B=2 C=4", 4, 2, 4, host=True),
    _case("N=64 B=100 C=5", 64, 100, 5, quick=True),
    _case("N=256 B=100 C=5", 256, 100, 5, verify=False),
    _case("N=256 B=24 C=5", 256, 24, 5, bench=False),
    _case("N=1024 B=100 C=5", 1024, 100, 5, verify=False),
    _case("N=128 K=256 B=100 C=5", 128, 100, 5, 256),
    _case("N=1024 B=4 C=16", 1024, 4, 16, verify=False),
    *(_case(f"N={n} B=100 C=5", n, 100, 5, along=("batch", n)) for n in (4, 16, 64, 256, 512)),
    _case("N=37 B=7 C=3", 37, 7, 3, bench=False, quick=True),
    _case("N=21 K=38 B=3 C=9", 21, 3, 9, 38, bench=False, quick=True),
]
