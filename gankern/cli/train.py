"""gankern train: a GAN on images or points, on torch's layers, on gankern's, or on both side by side."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gankern import data as data_sets
from gankern import games, losses, models, training
from gankern.cli._choose import choice, completing
from gankern.cli._fail import fail
from gankern.core.names import look_up
from gankern.games import Run
from gankern.models import layers as layer_tables
from gankern.models.conditional import CONDITIONINGS, NORMS
from gankern.training import record
from gankern.training.progress import header


def _preset(name: str) -> str:
    """What an option of ``Config`` is where it is left out."""
    (field,) = (field for field in fields(training.Config) if field.name == name)
    varies = any(name in training.PRESETS.get(model, games.find(model).preset) for model in games.names())
    if field.default is MISSING or (varies and field.default is None):
        return "the model's own"
    value = "none" if field.default is None else str(field.default)
    return f"{value}, or the model's own" if varies else value


def _config(
    panel: str, name: str, help: str, default: str | None = None, among: Iterable[str] = (), **more: Any
) -> Any:
    """An option that is a field of ``Config``, where its default and its checks are."""
    return choice(among, help, show_default=default or _preset(name), rich_help_panel=panel, **more)


RUN, NETWORKS, OPTIMISATION = "The run", "Networks", "Losses and optimisers"
MACHINE, FIGURES = "The machine", "Figures of merit"


def train(
    model: Annotated[
        str | None,
        typer.Argument(
            help="what to train; without it, everything that there is is listed",
            show_default=False,
            autocompletion=completing(games.names()),
        ),
    ] = None,
    data: Annotated[
        str | None,
        choice(
            (*data_sets.DATASETS, *data_sets.POINTS),
            f"images: a name, a folder or a zip file; for models of points {', '.join(data_sets.POINTS)}",
            metavar="NAME|FOLDER",
            show_default="the model's own",
            rich_help_panel=RUN,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="output folder", show_default="runs/MODEL-DATA, or the next of that name", rich_help_panel=RUN
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="options from a TOML or JSON file, such as a run's config.json or record.json", rich_help_panel=RUN
        ),
    ] = None,
    steps: Annotated[int | None, _config(RUN, "steps", "generator steps")] = None,
    layers: Annotated[str | None, _config(RUN, "layers", "whose layers", among=layer_tables.LAYERS)] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="train on torch's and gankern's layers in lockstep", rich_help_panel=RUN),
    ] = False,
    run: Annotated[str | None, typer.Argument(hidden=True)] = None,  # --resume RUN, where MODEL is named too
    resume: Annotated[
        bool,
        typer.Option("--resume", help="continue a run: --resume RUN, or the one in --out", rich_help_panel=RUN),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be trained on what, and stop", rich_help_panel=RUN)
    ] = False,
    seed: Annotated[int | None, _config(RUN, "seed", "decides weights, batches and latents")] = None,
    checkpoint_every: Annotated[int | None, _config(RUN, "checkpoint_every", "steps between checkpoints")] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="also log to OUT/tensorboard", rich_help_panel=RUN)
    ] = False,
    keep: Annotated[int | None, _config(RUN, "keep", "earlier checkpoints to keep, in OUT/snapshots")] = None,
    best: Annotated[
        str | None,
        _config(
            RUN,
            "best",
            "keep the best checkpoint by a figure of merit, as OUT/best.pt: fid, swd, ..., or max:NAME, min:NAME",
            metavar="FIGURE",
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        _config(
            RUN,
            "start_from",
            "begin with another run's weights, and its options where none are given here",
            metavar="RUN",
        ),
    ] = None,
    on_error: Annotated[
        str | None,
        _config(RUN, "on_error", "at a broken file of the data: stop, or leave it out", among=("stop", "skip")),
    ] = None,
    flip: Annotated[
        bool, typer.Option("--flip", help="mirror real images, left to right, half of the time", rich_help_panel=RUN)
    ] = False,
    augment: Annotated[
        str | None,
        _config(
            RUN,
            "augment",
            "differentiable augmentation of what the discriminator sees, such as color,translation,cutout",
            metavar="LIST",
        ),
    ] = None,
    workers: Annotated[int | None, _config(MACHINE, "workers", "threads that read images")] = None,
    size: Annotated[int | None, _config(NETWORKS, "size", "side of the images, a power of two", "the data's")] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="resize the data's images to --size", rich_help_panel=NETWORKS)
    ] = False,
    latent: Annotated[int | None, _config(NETWORKS, "latent", "length of the latent vectors")] = None,
    width: Annotated[int | None, _config(NETWORKS, "width", "channels at half the size of the images")] = None,
    conditioning: Annotated[
        str | None, _config(NETWORKS, "conditioning", "train with the data's labels, or vectors", among=CONDITIONINGS)
    ] = None,
    minibatch_discrimination: Annotated[
        int | None, _config(NETWORKS, "minibatch_discrimination", "similarity features of the discriminator")
    ] = None,
    generator_norm: Annotated[
        str | None, _config(NETWORKS, "generator_norm", "its normalisation", "the model's own", NORMS)
    ] = None,
    discriminator_norm: Annotated[
        str | None,
        _config(NETWORKS, "discriminator_norm", "its normalisation", "the model's own", (*NORMS, "none")),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", help="an option of the game's own; repeat", metavar="NAME=VALUE", rich_help_panel=NETWORKS
        ),
    ] = None,
    loss: Annotated[str | None, _config(OPTIMISATION, "loss", "the adversarial loss", among=losses.LOSSES)] = None,
    optimiser: Annotated[
        str | None, _config(OPTIMISATION, "optimiser", "of all players", among=training.OPTIMISERS)
    ] = None,
    lr: Annotated[float | None, _config(OPTIMISATION, "lr", "learning rate")] = None,
    decay_steps: Annotated[
        int | None, _config(OPTIMISATION, "decay_steps", "learning rates fall linearly to 0 over so many; 0: they stay")
    ] = None,
    beta1: Annotated[float | None, _config(OPTIMISATION, "beta1", "Adam's first decay")] = None,
    beta2: Annotated[float | None, _config(OPTIMISATION, "beta2", "Adam's second decay")] = None,
    momentum: Annotated[float | None, _config(OPTIMISATION, "momentum", "of sgd, at first")] = None,
    momentum_end: Annotated[float | None, _config(OPTIMISATION, "momentum_end", "what it rises to, linearly")] = None,
    momentum_steps: Annotated[int | None, _config(OPTIMISATION, "momentum_steps", "over so many steps")] = None,
    lr_decay: Annotated[
        float | None, _config(OPTIMISATION, "lr_decay", "the learning rates are divided by this after each step")
    ] = None,
    lr_floor: Annotated[float | None, _config(OPTIMISATION, "lr_floor", "and never fall below this")] = None,
    n_critic: Annotated[int | None, _config(OPTIMISATION, "n_critic", "discriminator steps a generator step")] = None,
    gradient_penalty: Annotated[
        float | None, _config(OPTIMISATION, "gradient_penalty", "weight of WGAN-GP's penalty")
    ] = None,
    zero_centered: Annotated[
        float | None,
        _config(OPTIMISATION, "zero_centered", "weight of the penalty with target 0 between real and fake"),
    ] = None,
    dragan: Annotated[
        float | None, _config(OPTIMISATION, "dragan", "weight of DRAGAN's penalty, around real images")
    ] = None,
    r1: Annotated[float | None, _config(OPTIMISATION, "r1", "weight of the penalty at real images")] = None,
    r2: Annotated[float | None, _config(OPTIMISATION, "r2", "weight of the penalty at generated images")] = None,
    penalty_every: Annotated[
        int | None,
        _config(
            OPTIMISATION,
            "penalty_every",
            "all penalties at every so many discriminator steps, with so many times the weight",
        ),
    ] = None,
    clip: Annotated[
        float | None, _config(OPTIMISATION, "clip", "clamp discriminator weights to ± this after each step")
    ] = None,
    drift: Annotated[
        float | None, _config(OPTIMISATION, "drift", "weight of the squared logits of real images")
    ] = None,
    real_target: Annotated[
        float | None, _config(OPTIMISATION, "real_target", "below 1: one-sided label smoothing")
    ] = None,
    noisy_labels: Annotated[
        float | None,
        _config(
            OPTIMISATION, "noisy_labels", "probability that a discriminator step exchanges the labels of real and fake"
        ),
    ] = None,
    instance_noise: Annotated[
        float | None,
        _config(
            OPTIMISATION, "instance_noise", "standard deviation of noise on all images that the discriminator sees"
        ),
    ] = None,
    instance_noise_steps: Annotated[
        int | None, _config(OPTIMISATION, "instance_noise_steps", "over which it falls linearly to 0; 0: it stays")
    ] = None,
    feature_matching: Annotated[
        float | None, _config(OPTIMISATION, "feature_matching", "weight of feature matching in the generator's loss")
    ] = None,
    historical_average: Annotated[
        float | None,
        _config(OPTIMISATION, "historical_average", "weight of the distance to the average of all past weights"),
    ] = None,
    grow_steps: Annotated[
        int | None, _config(OPTIMISATION, "grow_steps", "progan: steps to train a resolution, and to fade in the next")
    ] = None,
    ema: Annotated[
        float | None, _config(OPTIMISATION, "ema", "draw samples from a moving average with this decay")
    ] = None,
    batch_size: Annotated[int | None, _config(MACHINE, "batch_size", "samples a step, over all processes")] = None,
    accumulate: Annotated[
        int | None, _config(MACHINE, "accumulate", "parts that a batch goes through the networks in")
    ] = None,
    precision: Annotated[
        str | None, _config(MACHINE, "precision", "of the networks (autocast)", among=training.PRECISIONS)
    ] = None,
    coupled: Annotated[
        str | None,
        _config(
            MACHINE,
            "coupled",
            "of several processes: batch norm and the like see their own samples, or all",
            among=training.COUPLINGS,
        ),
    ] = None,
    device: Annotated[str | None, _config(MACHINE, "device", "cpu, cuda, cuda:1, ...")] = None,
    threads: Annotated[int | None, _config(MACHINE, "threads", "CPU threads", "torch's")] = None,
    evaluate: Annotated[
        int | None, _config(FIGURES, "evaluate", "FID and others at every so many checkpoints; 0: never")
    ] = None,
    evaluate_samples: Annotated[int | None, _config(FIGURES, "evaluate_samples", "samples for the figures")] = None,
    features: Annotated[
        str | None,
        _config(
            FIGURES, "features", "TorchScript file for FID, KID and Inception score", "a classifier, trained first"
        ),
    ] = None,
) -> None:
    """Train MODEL on images or points, on torch's layers, on gankern's, or (--compare) on both from one seed.

    Options that are left out come from --config, then from the model's preset, or with --resume from the checkpoint.
    The output folder gets the checkpoint, samples, loss curves, a log of every step and a machine-readable record.
    """
    options = locals()
    given = {field.name: options.get(field.name) for field in fields(training.Config)}
    # A switch that is left out is not a wish for its opposite.
    given |= {"compare": compare or None, "tensorboard": tensorboard or None, "flip": flip or None}
    console = Console()
    try:
        given["options"] = _own_options(option or ()) or None
        if config is not None:
            given |= {n: value for n, value in training.read_options(config).items() if given[n] is None}
        if resume:
            given["model"], out = _to_resume(given["model"], run, out)
        elif run is not None:
            raise ValueError(f"unexpected argument {run!r}: only --resume takes a run's folder")
        if start_from is not None and not resume:
            given = _beginning(start_from, given)
        model, data = given.pop("model"), given.pop("data")
        given_data = data
        if model is None and not (resume and out):
            if config is not None:
                raise ValueError(f"no MODEL: name one ({', '.join(games.names())}), or a --config that does")
            console.print(_listing())
            return
        if model is not None:
            data = data or ("8gaussians" if model in models.FOR_POINTS else games.find(model).data)
        if out is None:
            out = _default(f"{model}-{_short(data or '')}", resume)
        if resume:
            before, saved = training.find_run(out)
            settings = training.reconfigure(before, model=model, data=given_data, **given)
            samples, labels = _load(
                settings.model,
                settings.data,
                settings.size,
                settings.conditioning,
                settings.on_error,
                settings.channels if settings.size and Path(settings.data).exists() else None,
            )
        else:
            assert model is not None and data is not None  # seen to above
            saved = None
            wanted = given["size"] if resize or (config is not None and size is None) else None
            if data in data_sets.AT_ANY_SIZE:
                wanted = given["size"] or training.PRESETS.get(model, games.find(model).preset).get("size")
            samples, labels = _load(model, data, wanted, given.get("conditioning"), given["on_error"] or "stop")
            settings = training.configure(model, data, samples, labels, **given)
        if dry_run:
            _say(settings, samples, labels, out, saved, console)
            return
        result = training.train(settings, samples, out, saved, console, labels)
    except training.Interrupted as stop:
        console.print(str(stop), soft_wrap=True, markup=False)
        raise typer.Exit(128 + stop.signal_number) from stop
    except (ValueError, OSError, ImportError, training.TrainingError) as error:
        fail(error)

    if result is None:  # another process tells
        return
    console.print(record.table(result))
    if "comparison" in result:
        console.print(record.difference_table(result))
    figures = ", metrics.png, metrics.csv" if "figures" in result else ""
    console.print(
        f"{out}/: samples.png, losses.png{figures}, record.json, config.json, log.csv, checkpoint.pt",
        soft_wrap=True,
        markup=False,
    )


def _to_resume(model: str | None, run: str | None, out: Path | None) -> tuple[str | None, Path | None]:
    """MODEL and the folder, of what was given beside --resume: a path may stand in MODEL's place."""
    if run is None and model is not None and model not in games.names():
        model, run = None, model
    if run is None:
        if model is None and out is None:
            raise ValueError("--resume: which run? gankern train --resume RUN")
        return model, out
    folder = Path(run)
    if out is not None and out != folder:
        raise ValueError(f"--resume {run} and --out {out}: a run goes on in its own folder; leave --out out")
    if folder.is_file() and folder.name != training.CHECKPOINT:
        raise ValueError(f"{run}: a run goes on from its folder. --start-from {run} begins a new one with its weights")
    return model, folder.parent if folder.is_file() else folder


