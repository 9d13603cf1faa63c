"""gankern checkerboard: whether a generator makes checkerboard patterns, and which of its layers does."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gankern import diagnostics, training
from gankern.cli import _target
from gankern.cli._choose import JSON, SIDE, check_output, console_beside, write_results
from gankern.cli._fail import fail
from gankern.core.arguments import seed as check_seed
from gankern.training import CHECKPOINT, TrainingError, pictures
from gankern.training import checkpoint as checkpoints
from gankern.training.export import drawing


def checkerboard(
    target: Annotated[
        str,
        typer.Argument(
            help="a run's folder or checkpoint.pt, or module:factory (or file.py:factory) of a generator",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="also write a picture (PNG, JPEG, WebP)")] = None,
    json: Annotated[Path | None, JSON] = None,
    layers: Annotated[str | None, SIDE] = None,
    latent: Annotated[
        int | None, typer.Option(help="length of the latents", show_default="found out where it can be")
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(min=1, help="the generator needs labels: so many classes", show_default="the run's, or none"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="images for the spectrum")] = 64,
    seed: Annotated[int, typer.Option(help="decides latents, labels and noise")] = 0,
) -> None:
    """Look for checkerboard patterns in TARGET's upsampling layers and images.

    Exits with 0 whatever is found; --json has it in a form for programs.
    """
    try:
        check_seed("--seed", seed)
        check_output("--json", json)
        if out is not None:
            pictures.format_of(out)
            check_output("--out", out)
        generator, config, inputs = _generator(target, layers)
        if config is not None:  # a run knows what its generator is called with
            latent = latent or config.latent
            classes = classes or config.num_classes or None
        if inputs is None and classes is not None:
            random = torch.Generator().manual_seed(seed)
            latents = diagnostics.latents(generator, latent, samples, random)
            inputs = latents, torch.randint(classes, (samples,), generator=random)
        report = diagnostics.checkerboard(generator, inputs, latent=latent, samples=samples, seed=seed)
        if out:
            report.save_picture(out)
        write_results(json, report.to_dict())
    except (OSError, ValueError, TypeError, ImportError, TrainingError) as error:
        fail(error)
    console = console_beside(json)
    console.print(report.table())
    if report.clean:
        console.print("No checkerboard: every stage treats its phases alike.", soft_wrap=True)
    else:
        console.print(f"The checkerboard comes from {report.culprit or 'the generator itself'}.", soft_wrap=True)


def _generator(
    target: str, side: str | None
) -> tuple[nn.Module, training.Config | None, tuple[torch.Tensor, ...] | None]:
    """The generator, of a run its configuration, and of a game that draws its pictures itself what it draws them of."""
    path = Path(target)
    if path.exists():
        saved = checkpoints.load(path / CHECKPOINT if path.is_dir() else path)
        side = side or saved.config.sides[-1]
        if side not in saved.trainers:
            raise ValueError(f"{path} holds {' and '.join(saved.trainers)} layers, --layers {side} was asked for")
        game = checkpoints.game(saved, side)
        if game.averaged is None:
            network, inputs = drawing(game)
            return network, saved.config, inputs
        average = game.average()  # whose layers have the names that they have in the generator
        return average.module if isinstance(average, AveragedModel) else average, saved.config, None
    if ":" not in target:
        raise ValueError(f"{target!r} is neither a file or folder nor module:factory (for instance my_model:Generator)")
    return _target.make(target), None, None
