"""How far convolutions may be from exact arithmetic for speed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from gankern.core.native import nodes

PRECISIONS = ("highest", "high", "medium")

_precision = "highest"


class _Thread(threading.local):
    """What a block has set for its thread. torch.compile guards on it, and on the global above."""

    def __init__(self) -> None:
        self.precision: str | None = None


_thread = _Thread()


def get_convolution_precision() -> str:
    """What holds in this thread: what a block of :func:`convolution_precision` has set, else what
    :func:`set_convolution_precision` has; "highest" at first.

    >>> with convolution_precision("medium"):
    ...     get_convolution_precision()
    'medium'
    """
    return _thread.precision or _precision


def set_convolution_precision(precision: str) -> None:
    """Which algorithms gankern's convolutions on the CPU may use: for the whole process, from the next forward on.

    - "highest", the default: those whose error against float64 is at most twice that of PyTorch's direct convolution
      (nine products), three times (our direct one) or four times (tiles of 2 by 2; five times in 4x4 convolutions of
      stride 1).
    - "high": also 3x3 convolutions in tiles of 4 by 4, and 4x4 ones of stride 1 in tiles of 3 by 3.
    - "medium": also 4x4 convolutions of stride 2 in tiles of 4 by 4.

    The measured errors are in docs/convolution.md. float64 always has "highest".

    >>> import gankern
    >>> gankern.set_convolution_precision("high")
    >>> gankern.get_convolution_precision()
    'high'
    >>> gankern.set_convolution_precision("highest")
    """
    _check("set_convolution_precision", precision)
    global _precision
    _precision = precision


def _check(name: str, precision: str) -> None:
    if precision not in PRECISIONS:
        accepted = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"{name}: precision is {precision!r}; accepted are {accepted}")


@contextlib.contextmanager
def convolution_precision(precision: str) -> Iterator[None]:
    """:func:`set_convolution_precision` for the forwards of one thread within a block; blocks may be nested.

    >>> import gankern
    >>> with gankern.convolution_precision("medium"):
    ...     gankern.get_convolution_precision()
    'medium'
    """
    _check("convolution_precision", precision)
    before, _thread.precision = _thread.precision, precision
    try:
        yield
    finally:
        _thread.precision = before


# They ask for it themselves.
nodes.set_precision(_thread, globals())
