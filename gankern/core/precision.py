"""How far convolutions may be from exact arithmetic for speed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

PRECISIONS = ("highest", "high", "medium")

_precision = "highest"


def get_convolution_precision() -> str:
    """What :func:`set_convolution_precision` has set; "highest" at first."""
    return _precision


def set_convolution_precision(precision: str) -> None:
    """Which algorithms gankern's convolutions on the CPU may use: for the whole process, from the next forward on.

    - "highest", the default: those whose error against float64 is at most twice that of PyTorch's direct convolution
      (nine products), or four times (tiles of 2 by 2).
    - "high": also 3x3 convolutions in tiles of 4 by 4.
    - "medium": also 4x4 convolutions of stride 2 in tiles of 4 by 4.

    The measured errors are in docs/convolution.md. float64 always has "highest".

    >>> import gankern
    >>> gankern.set_convolution_precision("high")
    >>> gankern.get_convolution_precision()
    'high'
    >>> gankern.set_convolution_precision("highest")
    """
    if precision not in PRECISIONS:
        accepted = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"set_convolution_precision: precision is {precision!r}; accepted are {accepted}")
    global _precision
    _precision = precision


@contextlib.contextmanager
def convolution_precision(precision: str) -> Iterator[None]:
    """:func:`set_convolution_precision` for the duration of a block."""
    before = _precision
    set_convolution_precision(precision)
    try:
        yield
    finally:
        set_convolution_precision(before)
