"""What is known of a model beside its networks: its builder says so in its own file, and all else finds it here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from gankern.models.gan import GAN

Builder = TypeVar("Builder", bound=Callable[..., GAN])


class Preset(dict[str, Any]):
    """What differs from the defaults of a training run's options, at a width that trains in minutes on a CPU."""


@dataclass(frozen=True)
class Record:
    make: Callable[..., GAN]
    preset: Preset
    growing: bool  # its networks are resized while they train
    for_points: bool  # for points in the plane; all others are for images


RECORDS: dict[str, Record] = {}


def model(*, growing: bool = False, for_points: bool = False, **preset: Any) -> Callable[[Builder], Builder]:
    """Makes a builder known by its name, for ``gankern train`` and all else; ``preset``: see :class:`Preset`."""

    def add(make: Builder) -> Builder:
        RECORDS[make.__name__] = Record(make, Preset(preset), growing, for_points)
        return make

    return add
