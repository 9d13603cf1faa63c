"""Virtual batch norm with a leaky ReLU: large feature maps, and one of many small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import Case, Work, of_large_maps

NAME = "virtual_batch_norm"
COUNT, EPS, SLOPE = 64, 1e-5, 0.2
SHARE = 1 / (COUNT + 1)


def _make(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    channel = (shape[1],)
    mean = 0.2 * torch.randn(channel, generator=generator)
    mean_square = mean.square() + 1 + 0.2 * torch.rand(channel, generator=generator)
    weight = 1 + 0.02 * torch.randn(channel, generator=generator)
    bias = 0.1 * torch.randn(channel, generator=generator)
    return [t.to(device, dtype).requires_grad_() for t in (x, mean, mean_square, weight, bias)]


def _run(
    implementation: str | None,
    inputs: Sequence[Tensor],
    count: int | None = COUNT,
    activation: str | None = "leaky_relu",
) -> Tensor:
    x, mean, mean_square, weight, bias = inputs
    options: Any = {"eps": EPS, "activation": activation, "negative_slope": SLOPE, "implementation": implementation}
    return GF.virtual_batch_norm(x, mean, mean_square, count, weight, bias, **options)


def _statistics(implementation: str | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    mean, mean_square = GF.virtual_batch_norm_statistics(inputs[0], implementation=implementation)
    return [mean, mean_square]


def _channels(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [inputs[0], *(vector[:, None, None] for vector in inputs[1:])]


def _textbook(inputs: Sequence[Tensor]) -> Tensor:
    x, mean, mean_square, weight, bias = _channels(inputs)
    mu = SHARE * x.mean((2, 3), keepdim=True) + (1 - SHARE) * mean
    s = SHARE * x.square().mean((2, 3), keepdim=True) + (1 - SHARE) * mean_square
    return F.leaky_relu((x - mu) / (s - mu.square() + EPS).sqrt() * weight + bias, SLOPE)


def _folded(inputs: Sequence[Tensor]) -> Tensor:
    """One pass for both moments, and one multiply-add a value."""
    x, mean, mean_square, weight, bias = _channels(inputs)
    own_variance, own_mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    mu = SHARE * own_mean + (1 - SHARE) * mean
    s = SHARE * (own_variance + own_mean.square()) + (1 - SHARE) * mean_square
    scale = weight * (s - mu.square() + EPS).rsqrt()
    return F.leaky_relu(torch.addcmul(bias - mu * scale, x, scale), SLOPE)


def _work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    """x in and the result out; x and the result's gradient in and that of x out."""
    own = 4 * inputs[0].numel()
    return {"forward": Work(2 * own), "backward": Work(3 * own)}


def _case(name: str, shape: tuple[int, ...], channels_last: bool = False, **options: Any) -> Case:
    peers = {"textbook": _textbook, "folded": _folded}
    return Case(NAME, name, partial(_make, shape, channels_last), _run, peers, _work, **options)


def _verified(
    name: str, shape: tuple[int, ...], channels_last: bool = False, run: Callable[..., Any] = _run, **options: Any
) -> Case:
    return Case(NAME, name, partial(_make, shape, channels_last), partial(run, **options), bench=False, quick=True)


def _one(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: str) -> list[Tensor]:
    return _make(shape, channels_last, dtype, device)[:1]


CASES = [
    *of_large_maps(_case),
    _case("2x4x2x2", (2, 4, 2, 2), host=True),
    _verified("5x6x7x3", (5, 6, 7, 3)),
    _verified("5x18x7x3 channels_last, ReLU", (5, 18, 7, 3), True, activation="relu"),
    _verified("6x40, reference batch norm", (6, 40), count=None, activation=None),
    _verified("3x5x70", (3, 5, 70)),
    Case(NAME, "statistics 5x6x7x3", partial(_one, (5, 6, 7, 3), False), _statistics, bench=False, quick=True),
    Case(
        NAME,
        "statistics 5x18x7x3 channels_last",
        partial(_one, (5, 18, 7, 3), True),
        _statistics,
        bench=False,
        quick=True,
    ),
]
