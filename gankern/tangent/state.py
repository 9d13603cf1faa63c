"""What running a critic changes beside its result, so that an attempt that was given up leaves no trace."""

from __future__ import annotations

import collections
import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class State:
    """Buffers, frozen parameters and attributes of the critic's modules, and the random numbers; as of now.

    Parameters that are trained are not among it: the tape refuses to write them. Attributes are restored with the
    contents of lists, dicts and sets; objects of other kinds are the same ones as before.
    """

    def __init__(self, modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> None:
        self._modules = []
        self._tensors: dict[int, tuple[Tensor, Tensor, bool]] = {}
        for module in modules:
            attributes = module.__dict__.copy()
            contents = [(x, x.copy()) for x in attributes.values() if x.__class__ in _CONTAINERS and x]
            self._modules.append((module, attributes, contents))
            self._keep(attributes.values())
            for container, _ in contents:
                self._keep(container.values() if isinstance(container, dict) else container)
        self._random = [restore for save in _RANDOM if (restore := save(inputs)) is not None]

    def _keep(self, values: Iterable[Any]) -> None:
        for x in values:
            if isinstance(x, Tensor) and not x.requires_grad and x.layout == torch.strided and not is_lazy(x):
                self._tensors.setdefault(id(x), (x, x.detach().clone(), x.is_inference()))

    def restore(self) -> None:
        for module, attributes, contents in self._modules:
            _restore_attributes(module.__dict__, attributes, contents)
        for x, old, inference in self._tensors.values():
            with torch.inference_mode() if inference else torch.no_grad():
                x.copy_(old)
        for restore in self._random:
            restore()


_CONTAINERS = (list, dict, set, collections.deque, collections.OrderedDict)


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
        if not _same(x, copy):
            x.clear()
            (x.extend if isinstance(x, (list, collections.deque)) else x.update)(copy)


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
        cells = critic.__closure__ or ()
        names = (critic.__globals__.get(name) for name in critic.__code__.co_names)
        for x in (*(c.cell_contents for c in cells if _is_full(c)), *(critic.__defaults__ or ()), *names):
            yield from _in_object(x)
    else:
        yield from _in_object(critic)


def _in_object(x: Any) -> Iterator[nn.Module]:
    """A module, or those that an object has for attributes."""
    if isinstance(x, nn.Module):
        yield x
    elif not isinstance(x, type) and not callable(getattr(x, "__code__", None)):
        yield from (v for v in getattr(x, "__dict__", {}).values() if isinstance(v, nn.Module))


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


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
