"""Whether the code of a network may write to its weights in a way that leaves no trace: through ``.data``, an array or
a pointer, which autograd counts no version for. Asked of the names in the code that a forward can come to."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

_WAYS = {"data", "numpy", "__array__", "data_ptr", "storage", "untyped_storage", "set_", "from_numpy", "from_dlpack"}
_LIBRARIES = ("torch", "gankern")


def may_write(root: nn.Module, known: Mapping[nn.Module, str]) -> bool:
    """Of a forward of ``root``. ``known``: methods of its modules that are known to write to nothing but vectors of
    spectral norm."""
    return any(
        _does(function, but=known.get(module, "")) for module in root.modules() for function in _functions(module)
    )


def _functions(module: nn.Module) -> Iterator[tuple[Any, type | None]]:
    """What a call of a module runs, without torch's own and this library's: functions, each with the class whose
    methods it may call."""
    cls = type(module)
    forward = module.__dict__.get("forward", cls.forward)
    if not _is_of_libraries(forward):
        yield getattr(forward, "__func__", forward), cls
    elif not _is_of_libraries(cls.forward):  # which stands in its place
        yield cls.forward, cls
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if isinstance(hook, functools.partial):
            hook = hook.func
        if not _is_of_libraries(hook):
            owner = type(getattr(hook, "__self__", hook))
            function = getattr(hook, "__func__", hook)
            yield (function if isinstance(function, types.FunctionType) else owner.__call__), owner
    for value in module.__dict__.values():  # objects that the network has: whatever they can do
        owner = type(value)
        if isinstance(value, types.FunctionType):
            yield value, None
        elif not isinstance(value, type) and not _is_foreign(owner.__module__):
            yield from ((f, owner) for f in vars(owner).values() if isinstance(f, types.FunctionType))


def _is_of_libraries(function: Any) -> bool:
    place = getattr(function, "__module__", None) or type(function).__module__
    return place.split(".")[0] in _LIBRARIES and not place.startswith("gankern.models")


def _does(function: tuple[Any, type | None], but: str) -> bool:
    code, cls = function
    key = getattr(code, "__code__", None)
    if key is None:
        return False
    found = _answers.setdefault(key, {})
    place = cls if cls is not None else object, but
    if place not in found:
        found[place] = any(not _WAYS.isdisjoint(names) for names in _reached(code, cls, but))
    return found[place]


_answers: weakref.WeakKeyDictionary[types.CodeType, dict[Any, bool]] = weakref.WeakKeyDictionary()


def _reached(start: Any, cls: type | None, but: str) -> Iterator[Iterable[str]]:
    """The names in the code of a function and of those that it calls by name: methods of the class, and functions,
    modules and objects beside it."""
    pending, seen = [start], set()
    for function in pending:  # which grows
        function = getattr(function, "fget", function)  # a property's
        function = getattr(function, "__func__", function)  # of static and class methods
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, types.FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        if _is_of_libraries(function):
            continue
        for code in _with_inner(function.__code__):
            yield code.co_names
            for name in code.co_names:
                value = function.__globals__.get(name)
                pending += [value, *_members(value, code.co_names)]
                if cls is not None and name != but:
                    pending.append(next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None))
            for cell in filter(_is_full, function.__closure__ or ()):
                pending += [cell.cell_contents, *_members(cell.cell_contents, code.co_names)]


def _is_foreign(name: str) -> bool:
    """Whether a module is nobody's own: code that knows of no weights."""
    return name.split(".")[0] in (*_LIBRARIES, *sys.stdlib_module_names, "numpy")


def _members(value: Any, names: Iterable[str]) -> list[Any]:
    """Of a module of somebody's own, a class or an object of one: the functions of these names."""
    if value is None or isinstance(value, (types.FunctionType, types.BuiltinFunctionType, nn.Module)):
        return []
    if isinstance(value, types.ModuleType):
        return [] if _is_foreign(value.__name__) else [vars(value).get(name) for name in names]
    cls = value if isinstance(value, type) else type(value)
    if _is_foreign(cls.__module__):
        return []
    return [vars(base)[name] for name in names for base in cls.__mro__ if name in vars(base)]


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
