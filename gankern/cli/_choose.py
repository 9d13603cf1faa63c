"""Options that several commands share, and their checks."""

from collections.abc import Sequence

import torch

import gankern.functional  # noqa: F401 (declares the primitives)
from gankern.core.dispatch import Primitive
from gankern.core.names import look_up


def check_primitives(names: Sequence[str] | None) -> None:
    for name in names or ():
        look_up(Primitive.registry, name, "primitive")


def check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; there are: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch finds no CUDA or ROCm device")
