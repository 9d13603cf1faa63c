"""Expressions over labelled axes: what a tensor is to who reads code, or writes down what runs.

A value has no memory layout: it is an expression (``node``) over labelled axes, and ``dims`` says which axes make up
each dimension. An axis is (tensor, stride, size): an index into the elements of that tensor in their logical order.
Views, squeezes, ``keepdim``, transposes and broadcasts change ``dims`` alone, which is why the many ways of writing a
formula read as one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

INPUT = "(input)"  # the name of the tensor that a layer is given
Axis = tuple[str, int, int]  # tensor, stride, size; of an axis along which a value is constant: "", 0, size


class Node(tuple):
    """An expression: the name of an operation, what it is of, and options. There is one object for each expression, so
    that two are compared at once however deep they are."""

    serial: int
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other


_nodes: dict[tuple, Node] = {}
_MOST_NODES = 200_000  # after which they are forgotten; one that is read meanwhile is then not recognised
_counter = itertools.count()


def node(*parts: Any) -> Node:
    found = _nodes.get(parts)
    if found is None:
        if len(_nodes) > _MOST_NODES:
            _nodes.clear()
        found = Node(parts)
        found.serial = next(_counter)
        found = _nodes.setdefault(parts, found)
    return found


class Unknown(Exception):
    """What the code does is not known; the message says at what it was given up."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor."""

    node: Node
    dims: tuple[tuple[Axis, ...], ...]
    cell: str | None = None  # of a module's own tensor: its name
    fresh: bool = False  # whether an operation made it, so that nothing else shares its memory

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(size for _, _, size in axes) for axes in self.dims)

    def same(self, other: Any) -> bool:
        return isinstance(other, Value) and self.node is other.node and self.dims == other.dims


@dataclass(frozen=True, eq=False)
class Joined:
    """torch.cat of values, which nothing but a result may be."""

    parts: tuple[Value, ...]
    dim: int


def raise_unless(known: bool, reason: str) -> None:
    if not known:
        raise Unknown(reason)


# ---- what is no tensor -----------------------------------------------------------------------------------------

PLAIN = (int, float, bool, str, type(None))


def is_plain(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) in (tuple, list) and all(map(is_plain, value)))


def fixed(value: Any) -> Any:
    """Without lists, which the code that is read could change."""
    return tuple(map(fixed, value)) if type(value) in (tuple, list) else value


def same_values(a: Any, b: Any) -> bool:
    """Equal, and of the same types: True is not 1 here."""
    if type(a) is not type(b):
        return False
    if type(a) in (tuple, list):
        return len(a) == len(b) and all(map(same_values, a, b))
    return a == b


def leaves(values: Any) -> Any:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from leaves(value)
        else:
            yield value


# ---- axes -----------------------------------------------------------------------------------------------------


