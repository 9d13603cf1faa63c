"""Holds every implementation of every primitive against its reference in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from gankern.core.dispatch import FLOATING, last_implementation, short
from gankern.measure.cases import Case, all_cases

MODES = ("forward", "backward", "double backward")


@dataclass(frozen=True)
class Check:
    """One line of `gankern verify`. Errors are largest differences from fp64, relative to its largest value."""

    primitive: str
    case: str
    implementation: str
    dtype: str
    mode: str
    error: float
    plain_error: float  # of plain PyTorch in the same dtype
    bound: float
    passed: bool


def verify(primitives: Sequence[str] | None, device: str, quick: bool) -> Iterator[Check]:
    """Checks of all verified cases (``quick``: of the quick ones, in fp32 and bf16) on one device."""
    for case in all_cases():
        if not case.verify or (primitives and case.primitive not in primitives) or (quick and not case.quick):
            continue
        for dtype in (torch.float32, torch.bfloat16) if quick else FLOATING:
            for implementation in case.implementations(device, dtype):
                yield from check(case, implementation, dtype, device)


def check(case: Case, implementation: str, dtype: torch.dtype, device: str) -> list[Check]:
    """Forward, backward and double backward of one case: the error may be twice that of plain PyTorch in the same
    dtype, plus one unit in the last place of the result, plus one of the accumulation dtype (fp32, or fp64 for fp64)
    times the square root of the longest possible reduction."""
    truth = _run(case, "reference", dtype, device, upcast=True)
    plain = truth if dtype == torch.float64 else _run(case, "reference", dtype, device)
    ours = _run(case, implementation, dtype, device)
    if last_implementation(case.primitive) != implementation:
        raise RuntimeError(f"{case.primitive}: {last_implementation(case.primitive)} ran instead of {implementation}")
    longest = max(x.numel() for x in case.make(dtype, device))
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    floor = torch.finfo(dtype).eps + torch.finfo(accumulation).eps * math.sqrt(longest)
    checks = []
    for mode in MODES:
        error, plain_error = _error(ours[mode], truth[mode]), _error(plain[mode], truth[mode])
        # Plain PyTorch may overflow where fp32 accumulation does not: its error then allows nothing.
        bound = floor + (2 * plain_error if math.isfinite(plain_error) else 0)
        row = (case.primitive, case.name, implementation, short(dtype), mode)
        checks.append(Check(*row, error, plain_error, bound, error <= bound))
    return checks


def _run(
    case: Case, implementation: str, dtype: torch.dtype, device: str, upcast: bool = False
) -> dict[str, list[Tensor]]:
    """The tensors of each mode. Gradients that came in are fixed pseudo-random ones, the same for every run."""
    inputs = case.make(dtype, device)
    if upcast:
        inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    outputs = case.run(implementation, inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    buffers = [x for x in inputs if not x.requires_grad]
    result = {"forward": [x.detach() for x in (*outputs, *buffers)]}

    generator = torch.Generator().manual_seed(1)

    def random_like(x: Tensor) -> Tensor:
        # Rounded to the dtype under test first, so that fp64 sees the same values.
        values = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.to(x.device, x.dtype)

    leaves = [x for x in inputs if x.requires_grad]
    cotangents = [random_like(y).requires_grad_() for y in outputs]
    grads = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    result["backward"] = [g.detach() for g in grads]
    product = reduce(torch.add, ((g * random_like(g)).sum() for g in grads))
    second = torch.autograd.grad(product, [*leaves, *cotangents], allow_unused=True)
    result["double backward"] = [
        torch.zeros_like(x) if g is None else g for g, x in zip(second, [*leaves, *cotangents])
    ]
    return result


def _error(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest true value of all tensors of a mode."""
    scale = max((t.abs().max().item() for t in truth if t.numel()), default=0.0) or 1.0
    differences = [(o.double() - t).abs().max().item() for o, t in zip(ours, truth) if t.numel()]
    return max(differences, default=0.0) / scale if all(map(math.isfinite, differences)) else math.inf
