"""The training loop: ``train``, and below it what it needs to stop well."""

import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gankern import games
from gankern.core import files
from gankern.core.arguments import shown
from gankern.data import ImageSource, Points
from gankern.games import Picture
from gankern.games._config import Config, best_of, taken
from gankern.games._game import evenly
from gankern.training import checkpoint as checkpoints
from gankern.training import parallel, pictures
from gankern.training import record as records
from gankern.training.checkpoint import CHECKPOINT, Checkpoint, CheckpointError, TrainingError
from gankern.training.log import Log
from gankern.training.progress import progress
from gankern.training.trainer import Step, Trainer

CONFIG, BEST, SNAPSHOTS = "config.json", "best.pt", "snapshots"


class OutputInUse(TrainingError):
    """The output folder holds something, and it was not said that it is a run to continue; or another run is in it."""


class OutputLost(TrainingError):
    """A file could not be written. The last checkpoint is in the output folder."""


class Diverged(TrainingError):
    """A loss or a weight is not finite. The last good checkpoint is in the output folder."""


class Interrupted(TrainingError):
    """A signal ended the run, after a checkpoint."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def train(
    config: Config,
    samples: Any,
    out: Path | str,
    saved: Checkpoint | None = None,
    console: Console | None = None,
    labels: Any = None,
) -> dict | None:
    """Train ``config.model`` on ``samples``, and return the record that it leaves.

    ``samples`` are images, with ``labels`` [N] for a conditional model, or points: anything that
    :func:`gankern.data.wrap` takes, tensors [N, C, H, W] in [-1, 1] and torch's data sets among it. ``out`` gets
    checkpoint.pt, config.json, log.csv, samples.png (and samples/, one picture a checkpoint), losses.png and
    record.json; with ``config.evaluate`` metrics.csv and metrics.png; with ``config.keep`` the last checkpoints in
    snapshots/, and with ``config.best`` the one with the best figure, best.pt. With ``config.start_from`` the networks
    begin with the weights of another run's. With ``config.compare`` the model is trained
    twice, in lockstep: each step on one set of layers, then on the other, the order changing from step to step, so that
    what else the machine does falls on both alike.

    With ``saved``, the checkpoint of ``out``, the run continues and ends with the numbers of an uninterrupted
    one. Where torchrun or Slurm launched several processes, each calls this; the first one writes and returns the
    record, the others return None.

    Raises ``OutputInUse`` if ``out`` is not empty and nothing is continued, or another process trains in it,
    ``Interrupted`` after SIGINT or SIGTERM, ``Diverged`` if a loss is not finite, ``OutputLost`` if a file cannot be
    written; the last checkpoint stays valid. A ``ValueError`` in the first step, by options with which no step can be
    made, leaves nothing in ``out``.
    """
    began = perf_counter()
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, got {shown(config)}")
    if not isinstance(out, str | Path):
        raise TypeError(f"out must be the path of a folder, got {shown(out)}")
    if saved is not None and not isinstance(saved, Checkpoint):
        raise TypeError(f"saved must be a Checkpoint or None, got {shown(saved)}")
    out = Path(out)
    pictures.check_can_draw()
    samples, labels = taken(config.model, config.conditioning, samples, labels)
    torch.set_num_threads(config.threads)
    processes = parallel.start(config.device)
    trainers = {side: Trainer(config, side, samples, labels, processes) for side in config.sides}
    if saved is not None:
        for side, trainer in trainers.items():
            checkpoints.restore(trainer, saved.trainers.get(side), out / CHECKPOINT, side)
            if trainer.steps != saved.step:
                raise CheckpointError(
                    f"{out / CHECKPOINT} is of step {saved.step}, and the state of its {side} side of {trainer.steps}"
                )
    elif config.start_from is not None:
        for side, trainer in trainers.items():
            checkpoints.start_from(config.start_from, trainer.game.networks, trainer.average, side)
    done = saved.step if saved else 0
    if done > config.steps:
        raise CheckpointError(f"{out} is at step {done}, beyond the {config.steps} asked for: raise --steps")
    if processes.rank > 0:
        with _stop_on_signal() as stop:
            _run(config, trainers, done, out, stop, lambda step, results: None, lambda step: None)
        return None

    game = trainers[config.sides[0]].game
    titles = {name: player.title or name for name, player in game.players.items()}
    if saved is not None and any(rows.shape[1] != 2 * len(titles) for rows in saved.history["steps"].values()):
        raise CheckpointError(f"{out / CHECKPOINT}: its history is not of a loss and a time of {', '.join(titles)}")
    evaluate = games.find(config.model).evaluator(config, samples, labels) if config.evaluate else None

    def draw(path: Path, step: int, figures: list[dict], beside: bool = False) -> dict[str, Picture]:
        drawn = {side: trainer.game.pictures() for side, trainer in trainers.items()}
        several = any(len(found) > 1 for found in drawn.values())
        titled = {f"{n}, {side}" if several else side: p for side, found in drawn.items() for n, p in found.items()}
        if titled:
            real = _real(samples) if beside and all(p.batch.ndim == 4 for p in titled.values()) else {}
            pictures.save_samples(path, titled | real, _title(config, step, figures))
        return titled

    def started() -> bool:
        return saved is not None or any(trainer.steps for trainer in trainers.values())

    with _folder(config, out, saved is not None, started) as writing, _stop_on_signal() as stop:
        history = saved.history if saved else Log.empty(config.sides, list(titles))
        log = Log(out, history, list(titles), config.tensorboard)

        def picture_of(step: int) -> Path:
            return out / "samples" / f"step-{step:06}.png"

        def save(step: int) -> None:
            with writing():
                if evaluate and _evaluates(config, step) and all(row["step"] != step for row in log.figures):
                    log.append_figures(step, {side: evaluate(trainer.game) for side, trainer in trainers.items()})
                log.flush()
                states = {side: trainer.state_dict() for side, trainer in trainers.items()}
                content = checkpoints.content_of(Checkpoint(config, step, log.state_dict(), states))
                files.write_bytes(out / CHECKPOINT, content)
                _keep(config, out, step, content, log.figures)
                log.picture(step, draw(picture_of(step), step, log.figures))

        if saved is not None:  # whoever ended the run may have done it while this was being drawn
            with writing():
                draw(picture_of(done), done, log.figures)
        try:
            with progress(config, samples, game.networks, done, console) as advance:

                def note(step: int, results: dict[str, Step]) -> None:
                    with writing():
                        log.append(step, results)
                    advance(results)

                _run(config, trainers, done, out, stop, note, save)
        finally:
            with suppress(OSError):  # whatever is still to be written is in the checkpoint, or was lost with a message
                log.close()

        with writing():
            draw(out / "samples.png", config.steps, log.figures, beside=True)
            pictures.save_loss_curves(out / "losses.png", log.steps, titles)
            if log.figures and log.figures[-1][config.sides[0]]:  # a game may have none
                pictures.save_figure_curves(out / "metrics.png", log.figures)
            parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in game.networks.items()}
            # It takes the steps of one process, so of several it would need the others.
            control = _control(config, samples, labels) if config.compare and processes.number == 1 else []
            seconds = perf_counter() - began
            record = records.make(
                config, log.steps, control, titles, parameters, seconds, log.figures, processes.number
            )
            files.write_json(out / "record.json", record)
    return record


def _title(config: Config, step: int, figures: list[dict]) -> str:
    """What a picture of samples is of: the model, the step, and the first figure of merit, if it is of this step."""
    title = f"{config.model} on {config.data}, step {step:,}"
    if figures and figures[-1]["step"] == step and figures[-1][config.sides[-1]]:
        name, value = next(iter(figures[-1][config.sides[-1]].items()))
        title += f", {pictures.label(name)} {value:.3g}"
    return title


def _real(samples: Any) -> dict[str, Picture]:
    """Some of the images that are trained on, to be seen beside what was made of them."""
    if isinstance(samples, Points) or samples.shape[1] not in (1, 3):
        return {}
    return {"real images": Picture(samples[evenly(64, len(samples))].cpu())}


def _run(
    config: Config,
    trainers: dict[str, Trainer],
    done: int,
    out: Path,
    stop: SimpleNamespace,
    note: Callable[[int, dict[str, Step]], None],
    save: Callable[[int], None],
) -> None:
    """The steps that are left, in every process alike: all stop, or find out that something diverged, at one step."""
    processes = trainers[config.sides[0]].processes
    if not done:
        _check_finite(trainers, 0, out)
        save(0)
    for step in range(done + 1, config.steps + 1):
        order = config.sides if step % 2 else config.sides[::-1]
        results = {side: trainers[side].step() for side in order}
        note(step, results)
        for side, result in results.items():
            if not all(map(math.isfinite, result.losses.values())):
                losses = ", ".join(f"{player.upper()} {loss}" for player, loss in result.losses.items())
                raise Diverged(f"at step {step} the {side} side's losses are {losses}; {_advice(out)}")
        signal_number = processes.largest(stop.signal)
        if step % config.checkpoint_every == 0 or step == config.steps or signal_number:
            _check_finite(trainers, step, out)
            save(step)
        if signal_number:
            raise Interrupted(
                f"stopped after step {step} of {config.steps}; to continue: gankern train --resume {out}",
                signal_number,
            )


def _keep(config: Config, out: Path, step: int, content: bytes, figures: list[dict]) -> None:
    """Leaves the checkpoint of a step as a snapshot too, and as the best one, where that is asked for."""
    if config.keep and step:
        files.write_bytes(out / SNAPSHOTS / f"step-{step:06}.pt", content)
        for old in sorted((out / SNAPSHOTS).glob("step-*.pt"))[: -config.keep]:
            old.unlink()
    if config.best is not None and figures and figures[-1]["step"] == step:
        name, sign = best_of(config.best)
        rows = [row[config.sides[-1]] for row in figures]
        name = next((found for found in rows[-1] if found.removesuffix("_own_classifier") == name), name)
        if name not in rows[-1]:
            raise ValueError(f"best: there is no figure {name!r}; there are: {', '.join(rows[-1])}")
        earlier = [sign * row[name] for row in rows[:-1] if name in row]
        if is_best(sign * rows[-1][name], earlier):
            files.write_bytes(out / BEST, content)


def is_best(value: float, earlier: list[float]) -> bool:
    """Whether a figure, more being better, is above all before. What is no number never is, and counts for nothing."""
    return not math.isnan(value) and all(value > other for other in earlier if not math.isnan(other))


def _check_finite(trainers: dict[str, Trainer], step: int, out: Path) -> None:
    for side, trainer in trainers.items():
        if trainer.processes.largest(not trainer.is_finite()):
            raise Diverged(f"a weight of the {side} side is not finite at step {step}; {_advice(out)}")


def _advice(out: Path) -> str:
    return f"{out / CHECKPOINT} is the last good checkpoint. Train again with a lower --lr, or another --seed"


def _evaluates(config: Config, step: int) -> bool:
    number, rest = divmod(step, config.checkpoint_every)
    return (rest == 0 and number % config.evaluate == 0) or step == config.steps


def _control(config: Config, samples: Tensor | ImageSource | Points, labels: Tensor | None) -> list[Step]:
    """The first steps of the torch side once more, with the first player's weights changed by one rounding.

    Two correct implementations differ by roundings, so their losses may come apart as far as these do from the
    torch side's, and not much farther.
    """
    trainer = Trainer(config, "torch", samples, labels)
    random = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for weight in trainer.parameters(next(iter(trainer.game.players))):
            noise = torch.randn(weight.shape, generator=random).to(weight.device)
            weight.mul_(1.0 + 0.5 * torch.finfo(weight.dtype).eps * noise)
    return [trainer.step() for _ in range(min(records.CONTROL_STEPS, config.steps))]


def find_run(out: Path | str) -> tuple[Config, Checkpoint | None]:
    """What to continue in a run's folder: its configuration, and its checkpoint, or None where it died before its first
    one and begins anew. ``out`` may be a checkpoint, too.

    Raises ``CheckpointError`` where there is no run, or its checkpoint cannot be used.
    """
    out = Path(out)
    if (out / CONFIG).is_file() and died_at_once(out):
        return checkpoints.read_config(out / CONFIG), None
    saved = checkpoints.load(out if out.is_file() else out / CHECKPOINT)
    return saved.config, saved


# What a run writes before its first checkpoint.
_FIRST = (CONFIG, "samples", "log.csv", "metrics.csv", "tensorboard")


def died_at_once(out: Path) -> bool:
    """Whether a run's folder holds only what a run writes before its first checkpoint: there is nothing to lose."""
    samples = out / "samples"
    if not samples.is_dir() or (out / CHECKPOINT).exists():
        return False
    others = [path for path in out.iterdir() if path.name not in (*_FIRST, files.LOCK)] + list(samples.iterdir())
    return all(path.match(files.TEMPORARY) for path in others)


