"""What a run tells while it trains: bars in a terminal, plain lines in a log."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from gankern.data import ImageSource, Points
from gankern.games._config import Config
from gankern.training.trainer import Step

SECONDS_A_LINE = 10.0

Advance = Callable[[dict[str, Step]], None]


@contextmanager
def progress(
    config: Config,
    samples: Tensor | ImageSource | Points,
    networks: Mapping[str, nn.Module],
    done: int,
    console: Console | None,
) -> Iterator[Advance]:
    """Yields what is to be called with the results of every step; without a console it says nothing.

    A terminal gets a bar for each side. A file or a pipe gets what is trained on what, and then a line for the first
    step, the last one, and every ten seconds between.
    """
    if console is None:
        yield lambda results: None
        return
    tell = _bars if console.is_terminal else _lines
    if not console.is_terminal:
        _print(console, header(config, samples, networks, done))
    with tell(config, done, console) as advance:
        yield advance


def header(
    config: Config, samples: Tensor | ImageSource | Points, networks: Mapping[str, nn.Module], done: int = 0
) -> str:
    """What is trained, on what, where."""
    parameters = ", ".join(f"{n} {sum(p.numel() for p in net.parameters()):,}" for n, net in networks.items())
    shape = "x".join(map(str, () if isinstance(samples, Points) else samples.shape[1:]))
    amount = "points without end" if isinstance(samples, Points) else f"{len(samples):,} images {shape}"
    steps = f"steps {done + 1} to {config.steps}" if done else f"{config.steps} steps"
    return (
        f"{config.model}, layers of {' and '.join(config.sides)}; parameters: {parameters}; "
        f"data: {config.data}, {amount}; {steps} of {config.batch_size} samples; "
        f"{config.device}, {config.precision}, {config.threads} threads"
    )


class _Rates:
    """Losses and samples a second of each side, over its last twenty steps."""

    def __init__(self, config: Config):
        self.samples = config.batch_size * config.n_critic
        self.kind = "points" if config.size is None else "images"
        self.recent: dict[str, list[float]] = {side: [] for side in config.sides}

    def __call__(self, side: str, step: Step) -> str:
        self.recent[side] = [*self.recent[side][-19:], sum(step.seconds.values())]
        losses = " ".join(f"{player.upper()} {loss:.3f}" for player, loss in step.losses.items())
        return f"{losses} {self.samples / fmean(self.recent[side]):.0f} {self.kind}/s"


@contextmanager
def _bars(config: Config, done: int, console: Console) -> Iterator[Advance]:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    rates = _Rates(config)
    with Progress(*columns, console=console) as bar:
        bars = {side: bar.add_task(side, total=config.steps, completed=done, now="") for side in config.sides}

        def advance(results: dict[str, Step]) -> None:
            for side, step in results.items():
                bar.update(bars[side], advance=1, now=rates(side, step))

        yield advance


@contextmanager
def _lines(config: Config, done: int, console: Console) -> Iterator[Advance]:
    rates = _Rates(config)
    began = said = monotonic()
    number = done

    def advance(results: dict[str, Step]) -> None:
        nonlocal number, said
        number += 1
        now = monotonic()
        figures = {side: rates(side, results[side]) for side in config.sides}
        if number - done > 1 and number < config.steps and now - said < SECONDS_A_LINE:
            return
        said = now
        left = (now - began) / (number - done) * (config.steps - number)
        told = "; ".join(f"{side} {text}" for side, text in figures.items())
        _print(
            console, f"step {number} of {config.steps}: {told}; {_clock(now - began)} elapsed, {_clock(left)} remaining"
        )

    yield advance


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
