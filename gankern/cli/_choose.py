"""Options that several commands share, and their checks."""

from collections.abc import Sequence
from pathlib import Path

import torch

import gankern.functional  # noqa: F401 (declares the primitives)
from gankern.core.dispatch import Primitive, check_environment
from gankern.core.files import check_can_write
from gankern.core.names import look_up


def check_output(option: str, path: Path | None) -> None:
    """Raises a ValueError where a file could not be written: asked before what goes into it is worked for."""
    if path is None:
        return
    try:
        check_can_write(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written: {error.strerror}") from error


def check_primitives(names: Sequence[str] | None) -> None:
    check_environment()
    for name in names or ():
        look_up(Primitive.registry, name, "primitive")


def check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; there are: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch finds no CUDA or ROCm device")
