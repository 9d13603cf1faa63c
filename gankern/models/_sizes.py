"""Checks that the models share."""

from collections.abc import Mapping
from typing import TypeVar

from gankern.core.arguments import whole

Architecture = TypeVar("Architecture")


class SizeError(ValueError):
    """A model does not make images of that size; others would do."""


def check_size(size: int, smallest: int, largest: int | None = None) -> int:
    """Raise unless ``size`` is a power of two in range; return how often it halves down to 4."""
    size = whole("size", size)
    if size < smallest or size & (size - 1) or (largest is not None and size > largest):
        below = max(smallest, 1 << (max(size, smallest).bit_length() - 1))
        range_ = f"at least {smallest}" if largest is None else f"from {smallest} to {largest}"
        near = (
            f"the nearest is {largest}" if largest and below >= largest else f"the nearest are {below} and {2 * below}"
        )
        raise SizeError(f"size must be a power of two, {range_}, got {size}; {near}")
    return size.bit_length() - 3


def of_size(model: str, architectures: Mapping[int, Architecture], size: int) -> Architecture:
    """What a table holds for images of ``size``."""
    if whole("size", size) not in architectures:
        raise SizeError(f"{model} has networks for sizes {', '.join(map(str, architectures))}, got {size}")
    return architectures[size]


def check_translator(name: str, channels: int, width: int, blocks: int) -> None:
    """Of the networks from an image to an image, whose residual blocks may be none."""
    for argument, value, least in (("channels", channels, 1), ("width", width, 1), ("blocks", blocks, 0)):
        whole(f"{name}: {argument}", value, least=least)


def check_positive(**values: int) -> None:
    for name, value in values.items():
        whole(name, value, least=1)
