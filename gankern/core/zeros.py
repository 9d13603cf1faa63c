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

Whoever runs the backward of an operator that is linear in pieces, while it is recorded, sends its result through a node
that has a token as a further input: a witness. When a gradient comes to it, in the second backward, it notes that. The
collector, whose output the token is, has an edge to each leaf; so the engine runs it after all witnesses, and it
returns zeros for the leaves below those that noted something. A walk over the forward's graph, once a backward, finds
these leaves.

What is "below" goes by edges: the backward of torch's operators gives each of its inputs a gradient, or none any.

Where anything below is watched, nothing is cut short: hooks of tensors and modules are given what torch gives them, and
so is an autograd.Function of somebody's own. There the zeros go along torch's edges, and where torch has an edge that
carries nothing, such as a convolution's to its input, that is there too.

csrc/autograd/zeros.cpp does the same without Python.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import Node

import gankern.core.dispatch  # noqa: F401  # starts the nodes
from gankern.core.native import nodes

__all__ = ["carry"]


class _Absent:
    """Of the backwards through one that was recorded, by the engine's number: the leaves that are to have zeros, each a
    bit."""

    def __init__(self) -> None:
        self._of_task: dict[int, int] = {}

    def note(self, leaves: int) -> None:
        task = torch._C._current_graph_task_id()
        before = self._of_task.get(task)
        if before is None:
            _at_the_end(lambda: self._of_task.pop(task, None))
        self._of_task[task] = (before or 0) | leaves

    def noted(self) -> int:
        return self._of_task.get(torch._C._current_graph_task_id(), 0)


class _RecordedBackward:
    """Of one backward that is recorded, on one thread: the leaves below the witnesses' roots, each a bit."""

    def __init__(self) -> None:
        self.below: dict[Node, int] = {}  # of each node that was walked over, the leaves
        self.watched: set[Node] = set()  # of these nodes, those that somebody sees, or that have such below
        self.leaves = 0
        self.token: Tensor | None = None  # of the newest collector, which has an edge to the one before
        self.absent = _Absent()

    def walk(self, root: Node) -> int:
        """The leaves below a node; those that are new get a collector."""
        below, found = self.below, []
        stack = [root]
        while stack:
            node = stack[-1]
            if node in below:
                stack.pop()
                continue
            edges = list(_before(node.next_functions))
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
                if _is_of_others(node) or not self.watched.isdisjoint(edges):
                    self.watched.add(node)
        if found:
            first = self.leaves - len(found)
            self.token = _plain_apply(_Collector, self.absent, first, self.token, *found)
        return below[root]


def _is_of_others(node: Node) -> bool:
    """Whether a node is of an autograd.Function that is none of this library's, such as the one that hooks of modules
    have. Hooks of tensors are not seen from Python."""
    function = getattr(node, "_forward_cls", None)
    return function is not None and not function.__module__.startswith("gankern.")


def _before(edges: Iterable[tuple[Node | None, int]]) -> Iterator[Node]:
    """The nodes at the ends of edges. Where an output comes of one input alone (``layers`` of a Rule), what is before
    that input."""
    for node, output in edges:
        if node is None:
            continue
        layers = getattr(node, "layers", 0)
        if layers:
            yield from _before(edge for i, edge in enumerate(node.next_functions) if i % layers == output)
        else:
            yield node


class _Running(threading.local):
    """By the engine's number, the backwards of this thread that are recorded now."""

    def __init__(self) -> None:
        self.backwards: WeakValueDictionary[int, _RecordedBackward] = WeakValueDictionary()


_running = _Running()


def _recorded_backward() -> _RecordedBackward:
    """That of the running backward. It lives as long as the engine's task, also where that ends in an error; outside of
    a backward (an operator called by hand, whose graph may grow before the next one) as long as the caller has it."""
    task = torch._C._current_graph_task_id()
    backward = _running.backwards.get(task)
    if backward is None:
        backward = _RecordedBackward()
        if task >= 0:
            _running.backwards[task] = backward
            _at_the_end(lambda backward=backward: None)
    return backward


class _Collector(Function):
    """Inputs: the absent, the number of the first leaf, the token before, the leaves. Output: a token, which nobody
    reads and which no gradient comes to."""

    @staticmethod
    def forward(ctx: Any, absent: _Absent, first: int, before: Tensor | None, *leaves: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.absent, ctx.first, ctx.leaves = absent, first, leaves
        return torch.empty((), device=leaves[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        absent = ctx.absent.noted() >> ctx.first
        needed = ctx.needs_input_grad[3:]
        zeros = [
            torch.zeros_like(x, requires_grad=False) if need and absent >> i & 1 else None
            for i, (x, need) in enumerate(zip(ctx.leaves, needed))
        ]
        return None, None, None, *zeros


class _Carry(Function):
    """Inputs: the absent, the leaves of a witness, a result, a token. Output: the result."""

    @staticmethod
    def forward(ctx: Any, absent: _Absent, leaves: int, result: Tensor, token: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.absent, ctx.leaves = absent, leaves
        return result.data  # no view: it may be written to, as what torch returns

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            ctx.absent.note(ctx.leaves)
        return None, None, grad, None


class _Pass(Function):
    """Inputs: whether torch has zeros there, a result, the operator's input. Output: the result."""

    @staticmethod
    def forward(ctx: Any, exist: bool, result: Tensor, input: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.exist, ctx.like = exist, (input.shape, input.dtype, input.device)
        return result.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        size, dtype, device = ctx.like
        zeros = torch.zeros(size, dtype=dtype, device=device) if ctx.exist and grad is not None else None
        return None, grad, zeros


def carry(result: Tensor, below: Any, exist: bool = True) -> Tensor:
    """A result of an operator's backward, which is linear in pieces, with a witness behind it. Called within a backward
    that is recorded. ``below``: the node that runs (a Function's ``ctx``), or an input of the operator; the leaves are
    sought from there. ``exist``: whether torch's derivative by the input is one of zeros, or none."""
    of_input = isinstance(below, Tensor)
    carried = nodes.carry(result, below if of_input else None, exist)
    if carried is not NotImplemented:
        return carried
    if not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return result
    root = torch.autograd.graph.get_gradient_edge(below).node if of_input else below
    backward = _recorded_backward()
    leaves = backward.walk(root)
    if of_input and root in backward.watched:
        return _plain_apply(_Pass, exist, result, below)
    if not of_input and not backward.watched.isdisjoint(_before(root.next_functions)):
        raise RuntimeError(
            "gankern: a second derivative goes through a hook of a module, or an autograd.Function, in a way that only "
            "the compiled library can follow, and that is not built (gankern info says why); pass "
            "implementation='reference', or leave the hook out"
        )
    return _plain_apply(_Carry, backward.absent, leaves, result, backward.token) if leaves and exist else result


def _plain_apply(function: type[Function], *args: Any) -> Any:
    return super(Function, function).apply(*args)  # type: ignore[misc]  # torch's stubs leave the base's out


def _at_the_end(callback: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)
