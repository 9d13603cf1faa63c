"""Records what a critic does to its inputs, operator by operator, for the tangent form of a gradient penalty.

A :class:`Tape` is a dispatch mode: the critic really runs, whatever its Python looks like, and every ATen operator and
every primitive of this library that touches the inputs or a parameter leaves a node (see ``nodes``). Three things are
then known of the values that the nodes connect, and they are all that the penalty's gradient needs:

- the cotangent *delta*: the derivative of the sum of the critic's outputs, which at the inputs is the gradient g that
  the penalty P is a function of;
- the *tangent* t: the change along v = dP/dg. Since dP = <v, dg>, the derivative of P by the parameters is that of the
  sum of the outputs' tangents, with v held constant;
- the second cotangent *rho*: the derivative of that sum with respect to the value itself. Between the inputs and the
  output it exists only below an operator that has curvature; for a parameter it is the gradient that is wanted.

A tensor that is a value carries a mark, (tape, number); parameters are known by their identity. A tensor without a
mark is a constant.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gankern.core import autograd
from gankern.tangent import rules
from gankern.tangent.nodes import INPUT, WEIGHT, Bilinear, Gate, Kernel, Linear, Node, NotCovered

_MARK = "_gankern_tape_mark"
_VIEW = torch.ops.aten.view.default


class Tape(TorchDispatchMode):
    """Within ``with tape:`` operators are recorded; then close(), delta(), push() and pull(), once each."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would keep Dynamo from tracing __torch_dispatch__, and import it for that, which takes seconds. Dynamo
        does not come here: to it a tape is inside of one region of the graph."""
        return False

    def __init__(self, parameters: Iterable[Tensor], critic: Any = None) -> None:
        super().__init__()
        self.critic = critic
        self.nodes: list[Node | None] = []
        self.kinds: list[int] = []  # of each value
        self.roots: list[int] = []  # of each value: the first value of the memory that it looks at
        self.families: dict[int, list[int]] = {}  # root -> all values of that memory, where there are several
        self.stale: set[int] = set()  # overwritten through another tensor
        self.leaves: dict[int, int] = {}  # id of a parameter -> value
        self.parameters: dict[int, Tensor] = {}  # value -> parameter
        self.scaled_weights: dict[int | None, tuple[Tensor, float]] = {}  # value -> parameter and number, its factors
        self.saved: list[tuple[Tensor, int]] = []  # what will be read after the forward, with its version
        self.unversioned: list[Tensor] = []  # saved by the present operator, which may be about to count up its version
        self.rho: dict[int, Tensor] = {}
        self.paused = False
        for parameter in parameters:
            self._leaf(parameter)

    # ---- values ----------------------------------------------------------------------------------------------

    def _leaf(self, parameter: Tensor) -> int:
        number = self._value(WEIGHT)
        self.leaves[id(parameter)] = number
        self.parameters[number] = parameter
        return number

    def _value(self, kind: int, root: int | None = None) -> int:
        number = len(self.kinds)
        self.kinds.append(kind)
        self.roots.append(number if root is None else root)
        if root is not None:
            self.families.setdefault(root, [root]).append(number)
        return number

    def known(self, x: Tensor) -> int | None:
        """The value that a tensor was found to be; None for any other."""
        number = self.leaves.get(id(x))
        if number is not None:
            return number
        mark = getattr(x, _MARK, None)
        return mark[1] if mark is not None and mark[0] is self else None

    def find(self, x: Tensor) -> int | None:
        """The value of a tensor; None for a constant."""
        number = self.known(x)
        if number is None and x.requires_grad:
            if not x.is_leaf:
                raise NotCovered(f"a tensor of shape {tuple(x.shape)} that the critic did not make requires a gradient")
            return self._leaf(x)  # a parameter of a critic that is no module
        return number

    def input(self, x: Tensor) -> int:
        """Makes x, a tensor that nobody else holds, an input."""
        number = self._value(INPUT)
        self.mark(x, number)
        return number

    def mark(self, x: Tensor, number: int | None) -> None:
        setattr(x, _MARK, (self, number))

    def kind(self, values: Iterable[int | None]) -> int:
        kind = 0
        for number in values:
            if number is not None:
                kind |= self.kinds[number]
        return kind

    def add(self, node: Node, ins: Sequence[int | None], outputs: Sequence[Tensor | None], view: bool = False) -> None:
        """Records the node that made the outputs; None stands for one that is not differentiable. A tensor that was
        written in place becomes a new value."""
        node.ins, node.second, node.dead = ins, False, False
        node.kinds = [0 if number is None else self.kinds[number] for number in ins]
        kind = 0
        for k in node.kinds:
            kind |= k
        node.outs = []
        for output in outputs:
            if output is None:
                node.outs.append(None)
                continue
            root = None
            before = self.known(output)
            if before is not None:
                if id(output) in self.leaves:
                    raise NotCovered("a parameter is written in place")
                self.stale.update(self.families.get(self.roots[before], ()))
            elif view:
                root = self.roots[next(i for i in ins if i is not None)]
            number = self._value(kind, root)
            self.mark(output, number)
            node.outs.append(number)
        self.nodes.append(node)

    def save(self, *tensors: Tensor | None) -> None:
        """These tensors will be read after the forward; close() checks that they are still what they are now."""
        if not torch.compiler.is_compiling():
            self.unversioned += [x for x in tensors if x is not None]

    def _version(self) -> None:
        self.saved += [(x, x._version) for x in self.unversioned]
        self.unversioned.clear()

    # ---- recording -------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if self.unversioned:
            self._version()
        find = self.find
        tracked = False
        for x in args:
            if isinstance(x, Tensor):
                tracked = tracked or find(x) is not None
            elif isinstance(x, (list, tuple)):
                tracked = tracked or any(isinstance(y, Tensor) and find(y) is not None for y in x)
        if kwargs:
            tracked = tracked or any(isinstance(x, Tensor) and find(x) is not None for x in kwargs.values())
        if not tracked:
            return func(*args, **kwargs) if func is not _VIEW else rules.view(func, *args)
        try:
            return rules.record(self, func, args, kwargs)
        except NotCovered as error:
            raise self._located(error) from None

    def check(self, values: Iterable[int | None]) -> None:
        """Refuses values that were overwritten through another tensor."""
        if self.stale and any(number in self.stale for number in values):
            raise NotCovered("a tensor is read after it was written in place through a view of it, or its base")

    def primitive(self, name: str, options: tuple, tensors: Sequence[Tensor | None]):
        """A primitive of this library: ops.autograd.differentiate calls this in its own place."""
        rule = autograd.RULES[name]
        if not self.paused:
            rules.check_primitive(name, options, tensors[0])
        self.paused = True
        try:
            outputs = tuple(rule.forward(options, *tensors))
        finally:
            self.paused = False
        values = [None if x is None else self.find(x) for x in tensors]
        kind = self.kind(values)
        if kind and torch.is_grad_enabled():
            self.check(values)
            flat = rules.FLAT_PRIMITIVES.get(name)
            curved = bool(kind & INPUT) and not (flat is not None and flat(options))
            node = Kernel(rule, options, tensors, outputs, curved)
            self.add(node, values, [None if i in rule.non_differentiable else y for i, y in enumerate(outputs)])
            self.save(*node.saved)
        return outputs

    def linear(self, x: Tensor, forward, transpose) -> Tensor:
        """A linear map of this library, which calls this in its own place."""
        self.paused = True
        try:
            y = forward(x)
        finally:
            self.paused = False
        value = self.find(x)
        if value is not None and torch.is_grad_enabled():
            self.check([value])
            self.add(Linear(forward, transpose), (value,), (y,))
        return y

    def convolution(self, options: tuple, height: int, width: int, x: Tensor, weight: Tensor, bias: Tensor | None):
        """A convolution of this library: ops.convolution calls this in its own place."""
        self.paused = True
        try:
            return rules.convolution(self, options, height, width, x, weight, bias)
        finally:
            self.paused = False

    def __enter__(self):
        self._outer, autograd.recorder = autograd.recorder, self
        return super().__enter__()

    def __exit__(self, *exception):
        autograd.recorder = self._outer
        return super().__exit__(*exception)

    def _located(self, error: NotCovered) -> NotCovered:
        """The error with the name of the module that was running."""
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
            if isinstance(module, nn.Module):
                names = {m: n for n, m in self.critic.named_modules()} if isinstance(self.critic, nn.Module) else {}
                name = names.get(module)
                return NotCovered(f"{error} (in {type(module).__name__}{f' {name!r}' if name else ''})")
            frame = frame.f_back
        return error

    # ---- the passes ------------------------------------------------------------------------------------------

    def close(self, outputs: Iterable[int] = ()) -> None:
        """The forward is over. Decides through which nodes second cotangents will flow: below operators that have
        curvature, and from ``outputs``."""
        self._version()
        for x, version in self.saved:
            if x._version != version:
                shape = tuple(x.shape)
                raise NotCovered(
                    f"a tensor of shape {shape} that the gradient needs was written in place after its use"
                )
        self.saved.clear()
        flows: set[int | None] = set(outputs)
        for node in reversed(self.nodes):
            node.second = any(number in flows for number in node.outs)
            if node.second or node.curved:
                flows.update(i for i, kind in zip(node.ins, node.kinds) if kind == INPUT | WEIGHT)
        if not torch.compiler.is_compiling():
            self._find_fresh(set(outputs))

    def _find_fresh(self, outputs: set[int | None]) -> None:
        """Tells gates whose neighbour is a convolution or matrix product, and nothing else, that the tangents or
        cotangents that it makes are theirs."""
        readers: dict[int | None, list[Node]] = {}
        makers: dict[int | None, Node] = {}
        for node in self.nodes:
            for number in node.ins:
                readers.setdefault(number, []).append(node)
            for number in node.outs:
                makers[number] = node
        for node in self.nodes:
            if isinstance(node, Gate):
                (source,), (result,) = node.ins, node.outs
                after = readers.get(result, ())
                node.fresh_tangent = isinstance(makers.get(source), Bilinear) and len(readers[source]) == 1
                node.fresh_grad = len(after) == 1 and isinstance(after[0], Bilinear) and result not in outputs

    def delta(self, seeds: dict[int, Tensor]) -> dict[int, Tensor]:
        """The inputs' cotangents from the outputs'."""
        grads = dict(seeds)
        for node in reversed(self.nodes):
            needed = [bool(kind & INPUT) for kind in node.kinds]
            if any(needed):
                incoming = [grads.pop(number, None) for number in node.outs]
                if all(g is None for g in incoming):
                    node.dead = True
                else:
                    _accumulate(grads, node.ins, needed, node.delta(incoming, needed))
        return grads

    def push(self, tangents: dict[int, Tensor]) -> None:
        """The tangents, from the inputs to the output; second cotangents arise."""
        tangents = dict(tangents)
        last = {number: i for i, node in enumerate(self.nodes) for number in node.ins}
        for i, node in enumerate(self.nodes):
            if not any(kind & INPUT for kind in node.kinds):
                continue
            incoming = [tangents.get(number) for number in node.ins]
            for number in node.ins:
                if last[number] == i:
                    tangents.pop(number, None)
            if not node.dead and any(t is not None for t in incoming):
                needed = [bool(kind & WEIGHT) for kind in node.kinds]
                outgoing, second = node.push(incoming, needed)
                for number, t in zip(node.outs, outgoing):
                    if t is not None and number in last:
                        tangents[number] = t
                _accumulate(self.rho, node.ins, needed, second)
                del outgoing, second
            del incoming
            if not node.second:
                self.nodes[i] = None

    def pull(self) -> None:
        """The second cotangents, back to the parameters."""
        while self.nodes:
            node = self.nodes.pop()
            if node is None:
                continue
            incoming = [self.rho.pop(number, None) for number in node.outs]
            needed = [bool(kind & WEIGHT) for kind in node.kinds]
            if any(needed) and any(g is not None for g in incoming):
                _accumulate(self.rho, node.ins, needed, node.pull(incoming, needed))

    def gradients(self) -> dict[Tensor, Tensor]:
        """What pull() found, for each parameter that has a gradient."""
        return {x: self.rho[number] for number, x in self.parameters.items() if number in self.rho}


def _accumulate(into: dict[int, Tensor], ins, needed, grads) -> None:
    for number, need, grad in zip(ins, needed, grads):
        if need and grad is not None:
            before = into.get(number)
            into[number] = grad if before is None else before + grad
