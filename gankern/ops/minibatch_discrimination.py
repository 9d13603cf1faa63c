"""Operators and gradients of minibatch discrimination: the sums of similarities by L1 distance.

Within one set m, or between the points of m and those of another set; ``other`` is None for the former. Kernels:
csrc/cpu/minibatch_discrimination.cpp and gankern/triton/minibatch_discrimination.py; the formulas stand there. The
backward keeps nothing but its inputs, and computes the similarities again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gankern import dispatch
from gankern.ops import _tiers
from gankern.reference.minibatch_discrimination import minibatch_discrimination as reference

NAME = "minibatch_discrimination"
GRADIENT_ORDER = 2
primitive = _tiers.declare(NAME, gradient_order=GRADIENT_ORDER)


def _empty(like: Tensor | None, model: Tensor) -> Tensor:
    return model.new_empty(0) if like is None else like.new_empty(like.shape)


_tiers.define(
    NAME,
    "forward",
    "minibatch_discrimination(Tensor m, Tensor? other, bool include_self) -> Tensor",
    lambda m, other, include_self: m.new_empty(m.shape[:2]),
)
_tiers.define(
    NAME,
    "backward",
    "minibatch_discrimination_backward(Tensor grad, Tensor m, Tensor? other) -> (Tensor grad_m, Tensor grad_other)",
    lambda grad, m, other: (_empty(m, m), _empty(other, m)),
)
_tiers.define(
    NAME,
    "double_backward",
    "minibatch_discrimination_double_backward(Tensor? grad_grad_m, Tensor? grad_grad_other, Tensor grad, Tensor m, "
    "Tensor? other) -> (Tensor grad_grad, Tensor grad_m, Tensor grad_other)",
    lambda h, h_other, grad, m, other: (m.new_empty(m.shape[:2]), _empty(m, m), _empty(other, m)),
)


def _kernel(implementation: str, launcher: str, device: str):
    op = NAME if launcher == "forward" else f"{NAME}_{launcher}"
    return _tiers.kernel(implementation, NAME, launcher, getattr(torch.ops.gankern, op).default, device)


class MinibatchDiscrimination(Function):
    """Inputs: implementation, m, other or None, include_self. Output: the sums."""

    @staticmethod
    def forward(implementation, m, other, include_self):
        return _kernel(implementation, "forward", m.device.type)(m, other, include_self)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.implementation, m, other, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(m, other)

    @staticmethod
    def backward(ctx: Any, grad):
        if grad is None:
            return None, None, None, None
        m, other = ctx.saved_tensors
        if _tiers.first_order_only():
            grad_m, grad_other = _kernel(ctx.implementation, "backward", m.device.type)(grad, m, other)
        else:
            grad_m, grad_other = MinibatchDiscriminationBackward.apply(ctx.implementation, grad, m, other)
        return None, grad_m, None if other is None else grad_other, None


class MinibatchDiscriminationBackward(Function):
    """Inputs: implementation, gradient of the sums, m, other or None. Outputs: gradients of m and of other (empty
    without one)."""

    @staticmethod
    def forward(implementation, grad, m, other):
        return _kernel(implementation, "backward", m.device.type)(grad, m, other)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.implementation, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_grad_m, grad_grad_other):
        grad, m, other = ctx.saved_tensors
        if other is None:
            grad_grad_other = None
        if grad_grad_m is None and grad_grad_other is None:
            return None, None, None, None
        grad_grad, grad_m, grad_other = MinibatchDiscriminationDoubleBackward.apply(
            ctx.implementation, grad_grad_m, grad_grad_other, grad, m, other
        )
        return None, grad_grad, grad_m, None if other is None else grad_other


class MinibatchDiscriminationDoubleBackward(Function):
    """Inputs: implementation, gradients of the two gradients (or None), and the tensors of
    MinibatchDiscriminationBackward. Outputs: gradients of its three tensors (empty without other)."""

    @staticmethod
    def forward(implementation, grad_grad_m, grad_grad_other, grad, m, other):
        kernel = _kernel(implementation, "double_backward", m.device.type)
        return kernel(grad_grad_m, grad_grad_other, grad, m, other)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads):
        raise dispatch.refuse_gradient_order(NAME, GRADIENT_ORDER)


def l1_similarity(m: Tensor, other: Tensor | None, include_self: bool, implementation: str | None) -> Tensor:
    """The sums for checked arguments."""
    chosen = primitive.select(m, implementation)
    if chosen == "reference":
        return reference(m, other, include_self)
    if not torch.compiler.is_compiling() and _tiers.first_order_only():
        # Nobody will differentiate it: a small batch's forward is as short as what Function.apply costs.
        return _kernel(chosen, "forward", m.device.type)(m, other, include_self)
    return _tiers.apply(MinibatchDiscrimination, chosen, m, other, include_self)
