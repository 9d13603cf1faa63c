"""What happens around the forward of the module that was accelerated."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from gankern.acceleration._compiled import has_compiled_parts
from gankern.acceleration._scope import Deferred, Interception, listed, preserve, say, settle, state
from gankern.core.dispatch import last_implementation
from gankern.core.torch_internals import recomputed, transformed
from gankern.nn.utils._group import SpectralNormGroup


@dataclass(frozen=True)
class Plan:
    group: SpectralNormGroup | None
    fast_double_backward: bool
    usefulness: Usefulness


class Usefulness:
    """Whether torch's functions are watched: a few times for each kind of call, and further where that was of use. It
    costs a few microseconds an operation, which a small model would notice."""

    patience = 4
    most = 64  # kinds of calls that are told apart

    def __init__(self) -> None:
        self.useless: dict[Any, int] = {}  # how often watching was of no use, by kind of call

    def __reduce__(self):
        return Usefulness, ()

    def of(self, key: Any) -> bool:
        times = self.useless.get(key)
        return times < self.patience if times is not None else len(self.useless) < self.most

    def note(self, key: Any, met: bool) -> None:
        self.useless[key] = 0 if met else self.useless.get(key, 0) + 1


def _kind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What may decide which operations a forward calls: modes, the sizes of tensors and arguments such as depths."""
    values = (*args, *kwargs.values()) if kwargs else args
    parts = [x.shape if isinstance(x, Tensor) else x if type(x) in (int, bool, str) else type(x) for x in values]
    return module.training, state.double, torch.is_grad_enabled(), *parts


_interception = Interception()


def root_forward(module: nn.Module, plan: Plan, inner: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or transformed() or recomputed():
        return type(module).forward(module, *args, **kwargs) if inner is None else inner(*args, **kwargs)
    double, intercepting, met = state.double, state.intercepting, state.met
    if plan.fast_double_backward and not double:
        state.double = torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())
        )
    compiled = has_compiled_parts(module)
    try:
        if plan.group is not None and not compiled:
            with listed(f"spectral norm of {len(plan.group)} layers"):
                plan.group.prepare(module)
                say(f"gankern: spectral norm, all in one call ({last_implementation('spectral_norm')})")
        # A compiled part may be given what a function mode sees, but not a value that waits.
        kind = None if compiled or intercepting else _kind(module, args, kwargs)
        if kind is None or not plan.usefulness.of(kind):
            return type(module).forward(module, *args, **kwargs) if inner is None else inner(*args, **kwargs)
        state.intercepting, state.grad_mode, state.met = True, torch.is_grad_enabled(), False
        with _interception, _hooks_see_values(module):
            result = type(module).forward(module, *args, **kwargs) if inner is None else inner(*args, **kwargs)
        settle()
        preserve()
        plan.usefulness.note(kind, state.met)
        return tree_map_only(Deferred, Deferred.value, result) if type(result) is not Tensor else result
    finally:
        state.double, state.intercepting = double, intercepting
        if not intercepting:
            state.waiting, state.fused, state.met = (), (), met
        if plan.group is not None:
            plan.group.clear(module)


# ---- hooks ------------------------------------------------------------------------------------------------------


class _Hooked:
    """The modules inside a root that have hooks on what they return, found out again where a hook was registered
    since, anywhere."""

    def __init__(self) -> None:
        self.registered = -1  # how many hooks there had been
        self.modules: list[nn.Module] = []


_hooked: weakref.WeakKeyDictionary[nn.Module, _Hooked] = weakref.WeakKeyDictionary()
_FIRST = -1  # the key of a hook before all others: those of torch count from 0


@contextlib.contextmanager
def _hooks_see_values(root: nn.Module) -> Iterator[None]:
    """Within it, hooks on the modules inside are given computed tensors, never one that waits."""
    hooked = _hooked.setdefault(root, _Hooked())
    if hooked.registered != RemovableHandle.next_id:
        hooked.registered = RemovableHandle.next_id
        inner = itertools.islice(root.modules(), 1, None)
        hooked.modules = [m for m in inner if m._forward_hooks or m._backward_hooks or m._backward_pre_hooks]
    added = [m for m in hooked.modules if _FIRST not in m._forward_hooks]
    for module in added:
        hooks: Any
        for hooks, first in ((module._forward_pre_hooks, _settle_inputs), (module._forward_hooks, _settle_result)):
            hooks[_FIRST] = first
            hooks.move_to_end(_FIRST, last=False)
    try:
        yield
    finally:
        for module in added:
            module._forward_pre_hooks.pop(_FIRST, None)
            module._forward_hooks.pop(_FIRST, None)


def _settle_inputs(module: nn.Module, args: Any) -> Any:
    return tree_map_only(Deferred, Deferred.value, args)


def _settle_result(module: nn.Module, args: Any, result: Any) -> Any:
    return tree_map_only(Deferred, Deferred.value, result)
