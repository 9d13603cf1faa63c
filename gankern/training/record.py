"""record.json: what was run, on what, how fast, how far the two sides came apart. And that as a table."""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy
import torch
from rich.table import Table

import gankern
from gankern.games._config import Config
from gankern.training import pictures
from gankern.training.trainer import Step

WHOLE = "whole step"

# Rounding differences grow exponentially in a GAN's training: over the first steps they measure the kernels, later
# they only say that two runs have become two runs. The control (see loop.py) tells which is which.
SPANS = {"first 5 steps": 5, "first 20 steps": 20}
CONTROL_STEPS = max(SPANS.values())


def _phases(titles: Mapping[str, str]) -> dict[str, Callable[[Step], float]]:
    """What is timed: each player's moves, and all."""
    moves = {f"{title} step": lambda step, player=player: step.seconds[player] for player, title in titles.items()}
    return {**moves, WHOLE: lambda step: sum(step.seconds.values())}


# Variables that change what is measured.
ENVIRONMENT = [
    "THP_MEM_ALLOC_ENABLE",
    "ATEN_CPU_CAPABILITY",
    "GANKERN_IMPLEMENTATION",
    "OMP_NUM_THREADS",
    "LD_PRELOAD",
]


def make(
    config: Config,
    steps: dict[str, list[Step]],
    control: list[Step],
    titles: Mapping[str, str],
    parameters: dict[str, int],
    wall_seconds: float,
    figures: list[dict],
    processes: int = 1,
) -> dict:
    """The record of a run. ``wall_seconds`` is of this process, all else of every step since step 1.

    ``control``, which only a comparison has, is what a comparison's loss differences are to be held against: the
    first steps on torch's layers, from weights changed by one rounding. ``titles`` are the players', by name.
    ``figures`` is a ``Log``'s.
    """
    record = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": asdict(config),
        "parameters": parameters,
        "versions": {
            "python": platform.python_version(),
            "gankern": gankern.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "hardware": _hardware(config),
        "processes": processes,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "steps": len(next(iter(steps.values()))),
        "wall_seconds": round(wall_seconds, 1),
        "sides": {side: _side(config, results, titles) for side, results in steps.items()},
    }
    if figures:
        record["figures"] = figures[-1]
    if config.compare and control:
        record["comparison"] = _comparison(steps["torch"], steps["gankern"], control, titles)
    return record


def _side(config: Config, steps: list[Step], titles: Mapping[str, str]) -> dict:
    seconds = {phase: median(map(measure, steps)) for phase, measure in _phases(titles).items()}
    return {
        "median_milliseconds": {phase: 1e3 * value for phase, value in seconds.items()},
        "images_per_second": config.batch_size * config.n_critic / seconds[WHOLE],
        "final_loss": {title: steps[-1].losses[player] for player, title in titles.items()},
    }


def _comparison(stock: list[Step], ours: list[Step], control: list[Step], titles: Mapping[str, str]) -> dict:
    spans = SPANS | {"all steps": len(stock)}
    return {
        "speedup": {
            phase: median(measure(a) / measure(b) for a, b in zip(stock, ours, strict=True))
            for phase, measure in _phases(titles).items()
        },
        "largest_loss_difference": {
            span: {
                "gankern": _largest_loss_difference(stock[:number], ours[:number]),
                # The control is short, and has nothing to say about all steps of a long run.
                "control": _largest_loss_difference(stock[:number], control[:number])
                if number <= len(control) or len(control) == len(stock)
                else None,
            }
            for span, number in spans.items()
        },
    }


def _largest_loss_difference(some: list[Step], others: list[Step]) -> float:
    return max(abs(a.losses[p] - b.losses[p]) for a, b in zip(some, others, strict=True) for p in a.losses)


def _hardware(config: Config) -> dict:
    hardware = {
        "processor": _processor(),
        "logical_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if torch.device(config.device).type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(config.device)
    return hardware


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(record: dict) -> Table:
    """The times of a run, and for a comparison their ratios, for a terminal."""
    config, sides = record["config"], record["sides"]
    title = (
        f"{config['model']} on {config['data']}: {record['steps']} steps, batch {config['batch_size']}, "
        f"{config['threads']} threads, seed {config['seed']}"
    )
    result = Table(title=title)
    result.add_column("median time")
    for side in sides:
        result.add_column(side, justify="right")
    comparison = record.get("comparison")
    if comparison:
        result.add_column("torch / gankern", justify="right")
    for phase in next(iter(sides.values()))["median_milliseconds"]:
        row = [f"{side['median_milliseconds'][phase]:.2f} ms" for side in sides.values()]
        row += [f"{comparison['speedup'][phase]:.3f}x"] if comparison else []
        result.add_row(phase, *row)
    result.add_section()
    result.add_row("images a second", *(f"{side['images_per_second']:.0f}" for side in sides.values()))
    for player in next(iter(sides.values()))["final_loss"]:
        result.add_row(f"final {player} loss", *(f"{side['final_loss'][player]:.4f}" for side in sides.values()))
    if "figures" in record:
        result.add_section()
        found = [record["figures"][side] for side in sides]
        for name in found[0]:
            result.add_row(pictures.label(name), *(f"{values[name]:.4g}" for values in found))
    return result


def difference_table(record: dict) -> Table:
    """How far the losses of a comparison came apart, beside what one rounding of the weights alone does."""
    result = Table(title="largest difference of a loss from torch's")
    for column in ("", "gankern", "torch, weights changed by one rounding"):
        result.add_column(column, justify="right" if column else "left")
    for span, found in record["comparison"]["largest_loss_difference"].items():
        control = "" if found["control"] is None else f"{found['control']:.1e}"
        result.add_row(span, f"{found['gankern']:.1e}", control)
    return result
