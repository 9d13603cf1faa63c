"""Convolutions of GANs: ProGAN's and ResNet's layers that change the resolution, their 3x3 layers, DCGAN-64's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern.functional as GF
import gankern.nn as gnn
from gankern.measure.cases import SIDES, Case, Work

NAME = "convolution"
Inputs = Sequence[Tensor]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _collapsed_up(inputs: Inputs) -> Tensor:
    """The transposed 4x4 convolution of stride 2 that nearest upsampling and a 3x3 convolution collapse into."""
    x, w = inputs
    sums = F.pad(w, (1, 1, 1, 1))
    sums = sums[:, :, 1:] + sums[:, :, :-1]
    sums = sums[..., 1:] + sums[..., :-1]
    return F.conv_transpose2d(x, sums.flip(2, 3).transpose(0, 1), stride=2, padding=1)


def _collapsed_down(inputs: Inputs) -> Tensor:
    x, w = inputs
    sums = F.pad(w, (1, 1, 1, 1))
    sums = sums[:, :, 1:] + sums[:, :, :-1]
    sums = sums[..., 1:] + sums[..., :-1]
    return F.conv2d(x, sums / 4, stride=2, padding=1)


Function = Callable[[Inputs], Tensor]
# Kind: (gankern's, peers, taps, least products a pixel of the smaller image by the rows of the default precision,
# height of the input over that of the smaller image)
KINDS: dict[str, tuple[Callable[..., Tensor], dict[str, Function], int, int, int]] = {
    "upsample": (
        lambda how, i: GF.upsample_conv2d(i[0], i[1], implementation=how),
        {
            "resize-convolution": lambda i: F.conv2d(F.interpolate(i[0], scale_factor=2), i[1], padding=1),
            "collapsed": _collapsed_up,
        },
        3,
        9,
        1,
    ),
    "downsample": (
        lambda how, i: GF.conv2d_downsample(i[0], i[1], implementation=how),
        {"conv + pool": lambda i: F.avg_pool2d(F.conv2d(i[0], i[1], padding=1), 2), "collapsed": _collapsed_down},
        3,
        9,
        2,
    ),
    "3x3": (
        lambda how, i: GF.conv2d(i[0], i[1], padding=1, implementation=how),
        {"direct": lambda i: F.conv2d(i[0], i[1], padding=1)},
        3,
        4,
        1,
    ),
    "4x4 stride 2": (
        lambda how, i: GF.conv2d(i[0], i[1], stride=2, padding=1, implementation=how),
        {"direct": lambda i: F.conv2d(i[0], i[1], stride=2, padding=1)},
        4,
        9,
        2,
    ),
    "transposed 4x4 stride 2": (
        lambda how, i: GF.conv_transpose2d(i[0], i[1], stride=2, padding=1, implementation=how),
        {"direct": lambda i: F.conv_transpose2d(i[0], i[1], stride=2, padding=1)},
        4,
        9,
        1,
    ),
}


def _make(kind: str, layout: str, n: int, c: int, d: int, h: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Activations and weights of variance 1 and 2 / fan_in. h is the height of the smaller image."""
    _, _, taps, _, factor = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, factor * h, factor * h, generator=generator)
    shape = (c, d, taps, taps) if kind.startswith("transposed") else (d, c, taps, taps)
    w = math.sqrt(2 / (c * taps * taps)) * torch.randn(shape, generator=generator)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    return [t.to(device, dtype).requires_grad_() for t in (x, w)]


# Torch's own convolutions as layers: gankern's are to cost what torch's do.
LAYERS: dict[str, tuple[str, dict[str, int]]] = {
    "3x3": ("Conv2d", {"kernel_size": 3, "padding": 1}),
    "4x4 stride 2": ("Conv2d", {"kernel_size": 4, "stride": 2, "padding": 1}),
    "transposed 4x4 stride 2": ("ConvTranspose2d", {"kernel_size": 4, "stride": 2, "padding": 1}),
}


@lru_cache(maxsize=8)
def _layer(library: Any, kind: str, weight: nn.Parameter) -> nn.Module:
    name, options = LAYERS[kind]
    layer = getattr(library, name)(*weight.shape[:2], bias=False, **options)
    layer.weight = weight
    return layer


def _of_layers(kind: str) -> Case:
    def make(dtype: torch.dtype, device: str) -> list[Tensor]:
        x, weight = _make(kind, "contiguous", 1, 2, 2, 4, dtype, device)
        return [x, nn.Parameter(weight.detach())]

    def run(library: Any, implementation: str | None, inputs: Inputs) -> Tensor:
        x, weight = inputs
        return _layer(library, kind, weight)(x)

    return Case(
        NAME, f"{kind} as a layer", make, partial(run, gnn), {"torch's": partial(run, nn, None)}, host=True
    )  # fmt: skip


def _work(kind: str, inputs: Inputs) -> dict[str, Work]:
    x, w = inputs
    _, _, _, products, factor = KINDS[kind]
    small = x.shape[0] * x.shape[2] * x.shape[3] // factor**2
    d = w.shape[1] if kind.startswith("transposed") else w.shape[0]
    larger = 2 if kind in ("upsample", "transposed 4x4 stride 2") else 1
    y = small * d * larger**2
    total, macs = 4 * (x.numel() + w.numel() + y), small * x.shape[1] * d * products
    return {"forward": Work(total, macs), "backward": Work(2 * total, 2 * macs)}


def _case(kind: str, n: int, c: int, d: int, h: int, layout: str, **options: Any) -> Case:
    _, peers, _, _, _ = KINDS[kind]
    name = f"{kind} N={n} {c}->{d} {h}x{h}{' channels_last' if layout == 'channels_last' else ''}"
    return Case(
        NAME,
        name,
        partial(_make, kind, layout, n, c, d, h),
        KINDS[kind][0],
        peers if options.get("bench", True) else {},
        partial(_work, kind),
        **options,
    )


UPSAMPLE = [(16, 512, 512, 8), (16, 512, 256, 16), (16, 256, 128, 32), (8, 128, 64, 64), (8, 64, 32, 128)]
TIMED = {
    "upsample": UPSAMPLE,
    "downsample": [(n, d, c, h) for n, c, d, h in UPSAMPLE],
    "3x3": [(16, 128, 128, 32), (16, 256, 256, 16), (16, 512, 512, 8), (16, 64, 64, 64)],
    "4x4 stride 2": [(64, 3, 64, 32), (64, 64, 128, 16), (64, 128, 256, 8), (64, 256, 512, 4)],
    "transposed 4x4 stride 2": [(64, 1024, 512, 4), (64, 512, 256, 8), (64, 256, 128, 16), (64, 128, 3, 32)],
}
QUICK = {("upsample", 16, 512, 512, 8), ("3x3", 16, 256, 256, 16)}

CASES = (
    [_case(kind, 1, 2, 2, 4, "contiguous", host=True) for kind in KINDS]
    + [_of_layers(kind) for kind in LAYERS]
    + [
        _case(kind, *shape, layout, verify=False, quick=(kind, *shape) in QUICK and layout == "contiguous")
        for kind, shapes in TIMED.items()
        for shape in shapes
        for layout in LAYOUTS
    ]
    + [
        _case(kind, 16, 128, 128, side, "contiguous", along=(f"height, {kind}", side))
        for kind in ("3x3", "upsample")
        for side in SIDES[1:-1]
    ]
    + [
        _case(kind, *shape, layout, bench=False, quick=layout == "contiguous")
        for kind in KINDS
        for shape, layout in (((2, 19, 37, 6), "contiguous"), ((1, 32, 16, 9), "channels_last"))
    ]
)
