"""gankern sample: a picture of what a checkpoint's generator makes."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from gankern.cli._fail import fail
from gankern.training import CHECKPOINT, TrainingError, pictures
from gankern.training import checkpoint as checkpoints

COLUMNS = 8


def sample(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint.pt of a run, or the run's folder", show_default=False)],
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("samples.png"),
    num: Annotated[int, typer.Option(min=1, help="number of images")] = 64,
    seed: Annotated[int, typer.Option(help="decides the latents")] = 0,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="each row of eight goes from one latent to another")
    ] = False,
    layers: Annotated[
        str | None, typer.Option(help="which side of a comparison: torch or gankern [default: gankern]")
    ] = None,
) -> None:
    """Draw NUM images from a checkpoint's generator as one PNG."""
    path = checkpoint / CHECKPOINT if checkpoint.is_dir() else checkpoint
    try:
        saved = checkpoints.load(path)
        side = layers or saved.config.sides[-1]
        if side not in saved.trainers:
            fail(f"{path} holds {' and '.join(saved.trainers)} layers, --layers {side} was asked for")
        generator = checkpoints.generator(saved, side)
        random = torch.Generator().manual_seed(seed)
        latents = torch.randn(num, saved.config.latent, generator=random)
        if interpolate:
            latents = paths(latents)[:num]
        with torch.no_grad():
            pictures.save_grid(out, generator(latents), COLUMNS)
    except (OSError, ValueError, TrainingError) as error:
        fail(error)
    Console().print(f"{num} images of {saved.config.model} after {saved.step} steps: {out}", soft_wrap=True)


def paths(latents: Tensor) -> Tensor:
    """Every latent [N, D] becomes eight, on the way to the next one: [8·N, D], one grid row each.

    The way is along the sphere, sin((1−t)ω)/sin ω·a + sin(tω)/sin ω·b with ω the angle between a and b,
    because Gaussian latents all lie near a sphere, and a straight line would leave it.
    """
    nexts = latents.roll(-1, 0)
    angle = torch.nn.functional.cosine_similarity(latents, nexts).clamp(-1 + 1e-6, 1 - 1e-6).arccos()[:, None, None]
    t = torch.linspace(0, 1, COLUMNS, dtype=latents.dtype)[None, :, None]
    a, b = latents[:, None], nexts[:, None]
    return ((((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()).flatten(0, 1)