@contextmanager
def _folder(config: Config, out: Path, resuming: bool, started: Callable[[], bool]) -> Iterator[Callable]:
    """The output folder, for this process alone; yields what to write in: ``with writing():``. A ValueError before
    anything is ``started`` takes out of it what the run wrote, so that it can be called again with other options."""

    @contextmanager
    def writing() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = "make room and start again"
            if (out / CHECKPOINT).exists():
                advice = f"{out / CHECKPOINT} is whole. Make room, then: gankern train --resume {out}"
            raise OutputLost(f"cannot write to {out}: {error.strerror or error}; {advice}") from error

    in_use = OutputInUse(
        f"{out} is in use: gankern train --resume {out} continues the run in it; or pass another --out"
    )
    if out.exists() and not out.is_dir():
        raise in_use
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(files.alone_in(out))
        except BlockingIOError:
            raise OutputInUse(f"{out} is in use: another process trains in it") from None
        if not resuming and any(path.name != files.LOCK for path in out.iterdir()) and not died_at_once(out):
            raise in_use
        with writing():
            (out / "samples").mkdir(exist_ok=True)
            for place in (out, out / "samples"):
                files.remove_temporary(place)
            files.write_json(out / CONFIG, asdict(config))
        try:
            yield writing
        except ValueError:
            if not started():
                with writing():
                    for path in (out / name for name in (*_FIRST, CHECKPOINT)):
                        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                    if made and not any(out.iterdir()):
                        out.rmdir()
            raise


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

    def note(number: int, _frame: FrameType | None) -> None:
        stop.signal = number
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
