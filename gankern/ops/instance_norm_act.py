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
from gankern.ops.batch_norm_act import activated, empty_affine, empty_like, has_kink, prelu_double_backward
from gankern.reference.instance_norm_act import instance_norm_act as reference

NAME = "instance_norm_act"
primitive = registry.declare(NAME, gradient_order=2)


registry.define(
    NAME,
    "forward",
    "instance_norm_act(Tensor x, Tensor? weight, Tensor? bias, float eps, float negative_slope, Tensor? "
    "slope=None) -> (Tensor y, Tensor stats)",
    lambda x, *_: (empty_like(x), x.new_empty((3, *x.shape[:2]), dtype=accumulation_dtype(x))),
)


def _fake_backward(grad, x, weight, bias, stats, negative_slope, affine, slope=None):
    of_affine = (empty_affine(v if affine else None, x) for v in (weight, bias))
    return empty_like(x), *of_affine, empty_affine(slope, x)


def _fake_double_backward(h, h_weight, h_bias, grad, x, weight, bias, stats, negative_slope, affine):
    grad_x = x.new_empty(0) if h is None and h_weight is None else empty_like(x)
    return empty_like(x), grad_x, empty_affine(weight if affine and h is not None else None, x)


registry.define(
    NAME,
    "backward",
    "instance_norm_act_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, float "
    "negative_slope, bool affine, Tensor? slope=None) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor "
    "grad_slope)",
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


def _forward(options, x, weight, bias, slope):
    implementation, eps, negative_slope = options
    return registry.kernel(implementation, NAME, "forward", x.device)(x, weight, bias, eps, negative_slope, slope)


def _saved(options, tensors, outputs):
    return *tensors, outputs[1]


def _backward(options, needed, grads, saved):
    implementation, _, negative_slope = options
    x, weight, bias, slope, stats = saved
    kernel = registry.kernel(implementation, NAME, "backward", x.device)
    affine = needed[1] or needed[2]
    result = kernel(grads[0], x, weight, bias, stats, negative_slope, affine, slope)
    return result[0], *(value if need else None for value, need in zip(result[1:], needed[1:]))


def _double_backward(options, needed, grad_grads, grads, saved):
    implementation, eps, negative_slope = options
    x, weight, bias, slope, stats = saved
    h, h_weight, h_bias, h_slope = grad_grads
    needed_weight = needed[3]  # of y, stats, x, weight, bias, slope, stats
    kernel = registry.kernel(implementation, NAME, "double_backward", x.device)
    moves_x = h is not None or h_weight is not None
    if slope is not None:
        dtype, x, grad_y = x.dtype, x.to(slope.dtype), grads[0].to(slope.dtype)  # of half precision, wider
        h = None if h is None else h.to(slope.dtype)

        def forward():
            return registry.kernel(implementation, NAME, "forward", x.device)(x, weight, bias, eps, 1.0)[0]

        def backward(grad):
            launch = registry.kernel(implementation, NAME, "backward", x.device)
            return launch(grad, x, weight, bias, stats, 1.0, weight is not None or bias is not None)

        def double_backward(grad):
            return kernel(h, h_weight, h_bias, grad, x, weight, bias, stats, 1.0, needed_weight)

        moves = moves_x or h_bias is not None, moves_x
        result = prelu_double_backward(
            implementation, needed, (forward, backward, double_backward), moves, h is not None, h_slope, grad_y, slope
        )
        of_images = (None if t is None else t.to(dtype) for t in result[:3])
        return *of_images, *result[3:]
    grad_grad, grad_x, grad_weight = kernel(
        h, h_weight, h_bias, grads[0], x, weight, bias, stats, negative_slope, needed_weight
    )
    of_weight = grad_weight if needed_weight and h is not None else None
    return grad_grad, None, grad_x if moves_x else None, of_weight, None, None, None


def _plain(options, x, weight, bias, slope, stats):
    """By torch's own instance norm: see batch_norm_act's."""
    _, eps, negative_slope = options
    return activated(F.instance_norm(x, None, None, weight, bias, True, 0.0, eps), negative_slope, slope)


ANY_ORDER = f"{NAME}, any order"  # for who may not refuse a third one, at the price of nodes in Python
for _name, _of_any_order in ((NAME, None), (ANY_ORDER, _plain)):
    autograd.Rule(
        _name,
        _forward,
        _saved,
        _backward,
        _double_backward,
        non_differentiable=(1,),
        pieces=has_kink,
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
    slope: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The result and its statistics, for checked arguments. Affine values are of any dtype; slope, PReLU's in place of
    ``negative_slope``, too, [1] or [C]."""
    dtype = accumulation_dtype(x)
    weight, bias, slope = (v if v is None or v.dtype == dtype else v.to(dtype) for v in (weight, bias, slope))
    if slope is not None:
        slope, negative_slope = slope.expand(x.shape[1]), 0.0
    chosen = primitive.select(x, implementation)
    if chosen == "reference":
        return reference(x, weight, bias, eps, negative_slope, slope)
    name = ANY_ORDER if any_order else NAME
    return autograd.differentiate(name, (chosen, eps, negative_slope), x, weight, bias, slope)
