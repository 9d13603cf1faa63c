"""The losses and times of every step and the figures of merit: in memory, in files, and in the checkpoints."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from gankern.core import extras
from gankern.core.files import write_bytes
from gankern.games import Picture
from gankern.training import pictures
from gankern.training.trainer import Step


def _columns(players: Sequence[str]) -> list[str]:
    return [f"{player}_{what}" for what in ("loss", "seconds") for player in players]


def _row(step: Step) -> list[float]:
    return [*step.losses.values(), *step.seconds.values()]


class Log:
    """``steps[side]`` lists the steps so far, ``figures`` what was evaluated: [{"step": number, side: {name: value}}].

    What is added is written to log.csv and metrics.csv too, and to TensorBoard's files if that is asked for.
    """

    def __init__(self, folder: Path, history: dict[str, Any], players: Sequence[str], tensorboard: bool = False):
        """``history`` is what ``state_dict`` or ``empty`` gave; the files are written anew from it."""
        self.folder, self.players, self.columns = folder, players, _columns(players)

        def step(row: list[float]) -> Step:
            return Step(dict(zip(players, row)), dict(zip(players, row[len(players) :])))

        self.steps = {side: [step(row) for row in rows.tolist()] for side, rows in history["steps"].items()}
        self.figures = list(history["figures"])
        self.file = (folder / "log.csv").open("w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerow(["step", *(f"{side}_{column}" for side in self.steps for column in self.columns)])
        for i, results in enumerate(zip(*self.steps.values(), strict=True), start=1):
            self._write(i, results)
        self._write_figures()
        self.board = _board(folder, len(next(iter(self.steps.values()))) + 1) if tensorboard else None

    @staticmethod
    def empty(sides: Sequence[str], players: Sequence[str]) -> dict[str, Any]:
        width = len(_columns(players))
        return {"steps": {side: torch.empty(0, width, dtype=torch.float64) for side in sides}, "figures": []}

    def append(self, number: int, results: dict[str, Step]) -> None:
        for side, steps in self.steps.items():
            steps.append(results[side])
        self._write(number, [results[side] for side in self.steps])
        if self.board is not None:
            for side, step in results.items():
                for column, value in zip(self.columns, _row(step)):
                    self.board.add_scalar(f"{column}/{side}", value, number)

    def append_figures(self, number: int, figures: dict[str, dict[str, float]]) -> None:
        self.figures.append({"step": number, **figures})
        self._write_figures()
        if self.board is not None:
            for side, found in figures.items():
                for name, value in found.items():
                    self.board.add_scalar(f"{name}/{side}", value, number)

    def picture(self, number: int, drawn: dict[str, Picture]) -> None:
        """What was drawn of every side, for TensorBoard, which takes images alone."""
        if self.board is not None:
            for title, picture in drawn.items():
                if picture.batch.ndim == 4:
                    image = pictures.grid(picture.batch, picture.columns)
                    self.board.add_image(f"samples/{title}", image, number, dataformats="HWC")

    def _write(self, number: int, results: Iterable[Step]) -> None:
        self.writer.writerow([number, *(value for step in results for value in _row(step))])

    def _write_figures(self) -> None:
        if not self.figures:
            return
        sides = list(self.steps)
        # Small images have fewer figures than the larger ones that a growing model makes later.
        names = list(dict.fromkeys(name for row in self.figures for side in sides for name in row[side]))
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["step", *(f"{side}_{name}" for side in sides for name in names)])
        for row in self.figures:
            writer.writerow([row["step"], *(row[side].get(name, "") for side in sides for name in names)])
        write_bytes(self.folder / "metrics.csv", text.getvalue().encode())

    def state_dict(self) -> dict[str, Any]:
        """{"steps": {side: [steps, columns] float64}, "figures": as they are}."""
        steps = {
            side: torch.tensor([_row(step) for step in steps], dtype=torch.float64).view(-1, len(self.columns))
            for side, steps in self.steps.items()
        }
        return {"steps": steps, "figures": self.figures}

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _board(folder: Path, first: int) -> Any:
    """TensorBoard's writer, which takes back what a run that was killed wrote of later steps."""
    extras.load("tensorboard", "--tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=first)
