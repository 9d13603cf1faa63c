"""What happens around the forward of the module that was accelerated."""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from gankern.acceleration._chains import Chains
from gankern.acceleration._compiled import compiles, has_compiled_parts
from gankern.acceleration._layers import Replaced
from gankern.acceleration._scope import (
    Deferred,
    Interception,
    Kept,
    note_kept,
    preserve,
    settle,
    state,
)
from gankern.core.native import nodes
from gankern.core.torch_internals import functions_replaced, recomputed, seen_by_others, transformed

CHANGES = "_gankern_changes"  # of a module: what restore() undoes, in __dict__, so that it goes into copies and pickles


@dataclass(frozen=True)
class Plan:
    fast_double_backward: bool
    leaves: Leaves
    gains: Gains
    chains: Chains
    kept: Kept


class Leaves:
    """The layers whose forward was replaced for what they may gain; put back for calls in which none does, so that
    these cost nothing."""

    def __init__(self, replaced: list[tuple[nn.Module, Any]]) -> None:
        self.replaced, self.there = replaced, True

    def put(self, there: bool) -> None:
        if self.there is there or compiles():  # the compiler would take it for another program
            return
        self.there = there
        for module, forward in self.replaced:
            own = module.__dict__.get("forward")
            if there and own is None and CHANGES in module.__dict__:
                module.__dict__["forward"] = forward
            elif not there and own is forward:
                del module.__dict__["forward"]


# What a call needs: nothing of ours, that for now, the layers' forwards, torch's functions watched too.
PLAIN, LATER, LEAVES, WATCHED = range(4)


class Gains:
    """What each kind of call gains, found out in the first few: by which operations ran and of which sizes, never by a
    clock, so that the same calls run the same code in every run.

    Nothing but speed depends on it: what is not watched is the original. So inputs of ever new sizes are watched
    where there may be something to gain. A kind of which a larger one gained nothing is taken to gain nothing; and once
    FREE forwards were watched in vain, no more than one in SHARE is: what is not known yet waits."""

    patience = 4
    most = 64  # kinds of calls that are told apart
    free, share = 8, 32
    # Microseconds that it costs to watch an operation, and a forward, and to have a layer's forward replaced; measured.
    operation, forward, layer = 20.0, 30.0, 6.0

    def __init__(self) -> None:
        self.useless: dict[Any, list[int]] = {}  # by kind of call: how often either was of no use
        self.plain: set[Any] = set()  # without the native library: what RootForward would remember
        self.nothing: list[Any] = []  # the largest kinds that gain nothing
        self.forwards = self.in_vain = 0

    def __reduce__(self) -> Any:
        return Gains, ()

    def need(self, kind: Any) -> int:
        self.forwards += 1
        times = self.useless.get(kind)
        if times is None:
            if any(_covers(known, kind) for known in self.nothing):
                return PLAIN
            if len(self.useless) >= self.most:
                return LEAVES
        elif times[0] == 0 or times[0] >= self.patience:
            return self._settled(*times)
        return WATCHED if self.in_vain < self.free + self.forwards // self.share else LATER

    def _settled(self, watching: int, leaves: int) -> int:
        return WATCHED if watching < self.patience else LEAVES if leaves == 0 else PLAIN

    def note(self, kind: Any, layers: int) -> None:
        times = self.useless.setdefault(kind, [0, 0])
        worth = state.gained_by_watching > self.operation * state.watched + self.forward
        times[0] = 0 if worth else times[0] + 1
        times[1] = 0 if state.gained - state.gained_by_watching > self.layer * layers else times[1] + 1
        self.in_vain += min(times) > 0
        if self._settled(*times) == PLAIN:
            self.nothing = [known for known in self.nothing if not _covers(kind, known)] + [kind]


def _covers(known: Any, kind: Any) -> bool:
    """Whether two kinds of calls differ in nothing but in sizes of tensors, none of which is larger in the second."""
    return len(known) == len(kind) and all(
        len(a) == len(b) and all(n <= m for n, m in zip(b, a))
        if isinstance(a, torch.Size) and isinstance(b, torch.Size)
        else a == b
        for a, b in zip(known, kind)
    )