def merged_axes(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Without axes of size 1, and neighbours that count on from each other as one."""
    merged: list[Axis] = []
    for tensor, stride, size in axes:
        if size == 1:
            continue
        if merged and merged[-1][0] == tensor and merged[-1][1] == stride * size:
            merged[-1] = (tensor, stride, merged[-1][2] * size)
        else:
            merged.append((tensor, stride, size))
    return tuple(merged)


def overlap(axes: Sequence[Axis]) -> bool:
    """Whether two axes of one tensor are (partly) the same."""
    spans = [(t, s, s * n) for t, s, n in axes if t]
    return any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a, b in itertools.combinations(spans, 2))


def axes_of(name: str, shape: Sequence[int]) -> tuple[tuple[Axis, ...], ...]:
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return tuple(merged_axes([(name, stride, size)]) for stride, size in zip(strides, shape))


def bound_axes(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Axes that are summed over, in an order of their own."""
    return merged_axes(sorted(axes, key=lambda axis: (axis[0], -axis[1])))


def reshaped(x: Value, shape: Sequence[int]) -> tuple[tuple[Axis, ...], ...]:
    raise_unless(all(type(n) is int for n in shape), "a size that is not a number")
    total, sizes = math.prod(x.shape), list(shape)
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        raise_unless(rest > 0 and total % rest == 0, "a size that does not fit")
        sizes[sizes.index(-1)] = total // rest
    raise_unless(math.prod(sizes) == total and min(sizes, default=1) > 0, "a size that does not fit")
    left, dims = [axis for axes in x.dims for axis in axes], []
    for size in sizes:
        axes: list[Axis] = []
        while size > 1:
            tensor, stride, count = left.pop(0)
            if size % count == 0:
                axes.append((tensor, stride, count))
                size //= count
            elif count % size == 0:
                axes.append((tensor, stride * (count // size), size))
                left.insert(0, (tensor, stride, count // size))
                size = 1
            else:
                raise Unknown("a view across the axes of a tensor")
        dims.append(tuple(axes))
    return tuple(dims)


# ---- expressions ----------------------------------------------------------------------------------------------


def number(value: float) -> Node:
    return node("number", float(value))


def constant(of: Node) -> Node:
    """Without a gradient."""
    return of if of[0] in ("number", "constant") else node("constant", stripped(of, {}))


def stripped(of: Any, done: dict[Node, Any]) -> Any:
    if not isinstance(of, tuple):
        return of
    if not isinstance(of, Node):
        return tuple(stripped(part, done) for part in of)
    if of not in done:
        parts = tuple(stripped(part, done) for part in of)
        match parts:
            case "constant", inner:
                done[of] = inner
            case ("add" | "mul") as name, a, b:
                done[of] = node(name, *ordered(a, b))
            case "network", operands, links:
                done[of] = node("network", ordered(*operands), links)
            case _:
                done[of] = node(*parts)
    return done[of]


def nodes_in(of: Any) -> set[Node]:
    """All operations in an expression."""
    found: set[Node] = set()
    pending: list[Any] = [of]
    while pending:
        part = pending.pop()
        if isinstance(part, Node):
            if part in found:
                continue
            found.add(part)
        if isinstance(part, tuple):
            pending += part
    return found


def numbers_in(of: Node) -> set[float]:
    return {part[1] for part in nodes_in(of) if part[0] == "number"}


def ordered(*nodes: Node) -> tuple[Node, ...]:
    """Of what commutes."""
    return tuple(sorted(nodes, key=lambda each: each.serial))


def pointwise(name: str, *nodes: Node) -> Node:
    """One node for the ways of writing the same."""
    match name, nodes:
        case "add" | "sub", (a, ("number", 0.0)):
            return a
        case "add", (("number", 0.0), a):
            return a
        case "mul", (a, b) if a is b:
            return node("square", a)
        case "mul", (("number", 1.0), a) | (a, ("number", 1.0)):
            return a
        case "mul" | "add", (a, b):
            return node(name, *ordered(a, b))
        case "div", (("number", 1.0), ("sqrt", b)):
            return node("rsqrt", b)
        case "div", (a, ("sqrt", b)):
            return node("mul", *ordered(a, node("rsqrt", b)))
        case "div", (a, ("number", 1.0)):
            return a
        case "pow", (a, ("number", 2.0)):
            return node("square", a)
        case "pow", (a, ("number", 0.5)):
            return node("sqrt", a)
        case "pow", (a, ("number", -0.5)):
            return node("rsqrt", a)
    return node(name, *nodes)


def reduced(name: str, of: Node, axes: tuple[Axis, ...]) -> Node:
    match name, of:
        case "mean", _ if not axes:
            return of
        case "mean" | "sum", (inner, what, others) if inner == name:
            return node(name, what, bound_axes((*others, *axes)))
        case "mean", ("square", ("sub", a, ("mean", b, others))) if a is b and others == axes:
            return node("var", a, axes, 0)
    return node(name, of, axes)
