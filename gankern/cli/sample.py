"""gankern sample: pictures of what a checkpoint's generator makes."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from gankern import data, training
from gankern.cli._choose import SIDE, check_output
from gankern.cli._fail import fail
from gankern.core.arguments import seed as check_seed
from gankern.data import POINTS
from gankern.diagnostics.latent import LEAST, truncated
from gankern.diagnostics.latent import attribute as latent_attribute
from gankern.games import Picture, Run
from gankern.models.conditional import CONDITIONINGS
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
    sweep: Annotated[
        str | None, typer.Option(help="of a game with codes: c1, c2, ..., from one end to the other", metavar="CODE")
    ] = None,
    classes: Annotated[
        bool, typer.Option("--classes", help="a grid with a class a column, or of --label alone")
    ] = False,
    caption: Annotated[
        list[str] | None, typer.Option(help="of a game with captions: what to draw; repeat", metavar="TEXT")
    ] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="of a game with an encoder: images of the data, and what comes back")
    ] = False,
    attribute: Annotated[
        str | None,
        typer.Option(
            help="of a game with an encoder, and data with labels: images of class B, and with what A has more in mean",
            metavar="A-B",
        ),
    ] = None,
    truncation: Annotated[
        float | None, typer.Option(help="numbers of latents beyond ± this are drawn again", metavar="LIMIT")
    ] = None,
    label: Annotated[
        int | None,
        typer.Option(help="of a conditional model: images of this class", show_default="one of each in turn"),
    ] = None,
    layers: Annotated[str | None, SIDE] = None,
) -> None:
    """Draw samples from a checkpoint's generator: as one picture, or with --each one by one."""
    path = checkpoint / CHECKPOINT if checkpoint.is_dir() else checkpoint
    console = Console()
    samples = num or samples
    try:
        ways = {"interpolate": interpolate, "arithmetic": arithmetic is not None, "animate": animate,
                "sweep": sweep is not None, "classes": classes, "caption": bool(caption), "reconstruct": reconstruct,
                "attribute": attribute is not None}  # fmt: skip
        if sum(ways.values()) > 1:
            raise ValueError(f"one of --{', --'.join(ways)} at a time, got --{', --'.join(w for w in ways if ways[w])}")
        if each is not None and any(ways.values()):
            raise ValueError(f"--each is of samples alone: no --{', --'.join(ways)}")
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
        if classes and label is not None and not 0 <= label < saved.config.num_classes:
            raise ValueError(f"--label must be from 0 to {saved.config.num_classes - 1}, got {label}")
        picture = None
        if sweep is not None:
            picture = game.able("draw_sweep")(sweep, seed)
        elif classes:
            picture = game.able("draw_classes")(label, seed)
        elif caption:
            picture = game.able("draw_captions")(caption, seed)
        elif reconstruct or attribute is not None:
            picture = _through_codes(game, attribute, min(samples, 64), seed)
        if picture is not None:
            if picture.rows:  # named ones: the texts beside the images
                pictures.save_samples(out, {f"{saved.config.model}, step {saved.step:,}": picture})
            else:
                pictures.save_grid(out, picture.batch, picture.columns)
            told = f"{len(picture.batch)} images of {saved.config.model} after {saved.step} steps: {out}"
            console.print(told, soft_wrap=True, markup=False)
            return
        if truncation is not None and game.averaged is None:
            raise ValueError(f"--truncation is for generators of latents alone; {saved.config.model} draws its own")
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
        if truncation is not None:
            latents = truncated(latents, truncation, torch.Generator().manual_seed(seed + 1))
        if interpolate:
            latents = paths(latents)[:samples]
        elif arithmetic is not None:
            latents = terms(arithmetic, latents)
        labels = _labels(saved.config, label, len(latents))
        network = game.average().to(device)
        batches = _drawn(network, (latents, *labels), batch_size, torch.device(device), console)
        if each is not None:
            pictures.save_each(each, batches, *(x for x in labels if x.ndim == 1))
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


def _through_codes(game: Any, attribute: str | None, number: int, seed: int) -> Picture:
    """Rows of images of the data, what an encoder and decoder make of them, and what with an attribute more."""
    (encode, decode), config = game.able("coding")(), game.config
    samples: Any = data.load(config.data, config.size, on_error=config.on_error, kind=game.needs)
    where = torch.arange(len(samples))
    if game.held_out:
        _, where = Run(config, config.sides[-1], samples=samples).held_out(game.held_out)
    vector = None
    if attribute is not None:
        labels = data.condition(config.data, samples, "labels", config.on_error)[where]
        named = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", attribute)
        of_class = [where[labels == int(name)] for name in named.groups()] if named else []
        if len(of_class) != 2 or any(len(found) < LEAST for found in of_class):
            raise ValueError(
                f"--attribute must be A-B, two classes of {config.data} from 0 to {int(labels.max())} with {LEAST} "
                f"images at least, got {attribute!r}"
            )
        where = of_class[1]
        vector = latent_attribute(*(encode(samples[found[:1000]]) for found in of_class))
    order = torch.randperm(len(where), generator=torch.Generator().manual_seed(seed))[: max(8, number // 3 // 8 * 8)]
    images = samples[where[order]]
    codes = encode(images)
    rows = [images, decode(codes)] + ([] if vector is None else [decode(codes + vector)])
    parts = [part for eight in zip(*(row.split(COLUMNS) for row in rows)) for part in eight]
    return Picture(torch.cat(parts), min(COLUMNS, len(images)))


def _labels(config: Any, label: int | None, number: int) -> tuple[Tensor, ...]:
    """What the generator is called with beside latents: labels, or the first vectors of the data."""
    classes = config.num_classes
    if config.conditioning and (kind := CONDITIONINGS[config.conditioning]) != "labels":
        if label is not None:
            raise ValueError(f"--label is for a model of labels; this one is conditional on {kind}")
        vectors = data.condition(config.data, data.load(config.data, config.size), kind)
        return (vectors[torch.arange(number) % len(vectors)],)
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
