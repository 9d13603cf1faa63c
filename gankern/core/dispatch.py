"""Which implementation of a primitive runs, and for each other one the reason why it does not.

A primitive declares its implementations, best first, with what each can take. ``implementation="auto"`` takes
the first that can; a named one runs or raises, and the error says of every implementation why it cannot take
*these* inputs. What ran last is on record: :func:`last_implementation`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from gankern.core import devices, torch_internals
from gankern.core.native import nodes

logger = logging.getLogger("gankern")

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGE = 2**26  # bytes, of which the next operation finds nothing in a GPU's caches
ANY_ORDER = 1_000_000  # gradient order of plain PyTorch code
NAMES = ("auto", "reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Implementation:
    """One tier of one primitive, and what it can take."""

    name: str
    devices: tuple[str, ...]  # empty: any
    dtypes: tuple[torch.dtype, ...]  # empty: any
    gradient_order: int
    missing: str | None = None  # why it cannot run in this process at all
    large_only: bool = False  # whether "auto" takes it for LARGE tensors alone

    def refusal(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot take a tensor of this device and dtype; None where it can."""
        if self.missing:
            return self.missing
        if self.devices and device not in self.devices:
            return f"runs on {' and '.join(self.devices)} tensors, got a {device} tensor"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {', '.join(short(d) for d in self.dtypes)}, got {short(dtype)}"
        return None


def short(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def check_floating_on(name: str, argument: str, x: torch.Tensor, device: torch.device) -> None:
    """Raises unless x is floating point, and on that device."""
    if x.device != device or not x.is_floating_point():
        raise ValueError(f"{name}: {argument} is {short(x.dtype)} on {x.device}; it must be floating point on {device}")


class Primitive:
    """A name and its implementations, best first where nothing was measured (gankern.core.devices says what was); the
    last one is the reference, which takes everything."""

    registry: ClassVar[dict[str, Primitive]] = {}

    def __init__(self, name: str, implementations: Sequence[Implementation]) -> None:
        self.name = name
        self.implementations = tuple(implementations)
        self._by_size = any(i.large_only for i in implementations)
        self._chosen: dict[tuple[str, torch.dtype, str, bool], str] = {}
        Primitive.registry[name] = self

    def select(self, tensor: torch.Tensor, implementation: str | None = None) -> str:
        """The name of the implementation that runs for inputs like ``tensor``; it goes on record.

        ``implementation`` is a caller's keyword: None leaves the choice to :func:`use_implementation`, then to
        the variable GANKERN_IMPLEMENTATION, then to "auto".
        """
        wish = self.wish(implementation)
        if torch_internals.transformed():
            return self._plain(tensor, wish)
        large = self._by_size and tensor.numel() * tensor.element_size() > LARGE
        key = (tensor.device.type, tensor.dtype, wish, large)
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = self._decide(*key)
        _thread.last[self.name] = chosen
        return chosen

    def instead(self, chosen: str, reason: str, tensor: torch.Tensor, implementation: str | None) -> str:
        """What runs in place of the chosen implementation, which does not take these inputs for a reason that device
        and dtype do not tell; it goes on record. Raises where that one was asked for by name."""
        refusals = {**self.refusals(tensor.device.type, tensor.dtype), chosen: reason}
        if self.wish(implementation) == chosen:
            raise self.refuse(chosen, refusals)
        _thread.last[self.name] = other = next(name for name, refusal in refusals.items() if refusal is None)
        return other

    def wish(self, implementation: str | None = None) -> str:
        """What a caller's keyword, :func:`use_implementation` and GANKERN_IMPLEMENTATION amount to."""
        return implementation or _thread.wish or _environment()

    def ran(self, implementation: str) -> None:
        """Puts on record what runs, for a primitive that chooses by more than device and dtype."""
        _thread.last[self.name] = implementation

    def refusals(self, device: str, dtype: torch.dtype) -> dict[str, str | None]:
        """For each implementation the reason why it does not take such a tensor, or None."""
        return {i.name: i.refusal(device, dtype) for i in self.implementations}

    def refuse(self, wish: str, refusals: dict[str, str | None]) -> ValueError:
        """The error for an implementation asked for by name that cannot take these inputs."""
        reasons = "\n".join(f"  {name}: {reason or 'can'}" for name, reason in refusals.items())
        if wish not in NAMES:
            problem = f"no implementation is called {wish!r} (accepted: {', '.join(NAMES)})"
        elif wish not in refusals:
            problem = f"has no {wish!r} implementation"
        else:
            problem = f"implementation {wish!r} cannot take these inputs"
        return ValueError(f"{self.name}: {problem}. Of its implementations:\n{reasons}")

    def _plain(self, tensor: torch.Tensor, wish: str) -> str:
        """What runs under a transformation of programs, where torch's own operators are wanted."""
        chosen = "reference"
        if wish not in ("auto", "reference"):
            refusals = self.refusals(tensor.device.type, tensor.dtype)
            refusals.update((name, refusals[name] or transformation_refusal()) for name in refusals if name != chosen)
            if refusals.get(wish, "unknown") is not None:
                raise self.refuse(wish, refusals)
            chosen = wish
        _thread.last[self.name] = chosen
        return chosen

    def _decide(self, device: str, dtype: torch.dtype, wish: str, large: bool = True) -> str:
        refusals = self.refusals(device, dtype)
        if wish != "auto":
            if refusals.get(wish, "unknown") is None:
                return wish
            raise self.refuse(wish, refusals)
        fastest = devices.fastest(self.name, device)
        able = [i.name for i in self.implementations if refusals[i.name] is None and (large or not i.large_only)]
        chosen = fastest if fastest in able else able[0]
        if chosen == "reference" and not torch.compiler.is_compiling():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items() if reason)
            logger.warning("%s runs as plain PyTorch for %s %s (%s)", self.name, device, short(dtype), reasons)
        return chosen


