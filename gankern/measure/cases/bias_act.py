"""Bias and leaky ReLU of feature maps, and the other activations at one size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import SIDES, Case, Work

NAME = "bias_act"
# The tensors that benchmarks take, of both memory formats.
SHAPES = ((16, 128, 64, 64), (64, 128, 32, 32), (16, 512, 4, 4))
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def make(shape: tuple[int, ...], memory_format: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype).to(memory_format=FORMATS[memory_format])
    bias = torch.randn(shape[1], generator=generator).to(device, dtype)
    return [x.requires_grad_(), bias.requires_grad_()]


def label(shape: tuple[int, ...], memory_format: str) -> str:
    return f"{'x'.join(map(str, shape))} {memory_format}"


def quick(shape: tuple[int, ...], memory_format: str) -> bool:
    """Whether it is the one that quick runs take: larger than the caches."""
    return shape == SHAPES[0] and memory_format == "contiguous"


def _run(activation: str, implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    return GF.bias_act(*inputs, activation=activation, implementation=implementation)


def _eager(inputs: Sequence[Tensor]) -> Tensor:
    x, bias = inputs
    return F.leaky_relu(x + bias[:, None, None], 0.2)


def _in_place(inputs: Sequence[Tensor]) -> Tensor:
    x, bias = inputs
    return F.leaky_relu_(x + bias[:, None, None], 0.2)


def _work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    x = 4 * inputs[0].numel()
    return {"forward": Work(2 * x), "backward": Work(3 * x), "double backward": Work(2 * x)}


def _case(name: str, shape: tuple[int, ...], memory_format: str, activation: str, **options: Any) -> Case:
    peers = {"eager": _eager, "in place": _in_place} if activation == "leaky_relu" else {}
    return Case(NAME, name, partial(make, shape, memory_format), partial(_run, activation), peers, _work, **options)


def _leaky_relu(implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    return GF.leaky_relu(inputs[0], 0.2, implementation=implementation)


def _one(shape: tuple[int, ...], memory_format: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    return make(shape, memory_format, dtype, device)[:1]


# PReLU behind a convolution, one slope as in SRResNet; and a slope, of one or of each channel, beside a bias.
def _make_prelu(
    shape: tuple[int, ...], memory_format: str, slopes: int, bias: bool, dtype: torch.dtype, device: str
) -> list[Tensor]:
    x, given = make(shape, memory_format, dtype, device)
    slope = torch.linspace(0.25, 0.5, slopes, dtype=torch.float64).to(device, dtype).requires_grad_()
    return [x, given, slope] if bias else [x, slope]


def _prelu(implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    x, *bias, slope = inputs
    return GF.bias_act(x, *bias, activation="prelu", slope=slope, implementation=implementation)


def _torch_prelu(inputs: Sequence[Tensor]) -> Tensor:
    x, *bias, slope = inputs
    return F.prelu(x + bias[0][:, None, None] if bias else x, slope)


def _prelu_work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    x = 4 * inputs[0].numel()
    return {"forward": Work(2 * x), "backward": Work(3 * x), "double backward": Work(5 * x)}


def _prelu_case(name: str, shape: tuple[int, ...], memory_format: str, slopes: int, bias: bool, **options: Any) -> Case:
    make_inputs = partial(_make_prelu, shape, memory_format, slopes, bias)
    return Case(NAME, f"prelu {name}", make_inputs, _prelu, {"torch": _torch_prelu}, _prelu_work, **options)


CASES = [
    _case("2x4x2x2", (2, 4, 2, 2), "contiguous", "leaky_relu", host=True),
    Case(
        NAME,
        "leaky_relu alone",
        partial(_one, (2, 4, 2, 2), "contiguous"),
        _leaky_relu,
        {"torch": lambda inputs: F.leaky_relu(inputs[0], 0.2)},
        host=True,
    ),
    *(
        _case(
            label(shape, memory_format),
            shape,
            memory_format,
            "leaky_relu",
            verify=False,
            quick=quick(shape, memory_format),
        )
        for shape in SHAPES
        for memory_format in FORMATS
    ),
    *(
        _case(label(shape, "contiguous"), shape, "contiguous", "leaky_relu", along=("height", shape[2]))
        for shape in ((16, 64, side, side) for side in SIDES)
    ),
    *(
        _case(f"{activation} 5x7x9x3 {memory_format}", (5, 7, 9, 3), memory_format, activation, bench=False, quick=True)
        for activation in GF.ACTIVATIONS
        for memory_format in FORMATS
    ),
    _prelu_case("16x64x96x96", (16, 64, 96, 96), "contiguous", 1, False, verify=False),
    _prelu_case("16x64x96x96 channels last", (16, 64, 96, 96), "channels last", 1, False, verify=False),
    *(
        _prelu_case(f"5x7x9x3 {memory_format}", (5, 7, 9, 3), memory_format, 7, True, bench=False, quick=True)
        for memory_format in FORMATS
    ),
    _prelu_case("of one slope 5x7x9x13", (5, 7, 9, 13), "contiguous", 1, False, bench=False, quick=True),
]
