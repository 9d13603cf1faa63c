"""Operators and gradients of pixelwise normalisation, after a bias and a (leaky) ReLU or on its own.

Kernels: csrc/cpu/pixel_norm.cpp and gankern/triton/pixel_norm.py; the formulas stand there. The result is kept, and one
number a pixel: its scale, 1 / sqrt(mean + eps), which is a second result as far as autograd is concerned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gankern.core import activations, autograd, registry
from gankern.core.dispatch import refuse_gradient_order
from gankern.core.layout import accumulation_dtype
from gankern.reference.pixel_norm import pixel_norm as reference

NAME = "pixel_norm"
primitive = registry.declare(NAME, gradient_order=2)


def _new_scale(x: Tensor, dim: int) -> Tensor:
    """One number a pixel, in the order that the pixels have in memory."""
    pixels = x.numel() // x.shape[dim] if x.numel() else 0
    return x.new_empty(pixels, dtype=accumulation_dtype(x))


registry.define(
    NAME,
    "forward",
    "pixel_norm(Tensor x, Tensor? bias, int dim, float positive, float negative, float eps) -> "
    "(Tensor y, Tensor scale)",
    lambda x, bias, dim, positive, negative, eps: (torch.empty_like(x), _new_scale(x, dim)),
)
registry.define(
    NAME,
    "backward",
    "pixel_norm_backward(Tensor grad, Tensor? grad_scale, Tensor y, Tensor scale, int dim, float positive, "
    "float negative, bool sums) -> (Tensor grad_x, Tensor grad_bias)",
    lambda grad, grad_scale, y, scale, dim, positive, negative, sums: (
        torch.empty_like(y),
        y.new_empty(y.shape[dim] if sums else 0),
    ),
)
registry.define(
    NAME,
    "double_backward",
    "pixel_norm_double_backward(Tensor? grad_grad_x, Tensor? grad_grad_bias, Tensor grad, Tensor y, Tensor scale, "
    "int dim, float positive, float negative) -> (Tensor grad_grad, Tensor grad_y, Tensor grad_scale)",
    lambda h, h_bias, grad, y, scale, dim, positive, negative: (
        torch.empty_like(y),
        torch.empty_like(y),
        torch.empty_like(scale),
    ),
)

# Options: implementation, dim, the activation's two slopes, eps.


def _forward(options: Any, x: Tensor, bias: Tensor | None) -> Any:
    return registry.kernel(options[0], NAME, "forward", x.device)(x, bias, *options[1:])


def _backward(options: Any, needed: Sequence[bool], grads: Sequence[Any], saved: Sequence[Any]) -> Any:
    grad, grad_scale = grads
    y, scale = saved
    if grad is None:
        grad = torch.zeros_like(y)
    kernel = registry.kernel(options[0], NAME, "backward", y.device)
    grad_x, grad_bias = kernel(grad, grad_scale, y, scale, *options[1:4], needed[1])
    return grad_x, grad_bias if needed[1] else None


def _double_backward(
    options: Any, needed: Sequence[bool], grad_grads: Sequence[Any], grads: Sequence[Any], saved: Sequence[Any]
) -> Any:
    if grads[1] is not None:  # what comes back to the scale is of second order already
        raise refuse_gradient_order(NAME)
    kernel = registry.kernel(options[0], NAME, "double_backward", saved[0].device)
    grad_grad, grad_y, grad_scale = kernel(*grad_grads, grads[0], *saved, *options[1:4])
    return grad_grad, None, grad_y, grad_scale


def _again(options: Any, x: Tensor, bias: Tensor | None) -> Any:
    """Alone, its input is a result that whoever made it keeps anyway, as torch's formulation does."""
    _, _, positive, negative, _ = options
    return bias is None and positive == negative == 1


autograd.Rule(NAME, _forward, lambda options, tensors, outputs: outputs, _backward, _double_backward, again=_again)


def pixel_norm(
    x: Tensor, bias: Tensor | None, dim: int, activation: str | None, negative_slope: float, gain: float, eps: float,
    implementation: str | None,
) -> Tensor:  # fmt: skip
    """The result for checked arguments; negative_slope is not negative."""
    chosen = primitive.select(x, implementation)
    if chosen == "reference":
        return reference(x, bias, dim, activation, negative_slope, gain, eps)
    negative = activations.slope(activation, negative_slope)
    return autograd.differentiate(NAME, (chosen, dim, gain, gain * negative, eps), x, bias)[0]
