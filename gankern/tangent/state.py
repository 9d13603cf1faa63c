"""What running a critic changes beside its result, so that an attempt that was given up leaves no trace."""

from __future__ import annotations

import collections
import contextlib
import functools
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize


class State:
    """Buffers, frozen parameters and attributes of the critic's modules, containers that these or the call's arguments
    hold, and the random numbers; as of now. Of any other tensor and generator, what it was before the critic first
    wrote to it or drew from it: :meth:`about_to_write`, :meth:`about_to_draw`.

    Parameters that are trained are not among it: the tape refuses to write them. Attributes are restored with the
    contents of lists, dicts and sets, however deep; objects of other kinds are the same ones as before. ``critic``, if
    it is no module, and the modules' hooks of the forward are looked through for what they count and collect in.
    """

    def __init__(
        self, modules: Sequence[nn.Module], inputs: Sequence[Tensor], others: Iterable[Any] = (), critic: Any = None
    ) -> None:
        self._owners: list[tuple[Any, dict, list[tuple[Any, Any]]]] = []
        self._tensors: dict[int, tuple[Tensor, Tensor, bool]] = {}
        self._written: list[tuple[Tensor, Tensor, bool]] = []
        self._new = object()  # marks tensors that the critic made
        self._drawn: set[int] = set()
        self._deep: list[tuple[Any, Any]] = []  # containers that are no attribute themselves
        self._seen = set(map(id, modules))
        self._undo: list[Callable[[], Any]] = []
        self._undo += [restore for save in _RANDOM if (restore := save(inputs)) is not None]
        self._waiting = list(modules)
        self._keep(others, tensors=False)
        if not isinstance(critic, nn.Module):
            self._keep_of(critic)
        for module in self._waiting:  # which grows by modules that are hidden in a container
            contents = self._keep_attributes(module)
            self._keep(x for x in module.__dict__.values() if x.__class__ not in _CONTAINERS)
            for container, _ in contents:
                self._keep(_entries(container))
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                self._keep_of(hook)
        if parametrize._cache_enabled:  # where weights of the attempt would stay
            self._deep.append((parametrize._cache, parametrize._cache.copy()))

    def _keep(self, values: Iterable[Any], tensors: bool = True) -> None:
        for x in values:
            kind = x.__class__
            if kind in _UNCHANGING or (kind is tuple and _UNCHANGING.issuperset(map(type, x))):
                continue
            if isinstance(x, Tensor):
                if tensors and not x.requires_grad and x.layout == torch.strided and not is_lazy(x):
                    self._tensors.setdefault(id(x), (x, x.detach().clone(), x.is_inference()))
            elif id(x) in self._seen:
                continue
            elif kind in _CONTAINERS or isinstance(x, tuple):
                self._seen.add(id(x))
                if kind in _CONTAINERS:
                    self._deep.append((x, x.copy()))
                if not _only_values(x):
                    self._keep(_entries(x), tensors=False)
            elif isinstance(x, nn.Module):
                found = [m for m in x.modules() if id(m) not in self._seen]
                self._seen.update(map(id, found))
                self._waiting += found
            elif (restore := _of_generator(x)) is not None:
                self._seen.add(id(x))
                self._undo.append(restore)

    def _keep_attributes(self, owner: Any) -> list[tuple[Any, Any]]:
        """The containers among the attributes that are not empty, and copies of them."""
        attributes = owner.__dict__.copy()
        contents = [(x, x.copy()) for x in attributes.values() if x.__class__ in _CONTAINERS and x]
        self._owners.append((owner, attributes, contents))
        return contents

    def _keep_of(self, function: Any) -> None:
        """What a function, a method or a callable object counts and collects in: containers that it refers to, numbers
        of an outer function's, and attributes of its object."""
        while isinstance(function, functools.partial):
            self._keep((*function.args, *function.keywords.values()), tensors=False)
            function = function.func
        for cell in getattr(function, "__closure__", None) or ():
            if _is_full(cell) and type(cell.cell_contents) in (bool, int, float):
                self._undo.append(functools.partial(_refill, cell, cell.cell_contents))
        self._keep((x for x in _referred_to(function) if not isinstance(x, nn.Module)), tensors=False)
        owner = getattr(function, "__self__", None if hasattr(function, "__code__") else function)
        attributes = getattr(owner, "__dict__", None)
        known = id(owner) in self._seen or isinstance(owner, (nn.Module, types.ModuleType))
        if type(attributes) is dict and not known:
            self._seen.add(id(owner))
            self._keep_attributes(owner)
            self._keep((x for x in attributes.values() if not isinstance(x, nn.Module)), tensors=False)

    def about_to_write(self, x: Tensor) -> None:
        """The critic is about to write to a tensor, of which it may not be known whose it is."""
        if id(x) not in self._tensors and getattr(x, _NEW, None) is not self._new and not is_lazy(x):
            self._written.append((x, x.detach().clone(), x.is_inference()))

    def made(self, x: Tensor) -> None:
        """The critic made a tensor, which is nobody else's."""
        setattr(x, _NEW, self._new)

    def about_to_draw(self, generator: torch.Generator) -> None:
        """The critic is about to draw from a generator of somebody's."""
        if id(generator) not in self._drawn:
            self._drawn.add(id(generator))
            self._undo.append(functools.partial(generator.set_state, generator.get_state()))

    def restore(self) -> None:
        for owner, attributes, contents in self._owners:
            _restore_attributes(owner.__dict__, attributes, contents)
        for x, copy in self._deep:
            _restore_contents(x, copy)
        while self._written:
            _restore_tensor(*self._written.pop())
        for kept in self._tensors.values():
            _restore_tensor(*kept)
        for restore in self._undo:
            restore()


