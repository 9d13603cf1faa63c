"""Instance normalisation and ReLU, as image-to-image generators have them; and with samples' own affine values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import SIDES, Case, Work

NAME = "instance_norm_act"


def _make(shape: tuple[int, ...], last: bool, affine: str | None, dtype: torch.dtype, device: str) -> list[Tensor]:
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


def _run(implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    x, *affine = inputs
    weight, bias = affine or (None, None)
    return GF.instance_norm_act(x, None, None, weight, bias, activation="relu", implementation=implementation)


def _torch(inputs: Sequence[Tensor]) -> Tensor:
    x, *affine = inputs
    if not affine:
        return F.relu(F.instance_norm(x))
    if affine[0].ndim == 1:
        return F.relu(F.instance_norm(x, weight=affine[0], bias=affine[1]))
    weight, bias = (v[:, :, None, None] for v in affine)
    return F.relu(F.instance_norm(x) * weight + bias)


def _work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    """x in, y out; x and g in, dx out; x, g and h in, two out."""
    size = 4 * inputs[0].numel()
    return {mode: Work(n * size) for mode, n in {"forward": 2, "backward": 3, "double backward": 5}.items()}


def _case(name: str, shape: tuple[int, ...], *, last: bool = False, affine: str | None = None, **options: Any) -> Case:
    return Case(NAME, name, partial(_make, shape, last, affine), _run, {"torch": _torch}, _work, **options)


SIZES = {"1x256x64x64": (1, 256, 64, 64), "1x64x256x256": (1, 64, 256, 256), "8x64x32x32": (8, 64, 32, 32)}
CASES = [
    _case(
        f"{name}{' channels_last' if last else ''}",
        shape,
        last=last,
        verify=shape == (8, 64, 32, 32),
        quick=name == "1x256x64x64" and not last,
    )
    for name, shape in SIZES.items()
    for last in (False, True)
]
CASES += [
    _case("2x4x2x2", (2, 4, 2, 2), host=True),
    *(_case(f"16x64x{side}x{side}", (16, 64, side, side), along=("height", side)) for side in SIDES),
    _case("affine 5x7x9x11", (5, 7, 9, 11), affine="channel", bench=False, quick=True),
    _case("adaptive 5x7x3x3 channels_last", (5, 7, 3, 3), last=True, affine="sample", bench=False, quick=True),
    _case("affine 3x40x20x20 channels_last", (3, 40, 20, 20), last=True, affine="channel", bench=False, quick=True),
]
