"""What a forward of an accelerated module meets: each layer and each call of a function, with what ran for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from gankern.acceleration._compiled import is_compiled
from gankern.acceleration._report import Call
from gankern.acceleration._scope import METADATA, state
from gankern.core.torch_internals import OWN_MODES

OWN_CODE = "its own code"
TORCH = "torch"
NOTHING = "nothing of ours for it"


@dataclass(eq=False)
class Frame:
    """A layer or a call that runs. ``whole``: what happens within it is a part of it and is not listed."""

    layer: str
    operation: str
    whole: bool
    now: str = ""
    why: str = ""
    hidden: bool = False  # a module without parameters and operations of its own


class Log:
    """Of one forward. Where a value waits, what became of it is entered when it is computed."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.stack: list[Frame] = []
        self.ran: set[str] = set()  # the names of the modules whose forward was reached

    def begin(self, layer: str, operation: str, whole: bool) -> Frame:
        frame = Frame(layer, operation, whole)
        self.frames.append(frame)
        self.stack.append(frame)
        return frame

    @contextlib.contextmanager
    def function(self, func: Any) -> Iterator[None]:
        """While a function that a module calls by itself runs."""
        with self.part(name_of(func)):
            yield

    @contextlib.contextmanager
    def part(self, operation: str) -> Iterator[None]:
        """While what is called so runs in the code of the layer at hand."""
        if not self.stack or self.stack[-1].whole:
            yield
            return
        self.begin(self.stack[-1].layer, operation, True)
        try:
            yield
        finally:
            self.stack.pop()

    @contextlib.contextmanager
    def resumed(self, frame: Frame | None) -> Iterator[None]:
        """While that is computed which ``frame`` left waiting."""
        self.stack.append(frame or Frame("", "", True))
        try:
            yield
        finally:
            self.stack.pop()

    @property
    def top(self) -> Frame | None:
        return self.stack[-1] if self.stack else None

    def say(self, now: str, why: str) -> None:
        """What runs for the layer or the call at hand, and why not more. The first word counts."""
        if self.stack and not self.stack[-1].now:
            self.stack[-1].now, self.stack[-1].why = now, why

    def calls(self) -> list[Call]:
        """The same calls of a layer as one."""
        counts: dict[tuple[str, str, str, str], int] = {}
        for frame in self.frames:
            if frame.hidden:
                continue
            now, why = (frame.now, frame.why) if frame.now else (TORCH, NOTHING) if frame.whole else (OWN_CODE, "")
            key = frame.layer, frame.operation, now, why
            counts[key] = counts.get(key, 0) + 1
        return [Call(layer, operation, count, now, why) for (layer, operation, now, why), count in counts.items()]


_PLACES = ((F, "F"), (torch, "torch"), (Tensor, "Tensor"))


@functools.cache
def name_of(func: Any) -> str:
    """As it is written: F.relu, torch.cat, Tensor.view."""
    name = getattr(func, "__name__", "")
    for place, its in _PLACES:
        if name and getattr(place, name, None) is func:
            return f"{its}.{name}"
    return resolve_name(func) or name or str(func)


# What computes nothing.
_LOOKS = {
    "__get__",
    "__set__",
    "__len__",
    "stride",
    "numel",
    "storage_offset",
    "data_ptr",
    "get_device",
    "element_size",
}


class Listing(TorchFunctionMode):
    """Lists the functions that nobody before it took."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        log = state.log
        name = getattr(func, "__name__", "")
        if log is None or func in METADATA or name in _LOOKS or name.startswith(("_set_", "is_")):
            return func(*args, **kwargs)
        with log.function(func):
            return func(*args, **kwargs)


OWN_MODES.add(Listing)


def _is_whole(module: nn.Module) -> bool:
    """Whether its forward is torch's or this library's, so that what it calls is its own affair."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    return type(module).__module__.startswith(("torch.nn.", "gankern.nn."))


def _run(log: Log, name: str, of: Frame, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    log.ran.add(name)
    inside = bool(log.stack) and log.stack[-1].whole  # a wrapper that this library took over runs its layer
    if inside:
        return forward(*args, **kwargs)
    log.begin(name, of.operation, of.whole).hidden = of.hidden
    try:
        return forward(*args, **kwargs)
    finally:
        log.stack.pop()


def met(module: nn.Module, inputs: tuple[Any, ...], describe: Callable[[nn.Module], str]) -> Log:
    """Runs a forward and lists what it meets. ``module`` is a copy that nobody needs afterwards."""
    log = Log()
    for name, inner in module.named_modules():
        if not is_compiled(inner):
            forward = inner.__dict__.get("forward") or type(inner).forward.__get__(inner)
            taken = getattr(inner.__dict__.get("forward"), "whole", False)
            whole = taken or _is_whole(inner)
            hidden = not whole and not inner._parameters
            frame = Frame(name, describe(inner), whole, hidden=hidden)
            inner.__dict__["forward"] = functools.partial(_run, log, name, frame, forward)
    state.log = log
    try:
        with Listing():
            module(*inputs)
    finally:
        state.log = None
    return log
