"""Operators and gradients of minibatch standard deviation. Kernels: csrc/cpu/minibatch_stddev.cpp and
gankern/triton/minibatch_stddev.py; the formulas stand there. The backward keeps x alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gankern.core import autograd, registry
from gankern.core.layout import empty
from gankern.reference.minibatch_stddev import minibatch_stddev as reference

NAME = "minibatch_stddev"
primitive = registry.declare(NAME, gradient_order=2)

_OPTIONS = "int group_size, int num_channels, bool strided, bool unbiased, float eps"

registry.define(
    NAME,
    "forward",
    f"minibatch_stddev(Tensor x, {_OPTIONS}) -> Tensor",
    lambda x, group_size, num_channels, *rest: empty(x, x.shape[1] + num_channels),
)
registry.define(
    NAME,
    "backward",
    f"minibatch_stddev_backward(Tensor grad, Tensor x, {_OPTIONS}) -> Tensor",
    lambda grad, x, *rest: empty(x),
)
registry.define(
    NAME,
    "double_backward",
    f"minibatch_stddev_double_backward(Tensor grad_grad_x, Tensor grad, Tensor x, {_OPTIONS}) "
    "-> (Tensor grad_grad, Tensor grad_x)",
    lambda h, grad, x, group_size, num_channels, *rest: (empty(x, x.shape[1] + num_channels), empty(x)),
)


def _forward(options: Any, x: Tensor) -> Any:
    return (registry.kernel(options[0], NAME, "forward", x.device)(x, *options[1:]),)


def _backward(options: Any, needed: Sequence[bool], grads: Sequence[Any], saved: Sequence[Any]) -> Any:
    (x,) = saved
    return (registry.kernel(options[0], NAME, "backward", x.device)(*grads, x, *options[1:]),)


def _double_backward(
    options: Any, needed: Sequence[bool], grad_grads: Sequence[Any], grads: Sequence[Any], saved: Sequence[Any]
) -> Any:
    (x,) = saved
    return registry.kernel(options[0], NAME, "double_backward", x.device)(*grad_grads, *grads, x, *options[1:])


autograd.Rule(NAME, _forward, lambda options, tensors, outputs: tensors, _backward, _double_backward)


def minibatch_stddev(
    x: Tensor, group_size: int, num_channels: int, strided: bool, unbiased: bool, eps: float, implementation: str | None
) -> Tensor:
    """The result for checked arguments."""
    chosen = primitive.select(x, implementation)
    if chosen == "reference":
        return reference(x, group_size, num_channels, strided, unbiased, eps)
    return autograd.differentiate(NAME, (chosen, group_size, num_channels, strided, unbiased, eps), x)[0]
