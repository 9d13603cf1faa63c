"""Operators and gradients of points between samples.

Kernels: csrc/cpu/interpolate_samples.cpp and gankern/triton/interpolate_samples.py; the formulas stand there. What
nobody asks for in training, alpha's gradient and the second order, is put together from torch's operators.
"""

from __future__ import annotations

from torch import Tensor

from gankern.ops import _tiers
from gankern.ops.gradient_penalty import sample_major
from gankern.reference.interpolate_samples import interpolate_samples as reference

NAME = "interpolate_samples"
primitive = _tiers.declare(NAME, gradient_order=2)

_tiers.define(
    NAME,
    "forward",
    "interpolate_samples(Tensor real, Tensor fake, Tensor alpha) -> Tensor",
    lambda real, fake, alpha: sample_major(real),
)
_tiers.define(
    NAME,
    "backward",
    "interpolate_samples_backward(Tensor grad, Tensor alpha) -> (Tensor grad_real, Tensor grad_fake)",
    lambda grad, alpha: (sample_major(grad), sample_major(grad)),
)


def _along(alpha: Tensor, like: Tensor) -> Tensor:
    return alpha.view(-1, *[1] * (like.ndim - 1))


def _dot(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """The inner product of each sample."""
    return (
        (a.to(like.dtype) * b.to(like.dtype)).flatten(1).sum(1) if a.ndim > 1 else a.to(like.dtype) * b.to(like.dtype)
    )


def _forward(options, real, fake, alpha):
    return (_tiers.kernel(options[0], NAME, "forward", real.device)(real, fake, alpha),)


def _backward(options, needed, grads, saved):
    real, fake, alpha = saved
    (grad,) = grads
    grad_real = grad_fake = grad_alpha = None
    if needed[0] or needed[1]:
        grad_real, grad_fake = _tiers.kernel(options[0], NAME, "backward", grad.device)(grad, alpha)
    if needed[2]:
        grad_alpha = _dot(grad, fake - real, alpha)
    return grad_real if needed[0] else None, grad_fake if needed[1] else None, grad_alpha


def _double_backward(options, needed, grad_grads, grads, saved):
    real, fake, alpha = saved
    (grad,) = grads
    of_real, of_fake, of_alpha = grad_grads
    weight = _along(alpha, real).to(real.dtype)
    to_grad, to_real, to_fake, to_alpha = [], None, None, []
    if of_real is not None:
        to_grad.append((1 - weight) * of_real)
        to_alpha.append(-_dot(grad, of_real, alpha))
    if of_fake is not None:
        to_grad.append(weight * of_fake)
        to_alpha.append(_dot(grad, of_fake, alpha))
    if of_alpha is not None:
        along = _along(of_alpha, real).to(real.dtype)
        to_grad.append(along * (fake - real))
        to_fake = along * grad
        to_real = -to_fake
    return sum(to_grad), to_real, to_fake, sum(to_alpha) if to_alpha else None


_tiers.Rule(NAME, _forward, lambda options, tensors, outputs: tensors, _backward, _double_backward)


def interpolate_samples(real: Tensor, fake: Tensor, alpha: Tensor, implementation: str | None) -> Tensor:
    """The points for checked arguments; alpha is [N], in fp32 or better."""
    chosen = primitive.select(real, implementation)
    if chosen == "reference":
        return reference(real, fake, alpha)
    return _tiers.differentiate(NAME, (chosen,), real, fake, alpha)[0]
