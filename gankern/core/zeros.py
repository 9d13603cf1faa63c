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

That is csrc/autograd/zeros.cpp. Python sees no hooks of tensors, so where it records, without the compiled library or
under a mode or a transform, the zeros go torch's way, through the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

import gankern.core.dispatch  # noqa: F401  # starts the nodes
from gankern.core.native import nodes

__all__ = ["carry"]


class _Pass(Function):
    """Inputs: whether torch has zeros there, a result, the operator's input. Output: the result."""

    @staticmethod
    def forward(exist: bool, result: Tensor, input: Tensor) -> Tensor:
        return result.data  # no view: it may be written to, as what torch returns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.exist, ctx.like = inputs[0], (inputs[2].shape, inputs[2].dtype, inputs[2].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        size, dtype, device = ctx.like
        zeros = torch.zeros(size, dtype=dtype, device=device) if ctx.exist and grad is not None else None
        return None, grad, zeros


def carry(result: Tensor, input: Tensor, exist: bool = True) -> Tensor:
    """A result of an operator's backward, which is linear in pieces, with an edge to the operator's input behind it, or
    a witness. Called within a backward that is recorded. ``exist``: whether torch's derivative by the input is one of
    zeros, or none."""
    if (
        not (input.requires_grad and torch.is_grad_enabled())
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return result
    carried = nodes.carry(result, input, exist)
    plain: Any = super(Function, _Pass)  # torch's stubs leave the base's apply out
    return plain.apply(exist, result, input) if carried is NotImplemented else carried
