"""Which of torch's functions a module calls by itself: the names in its code."""

from __future__ import annotations

import dis
import functools
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_LIBRARIES = ("torch", "gankern")


def original(module: nn.Module, name: str = "forward") -> Any:
    """The method of a module's class, bound to it, whatever stands in its place on the instance."""
    return inspect.getattr_static(type(module), name).__get__(module, type(module))


def names_used(module: nn.Module) -> frozenset[str]:
    """All names that the methods of a module's class (below torch's own) refer to, and those of the plain functions
    beside them that these call."""
    return _names(type(module))


def functions_held(module: nn.Module) -> frozenset[str]:
    """The names of torch's functions that a module holds as attributes (``self.activation = F.relu``), also within
    functools.partial, lists and dicts, and of those that a function which it holds refers to."""
    names: set[str] = set()
    pending: list[Any] = [v for k, v in module.__dict__.items() if not (k.startswith("_") and isinstance(v, dict))]
    for value in pending:  # which grows
        if isinstance(value, functools.partial):
            pending.append(value.func)
        elif isinstance(value, (list, tuple, dict)):
            pending += list(value.values() if isinstance(value, dict) else value)[:100]
        elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            name = value.__name__
            if any(getattr(place, name, None) is value for place in (F, torch)):
                names.add(name)
            else:
                _collect(value, set(), names)
    return frozenset(names)


def functions_used(cls: type) -> tuple[types.FunctionType, ...]:
    """The methods of a class (below torch's own), and the functions of their modules that these refer to."""
    known = _functions.get(cls)
    if known is None:
        found: list[types.FunctionType] = []
        for base in cls.__mro__:
            if base.__module__.split(".")[0] not in _LIBRARIES or base.__module__.startswith("gankern.models"):
                found += [f for f in vars(base).values() if isinstance(f, types.FunctionType)]
        for method in list(found):
            method = getattr(method, "__wrapped__", method)
            names = (name for code in _with_inner(method.__code__) for name in code.co_names)
            called = (method.__globals__.get(name) for name in names)
            found += [f for f in called if isinstance(f, types.FunctionType)]
        known = _functions[cls] = tuple(found)
    return known


_functions: weakref.WeakKeyDictionary[type, tuple[types.FunctionType, ...]] = weakref.WeakKeyDictionary()


def _names(cls: type) -> frozenset[str]:
    known = _cache.get(cls)
    if known is None:
        seen: set[types.CodeType] = set()
        names: set[str] = set()
        for base in cls.__mro__:
            if base.__module__.split(".")[0] in _LIBRARIES and not base.__module__.startswith("gankern.models"):
                continue
            for name, value in vars(base).items():
                if name != "__init__":
                    _collect(value, seen, names)
        known = _cache[cls] = frozenset(names)
    return known


_cache: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def _collect(value: object, seen: set[types.CodeType], names: set[str]) -> None:
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)  # static and class methods
    value = getattr(value, "__wrapped__", value)
    if not isinstance(value, types.FunctionType) or value.__code__ in seen:
        return
    if (value.__module__ or "").split(".")[0] == "torch":
        return
    for code in _with_inner(value.__code__):
        seen.add(code)
        names.update(_called(code))
        for name in code.co_names:
            called = value.__globals__.get(name)
            if isinstance(called, types.FunctionType):
                _collect(called, seen, names)


def _called(code: types.CodeType) -> Iterator[str]:
    """The names in a piece of code, without those of attributes of ``self``, which are no functions of torch."""
    before = None
    for instruction in dis.get_instructions(code):
        own = before is not None and before.opname.startswith("LOAD_FAST") and before.argval == "self"
        if isinstance(instruction.argval, str) and instruction.argval in code.co_names and not own:
            yield instruction.argval
        before = instruction


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)
