"""gankern sample: pictures of what a checkpoint's generator makes."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from gankern import training
from gankern.cli._choose import check_output, choice
from gankern.cli._fail import fail
from gankern.core.arguments import seed as check_seed
from gankern.data import POINTS
from gankern.games import Picture
from gankern.models.layers import LAYERS
from gankern.training import CHECKPOINT, TrainingError, pictures
from gankern.training import checkpoint as checkpoints

COLUMNS = 8


def sample(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint.pt of a run, or the run's folder", show_default=False)],
    out: Annotated[Path, typer.Option(help="the PNG to write; with --animate the GIF")] = Path("samples.png"),
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="how many")] = 64,
    num: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,  # what --samples was called
    each: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|FILE.npz",
            help="write the samples one by one instead: PNG files in a new folder, or arrays (arr_0: uint8 "
            "N x H x W x C, and arr_1, the labels, of a conditional model)",
            show_default="one picture, --out",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="so many at a time")] = 64,
    device: Annotated[str, typer.Option(help="where they are computed: cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="decides the latents")] = 0,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="each row of eight goes from one latent to another")
    ] = False,
    arithmetic: Annotated[
        str | None,
        typer.Option(
            help="sums of latents, such as '3-1+5' or '3,8,9-1,4,6+5,2,7': images of the grid, counted from 0 row by "
            "row; a comma takes the mean",
            metavar="SUM",
        ),
    ] = None,
    animate: Annotated[
        bool, typer.Option("--animate", help="the pictures that the run made while it trained, as one GIF")
    ] = False,
    label: Annotated[
        int | None,
        typer.Option(help="of a conditional model: images of this class", show_default="one of each in turn"),
    ] = None,
    layers: Annotated[
        str | None, choice(LAYERS, "which side of a comparison", show_default="the last of those there are")
    ] = None,
) -> None:
    """Draw samples from a checkpoint's generator: as one picture, or with --each one by one."""
    path = checkpoint / CHECKPOINT if checkpoint.is_dir() else checkpoint
    console = Console()
    samples = num or samples
    try:
        if interpolate + animate + (arithmetic is not None) > 1:
            raise ValueError("one of --interpolate, --arithmetic and --animate at a time")
        if each is not None and (animate or interpolate or arithmetic is not None):
            raise ValueError("--each is of samples alone: no --interpolate, --arithmetic or --animate")
        if animate and out == Path("samples.png"):
            out = out.with_suffix(".gif")
        check_seed("--seed", seed)
        training.check_device(device)
        if each is not None:
            pictures.check_each(each)
        elif not animate:
            pictures.check_can_draw()
        if each is None:
            pictures.format_of(out, pictures.ANIMATIONS if animate else pictures.FORMATS)
            if not out.parent.is_dir():
                raise ValueError(f"--out {out}: cannot be written: {os.strerror(errno.ENOENT)}")
            check_output("--out", out)
        saved = checkpoints.load(path)
        if animate:
            frames = sorted((path.parent / "samples").glob("step-*.png"))
            if not frames:
                raise ValueError(f"{path.parent / 'samples'} has no pictures to animate")
            number = pictures.save_animation(out, frames)
            without = f" ({len(frames) - number} that cannot be read left out)" if number < len(frames) else ""
            told = f"{number} pictures of {saved.config.model}'s training{without}: {out}"
            console.print(told, soft_wrap=True, markup=False)
            return
        side = layers or saved.config.sides[-1]
        if side not in saved.trainers:
            raise ValueError(f"{path} holds {' and '.join(saved.trainers)} layers, --layers {side} was asked for")
        game = checkpoints.game(saved, side)
        if game.averaged is None:
            if interpolate or arithmetic is not None or label is not None or each is not None:
                raise ValueError(
                    f"{saved.config.model} draws its samples itself: no --interpolate, --arithmetic, --label or --each"
                )
            drawn = game.pictures()
            pictures.save_samples(out, drawn)
            told = f"{', '.join(drawn)} of {saved.config.model} after {saved.step} steps: {out}"
            console.print(told, soft_wrap=True, markup=False)
            return
        latents = torch.randn(samples, saved.config.latent, generator=torch.Generator().manual_seed(seed))
        if interpolate:
            latents = paths(latents)[:samples]
        elif arithmetic is not None:
            latents = terms(arithmetic, latents)
        labels = _labels(saved.config.num_classes, label, len(latents))
        network = game.average().to(device)
        batches = _drawn(network, (latents, *labels), batch_size, torch.device(device), console)
        if each is not None:
            pictures.save_each(each, batches, *labels)
            out = each
        elif saved.config.size is None:
            title = f"{saved.config.model} after {saved.step} steps"
            modes = getattr(POINTS.get(saved.config.data), "modes", None)
            pictures.save_samples(out, {title: Picture(torch.cat(list(batches)), modes=modes)})
        else:
            pictures.save_grid(out, torch.cat(list(batches)), COLUMNS)
    except (OSError, ValueError, ImportError, TrainingError) as error:
        fail(error)
    console.print(
        f"{len(latents)} samples of {saved.config.model} after {saved.step} steps: {out}", soft_wrap=True, markup=False
    )


