"""Gradients of zero, at leaves and nowhere else.

The gradient of a gradient often does not exist: LeakyReLU has no curvature. torch returns a tensor of zeros there,
which the engine then drags through a complete backward of the network; in the end each parameter below has a gradient
of zeros. To an optimiser with momentum or weight decay that is not the same as no gradient, and DistributedDataParallel
waits for it.

Here such a derivative is absent, and the leaves below get their zeros directly, from one node of the graph, the
collector:

    forward's graph           x, weights, biases  <-----------------  collector
                                                                          ^  edges that carry nothing
    gradient's graph          backward of LeakyReLU, of a pooling, ...:  witnesses

Whoever runs the backward of an operator that is linear in pieces, while it is recorded, asks for a :class:`Witness`,
and lets its node have the witness's token as an input. When a gradient comes to that node, in the second backward, it
notes that. The collector has an edge to each leaf, so the engine runs it after all witnesses, and it returns zeros for
the leaves below those that noted something. A walk over the forward's graph, once a backward, finds these leaves.

What is "below" goes by edges: the backward of torch's operators gives each of its inputs a gradient, or none any.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import Node

__all__ = ["Witness", "carry", "witness"]


class _Recorded:
    """Of one backward that is recorded: the leaves below the witnesses' roots, each a bit; and of the backwards through
    it, by the engine's number, the leaves that are to have zeros."""

    def __init__(self) -> None:
        self.below: dict[Node, int] = {}  # of each node that was walked over, the leaves; while the backward runs
        self.leaves = 0
        self.token: Tensor | None = None  # of the newest collector, which has an edge to the one before
        self.absent: dict[int, int] = {}

    def end(self) -> None:
        self.below.clear()
        self.token = None

    def note(self, leaves: int) -> None:
        task = torch._C._current_graph_task_id()
        before = self.absent.get(task)
        if before is None:
            _at_the_end(lambda: self.absent.pop(task, None))
        self.absent[task] = (before or 0) | leaves

    def walk(self, root: Node) -> int:
        """The leaves below a node; those that are new get a collector."""
        below, found = self.below, []
        stack = [root]
        while stack:
            node = stack[-1]
            if node in below:
                stack.pop()
                continue
            edges = [after for after, _ in node.next_functions if after is not None]
            unknown = [after for after in edges if after not in below]
            if unknown:
                stack += unknown
                continue
            stack.pop()
            if hasattr(node, "variable"):
                below[node] = 1 << self.leaves
                self.leaves += 1
                found.append(node.variable)
            else:
                leaves = 0
                for after in edges:
                    leaves |= below[after]
                below[node] = leaves
        if found:
            first = self.leaves - len(found)
            self.token = _plain_apply(_Collector, self, first, self.token, *found)
        return below[root]


class _Collector(Function):
    """Inputs: the backward, the number of the first leaf, the token before, the leaves. Output: a token, which nobody
    reads and which no gradient comes to."""

    @staticmethod
    def forward(ctx: Any, backward: _Recorded, first: int, before: Tensor | None, *leaves: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.backward, ctx.first, ctx.leaves = backward, first, leaves
        return torch.empty((), device=leaves[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        absent = ctx.backward.absent.get(torch._C._current_graph_task_id(), 0) >> ctx.first
        needed = ctx.needs_input_grad[3:]
        zeros = [
            torch.zeros_like(x, requires_grad=False) if need and absent >> i & 1 else None
            for i, (x, need) in enumerate(zip(ctx.leaves, needed))
        ]
        return None, None, None, *zeros


class Witness:
    """Of one operator's backward. ``token`` is to be an input of the node that it leaves, as a tensor."""

    __slots__ = ("_backward", "_leaves", "token")

    def __init__(self, backward: _Recorded, leaves: int, token: Tensor) -> None:
        self._backward, self._leaves, self.token = backward, leaves, token

    def note(self) -> None:
        """The node runs, with a gradient that came in."""
        self._backward.note(self._leaves)


class _Running(threading.local):
    """By the engine's number, the backwards of this thread that are recorded now."""

    def __init__(self) -> None:
        self.backwards: dict[int, _Recorded] = {}


_running = _Running()


def witness(root: Node | None) -> Witness | None:
    """Called within a backward that is recorded. ``root`` is the node of the forward whose values the result depends on
    through signs and places only. None where there are no leaves below it, or no second backward will come."""
    if root is None or not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    task = torch._C._current_graph_task_id()
    backward = _running.backwards.get(task)
    if backward is None:
        backward = _Recorded()
        if task >= 0:  # else the operator is called by hand, in a forward: its graph may grow before the next one
            backwards = _running.backwards
            backwards[task] = backward

            def end() -> None:
                backwards.pop(task, None)
                backward.end()

            _at_the_end(end)
    leaves = backward.walk(root)
    token = backward.token  # there since the first leaf was found
    return None if not leaves or token is None else Witness(backward, leaves, token)


def carry(result: Tensor, root: Node | None) -> Tensor:
    """The result of an operator's backward, whose node is torch's, with a witness behind it."""
    seen = witness(root)
    return result if seen is None else _plain_apply(_Carry, seen, result, seen.token)


class _Carry(Function):
    """Inputs: a witness, a result, a token. Output: the result."""

    @staticmethod
    def forward(ctx: Any, seen: Witness, result: Tensor, token: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.seen = seen
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            ctx.seen.note()
        return None, grad, None


def _plain_apply(function: type[Function], *args: Any) -> Any:
    return super(Function, function).apply(*args)  # type: ignore[misc]  # torch's stubs leave the base's out


def _at_the_end(callback: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)
