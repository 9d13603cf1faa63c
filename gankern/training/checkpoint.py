"""Checkpoints that are either whole or not there.

A checkpoint is a dictionary of tensors and plain values, so it is loaded without running any pickled code:

    format    "gankern-checkpoint"
    version   of this layout
    config    the fields of ``Config``
    step      how many steps are done
    history   {"steps": {side: losses and times of every step}, "figures": what was evaluated}
    trainers  {side: Trainer.state_dict()}, where side is "torch" or "gankern"
"""

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gankern import games
from gankern.core.arguments import real, shown, whole
from gankern.core.files import write_bytes
from gankern.games import Game, Run
from gankern.games._config import Config
from gankern.models import layers as layer_tables

CHECKPOINT = "checkpoint.pt"  # in a run's folder
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


def save(path: Path | str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint. A crash, a kill or a full disk at any moment leaves the one from before."""
    write_bytes(path, content_of(checkpoint))


def content_of(checkpoint: Checkpoint) -> bytes:
    """What the file of a checkpoint holds."""
    content = {"format": FORMAT, "version": VERSION, **vars(checkpoint), "config": asdict(checkpoint.config)}
    # Serialised in memory first: torch.save into a full disk dies inside C++ without saying "no space left".
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return _sealed(buffer.getvalue())


# A zip archive ends with a record of 22 bytes, the last two of which are the length of a comment that follows it. The
# comment of a checkpoint is a digest of all bytes before it, so that any bit that changes is found.
END, COMMENT = 22, b"gankern sha256 "
SEAL = len(COMMENT) + hashlib.sha256().digest_size


def _sealed(archive: bytes) -> bytes:
    archive = archive[:-2] + struct.pack("<H", SEAL)
    return archive + COMMENT + hashlib.sha256(archive).digest()


def _is_whole(content: bytes) -> bool:
    """Whether an archive is as it was written, by its digest; by the checksums of its parts, where it has none."""
    archive, seal = content[:-SEAL], content[-SEAL:]
    if seal.startswith(COMMENT):
        return seal == COMMENT + hashlib.sha256(archive).digest()
    if content[-END : 4 - END] != b"PK\x05\x06" or content[-2:] != b"\0\0":
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            return parts.testzip() is None
    except Exception:  # a damaged archive can fail in any way
        return False


def load(path: Path | str) -> Checkpoint:
    """Read a checkpoint, or that of a run's folder, its tensors to the CPU, and leave the file alone.

    Raises: CheckpointError, which says what is wrong.
    """
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path must be that of a run's folder or of a checkpoint, got {shown(path)}")
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    foreign = CheckpointError(f"{path} is not a checkpoint of `gankern train`, or it is damaged")
    try:
        archive = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not _is_whole(archive):
        raise foreign
    try:
        content = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # an archive of somebody else's can fail in any way
        raise foreign from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise foreign
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has layout version {content.get('version')}, this gankern reads version {VERSION}: "
            "use the gankern that wrote it"
        )
    try:
        return _checked(content)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is no whole checkpoint: {_sentence(error)}") from error


def _checked(content: dict[str, Any]) -> Checkpoint:
    """The checkpoint in a file's content; a KeyError, TypeError or ValueError where that is not as it should be."""
    config, step = _config(_value(content, "config", dict)), whole("step", content["step"], least=0)
    history, trainers = _value(content, "history", dict), _value(content, "trainers", dict)
    steps, figures = _value(history, "steps", dict), _value(history, "figures", list)
    for name, sides in (("history", steps), ("trainers", trainers)):
        if sides.keys() != set(config.sides):
            raise ValueError(f"{name} is of {_listed(sides)}, and the run is of {_listed(config.sides)}")
    for side, rows in steps.items():
        if not isinstance(rows, Tensor) or rows.dtype != torch.float64 or rows.ndim != 2 or len(rows) != step:
            raise ValueError(f"history of {side} must be [{step}, columns] of float64, got {shown(rows)}")
    for row in figures:
        if not isinstance(row, dict) or row.keys() != {"step", *config.sides}:
            raise ValueError("figures must be of a step and of each side")
        whole("figures: step", row["step"], 0, step)
        for side in config.sides:
            for name, value in _value(row, side, dict).items():
                real(f"figures: {name}", value)
    for side in trainers:
        _value(trainers, side, dict)
    return Checkpoint(config, step, history, trainers)


def read_config(path: Path | str) -> Config:
    """The configuration in a run's config.json."""
    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise TypeError(f"it must hold options and their values, got {shown(options)}")
        return _config(options)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a run's configuration: {_sentence(error)}") from error


def _config(options: dict[str, Any]) -> Config:
    if unknown := options.keys() - {field.name for field in fields(Config)}:
        raise ValueError(f"config has {', '.join(sorted(map(str, unknown)))}, which this gankern does not know")
    if missing := {field.name for field in fields(Config)} - options.keys() - LATER:
        raise ValueError(f"config lacks {', '.join(sorted(missing))}")
    return Config(**options)


# Options that earlier runs of this layout did not have: their defaults are what those runs did.
LATER = {
    *("options", "on_error", "keep", "best", "start_from", "flip", "augment", "workers"),
    *("momentum", "momentum_end", "momentum_steps", "lr_decay", "lr_floor"),
    *("zero_centered", "dragan", "r1", "r2", "penalty_every"),
    *("feature_matching", "historical_average", "noisy_labels", "instance_noise", "instance_noise_steps"),
}


def _value(content: dict, name: str, kind: type) -> Any:
    if not isinstance(content[name], kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {shown(content[name])}")
    return content[name]


def _listed(names: Iterable[Any]) -> str:
    return " and ".join(map(str, names)) or "nothing"


def _sentence(error: Exception) -> str:
    """What an error says, in one line that is not endless."""
    text = f"{error.args[0]} is missing" if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def restore(part: Any, state: dict | None, path: Path, side: str) -> None:
    """``part.load_state_dict(state)``; a CheckpointError in one sentence where the state is none of such a part."""
    try:
        part.load_state_dict(state)
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: the state of the {side} side does not fit: {_sentence(error)}") from error


def start_from(path: Path | str, networks: Mapping[str, nn.Module], average: nn.Module | None, side: str) -> None:
    """Gives networks, and their moving average, the weights that another run's have."""
    saved = load(path)
    found = side_of(saved, side)
    if missing := [name for name in networks if name not in saved.trainers[found]]:
        raise CheckpointError(
            f"{path} is of {saved.config.model}, which has no network {_listed(missing)} to begin with: "
            f"start_from takes a run of the same model"
        )
    for name, network in networks.items():
        restore(network, saved.trainers[found].get(name), Path(path), found)
    if average is not None:
        averaged = saved.trainers[found].get("average")
        if averaged is None:  # that run kept none: the average of weights that have not moved is the weights
            trained = games.find(saved.config.model).averaged
            averaged = AveragedModel(networks[trained or ""]).state_dict()
        restore(average, averaged, Path(path), found)


def side_of(checkpoint: Checkpoint, layers: str | None = None) -> str:
    """Which side of a run is looked at: that of the layers, where it was trained, or else the last that there is."""
    return layers if layers in checkpoint.trainers else checkpoint.config.sides[-1]


def game(checkpoint: Checkpoint, side: str, layers: str | None = None) -> Game:
    """The game as it stood, in evaluation mode, on the CPU and without data: for looking at what was trained.

    It is built of the ``layers`` that are named; of those that it was trained on, where none are.

    Raises ``CheckpointError`` where the checkpoint lacks something of it, or where a weight is not finite.
    """
    config = checkpoint.config
    if side not in checkpoint.trainers:
        raise CheckpointError(f"the checkpoint is of {_listed(checkpoint.trainers)} layers, not of {side}")
    state = checkpoint.trainers[side]
    played = games.find(config.model)(Run(config, layers or side))
    parts: dict[str, nn.Module] = dict(played.networks)
    if config.ema is not None and played.averaged is not None:
        parts["average"] = played.shown = AveragedModel(played.networks[played.averaged])
    try:
        for name, network in parts.items():
            own = _value(state, name, dict)
            network.load_state_dict(own)
            if wrong := [key for key, value in own.items() if not bool(value.isfinite().all())]:
                raise ValueError(f"{wrong[0]} of the {name} is not finite")
            network.eval()
        played.load_extra_state(state.get("extra", {}))
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint's state of the {side} side does not fit: {_sentence(error)}") from error
    return played


def generator(checkpoint: Checkpoint, side: str, layers: str | None = None, averaged: bool = True) -> nn.Module:
    """The network that samples are drawn from, in evaluation mode: the averaged one if there is one and it is wanted.

    Raises ``CheckpointError`` where the checkpoint does not have that, or where a weight is not finite; ``ValueError``
    where no network of the game is called with latents.
    """
    played = game(checkpoint, side, layers)
    if played.averaged is None:
        for name in ("generator", "decoder"):
            if name in played.networks:
                return played.networks[name]
    network = played.average() if averaged or played.averaged is None else played.networks[played.averaged]
    return network.module if isinstance(network, AveragedModel) else network


def load_generator(
    path: Path | str, layers: str | None = None, averaged: bool = True, device: torch.device | str = "cpu"
) -> nn.Module:
    """The generator that a run trained, in evaluation mode.

    Args:
        path: a run's folder, or one of its checkpoints.
        layers: "torch" or "gankern", what it is built of; by default what it was trained on. The weights are the same:
            on torch's layers it is a network of ``torch.nn`` alone. Of a comparison it is that side, by default
            gankern's.
        averaged: the moving average of its weights, where the run kept one (``ema``); or else the last weights.
        device: where it is put, whatever it was trained on.

    It is called with latents [N, latent], and with labels [N] where the run was conditional, and gives images
    [N, C, size, size] in [-1, 1], or points [N, 2]. ``gankern.training.find_run(path)[0]`` is the run's configuration,
    which has ``latent``, ``num_classes`` and ``size``. In games that draw more than latents (the codes of InfoGAN, the
    classes of AC-GAN) it takes what the game's page says.

    Raises: CheckpointError (a RuntimeError) where there is no checkpoint, or it cannot be used; ValueError where the
    layers have another name, or the game has no generator.

    >>> from gankern import data, training
    >>> images = data.load("digits")
    >>> config = training.configure("dcgan", "digits", images, steps=1, width=4, latent=8)
    >>> _ = training.train(config, images, "digits of a run")
    >>> generator = load_generator("digits of a run")
    >>> generator(torch.randn(3, 8)).shape
    torch.Size([3, 1, 8, 8])
    """
    if layers is not None:
        layer_tables.get(layers)
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a torch.device or its name, got {shown(device)}")
    saved = load(path)
    return generator(saved, side_of(saved, layers), layers, averaged).to(device)
