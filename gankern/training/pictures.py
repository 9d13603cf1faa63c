"""The pictures a run leaves: grids of samples, and loss curves. No display is needed."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from gankern.training.trainer import Step


def grid(images: Tensor, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Images [N, C, H, W] in [−1, 1], C 1 or 3, row by row as one picture [height, width, 3] in [0, 1].

    Cells that are left over, and the gaps of ``gap`` pixels, are white.
    """
    number, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"a picture has 1 or 3 channels, these images have {channels}")
    columns = min(columns, number)
    rows = -(-number // columns)
    picture = np.ones((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), dtype=np.float32)
    pixels = (images.float().clamp(-1, 1) * 0.5 + 0.5).permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(pixels):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def save_grid(path: Path, images: Tensor, columns: int = 8) -> None:
    """One grid as a PNG, each pixel of an image doubled until a grid of 8×8 fills some 500 pixels."""
    scale = max(1, 64 // images.shape[-1])
    imsave(path, grid(images, columns).repeat(scale, axis=0).repeat(scale, axis=1))


def save_grids(path: Path, images: dict[str, Tensor], columns: int = 8) -> None:
    """One titled grid for each entry, from left to right."""
    figure = Figure(figsize=(6 * len(images), 6.4), layout="constrained")
    for axes, (title, batch) in zip(figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True):
        axes.imshow(grid(batch, columns), interpolation="nearest")
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(path, dpi=100)


def save_loss_curves(path: Path, steps: dict[str, list[Step]]) -> None:
    """Both players' losses against the step, every side in the same axes."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, column, player in zip(
        figure.subplots(2, 1, sharex=True), ("d_loss", "g_loss"), ("discriminator", "generator"), strict=True
    ):
        for (side, results), style in zip(steps.items(), ("-", "--"), strict=False):
            losses = [getattr(step, column) for step in results]
            axes.plot(range(1, len(losses) + 1), losses, style, linewidth=0.8, label=side)
        axes.set_ylabel(f"{player} loss")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    axes.set_xlabel("step")
    figure.savefig(path, dpi=100)
