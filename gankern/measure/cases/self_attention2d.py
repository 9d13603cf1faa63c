"""Self-attention over a map: SAGAN's block with its four 1x1 convolutions, at the channels that GANs have it at."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import Case, Work

NAME = "self_attention2d"


def _make(shape: tuple[int, int, int, int], channels_last: bool, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    c = shape[1]
    keys, values = max(1, c // 8), max(1, c // 2)

    def drawn(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(device, dtype)

    x = drawn(*shape)
    # Scores of about 1: weights of unit variance over the root of their inputs, and of the keys' channels.
    theta, phi = (drawn(keys, c, scale=(c * keys**0.5) ** -0.5) for _ in range(2))
    g, out, gamma = drawn(values, c, scale=c**-0.5), drawn(c, values, scale=values**-0.5), drawn()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return [t.requires_grad_() for t in (x, theta, phi, g, out, gamma)]


def _run(implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    x, *weights = inputs
    return GF.self_attention2d(x, *weights, implementation=implementation)


def _projections(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [N, channels, positions]."""
    x, theta, phi, g, *_ = inputs
    q, k, v = (F.conv2d(x, w[:, :, None, None]) for w in (theta, phi, g))
    return q.flatten(2), F.max_pool2d(k, 2).flatten(2), F.max_pool2d(v, 2).flatten(2)


def _block(inputs: Sequence[Tensor], found: Tensor) -> Tensor:
    x, *_, out, gamma = inputs
    return x + gamma * F.conv2d(found.unflatten(2, x.shape[2:]), out[:, :, None, None])


def _textbook(inputs: Sequence[Tensor]) -> Tensor:
    """As the papers' code has it."""
    q, k, v = _projections(inputs)
    return _block(inputs, torch.bmm(v, torch.bmm(q.mT, k).softmax(2).mT))


def _fused(inputs: Sequence[Tensor]) -> Tensor:
    """torch's fused attention, whose heads have one size: queries and keys are filled up. Has no second order."""
    q, k, v = _projections(inputs)
    q, k = (F.pad(t, (0, 0, 0, v.shape[1] - t.shape[1])) for t in (q, k))
    q, k, v = (t.mT.unsqueeze(1).contiguous() for t in (q, k, v))
    return _block(inputs, F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1).mT)


def _work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    """Multiply-adds of the products, and 14 instructions for an exponential."""
    x, theta, _, g, *_ = inputs
    d, e, (n, c, h, w) = len(theta), len(g), x.shape
    pairs, one = n * h * w * (h // 2) * (w // 2), n * h * w * c * (2 * d + 2 * e)
    counts = {
        "forward": (d + e, 1, 1, 2),
        "backward": (3 * d + 2 * e, 1, 2, 3),
        "double backward": (11 * d + 6 * e, 2, 4, 5),
    }
    return {
        mode: Work(maps * 4 * x.numel(), pairs * (products + 14 * passes) + layers * one)
        for mode, (products, passes, layers, maps) in counts.items()
    }  # fmt: skip


def _case(name: str, shape: tuple[int, int, int, int], channels_last: bool = False, **options: Any) -> Case:
    peers = {"textbook": _textbook, "fused": _fused}
    return Case(NAME, name, partial(_make, shape, channels_last), _run, peers, _work, **options)


CASES = [
    _case("1x8x2x2", (1, 8, 2, 2), host=True),
    _case("1x64x64x64", (1, 64, 64, 64), verify=False, quick=True),
    _case("16x64x16x16", (16, 64, 16, 16), verify=False),
    _case("8x128x32x32", (8, 128, 32, 32), verify=False),
    _case("8x128x32x32 channels_last", (8, 128, 32, 32), channels_last=True, verify=False),
    *(_case(f"4x64x{side}x{side}", (4, 64, side, side), along=("height", side)) for side in (4, 8, 16, 32, 64)),
    _case("2x16x6x8", (2, 16, 6, 8), bench=False, quick=True),
    _case("2x20x9x7 channels_last", (2, 20, 9, 7), channels_last=True, bench=False, quick=True),
    _case("3x8x2x2", (3, 8, 2, 2), bench=False),
]
