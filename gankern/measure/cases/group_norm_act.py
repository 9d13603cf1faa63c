"""Group normalisation and a leaky ReLU: of some groups, and of one, as the layer norm of critics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import gankern.functional as GF
from gankern.measure.cases import Case
from gankern.measure.cases._norm_act import make, of_maps, work

NAME = "group_norm_act"


def _run(groups: int, implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    x, *affine = inputs
    weight, bias = affine or (None, None)
    options: dict[str, Any] = {"activation": "leaky_relu", "implementation": implementation}
    return GF.group_norm_act(x, groups, weight, bias, **options)


def _torch(groups: int, inputs: Sequence[Tensor]) -> Tensor:
    x, *affine = inputs
    if affine and affine[0].ndim == 2:
        gain, shift = (v[:, :, None, None] for v in affine)
        return F.leaky_relu(F.group_norm(x, groups) * gain + shift, 0.2)
    weight, bias = affine or (None, None)
    return F.leaky_relu(F.group_norm(x, groups, weight, bias), 0.2)


def _case(
    name: str,
    shape: tuple[int, ...],
    groups: int = 0,
    *,
    last: bool = False,
    affine: str | None = "channel",
    **options: Any,
) -> Case:
    groups = groups or min(32, shape[1] // 2)
    run, plain = partial(_run, groups), partial(_torch, groups)
    return Case(NAME, name, partial(make, shape, last, affine), run, {"torch": plain}, work, **options)


CASES = [
    *of_maps(_case, [(16, 64, 64, 64), (16, 256, 32, 32), (8, 64, 32, 32)], verified=(8, 64, 32, 32)),
    _case("one group 16x128x32x32", (16, 128, 32, 32), 1),
    _case("one group 16x128x32x32 channels_last", (16, 128, 32, 32), 1, last=True),
    _case("3 groups 5x6x9x11", (5, 6, 9, 11), 3, bench=False, quick=True),
    _case("adaptive 5x8x3x3 channels_last", (5, 8, 3, 3), 2, last=True, affine="sample", bench=False, quick=True),
    _case(
        "without affine 3x40x20x20 channels_last", (3, 40, 20, 20), 4, last=True, affine=None, bench=False, quick=True
    ),
]
