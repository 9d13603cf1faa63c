"""What was measured on GPUs: ``devices/`` has a file for each name of a device, which ``make gpu`` writes.

    {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0",
     "blocks": {"bias_act": {"BLOCK": 2048, "num_warps": 8}},      of Triton's kernels: see gankern.triton.launch
     "tiers": {"spectral_norm": "cuda"},                           what implementation="auto" takes first
     "convolutions": {"upsample": {"float32 contiguous": [[256, 128, 4096, {"torch": 0.2, "phases": 0.1}]]}}}
                                                                   gankern.ops.convolution_choice: by shape, ms by way
     "accelerate": {"pairs": 65536}}                               what it does, from so many values on: is_known; and
                                                                   "tangent form", of penalties: host_decides

What no file names is as it is where nothing was measured: Triton, with its default block sizes, and the collapsed form
of convolutions that resample; and `accelerate` leaves layers as they were.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

DEVICES = Path(__file__).resolve().parents[1] / "devices"


def device_file(name: str) -> Path:
    """Where the choices for devices of a name stand."""
    return DEVICES / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}.json"


@functools.cache
def measured(name: str | None) -> dict[str, Any]:
    """What the file of devices of this name says; empty for none."""
    if name is None or not device_file(name).exists():
        return {}
    content: dict[str, Any] = json.loads(device_file(name).read_text())
    return content if content["device"] == name else {}


@functools.cache
def any_measured() -> bool:
    """Whether there is a file of any device: where not, none needs to be asked for its name."""
    return any(DEVICES.glob("*.json"))


def _of_all(part: str) -> dict[str, dict[str, Any]]:
    contents = (json.loads(path.read_text()) for path in sorted(DEVICES.glob("*.json")))
    return {content["device"]: content[part] for content in contents if content.get(part)}


# Of each device that has some. Read once, at import: torch.compile can trace a look into a dict, not into a file.
TIERS: dict[str, dict[str, str]] = _of_all("tiers")
ACCELERATED: dict[str, dict[str, int]] = _of_all("accelerate")


def gains_from(what: str, device: torch.device) -> float:
    """The values of a tensor from which on something that `accelerate` does was measured not to be slower on a device
    than what was there before: infinitely many where nothing was measured."""
    if device.type != "cuda" or not ACCELERATED:
        return math.inf
    return ACCELERATED.get(torch.cuda.get_device_properties(device).name, {}).get(what, math.inf)


MEASURED = "cpu"  # the type of device that the thresholds of `accelerate` were measured on
SPECTRAL = "spectral norm"  # what this library decides by a device's file in more than one place
TANGENT = "tangent form"  # of a penalty, by the values of the samples


class _Replayed(threading.local):
    """Whether what runs now is to be a CUDA graph, whose replays cost the host nothing."""

    coming = False


_replayed = _Replayed()


@contextlib.contextmanager
def to_be_replayed() -> Iterator[None]:
    """Around the warm-up and the capture of a graph: within it, what costs the host time and spares the device some is
    worth it."""
    before, _replayed.coming = _replayed.coming, True
    try:
        yield
    finally:
        _replayed.coming = before


def is_known(what: str, x: torch.Tensor) -> bool:
    """Whether it is known of a tensor's device that this is worth what it costs there: elsewhere than where thresholds
    were measured, by the device's file. What is not known is left as it was: so it is never slower."""
    return x.device.type == MEASURED or x.numel() >= gains_from(what, x.device)


def host_decides(what: str, x: torch.Tensor) -> bool:
    """Whether x is on a GPU where what spares the device work is not known to be worth the time that it costs the host:
    unless it is to be replayed, or the device's file names so few values."""
    return x.is_cuda and not _replayed.coming and x.numel() < gains_from(what, x.device)


def fastest(primitive: str, device: str) -> str | None:
    """The implementation of a primitive that was measured to be the fastest on the current device of a type."""
    if device != "cuda" or not TIERS:
        return None
    return TIERS.get(torch.cuda.get_device_properties(torch.device("cuda")).name, {}).get(primitive)
