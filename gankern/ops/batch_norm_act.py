"""Operators and gradients of batch normalisation with a (leaky) ReLU behind it.

Kernels: csrc/cpu/batch_norm_act.cpp and gankern/triton/batch_norm_act.py; the formulas stand there. Kept for the
backward: x, weight, bias, and mean and 1 / sqrt(var + eps) of each channel. The activation's derivative is computed
again.

``stats`` is [3, C], in the dtype that x is accumulated in: mean, 1 / sqrt(var + eps), and the variance that running
statistics take up. weight and bias are in that dtype too, [C] or [N, C]. ``training`` means: with x's own statistics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.core import autograd, registry
from gankern.core.layout import accumulation_dtype, is_dense_channels_last
from gankern.reference.batch_norm_act import batch_norm_act as reference

NAME = "batch_norm_act"
primitive = registry.declare(NAME, gradient_order=2)


def empty_like(x: Tensor) -> Tensor:
    """What kernels write: as x lies in memory where they can read it as it lies, else contiguous."""
    if x.is_contiguous() or is_dense_channels_last(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_affine(like: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty((0,) if like is None else like.shape, dtype=accumulation_dtype(x))


def moves_x(h: Tensor | None, h_weight: Tensor | None, training: bool) -> bool:
    """Whether the first gradients depend on x, other than by the activation's kink."""
    return h_weight is not None or (h is not None and training)


registry.define(
    NAME,
    "forward",
    "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, "
    "float eps, float negative_slope) -> (Tensor y, Tensor stats)",
    lambda x, *_: (empty_like(x), x.new_empty((3, x.shape[1]), dtype=accumulation_dtype(x))),
)


def _fake_backward(grad, x, weight, bias, stats, training, negative_slope, affine):
    return empty_like(x), empty_affine(weight if affine else None, x), empty_affine(bias if affine else None, x)


def _fake_double_backward(h, h_weight, h_bias, grad, x, weight, bias, stats, training, negative_slope, affine):
    grad_x = empty_like(x) if moves_x(h, h_weight, training) else x.new_empty(0)
    return empty_like(x), grad_x, empty_affine(weight if affine and h is not None else None, x)


registry.define(
    NAME,
    "backward",
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, bool training, float "
    "negative_slope, bool affine) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
)
registry.define(
    NAME,
    "double_backward",
    "batch_norm_act_double_backward(Tensor? grad_grad_x, Tensor? grad_grad_weight, Tensor? grad_grad_bias, Tensor "
    "grad, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, bool training, float negative_slope, bool affine) -> "
    "(Tensor grad_grad, Tensor grad_x, Tensor grad_weight)",
    _fake_double_backward,
)


def _forward(options, x, weight, bias, running_mean, running_var):
    implementation, training, eps, negative_slope = options
    kernel = registry.kernel(implementation, NAME, "forward", x.device)
    return kernel(x, weight, bias, running_mean, running_var, training, eps, negative_slope)


def _saved(options, tensors, outputs):
    return *tensors[:3], outputs[1]


def _backward(options, needed, grads, saved):
    implementation, training, _, negative_slope = options
    x, weight, bias, stats = saved
    kernel = registry.kernel(implementation, NAME, "backward", x.device)
    affine = needed[1] or needed[2]
    grad_x, grad_weight, grad_bias = kernel(grads[0], x, weight, bias, stats, training, negative_slope, affine)
    return grad_x, grad_weight if needed[1] else None, grad_bias if needed[2] else None, None, None


def _double_backward(options, needed, grad_grads, grads, saved):
    implementation, training, _, negative_slope = options
    x, weight, bias, stats = saved
    h, h_weight, h_bias = grad_grads[:3]
    _, _, _, needed_weight, *_ = needed  # of y, stats, x, weight, bias, stats
    kernel = registry.kernel(implementation, NAME, "double_backward", x.device)
    grad_grad, grad_x, grad_weight = kernel(
        h, h_weight, h_bias, grads[0], x, weight, bias, stats, training, negative_slope, needed_weight
    )
    grad_x = grad_x if moves_x(h, h_weight, training) else None
    return grad_grad, None, grad_x, grad_weight if needed_weight and h is not None else None, None, None


def _plain(options, x, weight, bias, stats):
    """By torch's own batch norm, for who stands in its place: its third derivative takes the statistics that it saved
    for constants."""
    _, training, eps, negative_slope = options
    mean, var = (None, None) if training else (stats[0], stats[2])
    y = F.batch_norm(x, mean, var, weight, bias, training, 0.0, eps)
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
        pieces=lambda options: options[3] != 1,  # the slope
        plain=_of_any_order,
    )


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    negative_slope: float,
    implementation: str | None,
    any_order: bool = False,
) -> tuple[Tensor, ...]:
    """The result and its statistics, for checked arguments. Affine values are of any dtype."""
    dtype = accumulation_dtype(x)
    weight, bias = (v if v is None or v.dtype == dtype else v.to(dtype) for v in (weight, bias))
    if training:
        running_mean = running_var = None
    elif running_mean is not None and running_var is not None:
        running_mean, running_var = running_mean.to(dtype), running_var.to(dtype)
    chosen = primitive.select(x, implementation)
    if chosen == "reference":
        return reference(x, weight, bias, running_mean, running_var, training, eps, negative_slope)
    options = (chosen, training, eps, negative_slope)
    name = ANY_ORDER if any_order else NAME
    return autograd.differentiate(name, options, x, weight, bias, running_mean, running_var)
