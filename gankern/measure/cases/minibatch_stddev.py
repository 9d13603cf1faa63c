"""Minibatch standard deviation, in groups of 4: large feature maps, and the 4 x 4 one where ProGAN has it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import Case, Work, of_large_maps

NAME = "minibatch_stddev"
GROUP, EPS = 4, 1e-8


def _make(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, device: str) -> list[Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return [x.to(device, dtype).requires_grad_()]


def _run(implementation: str | None, inputs: Sequence[Tensor], **options: Any) -> Tensor:
    return GF.minibatch_stddev(inputs[0], group_size=GROUP, eps=EPS, implementation=implementation, **options)


def _appended(x: Tensor, variance: Tensor) -> Tensor:
    """x with the mean of sqrt(variance + eps), [N / G, C, H, W], as one more channel."""
    stddev = (variance + EPS).sqrt().mean((1, 2, 3), keepdim=True)
    channel = stddev.repeat(GROUP, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, channel], 1)


def _textbook(inputs: Sequence[Tensor]) -> Tensor:
    (x,) = inputs
    groups = x.unflatten(0, (GROUP, -1))
    return _appended(x, (groups - groups.mean(0)).square().mean(0))


def _var(inputs: Sequence[Tensor]) -> Tensor:
    (x,) = inputs
    return _appended(x, x.unflatten(0, (GROUP, -1)).var(0, correction=0))


def _work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    """x in and the result out; x and the result's gradient in and that of x out."""
    (x,) = inputs
    own, result = 4 * x.numel(), 4 * x.numel() // x.shape[1] * (x.shape[1] + 1)
    return {"forward": Work(own + result), "backward": Work(2 * own + result)}


def _case(name: str, shape: tuple[int, ...], channels_last: bool = False, **options: Any) -> Case:
    peers = {"textbook": _textbook, "var": _var}
    return Case(NAME, name, partial(_make, shape, channels_last), _run, peers, _work, **options)


def _verified(name: str, shape: tuple[int, ...], channels_last: bool = False, **options: Any) -> Case:
    return Case(NAME, name, partial(_make, shape, channels_last), partial(_run, **options), bench=False, quick=True)


CASES = [
    *of_large_maps(_case),
    _case("4x2x2x2", (4, 2, 2, 2), host=True),
    _verified("8x6x5x3", (8, 6, 5, 3)),
    _verified("8x18x5x3 channels_last, 3 channels", (8, 18, 5, 3), True, num_channels=3),
    _verified("6x40, unbiased, whole batch", (6, 40), unbiased=True, on_indivisible="whole_batch"),
    _verified("12x3x70, contiguous groups", (12, 3, 70), layout="contiguous"),
]
