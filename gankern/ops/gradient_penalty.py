"""Operators and gradients of the penalty of each sample's gradient norm.

Kernels: csrc/cpu/gradient_penalty.cpp and gankern/triton/gradient_penalty.py; the formulas stand there. The norms are
kept for the backward, in fp32 or better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gankern.core import autograd, registry
from gankern.core.native import nodes
from gankern.reference import gradient_penalty as reference

NAME = "gradient_penalty"
primitive = registry.declare(NAME, gradient_order=2)


def sample_major(x: Tensor) -> Tensor:
    """An empty tensor like x in which the elements of each sample lie together: in x's memory format where it has
    that property."""
    like = torch.empty_like(x)
    return like if x.shape[0] <= 1 or like.stride(0) * x.shape[0] == x.numel() else x.new_empty(x.shape)


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _per_sample(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=wide(x))


registry.define(
    NAME,
    "forward",
    "gradient_penalty(Tensor gradient, float target, bool one_sided) -> (Tensor values, Tensor norms)",
    lambda gradient, target, one_sided: (_per_sample(gradient), _per_sample(gradient)),
)
registry.define(
    NAME,
    "backward",
    "gradient_penalty_backward(Tensor grad, Tensor gradient, Tensor norms, float target, bool one_sided) -> Tensor",
    lambda grad, gradient, norms, target, one_sided: sample_major(gradient),
)
registry.define(
    NAME,
    "double_backward",
    "gradient_penalty_double_backward(Tensor grad_grad, Tensor grad, Tensor gradient, Tensor norms, float target, "
    "bool one_sided) -> (Tensor to_grad, Tensor to_gradient)",
    lambda grad_grad, grad, gradient, norms, target, one_sided: (_per_sample(gradient), sample_major(gradient)),
)


def _forward(options: Any, gradient: Tensor) -> Any:
    return registry.kernel(options[0], NAME, "forward", gradient.device)(gradient, *options[1:])


def _backward(options: Any, needed: Sequence[bool], grads: Sequence[Any], saved: Sequence[Any]) -> Any:
    gradient, norms = saved
    return (registry.kernel(options[0], NAME, "backward", gradient.device)(grads[0], gradient, norms, *options[1:]),)


def _double_backward(
    options: Any, needed: Sequence[bool], grad_grads: Sequence[Any], grads: Sequence[Any], saved: Sequence[Any]
) -> Any:
    gradient, norms = saved
    kernel = registry.kernel(options[0], NAME, "double_backward", gradient.device)
    to_grad, to_gradient = kernel(grad_grads[0], grads[0], gradient, norms, *options[1:])
    return to_grad, None, to_gradient, None


autograd.Rule(
    NAME,
    _forward,
    lambda options, tensors, outputs: (tensors[0], outputs[1]),
    _backward,
    _double_backward,
    non_differentiable=(1,),
)


def gradient_penalty(gradient: Tensor, target: float, one_sided: bool, implementation: str | None) -> Tensor:
    """The penalty of each sample for checked arguments."""
    chosen = primitive.select(gradient, implementation)
    if chosen == "reference":
        return reference.gradient_penalty(gradient, target, one_sided)
    return autograd.differentiate(NAME, (chosen, target, one_sided), gradient)[0]


def penalty_and_direction(gradient: Tensor, weight: float, target: float, one_sided: bool) -> tuple[Tensor, Tensor]:
    """The penalty of each sample, and the derivative of ``weight`` times their sum by the gradient. Not recorded."""
    if not torch.compiler.is_compiling():
        done = nodes.penalty_and_direction(gradient, weight, target, one_sided)
        if done is not NotImplemented:
            return done
    chosen = primitive.select(gradient)
    if chosen == "reference":
        values, norms = reference.penalty_and_norms(gradient, target, one_sided)
        return values, reference.direction(gradient, norms, weight, target, one_sided)
    values, norms = registry.kernel(chosen, NAME, "forward", gradient.device)(gradient, target, one_sided)
    backward = registry.kernel(chosen, NAME, "backward", gradient.device)
    return values, backward(torch.full_like(norms, weight), gradient, norms, target, one_sided)
