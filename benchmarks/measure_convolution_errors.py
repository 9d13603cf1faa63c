"""Prints the table of errors in docs/convolution.md: largest differences from float64, relative to its largest value,
of each row's three passes in fp32, and how often that of PyTorch's direct convolution they are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd import grad

from gankern.ops import convolution as ops
from gankern.ops import convolution_choice as choice

PLAIN = {
    "upsample": lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2), w, padding=1),
    "downsample": lambda x, w: F.avg_pool2d(F.conv2d(x, w, padding=1), 2),
    "same": lambda x, w: F.conv2d(x, w, padding=1),
    "same_of_four": lambda x, w: F.conv2d(x, w, padding=1),
    "strided": lambda x, w: F.conv2d(x, w, stride=2, padding=1),
    "transposed": lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1),
    "strided_of_three": lambda x, w: F.conv2d(x, w, stride=2, padding=1),
    "transposed_of_three": lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1),
}


def passes(function, x, w, g):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = function(x, w)
    return y.detach(), *grad(y, (x, w), g.to(y.dtype))


def errors(kind: str, way: str | None, channels: int, height: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    taps = choice.KINDS[kind].taps
    x = torch.randn(4, channels, height, height, generator=generator)
    w = torch.randn(channels, channels, taps, taps, generator=generator) / (taps * math.sqrt(channels))
    size = choice.result_size(kind, 1, height, height)
    g = torch.randn(4, channels, *size, generator=generator)
    exact = passes(PLAIN[kind], x.double(), w.double(), g)
    options = (kind, 1, 1.0, "medium", way, 0)
    ours = passes(
        PLAIN[kind] if way is None else lambda x, w: ops._Convolve.apply(options, False, *size, x, w, None), x, w, g
    )
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, exact)]


def main() -> None:
    print("| kind | way | precision | forward | data gradient | weight gradient |\n|---|---|---|---|---|---|")
    for kind in PLAIN:
        info = choice.KINDS[kind]
        shapes = [(64, 16), (256, 16)]
        direct = [errors(kind, None, *shape) for shape in shapes]
        for way in [*info.rows, *(["torch"] if info.collapsed else [])]:
            found = [errors(kind, way, *shape) for shape in shapes]
            cells = []
            for i in range(3):
                worst = max(f[i] / d[i] for f, d in zip(found, direct))
                cells.append(f"{max(f[i] for f in found):.1e} ({worst:.1f}x)")
            level = info.rows[way].precision if way in info.rows else "high"
            print(f"| {kind} | {'collapsed' if way == 'torch' else way} | {level} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
