"""gankern train: a GAN on images or points, on torch's layers, on gankern's, or on both side by side."""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gankern import data as data_sets
from gankern import games, models, training
from gankern.cli._fail import fail
from gankern.training import record


def train(
    model: Annotated[
        str | None,
        typer.Argument(help="what to train; without it, everything that there is is listed", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="mnist5k, digits, shapes, ... or a folder; 8gaussians, 25gaussians or swiss_roll for models of points "
            "[default: the model's own]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="output folder [default: runs/MODEL-DATA]")] = None,
    config: Annotated[
        Path | None, typer.Option(help="options from a TOML or JSON file, such as a run's config.json or record.json")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="generator steps")] = None,
    layers: Annotated[str | None, typer.Option(help="whose layers: torch or gankern [default: gankern]")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="train on torch's and gankern's layers in lockstep")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
    batch_size: Annotated[int | None, typer.Option(help="samples a step, over all processes")] = None,
    accumulate: Annotated[int | None, typer.Option(help="parts that a batch goes through the networks in")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 (autocast) [default: fp32]")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate")] = None,
    decay_steps: Annotated[int | None, typer.Option(help="learning rates fall linearly to 0 over so many")] = None,
    beta1: Annotated[float | None, typer.Option(help="Adam's first decay")] = None,
    beta2: Annotated[float | None, typer.Option(help="Adam's second decay")] = None,
    n_critic: Annotated[int | None, typer.Option(help="discriminator steps a generator step")] = None,
    optimiser: Annotated[str | None, typer.Option(help="adam or rmsprop")] = None,
    gradient_penalty: Annotated[float | None, typer.Option(help="weight of WGAN-GP's penalty")] = None,
    clip: Annotated[float | None, typer.Option(help="clamp discriminator weights to ± this after each step")] = None,
    drift: Annotated[float | None, typer.Option(help="weight of the squared logits of real images")] = None,
    real_target: Annotated[float | None, typer.Option(help="below 1: one-sided label smoothing")] = None,
    grow_steps: Annotated[
        int | None, typer.Option(help="progan: steps to train a resolution, and to fade in the next")
    ] = None,
    ema: Annotated[float | None, typer.Option(help="draw samples from a moving average with this decay")] = None,
    loss: Annotated[str | None, typer.Option(help="hinge, non_saturating, ... ")] = None,
    size: Annotated[int | None, typer.Option(help="side of the images, a power of two")] = None,
    resize: Annotated[bool, typer.Option("--resize", help="resize the data's images to --size")] = False,
    latent: Annotated[int | None, typer.Option(help="length of the latent vectors")] = None,
    width: Annotated[int | None, typer.Option(help="channels at half the size of the images")] = None,
    conditioning: Annotated[
        str | None, typer.Option(help="train with the data's labels: projection or concatenation")
    ] = None,
    minibatch_discrimination: Annotated[
        int | None, typer.Option(help="similarity features of the discriminator")
    ] = None,
    generator_norm: Annotated[str | None, typer.Option(help="batch or virtual")] = None,
    discriminator_norm: Annotated[str | None, typer.Option(help="batch, virtual or none")] = None,
    coupled: Annotated[
        str | None,
        typer.Option(help="several processes: batch norm and the like see their own samples, local, or all, global"),
    ] = None,
    evaluate: Annotated[
        int | None, typer.Option(help="FID and other figures at every so many checkpoints; 0: never")
    ] = None,
    evaluate_samples: Annotated[int | None, typer.Option(help="samples for the figures [default: 2000]")] = None,
    features: Annotated[
        str | None, typer.Option(help="TorchScript file for FID, KID and Inception score [default: a classifier]")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="also log to OUT/tensorboard")] = False,
    seed: Annotated[int | None, typer.Option(help="decides weights, batches and latents")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [default: torch's]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="steps between checkpoints")] = None,
    on_error: Annotated[
        str | None, typer.Option(help="at a file of the data that is broken: stop, or skip to leave it out")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="an option of the game's own", metavar="NAME=VALUE")
    ] = None,
) -> None:
    """Train MODEL on images or points, on torch's layers, on gankern's, or (--compare) on both from one seed.

    Options that are left out come from --config, then from the model's preset, or with --resume from the checkpoint.
    The output folder gets the checkpoint, samples, loss curves, a log of every step and a machine-readable record.
    """
    options = locals()
    given = {field.name: options.get(field.name) for field in fields(training.Config)}
    # A switch that is left out is not a wish for its opposite.
    given |= {"compare": compare or None, "tensorboard": tensorboard or None}
    console = Console()
    try:
        given["options"] = _own_options(option or ()) or None
        if config is not None:
            given |= {n: value for n, value in training.read_options(config).items() if given[n] is None}
        model, data = given.pop("model"), given.pop("data")
        given_data = data
        if model is None and not (resume and out):
            if config is not None:
                raise ValueError(f"no MODEL: name one ({', '.join(games.names())}), or a --config that does")
            console.print(_listing())
            return
        if model is not None:
            data = data or ("8gaussians" if model in models.FOR_POINTS else games.find(model).data)
        out = out or Path("runs") / f"{model}-{data}"
        if resume:
            before, saved = training.find_run(out)
            settings = training.reconfigure(before, model=model, data=given_data, **given)
            samples, labels = _load(
                settings.model, settings.data, settings.size, settings.conditioning, settings.on_error
            )
        else:
            saved = None
            wanted = given["size"] if resize or (config is not None and size is None) else None
            samples, labels = _load(model, data, wanted, given.get("conditioning"), given["on_error"] or "stop")
            settings = training.configure(model, data, samples, labels, **given)
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


def _load(model: str, data: str, size: int | None, conditioning: str | None, on_error: str):
    samples = data_sets.load(data, size, on_error=on_error)
    kind = "labels" if conditioning is not None else games.find(model).needs
    return samples, None if kind is None else data_sets.condition(data, samples, kind, on_error)


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
    """Everything that can be trained, by family, with a line each."""
    table = Table("name", "what", title="gankern train MODEL")
    families: dict[str, list[tuple[str, str]]] = {}
    for name in games.names():
        game = games.find(name)
        text = (models.MODELS[name] if name in models.MODELS else sys.modules[game.__module__]).__doc__ or ""
        families.setdefault(game.family, []).append((name, text.strip().partition("\n")[0].replace("``", "")))
    for family, rows in families.items():
        table.add_row(f"[bold]{family}[/]", "")
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table
