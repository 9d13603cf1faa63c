"""The training loop: ``train``, and below it what it needs to stop well."""

import json
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from time import perf_counter
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from gankern.training import checkpoint as checkpoints
from gankern.training import pictures
from gankern.training import record as records
from gankern.training.checkpoint import Checkpoint, CheckpointError, TrainingError
from gankern.training.config import Config
from gankern.training.log import Log
from gankern.training.trainer import Step, Trainer

CHECKPOINT = "checkpoint.pt"
SAMPLES = 64  # images in the grid, always of the same latents


class OutputInUse(TrainingError):
    """The output folder holds something, and it was not said that it is a run to continue."""


class Diverged(TrainingError):
    """A loss or a weight is not finite. The last good checkpoint is in the output folder."""


class Interrupted(TrainingError):
    """A signal ended the run, after a checkpoint."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def train(
    config: Config, images: Tensor, out: Path, saved: Checkpoint | None = None, console: Console | None = None
) -> dict:
    """Train ``config.model`` on ``images`` [N, C, H, W] in [−1, 1], and return the record that it leaves.

    ``out`` gets checkpoint.pt, log.csv, samples.png (and samples/, one grid a checkpoint), losses.png and
    record.json. With ``config.compare`` the model is trained twice, in lockstep: each step on one set of
    layers, then on the other, the order changing from step to step, so that what else the machine does falls
    on both alike.

    With ``saved``, the checkpoint of ``out``, the run continues and ends with the numbers of an uninterrupted
    one.

    Raises ``OutputInUse`` if ``out`` is not empty and nothing is continued, ``Interrupted`` after SIGINT or
    SIGTERM, ``Diverged`` if a loss is not finite, ``OSError`` if a file cannot be written; the last
    checkpoint stays valid.
    """
    began = perf_counter()
    torch.set_num_threads(config.threads)
    trainers = {side: Trainer(config, side, images) for side in config.sides}
    latents = torch.randn(SAMPLES, config.latent, generator=torch.Generator().manual_seed(config.seed))

    if saved is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputInUse(f"{out} is in use: pass --resume to continue the run in it, or another --out")
    else:
        for side, trainer in trainers.items():
            trainer.load_state_dict(saved.trainers[side])
    done = saved.step if saved else 0
    if done > config.steps:
        raise CheckpointError(f"{out} is at step {done}, beyond the {config.steps} asked for: raise --steps")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    log = Log(out / "log.csv", saved.history if saved else Log.empty(config.sides))

    def draw(path: Path) -> None:
        pictures.save_grids(path, {side: trainer.sample(latents) for side, trainer in trainers.items()})

    def save(step: int) -> None:
        for side, trainer in trainers.items():
            if not trainer.is_finite():
                raise Diverged(f"a weight of the {side} side is not finite at step {step}; {_advice(out)}")
        states = {side: trainer.state_dict() for side, trainer in trainers.items()}
        checkpoints.save(out / CHECKPOINT, Checkpoint(config, step, log.state_dict(), states))
        draw(out / "samples" / f"step-{step:06}.png")

    try:
        with _stop_on_signal() as stop, _progress(config, done, console) as advance:
            if not done:
                save(0)
            for step in range(done + 1, config.steps + 1):
                order = config.sides if step % 2 else config.sides[::-1]
                results = {side: trainers[side].step() for side in order}
                log.append(step, results)
                advance(results)
                for side, result in results.items():
                    if not (math.isfinite(result.d_loss) and math.isfinite(result.g_loss)):
                        raise Diverged(
                            f"at step {step} the {side} side's losses are D {result.d_loss}, "
                            f"G {result.g_loss}; {_advice(out)}"
                        )
                if step % config.checkpoint_every == 0 or step == config.steps or stop.signal:
                    save(step)
                if stop.signal:
                    raise Interrupted(
                        f"stopped after step {step} of {config.steps}; to continue: "
                        f"gankern train {config.model} --resume --out {out}",
                        stop.signal,
                    )
    finally:
        log.close()

    draw(out / "samples.png")
    pictures.save_loss_curves(out / "losses.png", log.steps)
    network = trainers[config.sides[0]]
    parameters = {
        player: sum(p.numel() for p in getattr(network, player).parameters())
        for player in ("generator", "discriminator")
    }
    control = _control(config, images) if config.compare else []
    record = records.make(config, log.steps, control, parameters, perf_counter() - began)
    checkpoints.write_atomically(out / "record.json", (json.dumps(record, indent=2) + "\n").encode())
    return record


def _control(config: Config, images: Tensor) -> list[Step]:
    """The first steps of the torch side once more, with the discriminator's weights changed by one rounding.

    Two correct implementations differ by roundings, so their losses may come apart as far as these do from the
    torch side's, and not much farther.
    """
    trainer = Trainer(config, "torch", images)
    random = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for weight in trainer.discriminator.parameters():
            noise = torch.randn(weight.shape, generator=random).to(weight.device)
            weight.mul_(1.0 + 0.5 * torch.finfo(weight.dtype).eps * noise)
    return [trainer.step() for _ in range(min(records.CONTROL_STEPS, config.steps))]


def _advice(out: Path) -> str:
    return f"{out / CHECKPOINT} is the last good checkpoint. Train again with a lower --lr, or another --seed"


@contextmanager
def _stop_on_signal() -> Iterator[SimpleNamespace]:
    """Turns the first SIGINT or SIGTERM into ``stop.signal``, looked at after each step; a second kills."""
    stop = SimpleNamespace(signal=0)
    if threading.current_thread() is not threading.main_thread():  # where Python allows no signal handlers
        yield stop
        return

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _frame) -> None:
        stop.signal = number
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def _progress(config: Config, done: int, console: Console | None) -> Iterator:
    """A progress bar for each side, if there is a console, with its losses and images a second."""
    if console is None:
        yield lambda results: None
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(),
    ]
    recent: dict[str, list[float]] = {side: [] for side in config.sides}
    with Progress(*columns, console=console) as progress:
        bars = {side: progress.add_task(side, total=config.steps, completed=done, now="") for side in config.sides}

        def advance(results: dict[str, Step]) -> None:
            for side, step in results.items():
                recent[side] = [*recent[side][-19:], step.d_seconds + step.g_seconds]
                rate = config.batch_size * config.n_critic / fmean(recent[side])
                now = f"D {step.d_loss:.3f} G {step.g_loss:.3f} {rate:.0f} images/s"
                progress.update(bars[side], advance=1, now=now)

        yield advance