def _drawn(
    network: nn.Module, inputs: tuple[Tensor, ...], batch_size: int, device: torch.device, console: Console
) -> Iterator[Tensor]:
    """What the network makes of its inputs, a batch at a time, on the CPU; a terminal sees how far it is."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress, torch.no_grad():
        bar = progress.add_task("drawing", total=len(inputs[0]))
        for parts in zip(*(x.split(batch_size) for x in inputs)):
            yield network(*(x.to(device) for x in parts)).cpu()
            progress.update(bar, advance=len(parts[0]))


def _labels(classes: int, label: int | None, number: int) -> tuple[Tensor, ...]:
    """What the generator is called with beside latents."""
    if not classes:
        if label is not None:
            raise ValueError("--label is for a model that was trained with --conditioning; this one was not")
        return ()
    if label is not None and not 0 <= label < classes:
        raise ValueError(f"--label must be from 0 to {classes - 1}, got {label}")
    return (torch.arange(number) % classes if label is None else torch.full((number,), label),)


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


def terms(expression: str, latents: Tensor) -> Tensor:
    """The latents of a sum's terms, and of the sum last: [terms + 1, D] (Radford 2015, §6.3.2).

    "3-1+5" takes three rows of ``latents`` [N, D], "3,8-1+5" the mean of two for its first term. Means and sum are
    brought back to the mean length of the latents that went in: Gaussian latents lie near a sphere.

    >>> terms("0-1+2", torch.eye(3)).tolist()[-1]
    [0.5773502588272095, -0.5773502588272095, 0.5773502588272095]
    """
    form = r"\s*\d+(\s*,\s*\d+)*\s*"
    if not re.fullmatch(rf"{form}([+-]{form})*", expression):
        raise ValueError(f"--arithmetic must be a sum such as '3-1+5' or '3,8,9-1,4,6+5,2,7', got {expression!r}")
    signs = [1.0, *(1.0 if sign == "+" else -1.0 for sign in re.findall("[+-]", expression))]
    chosen = [[int(number) for number in part.split(",")] for part in re.split("[+-]", expression)]
    wrong = [number for part in chosen for number in part if number >= len(latents)]
    if wrong:
        raise ValueError(
            f"--arithmetic: there are images 0 to {len(latents) - 1}, not {wrong[0]}; --samples makes more"
        )
    means = torch.stack([latents[part].mean(0) for part in chosen])
    length = torch.cat([latents[part] for part in chosen]).norm(dim=1).mean()
    total = (torch.tensor(signs)[:, None] * means).sum(0, keepdim=True)
    return torch.nn.functional.normalize(torch.cat([means, total])) * length
