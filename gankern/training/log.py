"""The losses and times of every step: in memory, in log.csv, and in the checkpoints."""

import csv
from dataclasses import astuple, fields
from pathlib import Path

import torch
from torch import Tensor

from gankern.training.trainer import Step

COLUMNS = [field.name for field in fields(Step)]


class Log:
    """``steps[side]`` lists the steps so far. ``append`` adds one of each side, there and to the file."""

    def __init__(self, path: Path, history: dict[str, Tensor]):
        """``history`` is what ``state_dict`` or ``empty`` gave; the file is written anew from it."""
        self.steps = {side: [Step(*row) for row in rows.tolist()] for side, rows in history.items()}
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerow(["step", *(f"{side}_{column}" for side in self.steps for column in COLUMNS)])
        for i, results in enumerate(zip(*self.steps.values(), strict=True), start=1):
            self._write(i, results)

    @staticmethod
    def empty(sides: tuple[str, ...]) -> dict[str, Tensor]:
        return {side: torch.empty(0, len(COLUMNS), dtype=torch.float64) for side in sides}

    def append(self, number: int, results: dict[str, Step]) -> None:
        for side, steps in self.steps.items():
            steps.append(results[side])
        self._write(number, [results[side] for side in self.steps])

    def _write(self, number: int, results) -> None:
        self.writer.writerow([number, *(value for step in results for value in astuple(step))])

    def state_dict(self) -> dict[str, Tensor]:
        """side → [steps, 4], float64."""
        return {
            side: torch.tensor([astuple(step) for step in steps], dtype=torch.float64).view(-1, len(COLUMNS))
            for side, steps in self.steps.items()
        }

    def close(self) -> None:
        self.file.close()
