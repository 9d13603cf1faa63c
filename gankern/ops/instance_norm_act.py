"""Operators and gradients of instance normalisation with a (leaky) ReLU behind it.

It is batch normalisation of one sample that has N C channels, and runs as that: by the kernels of
csrc/cpu/batch_norm_act.cpp and gankern/triton/batch_norm_act.py, where the formulas stand. Kept for the backward: x,
weight, bias, and mean and 1 / sqrt(var + eps) of each channel of each sample. The activation's derivative is computed
again.

``stats`` is [3, N, C], in the dtype that x is accumulated in: mean, 1 / sqrt(var + eps), and the variance that running
statistics take up. weight and bias are in that dtype too, [C] or [N, C].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gankern.core import autograd, registry
from gankern.core.layout import accumulation_dtype
from gankern.ops.batch_norm_act import empty_affine, empty_like
from gankern.reference.instance_norm_act import instance_norm_act as reference

NAME = "instance_norm_act"
primitive = registry.declare(NAME, gradient_order=2)


registry.define(
    NAME,
    "forward",
    "instance_norm_act(Tensor x, Tensor? weight, Tensor? bias, float eps, float negative_slope) -> (Tensor y, Tensor "
    "stats)",
    lambda x, *_: (empty_like(x), x.new_empty((3, *x.shape[:2]), dtype=accumulation_dtype(x))),
)


def _fake_backward(grad, x, weight, bias, stats, negative_slope, affine):
    return empty_like(x), empty_affine(weight if affine else None, x), empty_affine(bias if affine else None, x)


def _fake_double_backward(h, h_weight, h_bias, grad, x, weight, bias, stats, negative_slope, affine):
    grad_x = x.new_empty(0) if h is None and h_weight is None else empty_like(x)
    return empty_like(x), grad_x, empty_affine(weight if affine and h is not None else None, x)


registry.define(
    NAME,
    "backward",
    "instance_norm_act_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, float "
    "negative_slope, bool affine) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
)
registry.define(
    NAME,
    "double_backward",
    "instance_norm_act_double_backward(Tensor? grad_grad_x, Tensor? grad_grad_weight, Tensor? grad_grad_bias, Tensor "
    "grad, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, float negative_slope, bool affine) -> (Tensor "
    "grad_grad, Tensor grad_x, Tensor grad_weight)",
    _fake_double_backward,
)


def _forward(options, x, weight, bias):
    implementation, eps, negative_slope = options
    return registry.kernel(implementation, NAME, "forward", x.device)(x, weight, bias, eps, negative_slope)


def _saved(options, tensors, outputs):
    return *tensors, outputs[1]


def _backward(options, needed, grads, saved):
    implementation, _, negative_slope = options
    x, weight, bias, stats = saved
    kernel = registry.kernel(implementation, NAME, "backward", x.device)
    affine = needed[1] or needed[2]
    grad_x, grad_weight, grad_bias = kernel(grads[0], x, weight, bias, stats, negative_slope, affine)
    return grad_x, grad_weight if needed[1] else None, grad_bias if needed[2] else None


def _double_backward(options, needed, grad_grads, grads, saved):
    implementation, _, negative_slope = options
    x, weight, bias, stats = saved
    h, h_weight, h_bias = grad_grads
    needed_weight = needed[3]  # of y, stats, x, weight, bias, stats
    kernel = registry.kernel(implementation, NAME, "double_backward", x.device)
    grad_grad, grad_x, grad_weight = kernel(
        h, h_weight, h_bias, grads[0], x, weight, bias, stats, negative_slope, needed_weight
    )
    moves_x = h is not None or h_weight is not None
    of_weight = grad_weight if needed_weight and h is not None else None
    return grad_grad, None, grad_x if moves_x else None, of_weight, None, None


def _plain(options, x, weight, bias, stats):
    """By torch's own instance norm: see batch_norm_act's."""
    _, eps, negative_slope = options
    y = F.instance_norm(x, None, None, weight, bias, True, 0.0, eps)
    return y if negative_slope == 1 else F.leaky_relu(y, negative_slope)


ANY_ORDER = f"{NAME}, any order"  # for who may not refuse a third one, at the price of nodes in Python
for _name, _of_any_order in ((NAME, None), (ANY_ORDER, _plain)):
    autograd.Rule(
        _name,
        _forward,
        _saved,
        _backward,
        _double_backward,
        non_differentiable=(1,),
        pieces=lambda options: options[2] != 1,  # the slope
        plain=_of_any_order,
    )


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
    implementation: str | None,
    any_order: bool = False,
) -> tuple[Tensor, ...]:
    """The result and its statistics, for checked arguments. Affine values are of any dtype."""
    dtype = accumulation_dtype(x)
    weight, bias = (v if v is None or v.dtype == dtype else v.to(dtype) for v in (weight, bias))
    chosen = primitive.select(x, implementation)
    if chosen == "reference":
        return reference(x, weight, bias, eps, negative_slope)
    name = ANY_ORDER if any_order else NAME
    return autograd.differentiate(name, (chosen, eps, negative_slope), x, weight, bias)