def _kind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What may decide which operations a forward calls: modes, the sizes of tensors and arguments such as depths."""
    modes = module.training, state.double, torch.is_grad_enabled()
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
        return modes, args[0].shape
    values = (*args, *kwargs.values())
    return modes, *(x.shape if isinstance(x, Tensor) else x if type(x) in _DECIDING else type(x) for x in values)


_DECIDING = (int, bool, str)


_interception = Interception()


class _PythonForward(functools.partial):
    """In place of the native library's class, without it: root_forward looks first."""

    def remember(self, module: nn.Module, args: tuple[Any, ...], differentiates: bool) -> None:
        if len(args) == 1 and type(args[0]) is Tensor:
            shortest = args[0].shape, module.training, is_grad_enabled(), args[0].requires_grad
            self.args[1].gains.plain.add(shortest)

    def forget(self) -> None: ...


_native = nodes.plain_forward(state)
PlainForward: Any = _PythonForward if _native is NotImplemented else _native


# In this order: from 3.12 on Python would take the call of functools.partial, which Replaced inherits, before that of
# the native class.
class RootForward(PlainForward, Replaced):
    """Stands in place of the forward of the module that was accelerated: root_forward with all that it has to know.
    The calls that it remembers, by modes and arguments, run the class's forward without it."""


def root_forward(module: nn.Module, plan: Plan, inner: Any, *args: Any, **kwargs: Any) -> Any:
    # Written out: in a network of two tiny layers each microsecond is seen.
    if plan.gains.plain and not is_dynamo_compiling() and not plan.leaves.there and len(args) == 1 and not kwargs:
        (x,) = args
        if type(x) is Tensor:
            differs = x.requires_grad
            if (x.shape, module.training, is_grad_enabled(), differs) in plan.gains.plain:
                if not differs:
                    return type(module).forward(module, x)
                before = state.double
                state.double = before or (plan.fast_double_backward and is_grad_enabled())
                try:
                    return type(module).forward(module, x)
                finally:
                    state.double = before
    if torch.compiler.is_compiling() or transformed() or recomputed() or seen_by_others() or functions_replaced():
        return type(module).forward(module, *args, **kwargs) if inner is None else inner(*args, **kwargs)
    double, intercepting = state.double, state.intercepting
    if plan.fast_double_backward and not double:
        state.double = torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())
        )
    compiled = has_compiled_parts(module)
    try:
        # A compiled part may be given what a function mode sees, but not a value that waits.
        kind = None if compiled or intercepting else _kind(module, args, kwargs)
        need = LEAVES if kind is None else plan.gains.need(kind)
        own = module.__dict__.get("forward")
        if plan.leaves.there is (need < LEAVES):
            plan.leaves.put(need >= LEAVES)
            if plan.leaves.there and isinstance(own, RootForward):
                own.forget()
        settled_for_good = need == PLAIN and not plan.leaves.there and inner is None and not double and not kwargs
        if settled_for_good and isinstance(own, RootForward):
            own.remember(module, args, state.double)
        if need < WATCHED:
            return type(module).forward(module, *args, **kwargs) if inner is None else inner(*args, **kwargs)
        state.intercepting, state.grad_mode, state.chains = True, torch.is_grad_enabled(), plan.chains
        state.gained = state.gained_by_watching = 0.0
        state.watched, state.kept, state.call = 0, plan.kept, kind
        with _interception, _hooks_see_values(module):
            result = type(module).forward(module, *args, **kwargs) if inner is None else inner(*args, **kwargs)
        settle()
        preserve()
        if state.tried:
            note_kept()
        plan.gains.note(kind, len(plan.leaves.replaced))
        return tree_map_only(Deferred, Deferred.value, result) if type(result) is not Tensor else result
    except BaseException:
        if not intercepting:
            settle(pure=True)  # a norm that ran before the error has moved its statistics
        raise
    finally:
        state.double, state.intercepting = double, intercepting
        if not intercepting:
            state.waiting = state.fused = state.tried = ()
            state.chains, state.exposed = None, False


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
