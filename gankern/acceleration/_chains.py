"""Several operations in a row that together compute what one of ours does, wherever in a forward they stand: the
minibatch's standard deviation that a discriminator computes between two of its layers, a bias, LeakyReLU and factor, a
pixel norm.

Each operation that runs is written down as an expression (see :mod:`gankern.acceleration._expressions`) and waits; as
soon as somebody wants the value, the expression of the whole chain is compared with those of our formulas, and where it
is one of them, ours runs; else the operations run as they came. So what is known is what ran, with its arguments and
for these sizes, whoever called it: a closure, a decorated function, a lambda. Nothing is concluded from values.

A chain is of one tensor, and of one more that is added to its channels.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gankern.acceleration import _known
from gankern.acceleration._expressions import INPUT, Joined, Unknown, Value, axes_of, is_plain, node
from gankern.acceleration._known import Found
from gankern.acceleration._read import Reader
from gankern.acceleration._scope import (
    PLAIN,
    STEPS,
    Deferred,
    Pair,
    _versions,
    defer,
    is_half,
    joined,
    may_defer,
    settle,
    state,
)
from gankern.core.dispatch import last_implementation

FORMS = (_known._as_bias_act, _known._as_pixel_norm, _known._as_stddev)
BIAS = "bias"  # what the other tensor of a chain is called
# Values from which on a chain is begun, measured on the CPU: fused, half a million values were not faster.
# For a variance over samples torch takes so long that the smallest is worth it.
FROM = {"add": 2**21, "pow": 2**21, "view": 0, "var": 0, "mean": 0}
# Microseconds that ours is taken to be worth, for a value and for each operation that does not run. More was measured.
WORTH = {"minibatch_stddev": 0.02, "bias_act": 4e-4, "pixel_norm": 4e-4}
AN_OPERATION = 5.0


class Step:
    """A chain of operations on a tensor of one size, as an expression."""

    def __init__(self, origin: Origin, value: Value | Joined) -> None:
        self.origin, self.value = origin, value
        self._found: Found | bool | None = False  # not asked yet

    def found(self) -> Found | None:
        """What of ours it computes."""
        if self._found is False:
            self._found = next(self._all(), None)
        return self._found  # type: ignore[return-value]

    def _all(self) -> Iterator[Found]:
        for form in FORMS:
            yield from form(self.origin.reader, self.origin.value, self.value, True)


class Origin:
    """Where chains begin: a tensor of one size, and perhaps another one; the steps that were met from there."""

    def __init__(self, shape: torch.Size, bias: torch.Size | None) -> None:
        self.reader = Reader(nn.Module())
        self.value = Value(node("tensor", INPUT), axes_of(INPUT, shape))
        self.bias: Value | None = None
        if bias is not None:
            self.bias = self.reader.cells[BIAS] = Value(node("tensor", BIAS), axes_of(BIAS, bias), BIAS)
        self.steps: dict[Any, Step | None] = {}

    def step(self, name: str, operands: Any, kwargs: dict[str, Any]) -> Step | None:
        """The step that this operation makes; None where it is not known."""
        key = name, _key(operands), repr(kwargs) if kwargs else ""
        if key not in self.steps:
            try:
                value = self.reader.operation(name, *_values(operands), **kwargs)
            except Unknown:
                value = None
            self.steps[key] = Step(self, value) if isinstance(value, (Value, Joined)) else None
        return self.steps[key]


def _key(operand: Any) -> Any:
    """What tells one operation from another: True is not 1 here."""
    if isinstance(operand, (tuple, list)):
        return tuple(map(_key, operand))
    return operand if isinstance(operand, (Step, Value)) else repr(operand)


def _values(operands: Any) -> Any:
    return type(operands)(
        _values(o) if isinstance(o, (tuple, list)) else o.value if isinstance(o, Step) else o for o in operands
    )


@dataclass(eq=False)
class Link:
    """One operation of a chain that waits."""

    step: Step
    start: Any  # what is known of the place where the chain began
    chains: Chains
    run: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: list[Pair]


class Chains:
    """Of one accelerated module: the chains that were met. They go with no copy, but are found out anew."""

    patience = 4  # how often a chain may turn out to be none of ours before such are not begun any more
    most = 256

    def __init__(self) -> None:
        self.origins: dict[Any, Origin] = {}
        self.misses: dict[Any, int] = {}

    def __reduce__(self) -> Any:
        return Chains, ()

    def origin(self, shape: torch.Size, bias: torch.Size | None) -> Origin | None:
        key = shape, bias
        if key not in self.origins and len(self.origins) < self.most:
            self.origins[key] = Origin(shape, bias)
        return self.origins.get(key)


# ---- where a chain begins ---------------------------------------------------------------------------------------


_BEGINNINGS = {"view", "reshape", "var", "mean", "pow", "square", "mul", "add"}


def _begins(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """The tensors of a chain that may begin with this operation. Few do: most of what a model calls is ruled out here,
    so that it costs next to nothing."""
    if name not in _BEGINNINGS:
        return None
    x = args[0] if args else kwargs.get("input")
    if type(x) is not Tensor or x.dtype not in (torch.float32, torch.float64) or not 2 <= x.ndim <= 4:
        return None
    bias: Any = None
    if name in ("view", "reshape"):
        # The samples in groups: [N, C, H, W] as [G, N / G, ...] or [N / G, G, ...].
        if x.ndim != 4:
            return None
        sizes = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        if len(sizes) < 5 or not all(type(n) is int for n in sizes):
            return None
        known = math.prod(n for n in sizes if n != -1)
        first = [x.numel() // max(known, 1) if n == -1 else n for n in sizes[:2]]
        if first[0] * first[1] != x.shape[0]:
            return None
        name = "view"
    elif name in ("var", "mean"):
        if x.ndim != 4 or (args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))) not in (0, [0], (0,)):
            return None
    elif name in ("pow", "square"):
        if (name == "pow" and (len(args) < 2 or args[1] != 2)) or x.ndim == 3:
            return None
        name = "pow"
    elif name == "mul":
        if len(args) < 2 or args[1] is not x or x.ndim == 3:
            return None
        name = "pow"
    else:  # add
        bias = args[1] if len(args) == 2 and not kwargs else None
        if type(bias) not in (Tensor, nn.Parameter) or bias.numel() != x.shape[1] or bias.numel() == x.numel():
            return None
        if bias.ndim not in (x.ndim, x.ndim - 1) or bias.shape[bias.ndim - x.ndim + 1] != x.shape[1]:
            return None
        if bias.dtype != x.dtype or bias.device != x.device or x.shape[1] == 1:
            return None
    return None if x.numel() < max(FROM[name], 1) or not x.is_contiguous() or not may_defer(x) else (x, bias)


# ---- operations ---------------------------------------------------------------------------------------------------


def step(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before an operation: makes it a part of a chain, or NotImplemented."""
    chains = state.chains
    if chains is None:
        return NotImplemented
    name = NAMES[func]
    listed = name == "cat"
    if listed and not (args and type(args[0]) in (list, tuple) and len(args[0]) == 2):
        return NotImplemented
    operands = args[0] if listed else args
    if any(type(a) is Deferred and a.pair.result is not None for a in operands):  # it was computed meanwhile
        operands = [a.pair.result if type(a) is Deferred and a.pair.result is not None else a for a in operands]
        args = (operands, *args[1:]) if listed else tuple(operands)
    first = next((a for a in operands[:2] if type(a) is Deferred), None)
    if first is not None:
        if not is_half(first, "chain"):
            return NotImplemented
        x, bias, link = first.pair.arguments
        if name not in _LONGER and link.step.found() is not None:  # it is complete: another one may begin behind it
            value = first.value()
            again = [value if a is first else a for a in operands]
            return step(func, (again, *args[1:]) if listed else tuple(again), kwargs)
        origin, start = link.step.origin, link.start
    else:
        if listed or (tensors := _begins(name, args, kwargs)) is None:
            return NotImplemented
        x, bias = tensors
        start = name, x.shape, None if bias is None else bias.shape, _key([a for a in args if is_plain(a)])
        if chains.misses.get(start, 0) >= chains.patience:
            return NotImplemented
        origin = chains.origin(x.shape, None if bias is None else bias.shape)
        if origin is None:
            return NotImplemented
    if not all(map(is_plain, kwargs.values())) or kwargs.get("inplace"):
        return NotImplemented
    before: list[Pair] = []
    symbols: list[Any] = []
    for operand in operands:
        if type(operand) is Deferred and is_half(operand, "chain") and operand.pair.arguments[0] is x:
            before.append(operand.pair)
            symbols.append(operand.pair.arguments[2].step)
        elif operand is x:
            symbols.append(origin.value)
        elif bias is not None and operand is bias:
            symbols.append(origin.bias)
        elif is_plain(operand) or type(operand) is torch.Size:
            symbols.append(tuple(operand) if type(operand) is torch.Size else operand)
        else:
            return NotImplemented
    following = origin.step(name, [symbols, *args[1:]] if listed else symbols, kwargs)
    if following is None or (isinstance(following.value, Joined) and following.found() is None):
        return NotImplemented
    settle(pure=True)
    link = Link(following, start, chains, func, _pairs(args), kwargs, before)
    if isinstance(following.value, Joined):
        return _joined(link, x, [o for o in operands if type(o) is Deferred])
    return defer("chain", torch.Size(following.value.shape), _compute, x, bias, link)


