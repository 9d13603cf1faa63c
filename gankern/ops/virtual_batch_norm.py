"""Operators and gradients of virtual batch norm and of a reference batch's statistics. Kernels:
csrc/cpu/virtual_batch_norm.cpp and gankern/triton/virtual_batch_norm.py; the formulas stand there. The backward keeps
x, what belongs to channels, and mean and 1 / standard deviation of each example and channel in float64 ("saved").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gankern.core import autograd, registry
from gankern.core.layout import empty
from gankern.reference.virtual_batch_norm import virtual_batch_norm as reference
from gankern.reference.virtual_batch_norm import virtual_batch_norm_statistics as reference_statistics

NAME = "virtual_batch_norm"
STATISTICS = "virtual_batch_norm_statistics"
primitive = registry.declare(NAME, gradient_order=2)

_TENSORS = "Tensor x, Tensor ref_mean, Tensor ref_mean_square, Tensor? weight, Tensor? bias"
_OPTIONS = "float own_share, float eps, float negative_slope"


def _doubles(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty(sizes, dtype=torch.float64)


def _like(vector: Tensor | None, x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(0) if vector is None or not needed else vector.new_empty(vector.shape)


def _map(x: Tensor, needed: bool) -> Tensor:
    return empty(x) if needed else x.new_empty(0)


registry.define(
    NAME,
    "forward",
    f"{NAME}({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor saved)",
    lambda x, *rest: (empty(x), _doubles(x, 2, *x.shape[:2])),
)
registry.define(
    NAME,
    "backward",
    f"{NAME}_backward(Tensor grad, {_TENSORS}, Tensor saved, {_OPTIONS}, bool need_x, bool need_channels) -> "
    "(Tensor grad_x, Tensor grad_ref_mean, Tensor grad_ref_mean_square, Tensor grad_weight, Tensor grad_bias)",
    lambda grad, x, mean, mean_square, weight, bias, saved, share, eps, slope, need_x, need_channels: (
        _map(x, need_x),
        *(_like(vector, x, need_channels) for vector in (mean, mean_square, weight, bias)),
    ),
)
registry.define(
    NAME,
    "double_backward",
    f"{NAME}_double_backward(Tensor? grad_grad_x, Tensor? grad_grad_ref_mean, Tensor? grad_grad_ref_mean_square, "
    f"Tensor? grad_grad_weight, Tensor? grad_grad_bias, Tensor grad, {_TENSORS}, Tensor saved, {_OPTIONS}, "
    "bool need_grad, bool need_x, bool need_channels) -> "
    "(Tensor grad_grad, Tensor grad_x, Tensor grad_ref_mean, Tensor grad_ref_mean_square, Tensor grad_weight)",
    lambda hx, hm, hs, hw, hb, grad, x, mean, mean_square, weight, bias, saved, share, eps, slope, *need: (
        _map(x, need[0]),
        _map(x, need[1]),
        *(_like(vector, x, need[2]) for vector in (mean, mean_square, weight)),
    ),
)
registry.define(NAME, "statistics", f"{STATISTICS}(Tensor x) -> Tensor", lambda x: _doubles(x, 2, x.shape[1]))
registry.define(
    NAME,
    "statistics_backward",
    f"{STATISTICS}_backward(Tensor grad, Tensor x, Tensor moments) -> Tensor",
    lambda grad, x, moments: empty(x),
)
registry.define(
    NAME,
    "statistics_double_backward",
    f"{STATISTICS}_double_backward(Tensor grad_grad_x, Tensor grad, Tensor x, Tensor moments) "
    "-> (Tensor grad_grad, Tensor grad_x)",
    lambda h, grad, x, moments: (_doubles(x, 2, x.shape[1]), empty(x)),
)


# ---- normalising -----------------------------------------------------------------------------------------------


def _forward(options: Any, *tensors: Tensor) -> Any:
    return registry.kernel(options[0], NAME, "forward", tensors[0].device)(*tensors, *options[1:])


def _saved(options: Any, tensors: Sequence[Any], outputs: Sequence[Any]) -> Any:
    return (*tensors, outputs[1])


def _backward(options: Any, needed: Sequence[bool], grads: Sequence[Any], saved: Sequence[Any]) -> Any:
    need_x, need_channels = needed[0], any(needed[1:])
    kernel = registry.kernel(options[0], NAME, "backward", saved[0].device)
    results = kernel(grads[0], *saved, *options[1:], need_x, need_channels)
    return tuple(result if need else None for result, need in zip(results, needed))


def _double_backward(
    options: Any, needed: Sequence[bool], grad_grads: Sequence[Any], grads: Sequence[Any], saved: Sequence[Any]
) -> Any:
    # Of the outputs' gradients, then of what was saved. `saved` itself, last, is a function of the others; and so is
    # the gradient of its gradient. y is linear in the bias, and so is the activation almost everywhere.
    need_grad, _, need_x, *need_channels = needed
    kernel = registry.kernel(options[0], NAME, "double_backward", saved[0].device)
    need = (need_grad, need_x, any(need_channels[:3]))
    grad_grad, grad_x, *of_channels = kernel(*grad_grads, grads[0], *saved, *options[1:], *need)
    results = [grad_grad, None, grad_x, *of_channels, None, None]
    return tuple(result if need else None for result, need in zip(results, needed))


def _has_pieces(options: Any) -> bool:
    return options[3] != 1  # the slope


autograd.Rule(NAME, _forward, _saved, _backward, _double_backward, non_differentiable=(1,), pieces=_has_pieces)


def virtual_batch_norm(
    x: Tensor, ref_mean: Tensor, ref_mean_square: Tensor, own_share: float, weight: Tensor | None,
    bias: Tensor | None, eps: float, negative_slope: float, implementation: str | None,
) -> Tensor:  # fmt: skip
    """The result for checked arguments."""
    chosen = primitive.select(x, implementation)
    if chosen == "reference":
        return reference(x, ref_mean, ref_mean_square, own_share, weight, bias, eps, negative_slope)
    options = (chosen, own_share, eps, negative_slope)
    return autograd.differentiate(NAME, options, x, ref_mean, ref_mean_square, weight, bias)[0]


# ---- statistics ------------------------------------------------------------------------------------------------


def _statistics(options: Any, x: Tensor) -> Any:
    return (registry.kernel(options[0], NAME, "statistics", x.device)(x),)


def _statistics_backward(options: Any, needed: Sequence[bool], grads: Sequence[Any], saved: Sequence[Any]) -> Any:
    x, moments = saved
    return (registry.kernel(options[0], NAME, "statistics_backward", x.device)(grads[0], x, moments),)


def _statistics_double_backward(
    options: Any, needed: Sequence[bool], grad_grads: Sequence[Any], grads: Sequence[Any], saved: Sequence[Any]
) -> Any:
    x, moments = saved
    kernel = registry.kernel(options[0], NAME, "statistics_double_backward", x.device)
    return (*kernel(grad_grads[0], grads[0], x, moments), None)


autograd.Rule(
    STATISTICS,
    _statistics,
    lambda options, tensors, outputs: (*tensors, *outputs),
    _statistics_backward,
    _statistics_double_backward,
)


def virtual_batch_norm_statistics(x: Tensor, implementation: str | None) -> tuple[Tensor, Tensor]:
    """Mean and mean of squares for a checked argument."""
    chosen = primitive.select(x, implementation)
    if chosen == "reference":
        return reference_statistics(x)
    mean, mean_square = autograd.differentiate(STATISTICS, (chosen,), x)[0].unbind(0)
    return mean, mean_square