def _default(name: str, resume: bool) -> Path:
    """runs/NAME; where that is taken the next of runs/NAME-2, ..., or to resume the last of those there are."""
    folders = chain([Path("runs") / name], (Path("runs") / f"{name}-{number}" for number in count(2)))
    there = list(takewhile(lambda folder: folder.exists(), folders))
    if resume:
        return there[-1] if there else Path("runs") / name
    free = next((folder for folder in there if not any(folder.iterdir()) or training.died_at_once(folder)), None)
    return free or Path("runs") / (f"{name}-{len(there) + 1}" if there else name)


def _say(
    settings: training.Config,
    samples: Any,
    labels: Any,
    out: Path,
    saved: training.Checkpoint | None,
    console: Console,
) -> None:
    """What --dry-run tells."""
    game = games.find(settings.model)(Run(settings, settings.sides[-1], samples=samples, condition=labels))
    weights = sum(p.numel() for network in game.networks.values() for p in network.parameters())
    states = {"adam": 2, "rmsprop": 1}.get(settings.optimiser, int(settings.momentum > 0.0))
    own = weights * 4 * (2 + states)
    if settings.ema is not None and game.averaged is not None:
        own += sum(p.numel() for p in game.networks[game.averaged].parameters()) * 4
    data = samples.numel() * samples.element_size() if isinstance(samples, Tensor) else 0
    console.print(header(settings, samples, game.networks, saved.step if saved else 0), soft_wrap=True, markup=False)
    console.print(
        f"memory: {own * len(settings.sides) / 2**20:.1f} MiB of weights, gradients and the optimisers' state, "
        f"{data / 2**20:.1f} MiB of data; what the layers keep for backward comes on top",
        soft_wrap=True,
    )
    console.print(f"to {out}; nothing was trained or written (--dry-run)", soft_wrap=True, markup=False)