def transformation_refusal() -> str | None:
    """Why no kernel can run here, whatever the tensors are; None where one can."""
    found = torch_internals.without_kernels()
    if found is None:
        return None
    return f"does not run under {found}; leave implementation at 'auto', or pass implementation='reference'"


class _Thread(threading.local):
    """What holds for one thread. torch.compile guards on attributes that __init__ sets, in the thread that calls what
    was compiled; a ContextVar cannot be traced."""

    def __init__(self) -> None:
        self.wish: str | None = None
        self.last: dict[str, str] = {}


_thread = _Thread()


def _environment() -> str:
    name = os.environ.get("GANKERN_IMPLEMENTATION") or "auto"
    if name not in NAMES:
        raise ValueError(f"the variable GANKERN_IMPLEMENTATION is {name!r}; accepted are {', '.join(NAMES)}")
    return name


def check_environment() -> None:
    """Raises a ValueError where the variable GANKERN_IMPLEMENTATION names nothing there is."""
    _environment()


@contextlib.contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Within the block, every primitive runs as the named implementation, or raises with the reasons.

    ``name`` is one of "auto", "reference", "cpu", "triton", "cuda". A call's own ``implementation=`` goes
    first. Holds for the thread, and blocks may be nested; GANKERN_IMPLEMENTATION holds for the process.

    >>> import torch, gankern, gankern.functional as GF
    >>> w, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)
    >>> with gankern.use_implementation("reference"):
    ...     _ = GF.spectral_norm(w, u, v)
    >>> gankern.last_implementation("spectral_norm")
    'reference'
    """
    if name not in NAMES:
        raise ValueError(f"use_implementation: name is {name!r}; accepted are {', '.join(NAMES)}")
    before, _thread.wish = _thread.wish, name
    try:
        yield
    finally:
        _thread.wish = before


def last_implementation(primitive: str) -> str | None:
    """Which implementation of ``primitive`` ran last in this thread; None where none has run yet.

    Raises: ValueError for a name that is no primitive's, with those there are.

    >>> import gankern.functional as GF
    >>> _ = GF.pixel_norm(torch.ones(2, 3), implementation="reference")
    >>> last_implementation("pixel_norm")
    'reference'
    """
    if primitive not in Primitive.registry:
        known = ", ".join(sorted(Primitive.registry))
        raise ValueError(f"last_implementation: no primitive is called {primitive!r} (there are: {known})")
    return _thread.last.get(primitive)


def refuse_gradient_order(primitive: str) -> RuntimeError:
    """The error for a gradient of a higher order than the kernels have."""
    ran = _thread.last.get(primitive, "compiled")
    return RuntimeError(
        f"{primitive}: the {ran} implementation is exact to gradient order 2, and a "
        f"higher one was asked for; pass implementation='reference', which has every order"
    )


# There, too, what runs is chosen and goes on record.
_variables: Any = os.environ  # whose dictionary the standard library's stubs do not have
nodes.start(
    _thread,
    Primitive.registry,
    vars(torch.autograd.forward_ad),
    _variables._data,
    _variables.encodekey("GANKERN_IMPLEMENTATION"),
    LARGE,
)
