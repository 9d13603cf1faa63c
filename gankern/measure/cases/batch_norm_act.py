"""Batch normalisation and leaky ReLU in training, as discriminators have it, and with samples' own affine values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import SIDES, Case, Work

NAME = "batch_norm_act"
SLOPE = 0.2


def _make(shape: tuple[int, ...], last: bool, per_sample: bool, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    affine = shape[:2] if per_sample else shape[1:2]
    weights = torch.float64 if dtype == torch.float64 else torch.float32  # of half-precision x, as AMP has it
    x = torch.randn(shape, generator=generator).to(device, dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = (1 + 0.1 * torch.randn(affine, generator=generator)).to(device, weights)
    bias = (0.1 * torch.randn(affine, generator=generator)).to(device, weights)
    return [v.requires_grad_() for v in (x, weight, bias)]


def _run(implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    x, weight, bias = inputs
    return GF.batch_norm_act(
        x, None, None, weight, bias, True,
        activation="leaky_relu", negative_slope=SLOPE, implementation=implementation,
    )  # fmt: skip


def _torch(inputs: Sequence[Tensor]) -> Tensor:
    x, weight, bias = inputs
    if weight.ndim == 1:
        return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True), SLOPE)
    y = F.batch_norm(x, None, None, training=True)
    return F.leaky_relu(y * weight[:, :, None, None] + bias[:, :, None, None], SLOPE)


def _work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    """x in, y out; x and g in, dx out; x, g and h in, two out."""
    size = 4 * inputs[0].numel()
    return {mode: Work(n * size) for mode, n in {"forward": 2, "backward": 3, "double backward": 5}.items()}


def _case(name: str, shape: tuple[int, ...], *, last: bool = False, per_sample: bool = False, **options: Any) -> Case:
    return Case(NAME, name, partial(_make, shape, last, per_sample), _run, {"torch": _torch}, _work, **options)


# PReLU of one slope behind it, as in SRResNet.
def _make_prelu(shape: tuple[int, ...], last: bool, slopes: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    inputs = _make(shape, last, False, dtype, device)
    slope = torch.linspace(0.25, 0.5, slopes, dtype=torch.float64).to(device, inputs[1].dtype)
    return [*inputs, slope.requires_grad_()]


def _prelu(implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    x, weight, bias, slope = inputs
    options: dict[str, Any] = {"activation": "prelu", "slope": slope, "implementation": implementation}
    return GF.batch_norm_act(x, None, None, weight, bias, True, **options)


def _torch_prelu(inputs: Sequence[Tensor]) -> Tensor:
    x, weight, bias, slope = inputs
    return F.prelu(F.batch_norm(x, None, None, weight, bias, True), slope.to(x.dtype))


def _prelu_case(name: str, shape: tuple[int, ...], last: bool, slopes: int, **options: Any) -> Case:
    make = partial(_make_prelu, shape, last, slopes)
    return Case(NAME, f"prelu {name}", make, _prelu, {"torch": _torch_prelu}, _work, **options)


SIZES = {"16x128x64x64": (16, 128, 64, 64), "64x128x32x32": (64, 128, 32, 32), "16x512x4x4": (16, 512, 4, 4)}
CASES = [
    _case(
        f"{name}{' channels_last' if last else ''}",
        shape,
        last=last,
        verify=shape == (16, 512, 4, 4),
        quick=name == "16x128x64x64" and not last,
    )
    for name, shape in SIZES.items()
    for last in (False, True)
]
CASES += [
    _case("2x4x2x2", (2, 4, 2, 2), host=True),
    *(_case(f"16x64x{side}x{side}", (16, 64, side, side), along=("height", side)) for side in SIDES),
    _case("conditional 64x128x32x32", (64, 128, 32, 32), per_sample=True, verify=False),
    _case("5x7x9x11", (5, 7, 9, 11), bench=False, quick=True),
    _prelu_case("16x64x24x24", (16, 64, 24, 24), False, 1, verify=False),
    _prelu_case("5x7x9x11", (5, 7, 9, 11), False, 1, bench=False, quick=True),
    _prelu_case("5x7x9x11 channels_last", (5, 7, 9, 11), True, 7, bench=False, quick=True),
    _case("conditional 5x7x3x3 channels_last", (5, 7, 3, 3), last=True, per_sample=True, bench=False, quick=True),
]
