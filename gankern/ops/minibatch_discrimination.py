"""Operators and gradients of minibatch discrimination: the sums of similarities by L1 distance.

Within one set m, or between the points of m and those of another set; ``other`` is None for the former. Kernels:
csrc/cpu/minibatch_discrimination.cpp, csrc/cuda/minibatch_discrimination.cu and
gankern/triton/minibatch_discrimination.py; the formulas stand there. The backward keeps nothing but its inputs, and
computes the similarities again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gankern.core import autograd, registry
from gankern.core.autograd import Kept, Tensors
from gankern.reference.minibatch_discrimination import minibatch_discrimination as reference

NAME = "minibatch_discrimination"
primitive = registry.declare(NAME, gradient_order=2, cuda=True)


def _empty(like: Tensor | None, model: Tensor) -> Tensor:
    return model.new_empty(0) if like is None else like.new_empty(like.shape)


registry.define(
    NAME,
    "forward",
    "minibatch_discrimination(Tensor m, Tensor? other, bool include_self) -> Tensor",
    lambda m, other, include_self: m.new_empty(m.shape[:2]),
)
registry.define(
    NAME,
    "backward",
    "minibatch_discrimination_backward(Tensor grad, Tensor m, Tensor? other) -> (Tensor grad_m, Tensor grad_other)",
    lambda grad, m, other: (_empty(m, m), _empty(other, m)),
)
registry.define(
    NAME,
    "double_backward",
    "minibatch_discrimination_double_backward(Tensor? grad_grad_m, Tensor? grad_grad_other, Tensor grad, Tensor m, "
    "Tensor? other) -> (Tensor grad_grad, Tensor grad_m, Tensor grad_other)",
    lambda h, h_other, grad, m, other: (m.new_empty(m.shape[:2]), _empty(m, m), _empty(other, m)),
)


def _forward(options: tuple, m: Tensor, other: Tensor | None) -> tuple[Tensor, ...]:
    implementation, include_self = options
    return (registry.kernel(implementation, NAME, "forward", m.device)(m, other, include_self),)


def _backward(options: tuple, needed: Sequence[bool], grads: Tensors, saved: Kept) -> Tensors:
    m, other = saved
    grad_m, grad_other = registry.kernel(options[0], NAME, "backward", m.device)(grads[0], m, other)
    return grad_m, None if other is None else grad_other


def _double_backward(
    options: tuple, needed: Sequence[bool], grad_grads: Tensors, grads: Tensors, saved: Kept
) -> Tensors:
    m, other = saved
    kernel = registry.kernel(options[0], NAME, "double_backward", m.device)
    grad_grad, grad_m, grad_other = kernel(*grad_grads, *grads, m, other)
    return grad_grad, grad_m, None if other is None else grad_other


autograd.Rule(NAME, _forward, lambda options, tensors, outputs: tensors, _backward, _double_backward)


def l1_similarity(m: Tensor, other: Tensor | None, include_self: bool, implementation: str | None) -> Tensor:
    """The sums for checked arguments."""
    chosen = primitive.select(m, implementation)
    if chosen == "reference":
        return reference(m, other, include_self)
    return autograd.differentiate(NAME, (chosen, include_self), m, other)[0]
