"""Bias, leaky ReLU and pixel norm: the tail of a layer of ProGAN's generator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import SIDES, Case, Work
from gankern.measure.cases.bias_act import FORMATS, SHAPES, label, make, quick

NAME = "pixel_norm"
EPS = 1e-8


def _run(implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    return GF.bias_act_pixel_norm(*inputs, eps=EPS, implementation=implementation)


def _activated(inputs: Sequence[Tensor]) -> Tensor:
    x, bias = inputs
    return F.leaky_relu_(x + bias[:, None, None], 0.2)


def _textbook(inputs: Sequence[Tensor]) -> Tensor:
    a = _activated(inputs)
    return a * torch.rsqrt(a.square().mean(1, keepdim=True) + EPS)


def _vector_norm(inputs: Sequence[Tensor]) -> Tensor:
    a = _activated(inputs)
    return a * torch.rsqrt(torch.linalg.vector_norm(a, dim=1, keepdim=True).square() / a.shape[1] + EPS)


def _rms_norm(inputs: Sequence[Tensor]) -> Tensor:
    a = _activated(inputs)
    return F.rms_norm(a.movedim(1, -1), (a.shape[1],), eps=EPS).movedim(-1, 1)


def _work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    x = 4 * inputs[0].numel()
    return {"forward": Work(2 * x), "backward": Work(3 * x), "double backward": Work(5 * x)}


PEERS = {"textbook": _textbook, "vector_norm": _vector_norm, "rms_norm": _rms_norm}

CASES = [
    Case(NAME, "2x4x2x2", partial(make, (2, 4, 2, 2), "contiguous"), _run, PEERS, _work, host=True),
    *(
        Case(
            NAME,
            label(shape, memory_format),
            partial(make, shape, memory_format),
            _run,
            PEERS,
            _work,
            verify=False,
            quick=quick(shape, memory_format),
        )
        for shape in SHAPES
        for memory_format in FORMATS
    ),
    *(
        Case(
            NAME,
            label(shape, "contiguous"),
            partial(make, shape, "contiguous"),
            _run,
            PEERS,
            _work,
            along=("height", shape[2]),
        )
        for shape in ((16, 64, side, side) for side in SIDES)
    ),
    *(
        Case(
            NAME, f"5x7x9x3 {memory_format}", partial(make, (5, 7, 9, 3), memory_format), _run, bench=False, quick=True
        )
        for memory_format in FORMATS
    ),
]
