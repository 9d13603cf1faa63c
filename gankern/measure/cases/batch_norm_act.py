"""Batch normalisation and leaky ReLU in training, as discriminators have it, and with samples' own affine values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import Case
from gankern.measure.cases._norm_act import make, of_maps, work

NAME = "batch_norm_act"
SLOPE = 0.2


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


def _case(name: str, shape: tuple[int, ...], *, last: bool = False, affine: str = "channel", **options: Any) -> Case:
    return Case(NAME, name, partial(make, shape, last, affine), _run, {"torch": _torch}, work, **options)


# PReLU of one slope behind it, as in SRResNet.
def _make_prelu(shape: tuple[int, ...], last: bool, slopes: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    inputs = make(shape, last, "channel", dtype, device)
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
    inputs = partial(_make_prelu, shape, last, slopes)
    return Case(NAME, f"prelu {name}", inputs, _prelu, {"torch": _torch_prelu}, work, without=("cuda",), **options)


CASES = [
    *of_maps(_case, [(16, 128, 64, 64), (64, 128, 32, 32), (16, 512, 4, 4)], verified=(16, 512, 4, 4)),
    _case("conditional 64x128x32x32", (64, 128, 32, 32), affine="sample", verify=False, without=("cuda",)),
    _case("5x7x9x11", (5, 7, 9, 11), bench=False, quick=True, without=("cuda",)),
    _case("5x24x3x3 channels_last", (5, 24, 3, 3), last=True, bench=False, quick=True),
    _prelu_case("16x64x24x24", (16, 64, 24, 24), False, 1, verify=False),
    _prelu_case("5x7x9x11", (5, 7, 9, 11), False, 1, bench=False, quick=True),
    _prelu_case("5x7x9x11 channels_last", (5, 7, 9, 11), True, 7, bench=False, quick=True),
    _case(
        "conditional 5x7x3x3 channels_last",
        (5, 7, 3, 3),
        last=True,
        affine="sample",
        bench=False,
        quick=True,
        without=("cuda",),
    ),
]
