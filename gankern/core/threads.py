"""State that each thread has its own of."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class PerThread(threading.local):
    """``value`` is at first ``make()``, in every thread. Copies and pickles of what holds it begin anew.

    torch.compile guards on it: an attribute that __init__ sets is looked up in the thread that calls what was compiled.

    >>> PerThread(list).value
    []
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.value = make()

    def __reduce__(self) -> tuple:
        return PerThread, (self.make,)
