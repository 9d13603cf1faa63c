"""What a tape of :mod:`gankern.tangent.tape` consists of: nodes, one an operator, with their three linear maps.

For an operator y = f(x), J its Jacobian at the point where the critic ran:

- ``delta``: the inputs' cotangents J^T delta (and the node remembers delta where push needs it);
- ``push``: the outputs' tangents J t, and the derivative of <delta, J t> with respect to x and the weights, with delta
  and t held constant: the operator's own part of the second cotangents. For a weight this is the penalty's gradient,
  for an input it is the operator's curvature;
- ``pull``: J^T rho for inputs and weights, below an operator that has curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gankern.core.autograd import Rule
from gankern.core.layout import memory_format

INPUT = 1  # a value that depends on the critic's inputs
WEIGHT = 2  # a value that depends on a parameter

Grads = Sequence[Tensor | None]
Given = Sequence[Any]  # the same, where a node knows which of them are there


class NotCovered(Exception):
    """The tangent form does not cover something that the critic does; the message says what, and in which module."""


class LayoutMatters(Exception):
    """The critic does what depends on how its input lies in memory; the tape must take that as it is."""


class Node:
    """``ins`` and ``outs`` are numbers of values, None for what is constant; ``kinds`` says of each of ``ins`` what it
    depends on. All lists that go in and out have an entry for each of ``ins`` or ``outs``; None stands for zero.
    """

    __slots__ = ("dead", "ins", "kinds", "outs", "second")
    curved = False  # whether J depends on the inputs
    ins: Sequence[int | None]
    outs: list[int | None]
    kinds: list[int]
    second: bool  # whether second cotangents flow through it
    dead: bool  # no cotangent came to it

    def delta(self, grads: Grads, needed: Sequence[bool]) -> Grads:
        return self.pull(grads, needed)

    def push(self, tangents: Grads, needed: Sequence[bool]) -> tuple[Grads, Grads]:
        raise NotImplementedError

    def pull(self, grads: Grads, needed: Sequence[bool]) -> Grads:
        raise NotImplementedError

    def active(self, i: int) -> bool:
        return bool(self.kinds[i] & INPUT)


class Linear(Node):
    """A linear map of one input, which needs no weights: y = forward(x)."""

    __slots__ = ("forward", "transpose")

    def __init__(self, forward: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]) -> None:
        self.forward, self.transpose = forward, transpose

    def push(self, tangents: Given, needed: Sequence[bool]) -> tuple[Grads, Grads]:
        return (self.forward(tangents[0]),), ()

    def pull(self, grads: Given, needed: Sequence[bool]) -> Grads:
        return (self.transpose(grads[0]),)


class Gate(Node):
    """y = m x with a mask m of slopes that y tells: ``backward(g, y, *options)`` is m g. Where nobody else holds what
    comes in, it is overwritten."""

    __slots__ = ("backward", "fresh_grad", "fresh_tangent", "options", "y")

    def __init__(self, backward: Any, y: Tensor, *options: float) -> None:
        self.backward, self.y, self.options = backward, y.detach(), options
        self.fresh_grad = self.fresh_tangent = False

    def delta(self, grads: Given, needed: Sequence[bool]) -> Grads:
        return (self._mask(grads[0], self.fresh_grad),)

    def push(self, tangents: Given, needed: Sequence[bool]) -> tuple[Grads, Grads]:
        return (self._mask(tangents[0], self.fresh_tangent),), ()

    def pull(self, grads: Given, needed: Sequence[bool]) -> Grads:
        return (self._mask(grads[0], False),)

    def _mask(self, x: Tensor, fresh: bool) -> Tensor:
        if fresh and x.dtype == self.y.dtype and x.is_contiguous(memory_format=memory_format(self.y)):
            return self.backward.grad_input(x, self.y, *self.options, grad_input=x)
        return self.backward.default(x, self.y, *self.options)


class Sum(Node):
    """y = sum of c_i x_i with numbers c_i; the inputs are broadcast."""

    __slots__ = ("factors", "shape", "shapes")

    def __init__(self, shape: torch.Size, shapes: Sequence[torch.Size], factors: Sequence[float]) -> None:
        self.shape, self.shapes, self.factors = shape, shapes, factors

    def push(self, tangents: Given, needed: Sequence[bool]) -> tuple[Grads, Grads]:
        total: Any = None  # there is one tangent at least
        for t, c in zip(tangents, self.factors):
            if t is not None:
                t = scaled(t, c)
                total = t if total is None else total + t
        return (total.expand(self.shape),), ()

    def pull(self, grads: Given, needed: Sequence[bool]) -> Grads:
        (g,) = grads
        return [
            scaled(sum_to(g, shape), c) if need else None for need, shape, c in zip(needed, self.shapes, self.factors)
        ]


class _Many(Node):
    """A linear map with values of many ``shapes`` on one of its sides, of which some may be missing: zeros."""

    __slots__ = ("forward", "shapes", "transpose")

    def __init__(
        self, forward: Callable[..., Any], transpose: Callable[..., Any], shapes: Sequence[torch.Size]
    ) -> None:
        self.forward, self.transpose, self.shapes = forward, transpose, shapes

    def _all(self, values: Given) -> list[Tensor]:
        like = next(v for v in values if v is not None)
        return [like.new_zeros(shape) if v is None else v for v, shape in zip(values, self.shapes)]


class Join(_Many):
    """A linear map of many inputs to one output; constants among the inputs count as zeros for the tangent."""

    __slots__ = ()

    def push(self, tangents: Given, needed: Sequence[bool]) -> tuple[Grads, Grads]:
        return (self.forward(self._all(tangents)),), ()

    def pull(self, grads: Given, needed: Sequence[bool]) -> Grads:
        return self.transpose(grads[0])


class Parts(_Many):
    """A linear map of one input to many outputs."""

    __slots__ = ()

    def push(self, tangents: Given, needed: Sequence[bool]) -> tuple[Grads, Grads]:
        return self.forward(tangents[0]), ()

    def pull(self, grads: Given, needed: Sequence[bool]) -> Grads:
        return (self.transpose(self._all(grads)),)


class Bilinear(Node):
    """y = f(a, b) + c, linear in a and in b: convolutions, matrix products, products. ``da(g, a, b)`` is f's transpose
    in a, ``db(g, a, b)`` in b; ``add(c)`` is what is added, in y's shape, and ``dc(g)`` its transpose. Inputs: a, b, c.
    """

    __slots__ = ("a", "add", "b", "curved", "da", "db", "dc", "f", "g")
    a: Any  # None where nothing reads it any more
    b: Any
    g: Any  # delta, from its pass to push

    def __init__(
        self,
        f: Callable[..., Tensor],
        da: Callable[..., Tensor],
        db: Callable[..., Tensor],
        add: Callable[[Tensor], Tensor],
        dc: Callable[[Tensor], Tensor],
        a: Tensor,
        b: Tensor,
    ) -> None:
        self.f, self.da, self.db, self.add, self.dc, self.g = f, da, db, add, dc, None
        self.a, self.b = a.detach(), b.detach()

    def delta(self, grads: Given, needed: Sequence[bool]) -> Grads:
        (g,) = grads
        if any(kind & WEIGHT for kind in self.kinds[:2]):
            self.g = g
        result = self.pull(grads, needed)
        if not self.second:  # only pull reads the operand whose partner is no input
            if not self.active(1):
                self.a = None
            if not self.active(0):
                self.b = None
        return result

    def push(self, tangents: Given, needed: Sequence[bool]) -> tuple[Grads, Grads]:
        ta, tb, tc = (*tangents, None)[:3]
        second: list[Tensor | None] = [None, None, None]
        if ta is not None and needed[1]:
            second[1] = self.db(self.g, ta, self.b)
        if tb is not None and needed[0]:
            second[0] = self.da(self.g, self.a, tb)
        self.g = None  # before the tangents are made: where memory is fullest
        terms = []
        if ta is not None:
            terms.append(self.f(ta, self.b))
        if tb is not None:
            terms.append(self.f(self.a, tb))
        if tc is not None:
            # a new tensor in any case, since a gate may write to it
            terms.append(self.add(tc) if terms else self.add(tc).clone(memory_format=torch.contiguous_format))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return (total,), second

    def pull(self, grads: Given, needed: Sequence[bool]) -> Grads:
        (g,) = grads
        da = self.da(g, self.a, self.b) if needed[0] else None
        db = self.db(g, self.a, self.b) if needed[1] else None
        return da, db, self.dc(g) if len(needed) > 2 and needed[2] else None


class Smooth(Node):
    """Any differentiable operator, through autograd within it: its own double backward, and no other's."""

    __slots__ = ("curved", "deltas", "function", "grads", "label", "tensors", "x", "y")
    x: Any  # the inputs and outputs of a run of its own, and the cotangents that came and went; None between the passes
    y: Any
    deltas: Any
    grads: Any
    tensors: Any

    def __init__(self, function: Callable[..., Sequence], tensors: list[Tensor], curved: bool, label: str) -> None:
        self.function, self.curved, self.label = function, curved, label
        self.tensors = [x.detach() for x in tensors]
        self.x = self.y = self.deltas = self.grads = None

    def _run(self) -> None:
        self.x = [x.detach().requires_grad_() for x in self.tensors]
        self.y = self.function(*self.x)
        self.tensors = None

    def _differentiate(self, outputs: Any, inputs: Any, grads: Grads, **options: Any) -> Any:
        try:
            return torch.autograd.grad(outputs, inputs, grads, allow_unused=True, **options)
        except RuntimeError as error:
            raise NotCovered(f"{self.label} cannot be differentiated twice: {error}") from None

    def delta(self, grads: Given, needed: Sequence[bool]) -> Grads:
        with torch.enable_grad():
            self._run()
            pairs = [(y, g) for y, g in zip(self.y, grads) if g is not None and y.requires_grad]
            if not pairs:
                self.grads = [None] * len(needed)
                return self.grads
            self.deltas = [None if g is None else g.detach().requires_grad_() for g in grads]
            pairs = [(y, d) for y, d in zip(self.y, self.deltas) if d is not None and y.requires_grad]
            wanted = [x for x, need in zip(self.x, needed) if need]
            found = iter(self._differentiate(*_split(pairs, wanted), create_graph=True))
            self.grads = [next(found) if need else None for need in needed]
        return [None if g is None else g.detach() for g in self.grads]

    def push(self, tangents: Given, needed: Sequence[bool]) -> tuple[Grads, Grads]:
        nothing = [None] * len(self.y), ()
        pairs = [(g, t) for g, t in zip(self.grads, tangents) if g is not None and t is not None and g.requires_grad]
        if not pairs:
            return nothing
        deltas = [d for d in self.deltas if d is not None]
        # without curvature a second derivative by an input is zero, and need not be computed
        wanted = [need and (self.curved or not kind & INPUT) for need, kind in zip(needed, self.kinds)]
        leaves = [x for x, want in zip(self.x, wanted) if want]
        found = iter(self._differentiate(*_split(pairs, deltas + leaves), retain_graph=self.second))
        outgoing = [None if d is None else next(found) for d in self.deltas]
        second = [next(found) if want else None for want in wanted]
        self.grads = self.deltas = None
        if not self.second:
            self.x = self.y = None
        return outgoing, second

    def pull(self, grads: Given, needed: Sequence[bool]) -> Grads:
        if self.y is None:
            with torch.enable_grad():
                self._run()
        pairs = [(y, g) for y, g in zip(self.y, grads) if g is not None and y.requires_grad]
        if not pairs:
            return [None] * len(needed)
        # The backward of torch's group norm writes to the gradient of a channels_last input on the CPU whether or not
        # there is one, and crashes.
        asked = [True] * len(needed) if self.label.startswith("aten.native_group_norm") else needed
        found = iter(self._differentiate(*_split(pairs, [x for x, ask in zip(self.x, asked) if ask])))
        found = [next(found) if ask else None for ask in asked]
        return [g if need else None for g, need in zip(found, needed)]


