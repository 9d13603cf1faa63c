"""gankern train: a GAN on real images, on torch's layers, on gankern's, or on both side by side."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gankern import data as image_sets
from gankern import training
from gankern.cli._fail import fail
from gankern.training import checkpoint, record


def train(
    model: Annotated[
        str, typer.Argument(help="gan, dcgan, wgan, wgan_gp, sn_dcgan, sngan or progan", show_default=False)
    ],
    data: Annotated[
        str | None, typer.Option(help="mnist5k, digits, shapes or a folder [default: mnist5k]", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="output folder [default: runs/MODEL-DATA]")] = None,
    steps: Annotated[int | None, typer.Option(help="generator steps")] = None,
    layers: Annotated[str | None, typer.Option(help="whose layers: torch or gankern [default: gankern]")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="train on torch's and gankern's layers in lockstep")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
    batch_size: Annotated[int | None, typer.Option(help="images a step")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate")] = None,
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
    seed: Annotated[int | None, typer.Option(help="decides weights, batches and latents")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads [default: torch's]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="steps between checkpoints")] = None,
) -> None:
    """Train MODEL on real images, on torch's layers, on gankern's, or (--compare) on both from one seed.

    Options that are left out come from the model's preset, or with --resume from the checkpoint. The output
    folder gets the checkpoint, samples, loss curves, a log of every step and a machine-readable record.
    """
    given = {
        "compare": compare or None,
        "layers": layers,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "n_critic": n_critic,
        "optimiser": optimiser,
        "gradient_penalty": gradient_penalty,
        "clip": clip,
        "drift": drift,
        "real_target": real_target,
        "grow_steps": grow_steps,
        "ema": ema,
        "loss": loss,
        "size": size,
        "latent": latent,
        "width": width,
        "seed": seed,
        "threads": threads,
        "device": device,
        "checkpoint_every": checkpoint_every,
    }
    console = Console()
    out = out or Path("runs") / f"{model}-{data or 'mnist5k'}"
    try:
        if resume:
            saved = checkpoint.load(out / training.CHECKPOINT)
            config = training.reconfigure(saved.config, model=model, data=data, **given)
            images = image_sets.load(config.data, config.size)
        else:
            saved = None
            data = data or "mnist5k"
            images = image_sets.load(data, size if resize else None)
            config = training.configure(model, data, images, **given)
        result = training.train(config, images, out, saved, console)
    except training.Interrupted as stop:
        console.print(str(stop), soft_wrap=True)
        raise typer.Exit(128 + stop.signal_number) from stop
    except (ValueError, OSError, ImportError, training.TrainingError) as error:
        fail(error)

    console.print(record.table(result))
    if result["config"]["compare"]:
        console.print(record.difference_table(result))
    console.print(f"{out}/: samples.png, losses.png, record.json, log.csv, checkpoint.pt", soft_wrap=True)