def _beginning(run: str, given: dict[str, Any]) -> dict[str, Any]:
    """Options, and where none is given that of the run whose weights are the first ones."""
    before = asdict(training.find_run(run)[0])
    left = ("channels", "num_classes", "start_from", "keep", "best", "compare", "layers")  # the data's, and this run's
    return given | {n: before[n] for n, value in given.items() if value is None and n not in left}


def _load(
    model: str, data: str, size: int | None, conditioning: str | None, on_error: str, channels: int | None = None
) -> tuple[Any, Any]:
    conditioning = conditioning or training.PRESETS.get(model, games.find(model).preset).get("conditioning")
    kind = games.find(model).needs
    if conditioning is not None:
        kind = look_up(CONDITIONINGS, conditioning, "conditioning")
    samples = data_sets.load(data, size, channels, on_error=on_error, kind=kind)
    return samples, None if kind is None else data_sets.condition(data, samples, kind, on_error)


def _short(data: str) -> str:
    """What a run on some data is called: a folder's own name, so that the run is below runs/ wherever the data are.

    >>> _short("digits"), _short("/data/my photos/")
    ('digits', 'my photos')
    """
    path = Path(data).resolve()
    return (path.stem if path.suffix == ".zip" else path.name) or "data"


def _own_options(given: Sequence[str]) -> dict[str, Any]:
    """Options as NAME=VALUE: numbers, true and false, or else strings.

    >>> _own_options(["rate=1e-3", "unroll=5", "smooth=true", "kind=ring"])
    {'rate': 0.001, 'unroll': 5, 'smooth': True, 'kind': 'ring'}
    """
    options: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"--option must be NAME=VALUE, got {item!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def _listing() -> Table:
    """Everything that can be trained, by family, with a sentence each."""
    table = Table("name", "what", title="gankern train MODEL")
    families: dict[str, list[tuple[str, str]]] = {}
    for name in games.names():
        game = games.find(name)
        text = (models.MODELS[name] if name in models.MODELS else sys.modules[game.__module__]).__doc__ or ""
        about = " ".join(text.strip().partition("\n\n")[0].split())
        families.setdefault(game.family, []).append((name, about.replace("``", "")))
    for family, rows in families.items():
        table.add_row(f"[bold]{family}[/]", "")
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table
