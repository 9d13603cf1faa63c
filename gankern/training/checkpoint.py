"""Checkpoints that are either whole or not there.

A checkpoint is a dictionary of tensors and plain values, so it is loaded without running any pickled code:

    format    "gankern-checkpoint"
    version   of this layout
    config    the fields of ``Config``
    step      how many steps are done
    history   {"steps": {side: losses and times of every step}, "figures": what was evaluated}
    trainers  {side: Trainer.state_dict()}, where side is "torch" or "gankern"
"""

import io
import os
import pickle
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gankern import games
from gankern.games import Game, Run
from gankern.games._config import Config

FORMAT = "gankern-checkpoint"
VERSION = 3


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says what to do."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be used, and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after ``step`` steps."""

    config: Config
    step: int
    history: dict[str, Any]
    trainers: dict[str, dict]


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint. A crash, a kill or a full disk at any moment leaves the one from before."""
    content = {"format": FORMAT, "version": VERSION, **vars(checkpoint), "config": asdict(checkpoint.config)}
    # Serialised in memory first: torch.save into a full disk dies inside C++ without saying "no space left".
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name beside it, make sure it is on the disk, then move it into place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write names no file


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, its tensors to the CPU; a CheckpointError says why it cannot be used."""
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    foreign = CheckpointError(f"{path} is not a checkpoint of `gankern train`, or it is damaged")
    if not zipfile.is_zipfile(path):  # torch.load takes a file that is no archive for one of its oldest formats
        raise foreign
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise foreign from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise foreign
    if content["version"] != VERSION:
        raise CheckpointError(
            f"{path} has layout version {content['version']}, this gankern reads version {VERSION}: "
            "use the gankern that wrote it"
        )
    return Checkpoint(Config(**content["config"]), content["step"], content["history"], content["trainers"])


def game(checkpoint: Checkpoint, side: str) -> Game:
    """The game as it stood, in evaluation mode, on the CPU and without data: for looking at what was trained."""
    state = checkpoint.trainers[side]
    played = games.find(checkpoint.config.model)(Run(checkpoint.config, side))
    if "average" in state:
        played.shown = AveragedModel(played.networks[played.averaged])
        played.shown.load_state_dict(state["average"])
        played.shown.eval()
    for name, network in played.networks.items():
        network.load_state_dict(state[name])
        network.eval()
    played.load_extra_state(state.get("extra", {}))
    return played


def generator(checkpoint: Checkpoint, side: str) -> nn.Module:
    """The generator that samples are drawn from, in evaluation mode: the averaged one if there is one."""
    return game(checkpoint, side).average()