def _listed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same, where somebody lists what runs."""
    if state.log is None:
        return step(func, args, kwargs)
    before = len(state.log.frames)
    with state.log.function(func):
        result = step(func, args, kwargs)
    if result is NotImplemented:
        del state.log.frames[before:]
    return result


def _pairs(args: Any) -> Any:
    """With what waits, but without the tensors that stand for it: whether anybody still has these can be seen."""
    return type(args)(a.pair if type(a) is Deferred else _pairs(a) if type(a) in (tuple, list) else a for a in args)


def _compute(x: Tensor, bias: Tensor | None, link: Link) -> Tensor:
    found = link.step.found()
    if found is not None:
        result = found.run(SimpleNamespace(bias=bias), x)
        _ran(found, link, x)
        return result
    link.chains.misses[link.start] = link.chains.misses.get(link.start, 0) + 1
    return link.run(*_computed(link.args), **link.kwargs)


def _computed(args: Any) -> Any:
    return type(args)(a.value() if type(a) is Pair else _computed(a) if type(a) in (tuple, list) else a for a in args)


def _plainly(new: Callable[[Any], Any], x: Tensor, bias: Tensor | None, link: Link) -> Tensor:
    args = tree_map_only(Pair, lambda pair: _plainly(new, *pair.origin.arguments), link.args)
    return link.run(*tree_map_only(Tensor, new, args), **link.kwargs)


def _ran(found: Found, link: Link, x: Tensor) -> None:
    link.chains.misses[link.start] = 0
    pending, operations = list(link.before), 1
    while pending:
        pair = pending.pop()
        if pair.spent:
            continue
        pair.spent, operations = True, operations + 1
        if pair.frame is not None:
            pair.frame.now, pair.frame.why = "in one with what follows", ""
        if pair.result is None:
            pending += pair.arguments[2].before
    worth = x.numel() * WORTH[found.name] + AN_OPERATION * operations
    joined(None, f"gankern: {found.name} ({last_implementation(found.name)}), for {operations} operations", worth)


def _joined(link: Link, x: Tensor, appended: list[Deferred]) -> Tensor:
    """x with what is appended to its channels."""
    found: Any = link.step.found()
    with torch._C.DisableTorchFunction():
        for pair in link.before:
            pair.check()
        result = found.run(SimpleNamespace(bias=None), x)
    _ran(found, link, x)
    for each in appended:  # who still wants it alone takes it from there
        pair = each.pair
        pair.kind, pair.compute, pair.arguments = "part", _part, (result, x.shape[1])
        pair.versions = _versions(pair.arguments)
        state.fused = (*state.fused, weakref.ref(each))
    return result


def _part(result: Tensor, start: int) -> Tensor:
    return result[:, start:].clone()


_LONGER = ("mul", "div", "clamp")  # what may follow on a chain that is complete already

NAMES: dict[Any, str] = {
    getattr(place, name): name
    for name in ("add", "cat", "clamp", "contiguous", "div", "expand", "expand_as", "flatten", "mean", "mul", "pow",
                 "repeat", "reshape", "rsqrt", "sqrt", "square", "squeeze", "sub", "sum", "unflatten", "unsqueeze",
                 "var", "view")
    for place in (Tensor, torch)
    if hasattr(place, name)
}  # fmt: skip
NAMES |= {F.leaky_relu: "leaky_relu", F.relu: "relu", torch.relu: "relu", Tensor.relu: "relu"}
NAMES |= {Tensor.__pow__: "pow", torch.concat: "cat", torch.multiply: "mul", torch.true_divide: "div"}

STEPS.update(dict.fromkeys(NAMES, _listed))
PLAIN["chain"] = _plainly
