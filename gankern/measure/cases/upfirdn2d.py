"""Up, FIR filter, down: the binomial filter of four taps, to twice the size, to half of it, and at the same size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import gankern.functional as GF
from gankern.measure.cases import SIDES, Case, Work

NAME = "upfirdn2d"
TAPS = (1.0, 3.0, 3.0, 1.0)
RUN: dict[str, Callable[..., Tensor]] = {"up 2": GF.upsample2d, "down 2": GF.downsample2d, "same": GF.filter2d}


def _make(
    shape: tuple[int, ...],
    taps: Sequence[float],
    channels_last: bool,
    outer: bool,
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    one = torch.tensor(taps) / sum(taps)
    return [x.to(device, dtype).requires_grad_(), (one.outer(one) if outer else one).to(device, dtype)]


def _run(kind: str, implementation: str | None, inputs: Sequence[Tensor]) -> Tensor:
    return RUN[kind](*inputs, implementation=implementation)


# ---- the operator of four symmetric taps in PyTorch ---------------------------------------------------------------


def _convolution(kind: str, inputs: Sequence[Tensor]) -> Tensor:
    """One depthwise convolution, 4 x 4."""
    x, taps = inputs
    kernel = taps.outer(taps).repeat(x.shape[1], 1, 1, 1)
    if kind == "up 2":
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=len(kernel))
    if kind == "down 2":
        return F.conv2d(x, kernel, stride=2, padding=1, groups=len(kernel))
    return F.conv2d(F.pad(x, [2, 1, 2, 1]), kernel, groups=len(kernel))


def _two_convolutions(kind: str, inputs: Sequence[Tensor]) -> Tensor:
    """Two depthwise convolutions, down and across."""
    x, taps = inputs
    kernel = taps.repeat(x.shape[1], 1, 1)
    if kind == "same":
        x = F.pad(x, [2, 1, 2, 1])
    for axis in (0, 1):
        weight = kernel.unsqueeze(2 + (1 - axis))
        stride = (2, 1) if axis == 0 else (1, 2)
        padding = (1, 0) if axis == 0 else (0, 1)
        if kind == "up 2":
            x = F.conv_transpose2d(x, 2 * weight, stride=stride, padding=padding, groups=len(kernel))
        elif kind == "down 2":
            x = F.conv2d(x, weight, stride=stride, padding=padding, groups=len(kernel))
        else:
            x = F.conv2d(x, weight, groups=len(kernel))
    return x


def _one_channel(kind: str, inputs: Sequence[Tensor]) -> Tensor:
    """A convolution of one channel, with all channels as its batch."""
    x, taps = inputs
    planes = x.reshape(-1, 1, *x.shape[2:])
    return _convolution(kind, (planes, taps)).reshape(*x.shape[:2], *_size(kind, x))


def _shifts(kind: str, inputs: Sequence[Tensor]) -> Tensor:
    """Sums of shifted slices, down and then across, which torch.compile makes loops of."""
    x, taps = inputs
    h, w = x.shape[2:]
    if kind == "up 2":
        # Of the samples around, the two phases read one before and itself, and itself and one after.
        x = F.pad(x, [1, 1, 1, 1])
        even, odd = (taps[3], taps[1]), (taps[2], taps[0])
        x = 2 * torch.stack(
            [f[0] * x[:, :, i : i + h] + f[1] * x[:, :, i + 1 : i + h + 1] for i, f in enumerate((even, odd))], 3
        )
        x = x.flatten(2, 3)
        x = 2 * torch.stack(
            [f[0] * x[..., i : i + w] + f[1] * x[..., i + 1 : i + w + 1] for i, f in enumerate((even, odd))], 4
        )
        return x.flatten(3, 4)
    before, step = (1, 2) if kind == "down 2" else (2, 1)
    rows, columns = _size(kind, x)
    x = F.pad(x, [before, 1, before, 1])
    x = reduce(torch.add, (taps[j] * x[:, :, j : j + step * (rows - 1) + 1 : step] for j in range(4)))
    return reduce(torch.add, (taps[j] * x[..., j : j + step * (columns - 1) + 1 : step] for j in range(4)))


PEERS = {
    "depthwise": _convolution,
    "two depthwise": _two_convolutions,
    "one channel": _one_channel,
    "shifts": _shifts,
}


def _size(kind: str, x: Tensor) -> tuple[int, int]:
    h, w = x.shape[2:]
    return {"up 2": (2 * h, 2 * w), "down 2": (h // 2, w // 2), "same": (h, w)}[kind]


def _work(kind: str, inputs: Sequence[Tensor]) -> dict[str, Work]:
    """Each of the two tensors once. Multiply-adds of the two passes for each output sample, by the taps that meet a
    sample: up 2 / 2 + 2, down 2 * 4 + 4, at the same size 4 + 4."""
    x = inputs[0]
    rows, columns = _size(kind, x)
    out = x.shape[0] * x.shape[1] * rows * columns
    each = {"up 2": 3, "down 2": 12, "same": 8}[kind]
    work = Work(4 * (x.numel() + out), each * out)
    return {"forward": work, "backward": work}


def _case(kind: str, shape: tuple[int, ...], *, channels_last: bool = False, **options: Any) -> Case:
    name = f"{kind} {'x'.join(map(str, shape))}{' channels_last' if channels_last else ''}"
    make = partial(_make, shape, TAPS, channels_last, False)
    peers = {name: partial(peer, kind) for name, peer in PEERS.items()}
    return Case(NAME, name, make, partial(_run, kind), peers, partial(_work, kind), **options)


def _odd_case(kind: str, shape: tuple[int, ...], taps: Sequence[float], channels_last: bool, outer: bool) -> Case:
    """For verification alone."""
    name = f"{kind} {'x'.join(map(str, shape))} {len(taps)} taps{', 2-D' if outer else ''}"
    make = partial(_make, shape, taps, channels_last, outer)
    return Case(NAME, name, make, partial(_run, kind), bench=False, quick=True)


CASES = [
    *(_case(kind, (1, 2, 4, 4), host=True) for kind in RUN),
    *(_case(kind, (16, 64, 64, 64), verify=False, quick=kind != "same") for kind in RUN),
    *(_case(kind, (4, 32, 256, 256), verify=False) for kind in RUN),
    *(_case(kind, (16, 64, 64, 64), verify=False, channels_last=True) for kind in RUN),
    *(_case(kind, (4, 32, 256, 256), verify=False, channels_last=True) for kind in RUN),
    *(_case(kind, (2, 8, 32, 32), bench=False) for kind in RUN),
    *(_case("up 2", (16, 64, side, side), along=("height", side)) for side in SIDES),
    _odd_case("up 2", (2, 3, 7, 9), (1, 2, 1), False, False),
    _odd_case("down 2", (2, 3, 18, 11), (1, 5, 10, 10, 5, 1), True, False),
    _odd_case("same", (2, 3, 7, 9), (1, 2, 1), False, True),
]