_CONTAINERS = frozenset(
    (list, dict, set, collections.deque, collections.OrderedDict, collections.defaultdict, collections.Counter)
)
_NEW = "_gankern_made_by_the_critic"
_UNCHANGING = frozenset(
    (type(None), bool, int, float, complex, str, bytes, type, torch.Size, torch.dtype, torch.device, types.FunctionType)
)


def _entries(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _restore_tensor(x: Tensor, old: Tensor, inference: bool) -> None:
    """No write to autograd: a graph of before the attempt that has saved the tensor finds the values that it saved."""
    unwritten = contextlib.nullcontext() if inference else torch.autograd._unsafe_preserve_version_counter(x)
    with torch.inference_mode() if inference else torch.no_grad(), unwritten:
        if x.shape != old.shape:
            x.resize_(old.shape)
        x.copy_(old)


def _restore_attributes(attributes: dict, before: dict, contents: list[tuple[Any, Any]]) -> None:
    """Touches what has changed alone: another thread may be running the same modules."""
    for name in attributes.keys() - before.keys():
        del attributes[name]
    full = {id(x) for x, _ in contents}
    for name, x in before.items():
        if attributes.get(name, attributes) is not x:
            attributes[name] = x
        if x.__class__ in _CONTAINERS and x and id(x) not in full:
            x.clear()  # it was empty
    for x, copy in contents:
        _restore_contents(x, copy)


def _restore_contents(x: Any, copy: Any) -> None:
    if not _same(x, copy):
        x.clear()
        (x.extend if isinstance(x, (list, collections.deque)) else x.update)(copy)


def _refill(cell: types.CellType, old: Any) -> None:
    if cell.cell_contents is not old:
        cell.cell_contents = old


def _only_values(container: Any) -> bool:
    """Whether it holds numbers and texts alone, which takes no loop of Python's to see: an owner of a method may have a
    long list of them."""
    return _UNCHANGING.issuperset(map(type, _entries(container)))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, set):
        return a == b
    pairs = zip(a.items(), b.items()) if isinstance(a, dict) else zip(enumerate(a), enumerate(b))
    return len(a) == len(b) and all(k == m and x is y for (k, x), (m, y) in pairs)


def modules_of(critic: Any) -> list[nn.Module]:
    """The modules that a critic consists of, as far as they can be found."""
    return list(dict.fromkeys(m for root in _roots(critic) for m in root.modules()))


def _roots(critic: Any) -> Iterator[nn.Module]:
    """Itself; or what a function refers to."""
    if isinstance(critic, nn.Module):
        yield critic
    elif isinstance(critic, functools.partial):
        for part in (critic.func, *critic.args, *critic.keywords.values()):
            yield from _roots(part)
    elif hasattr(critic, "__self__"):
        yield from _in_object(critic.__self__)
    elif hasattr(critic, "__code__"):
        for x in _referred_to(critic):
            yield from _in_object(x)
    else:
        yield from _in_object(critic)


def _referred_to(function: Any) -> list[Any]:
    """What the code of a function finds by name."""
    code = getattr(function, "__code__", None)
    if code is None or not hasattr(function, "__globals__"):
        return []
    cells = (c.cell_contents for c in function.__closure__ or () if _is_full(c))
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    names = (function.__globals__.get(name) for name in code.co_names)
    return [*cells, *defaults, *names]


def _in_object(x: Any) -> Iterator[nn.Module]:
    """A module, or those in a container, or those that an object has for attributes."""
    if isinstance(x, nn.Module):
        yield x
    elif x.__class__ in _CONTAINERS or isinstance(x, tuple):
        yield from _in_container(x, set())
    elif not isinstance(x, type) and not callable(getattr(x, "__code__", None)):
        for value in list(getattr(x, "__dict__", {}).values()):
            if isinstance(value, nn.Module):
                yield value
            elif value.__class__ in _CONTAINERS or isinstance(value, tuple):
                yield from _in_container(value, set())


def _in_container(x: Any, seen: set[int]) -> Iterator[nn.Module]:
    seen.add(id(x))
    if _only_values(x):
        return
    for value in list(_entries(x)):
        if isinstance(value, nn.Module):
            yield value
        elif (value.__class__ in _CONTAINERS or isinstance(value, tuple)) and id(value) not in seen:
            yield from _in_container(value, seen)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _of_generator(x: Any) -> Callable[[], None] | None:
    """What gives a generator of random numbers its present state back; None for what is none. One of torch's is known
    when it is drawn from."""
    if isinstance(x, random.Random):
        return functools.partial(x.setstate, x.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(x, numpy.random.RandomState):
        return functools.partial(x.set_state, x.get_state())
    if isinstance(x, numpy.random.Generator):
        return functools.partial(setattr, x.bit_generator, "state", x.bit_generator.state)
    return None


# ---- random numbers: each saves a state, and returns what restores it ------------------------------------------


def _of_torch(inputs: Sequence[Tensor]) -> Callable[[], None]:
    return functools.partial(torch.set_rng_state, torch.get_rng_state())


def _of_devices(inputs: Sequence[Tensor]) -> Callable[[], None] | None:
    devices = {x.device for x in inputs if x.device.type == "cuda"}
    if not devices or torch.cuda.is_current_stream_capturing():
        return None
    states = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore() -> None:
        for device, state in states:
            torch.cuda.set_rng_state(state, device)

    return restore


def _of_python(inputs: Sequence[Tensor]) -> Callable[[], None]:
    return functools.partial(random.setstate, random.getstate())


def _of_numpy(inputs: Sequence[Tensor]) -> Callable[[], None] | None:
    numpy = sys.modules.get("numpy")
    return functools.partial(numpy.random.set_state, numpy.random.get_state()) if numpy is not None else None


_RANDOM = (_of_torch, _of_devices, _of_python, _of_numpy)
