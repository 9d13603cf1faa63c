"""Instance normalisation and ReLU, as image-to-image generators have them; and with samples' own affine values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import Case
from gankern.measure.cases._norm_act import make, of_maps, work

NAME = "instance_norm_act"


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


def _case(name: str, shape: tuple[int, ...], *, last: bool = False, affine: str | None = None, **options: Any) -> Case:
    return Case(NAME, name, partial(make, shape, last, affine), _run, {"torch": _torch}, work, **options)


CASES = [
    *of_maps(_case, [(1, 256, 64, 64), (1, 64, 256, 256), (8, 64, 32, 32)], verified=(8, 64, 32, 32)),
    _case("affine 5x7x9x11", (5, 7, 9, 11), affine="channel", bench=False, quick=True),
    _case("adaptive 5x7x3x3 channels_last", (5, 7, 3, 3), last=True, affine="sample", bench=False, quick=True),
    _case("affine 3x40x20x20 channels_last", (3, 40, 20, 20), last=True, affine="channel", bench=False, quick=True),
]
