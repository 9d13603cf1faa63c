"""Operators and gradients of batch normalisation with a (leaky) ReLU behind it.

Kernels: csrc/cpu/batch_norm_act.cpp and gankern/triton/batch_norm_act.py; the formulas stand there. Kept for the
backward: x, weight, bias, and mean and 1 / sqrt(var + eps) of each channel. The activation's derivative is computed
again.

PReLU's slope is a tensor, [C], beside which ``negative_slope`` is 0 and not read. Its second order is made of
that of the normalisation alone and of bias_act's: who uses it twice is rare.

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
    "float eps, float negative_slope, Tensor? slope=None) -> (Tensor y, Tensor stats)",
    lambda x, *_: (empty_like(x), x.new_empty((3, x.shape[1]), dtype=accumulation_dtype(x))),
)


def _fake_backward(grad, x, weight, bias, stats, training, negative_slope, affine, slope=None):
    of_affine = (empty_affine(v if affine else None, x) for v in (weight, bias))
    return empty_like(x), *of_affine, empty_affine(slope, x)


def _fake_double_backward(h, h_weight, h_bias, grad, x, weight, bias, stats, training, negative_slope, affine):
    grad_x = empty_like(x) if moves_x(h, h_weight, training) else x.new_empty(0)
    return empty_like(x), grad_x, empty_affine(weight if affine and h is not None else None, x)


registry.define(
    NAME,
    "backward",
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, bool training, float "
    "negative_slope, bool affine, Tensor? slope=None) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor "
    "grad_slope)",
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


def _forward(options, x, weight, bias, slope, running_mean, running_var):
    implementation, training, eps, negative_slope = options
    kernel = registry.kernel(implementation, NAME, "forward", x.device)
    return kernel(x, weight, bias, running_mean, running_var, training, eps, negative_slope, slope)


def _saved(options, tensors, outputs):
    return *tensors[:4], outputs[1]


def _backward(options, needed, grads, saved):
    implementation, training, _, negative_slope = options
    x, weight, bias, slope, stats = saved
    kernel = registry.kernel(implementation, NAME, "backward", x.device)
    affine = needed[1] or needed[2]
    result = kernel(grads[0], x, weight, bias, stats, training, negative_slope, affine, slope)
    return result[0], *(value if need else None for value, need in zip(result[1:], needed[1:4])), None, None


def _double_backward(options, needed, grad_grads, grads, saved):
    implementation, training, eps, negative_slope = options
    x, weight, bias, slope, stats = saved
    h, h_weight, h_bias, h_slope = grad_grads[:4]
    _, _, _, needed_weight, *_ = needed  # of y, stats, x, weight, bias, slope, stats
    kernel = registry.kernel(implementation, NAME, "double_backward", x.device)
    if slope is not None:
        dtype, x, grad_y = x.dtype, x.to(slope.dtype), grads[0].to(slope.dtype)  # of half precision, wider
        h = None if h is None else h.to(slope.dtype)

        def forward():
            launch = registry.kernel(implementation, NAME, "forward", x.device)
            return launch(x, weight, bias, stats[0], stats[2], training, eps, 1.0)[0]

        def backward(grad):
            launch = registry.kernel(implementation, NAME, "backward", x.device)
            return launch(grad, x, weight, bias, stats, training, 1.0, weight is not None or bias is not None)

        def double_backward(grad):
            return kernel(h, h_weight, h_bias, grad, x, weight, bias, stats, training, 1.0, needed_weight)

        moves = h is not None or h_weight is not None or h_bias is not None, moves_x(h, h_weight, training)
        result = prelu_double_backward(
            implementation, needed, (forward, backward, double_backward), moves, h is not None, h_slope, grad_y, slope
        )
        of_images = (None if t is None else t.to(dtype) for t in result[:3])
        return *of_images, *result[3:]
    grad_grad, grad_x, grad_weight = kernel(
        h, h_weight, h_bias, grads[0], x, weight, bias, stats, training, negative_slope, needed_weight
    )
    grad_x = grad_x if moves_x(h, h_weight, training) else None
    return grad_grad, None, grad_x, grad_weight if needed_weight and h is not None else None, None, None, None


def prelu_double_backward(implementation, needed, norm, moves, of_x, h_slope, grad, slope):
    """Second order of a normalisation with PReLU behind it, from that of each: z = forward() is normalised,
    backward(gradient of z) gives gradients of x, weight and bias, double_backward(gradient of z) those of that
    gradient, of x and of weight. ``moves``: whether there is a gradient of any of the first, and whether x has one by
    double_backward; ``of_x``: whether the weight has.
    """
    forward, backward, double_backward = norm
    z = forward()
    options = (1, 1.0, None)  # dim, gain, clamp

    def launch(name):
        return registry.kernel(implementation, "bias_act", name, z.device)

    grad_z = launch("prelu_backward")(grad, z, None, slope, *options, False, False)[0]
    of_grad_z = grad_x = grad_weight = grad_bias = None
    if moves[0]:
        of_grad_z, grad_x, grad_weight = double_backward(grad_z)
        grad_x, grad_weight = grad_x if moves[1] else None, grad_weight if of_x and needed[3] else None
    grad_grad, of_z, _, grad_slope = launch("prelu_double_backward")(
        of_grad_z, None, h_slope, grad, z, None, slope, *options, h_slope is not None, False, needed[5]
    )
    if h_slope is not None:
        others = backward(of_z)
        grad_x = others[0] if grad_x is None else grad_x + others[0]
        if needed[3]:
            grad_weight = others[1] if grad_weight is None else grad_weight + others[1]
        grad_bias = others[2] if needed[4] else None
    return grad_grad, None, grad_x, grad_weight, grad_bias, grad_slope if needed[5] else None, None


def _plain(options, x, weight, bias, slope, stats):
    """By torch's own batch norm, for who stands in its place: its third derivative takes the statistics that it saved
    for constants."""
    _, training, eps, negative_slope = options
    mean, var = (None, None) if training else (stats[0], stats[2])
    y = F.batch_norm(x, mean, var, weight, bias, training, 0.0, eps)
    return activated(y, negative_slope, slope)


def activated(y: Tensor, negative_slope: float, slope: Tensor | None) -> Tensor:
    if slope is not None:
        return F.prelu(y, slope.to(y.dtype))
    return y if negative_slope == 1 else F.leaky_relu(y, negative_slope)


def has_kink(options: tuple) -> bool:
    return options[-1] != 1  # the slope


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
    slope: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The result and its statistics, for checked arguments. Affine values are of any dtype; slope, PReLU's in place of
    ``negative_slope``, too, [1] or [C]."""
    dtype = accumulation_dtype(x)
    weight, bias, slope = (v if v is None or v.dtype == dtype else v.to(dtype) for v in (weight, bias, slope))
    if slope is not None:
        slope, negative_slope = slope.expand(x.shape[1]), 0.0
    if training:
        running_mean = running_var = None
    elif running_mean is not None and running_var is not None:
        running_mean, running_var = running_mean.to(dtype), running_var.to(dtype)
    chosen = primitive.select(x, implementation)
    if chosen == "reference":
        return reference(x, weight, bias, running_mean, running_var, training, eps, negative_slope, slope)
    options = (chosen, training, eps, negative_slope)
    name = ANY_ORDER if any_order else NAME
    return autograd.differentiate(name, options, x, weight, bias, slope, running_mean, running_var)
