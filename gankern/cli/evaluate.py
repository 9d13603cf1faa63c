"""gankern evaluate: the figures that papers report, of a run's samples or of a folder of pictures."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from gankern import data, metrics, training
from gankern.cli._choose import JSON, SIDE, check_output, console_beside, write_results
from gankern.cli._fail import fail
from gankern.core.arguments import seed as check_seed
from gankern.data import ImageSource
from gankern.diagnostics.latent import truncated
from gankern.models.conditional import CONDITIONINGS
from gankern.training import checkpoint as checkpoints
from gankern.training import pictures

MOST = 50_000  # samples of a run, where there are as many real images


def evaluate(
    fake: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|FOLDER",
            help="a run (its folder or a checkpoint), or a folder or zip file of pictures",
            show_default=False,
        ),
    ],
    real: Annotated[
        str | None,
        typer.Argument(
            metavar="[REAL]",
            help="a folder or zip file of real pictures, or a data set's name",
            show_default="the run's",
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="the file of the Inception of FID (inception-2015-12-05.pt, or pt_inception-2015-12-05-6726825d.pth), "
            "or a TorchScript file of other features",
            show_default="a classifier of REAL's labels, trained first",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="how many of each", show_default="as many as there are of both")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="crop and resize both to this", show_default="no")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="samples of a run at a time")] = 64,
    device: Annotated[str, typer.Option(help="where a run's samples are computed: cpu, cuda, cuda:1, ...")] = "cpu",
    layers: Annotated[str | None, SIDE] = None,
    seed: Annotated[int, typer.Option(help="decides latents, and which images are taken")] = 0,
    truncation: Annotated[
        list[float] | None,
        typer.Option(
            help="of a run, beside its samples those whose latents' numbers beyond ± this are drawn again; repeat",
            metavar="LIMIT",
        ),
    ] = None,
    json_file: Annotated[Path | None, JSON] = None,
) -> None:
    """FID, KID, Inception score, precision, recall and sliced Wasserstein distance of two sets of images.

    They compare with published figures where --features is the published Inception. Without it FID and the like are of
    a classifier of the real images' labels and are called that, and without labels only the sliced Wasserstein distance
    is computed.
    """
    console = console_beside(json_file)
    try:
        check_seed("--seed", seed)
        check_output("--json", json_file)
        training.check_device(device)
        extractor = None if features is None else metrics.load(features)
        is_run = (fake.is_file() and fake.suffix == ".pt") or (fake / training.CHECKPOINT).is_file()
        saved = checkpoints.load(fake) if is_run else None
        if saved is None and not fake.exists():
            raise FileNotFoundError(f"there is no run and no folder {fake}")
        if real is None:
            if saved is None:
                raise ValueError("REAL is missing: what are the pictures to be compared with?")
            real = saved.config.data
        side = saved.config.size if saved is not None and size is None else size
        if truncation and saved is None:
            raise ValueError(f"--truncation is of a run's latents; {fake} holds pictures")
        for asked in truncation or []:
            truncated(torch.zeros(1), asked)  # says what is wrong with it before there are samples
        everything = genuine = _images(real, side, None if saved is None else saved.config.channels)
        labels = None if features is not None else _labels(real, everything)
        limits: list[float | None] = [None, *(truncation or [])]
        sets: list[Tensor | ImageSource] = []
        if saved is None:
            sets = [_images(str(fake), size, genuine.shape[1])]
        else:
            number = min(samples or MOST, len(genuine))
            for limit in limits:
                made = _samples(saved, layers, number, seed, batch_size, device, limit)
                sets.append(made if size is None else data.resize(made, size))
        number = min(len(genuine), len(sets[0]), samples or MOST)
        random = torch.Generator().manual_seed(seed)
        where, chosen = (torch.randperm(len(x), generator=random)[:number] for x in (genuine, sets[0]))
        genuine = genuine[where]
        if extractor is None and labels is not None:
            extractor = metrics.train_classifier((everything, labels))[0]
        several = [metrics.image_figures(genuine, others[chosen], extractor, seed) for others in sets]
    except (OSError, ValueError, TypeError, ImportError, training.TrainingError) as error:
        fail(error)
    columns = [f"within ±{limit:g}" if limit else "value" for limit in limits]
    table = Table("figure", *columns, title=f"{fake} beside {real}, {number} images of each")
    suffix = extractor.suffix if extractor else ""
    for name in several[0]:
        if not name.removesuffix(suffix).endswith("_std"):
            deviations = [found.get(f"{name.removesuffix(suffix)}_std{suffix}") for found in several]
            values = zip((found[name] for found in several), deviations)
            table.add_row(_label(name), *(f"{v:.4g}" + ("" if d is None else f" ± {d:.2g}") for v, d in values))
    console.print(table)
    if features is None:
        console.print(
            "No figure here compares with a paper's: those are of the published Inception, --features FILE.",
            soft_wrap=True,
        )
    if not several[0]:
        fail("the images are too small for a sliced Wasserstein distance, and there is nothing to take features with")
    content: dict[str, Any] = {"fake": str(fake), "real": real, "samples": number, "seed": seed}
    content |= {"features": extractor.name if extractor else None, "figures": several[0]}
    if truncation:
        content["truncation"] = [{"limit": limit, "figures": found} for limit, found in zip(truncation, several[1:])]
    write_results(json_file, content)


def _images(name: str, size: int | None, channels: int | None) -> Tensor | ImageSource:
    images = data.load(name, size, channels if Path(name).exists() else None)
    if isinstance(images, data.Points):
        raise ValueError(f"{name} are points in the plane; these figures are of images")
    return images


def _samples(
    saved: training.Checkpoint,
    layers: str | None,
    number: int,
    seed: int,
    batch_size: int,
    device: str,
    limit: float | None,
) -> Tensor:
    config = saved.config
    side = checkpoints.side_of(saved, layers)
    if checkpoints.game(saved, side).averaged is None or config.size is None:
        raise ValueError(f"{config.model} makes no images of latents alone: its own figures are in record.json")
    if config.conditioning is not None and CONDITIONINGS[config.conditioning] != "labels":
        raise ValueError(
            f"{config.model} was trained with vectors of the data: gankern sample --each, and the folder then"
        )
    generator = checkpoints.generator(saved, side).to(device)
    random, redrawn = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    made = []
    with torch.no_grad():
        for start in range(0, number, batch_size):
            latents = torch.randn(min(batch_size, number - start), config.latent, generator=random)
            if limit is not None:
                latents = truncated(latents, limit, redrawn)
            labels: tuple[Tensor, ...] = ()
            if config.conditioning is not None:
                labels = (torch.randint(config.num_classes, (len(latents),), generator=random).to(device),)
            made.append(generator(latents.to(device), *labels).clamp(-1.0, 1.0).cpu())
    return torch.cat(made)


def _labels(real: str, images: Tensor | ImageSource) -> Tensor | None:
    """The labels of the real images, or None where they have none."""
    try:
        found = data.condition(real, images, "labels")
    except ValueError:
        return None
    return found if isinstance(found, Tensor) and found.ndim == 1 else None


def _label(name: str) -> str:
    band = name.removeprefix("swd_")
    return f"of the band of {band} pixels" if band != name else pictures.label(name)
