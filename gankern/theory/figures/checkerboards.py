"""How often each output of an upsampling layer is written: where checkerboards come from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.theory.figures._figure import Figure, canvas, table

LAYERS = {
    "transposed 3 × 3, stride 2": (3, 1, 1),
    "transposed 4 × 4, stride 2": (4, 1, 0),
    "transposed 5 × 5, stride 2": (5, 2, 1),
    "nearest ×2, then 3 × 3": (0, 0, 0),
}


def contributions(kernel: int, padding: int, output_padding: int, side: int = 8) -> Tensor:
    """What a layer of weights 1 makes of an image of ones, the border cut off: equal numbers, or a pattern."""
    ones = torch.ones(1, 1, side, side, dtype=torch.float64)
    if kernel:
        weight = torch.ones(1, 1, kernel, kernel, dtype=torch.float64)
        made = F.conv_transpose2d(ones, weight, stride=2, padding=padding, output_padding=output_padding)
    else:
        made = F.conv2d(F.interpolate(ones, scale_factor=2), torch.ones(1, 1, 3, 3, dtype=torch.float64), padding=1)
    return made[0, 0, 4:-4, 4:-4]


def compute() -> dict[str, Any]:
    maps = {name: contributions(*layer) for name, layer in LAYERS.items()}
    rows = []
    for name, made in maps.items():
        levels = sorted({int(v) for v in made.flatten().tolist()})
        rows.append((name, ", ".join(map(str, levels)), f"{made.std(correction=0) / made.mean():.3f}"))
    return {
        "table": table(("layer", "contributions to an output", "their deviation / mean"), rows),
        "uneven": (maps["transposed 3 × 3, stride 2"].max() / maps["transposed 3 × 3, stride 2"].min()).item(),
        "maps": maps,
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, axes = canvas(9, 2.5, columns=4)
    for ax, (name, made) in zip(axes, found["maps"].items()):
        ax.imshow(made, cmap="gray", vmin=0, vmax=10)
        for (i, j), value in ((index, made[index]) for index in ((a, b) for a in range(8) for b in range(8))):
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color="white" if value < 5 else "black")
        ax.set(title=name)
        ax.axis("off")
    return figure
