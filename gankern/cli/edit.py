"""gankern edit: an image, found among what a trained generator makes, and changed there by a stroke."""

import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from gankern.cli._choose import SIDE, check_output
from gankern.cli._fail import fail
from gankern.core.arguments import seed as check_seed
from gankern.data import files
from gankern.data.images import grey
from gankern.diagnostics import latent
from gankern.training import CHECKPOINT, TrainingError, pictures
from gankern.training import checkpoint as checkpoints

COLOURS = {
    "black": "000000", "white": "ffffff", "red": "ff0000", "yellow": "ffff00", "green": "00ff00", "cyan": "00ffff",
    "blue": "0000ff", "magenta": "ff00ff",
}  # fmt: skip
PARTS = "the image, the nearest that the generator makes, the mask, the edit, and the edit on the image"


def edit(
    checkpoint: Annotated[Path, typer.Argument(help="a run's folder, or one of its checkpoints", show_default=False)],
    image: Annotated[
        Path | None, typer.Argument(help="a picture", show_default="one that the generator makes, by --seed")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="a picture, white where the stroke is", show_default="only find the image")
    ] = None,
    outlines: Annotated[
        Path | None, typer.Option(help="a picture, a sketch whose edges are wanted under the mask", show_default="none")
    ] = None,
    colour: Annotated[str, typer.Option(help=f"of the stroke: {', '.join(COLOURS)}, or RRGGBB")] = "red",
    out: Annotated[Path, typer.Option(help=f"the picture to write: {PARTS}, side by side")] = Path("edited.png"),
    steps: Annotated[int, typer.Option(min=1, help="to find the image, and for the stroke")] = 100,
    starts: Annotated[int, typer.Option(min=1, help="latents to begin from")] = 8,
    stay: Annotated[float, typer.Option(min=0.0, help="how dear it is to leave the latent that was found")] = 3.0,
    seed: Annotated[int, typer.Option(help="decides the latents")] = 0,
    layers: Annotated[str | None, SIDE] = None,
) -> None:
    """Find IMAGE among what the generator of a run makes, and paint on it with the colour under the mask."""
    console = Console()
    try:
        check_seed("--seed", seed)
        if outlines is not None and mask is None:
            raise ValueError("--outlines are wanted under the mask: pass --mask too")
        pictures.check_can_draw()
        pictures.format_of(out)
        check_output("--out", out)
        saved = checkpoints.load(checkpoint / CHECKPOINT if checkpoint.is_dir() else checkpoint)
        game, config = checkpoints.game(saved, layers or saved.config.sides[-1]), saved.config
        if game.averaged is None or config.conditioning or config.size is None:
            raise ValueError(f"edit is for generators of images from latents alone; {config.model} here is another")
        generator, random = game.average(), torch.Generator().manual_seed(seed)
        if image is None:
            with torch.no_grad():
                target = generator(torch.randn(1, config.latent, generator=random))
        else:
            target = files.read_picture(image, config.size, config.channels)
        found = latent.project(generator, target, config.latent, steps=steps, starts=starts, random=random)
        far, variance = found.error.item(), target.var().item()
        console.print(f"the nearest image: mean square error {far:.4f}, variance {variance:.4f}", soft_wrap=True)
        row = [target, found.images]
        if mask is not None:
            where = files.read_picture(mask, config.size, 1)[0, 0] * 0.5 + 0.5
            like = _colour(colour, config.channels)
            sketch = None if outlines is None else files.read_picture(outlines, config.size, config.channels)[0]
            moved = latent.edit(generator, found.latents, where, like, outlines=sketch, steps=steps, stay=stay)
            with torch.no_grad():
                edited = generator(moved)
            drawn = (2.0 * where - 1.0).expand_as(target)
            row += [drawn, edited, latent.transfer(target, found.images, edited).clamp(-1.0, 1.0)]
        pictures.save_grid(out, torch.cat(row), len(row))
    except (OSError, ValueError, ImportError, TrainingError) as error:
        fail(error)
    told = PARTS if mask is not None else "the image, and the nearest that the generator makes"
    console.print(f"{told}: {out}", soft_wrap=True, markup=False)


def _colour(name: str, channels: int) -> Tensor:
    """A colour's name or RRGGBB, [channels] in [-1, 1]; its brightness where images are grey.

    >>> _colour("red", 3), _colour("#00ff00", 1)
    (tensor([ 1., -1., -1.]), tensor([0.1740]))
    """
    digits = COLOURS.get(name.lower(), name.removeprefix("#"))
    if not re.fullmatch("[0-9a-fA-F]{6}", digits):
        raise ValueError(f"--colour must be {', '.join(COLOURS)}, or RRGGBB, got {name!r}")
    rgb = torch.tensor([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 127.5 - 1.0
    return rgb if channels == 3 else grey(rgb[:, None, None]).flatten()
