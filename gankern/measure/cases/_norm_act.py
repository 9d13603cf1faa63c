"""What the cases of normalisations with an activation behind them share, whatever they normalise over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gankern.measure.cases import SIDES, Case, Work


def make(shape: tuple[int, ...], last: bool, affine: str | None, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, in channels_last with ``last``, and weight and bias of each "channel", or of each "sample" and channel."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.float64 if dtype == torch.float64 else torch.float32  # of half-precision x, as AMP has it
    x = torch.randn(shape, generator=generator).to(device, dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    if affine is None:
        return [x.requires_grad_()]
    size = shape[:2] if affine == "sample" else shape[1:2]
    weight = (1 + 0.1 * torch.randn(size, generator=generator)).to(device, weights)
    bias = (0.1 * torch.randn(size, generator=generator)).to(device, weights)
    return [v.requires_grad_() for v in (x, weight, bias)]


def work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    """x in, y out; x and g in, dx out; x, g and h in, two out."""
    size = 4 * inputs[0].numel()
    return {mode: Work(n * size) for mode, n in {"forward": 2, "backward": 3, "double backward": 5}.items()}


def of_maps(case: Callable[..., Case], shapes: Sequence[tuple[int, ...]], verified: tuple[int, ...]) -> list[Case]:
    """``case(name, shape, ...)`` of maps in both memory formats, of which the first one is quick too; of a map for the
    cost of a call; and of maps of rising height."""
    cases = [
        case(
            "x".join(map(str, shape)) + (" channels_last" if last else ""),
            shape,
            last=last,
            verify=shape == verified,
            quick=shape == shapes[0] and not last,
        )
        for shape in shapes
        for last in (False, True)
    ]
    cases.append(case("2x4x2x2", (2, 4, 2, 2), host=True))
    return cases + [case(f"16x64x{n}x{n}", (16, 64, n, n), along=("height", n)) for n in SIDES]