class BatchNorm(Smooth):
    """torch's batch norm. Of a batch of one its backward is wrong where either of input and cotangent lies as
    channels_last but for the stride over samples, as a view does, and the other does not: both are laid out alike."""

    __slots__ = ()

    def __init__(self, function: Callable[..., Sequence], tensors: list[Tensor], curved: bool, label: str) -> None:
        super().__init__(function, [_alike(x) for x in tensors], curved, label)

    def delta(self, grads: Given, needed: Sequence[bool]) -> Grads:
        return super().delta([None if g is None else _alike(g) for g in grads], needed)

    def pull(self, grads: Given, needed: Sequence[bool]) -> Grads:
        return super().pull([None if g is None else _alike(g) for g in grads], needed)


def _alike(x: Tensor) -> Tensor:
    if x.dim() < 3 or x.shape[0] != 1:
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def _split(pairs: Sequence[tuple[Any, Any]], inputs: Any) -> Any:
    outputs, grads = zip(*pairs)
    return outputs, inputs, grads


class Kernel(Node):
    """A primitive of this library, through its own rule: ops.autograd.Rule."""

    __slots__ = ("curved", "grads", "options", "roles", "rule", "saved")
    grads: Any  # delta, from its pass to push

    def __init__(self, rule: Rule, options: tuple, tensors: Grads, outputs: Sequence[Tensor], curved: bool) -> None:
        self.rule, self.options, self.curved = rule, options, curved
        self.saved = tuple(rule.saved(options, tensors, outputs))
        non_differentiable = [i % len(outputs) for i in rule.non_differentiable]
        self.roles = []  # of each saved tensor: which input, or else which output, it is
        for x in self.saved:
            places = [("in", i) for i, y in enumerate(tensors) if x is not None and x is y]
            places += [("out", i) for i, y in enumerate(outputs) if x is not None and x is y]
            if x is not None and not places:
                raise NotCovered(f"{rule.name} keeps what is neither its input nor its output")
            constant = not places or (places[0][0] == "out" and places[0][1] in non_differentiable)
            self.roles.append((None, 0) if constant else places[0])
        self.saved = tuple(None if x is None else x.detach() for x in self.saved)
        self.grads = None

    def delta(self, grads: Given, needed: Sequence[bool]) -> Grads:
        self.grads = tuple(grads)
        return self.pull(grads, needed)

    def push(self, tangents: Given, needed: Sequence[bool]) -> tuple[Grads, Grads]:
        wanted = [g is not None for g in self.grads]
        wanted += [role == "out" or (role == "in" and needed[i]) for role, i in self.roles]
        found = self.rule.double_backward(self.options, tuple(wanted), tuple(tangents), self.grads, self.saved)
        outgoing = list(found[: len(self.grads)])
        second: list[Any] = [None] * len(needed)
        through: list[Any] = [None] * len(self.grads)
        for (role, i), grad in zip(self.roles, found[len(self.grads) :]):
            if grad is not None and role is not None:
                into = second if role == "in" else through
                into[i] = grad if into[i] is None else into[i] + grad
        if any(g is not None for g in through) and any(needed):
            for i, grad in enumerate(self.pull(through, needed)):
                if grad is not None:
                    second[i] = grad if second[i] is None else second[i] + grad
        self.grads = None
        return outgoing, second

    def pull(self, grads: Given, needed: Sequence[bool]) -> Grads:
        return self.rule.backward(self.options, tuple(needed), tuple(grads), self.saved)


def scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    return x if x.shape == shape else x.sum_to_size(shape)
