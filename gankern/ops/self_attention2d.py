"""Operators and gradients of attention between the positions of a map.

Queries are [N, d, n], keys and values one tensor, [N, d + e, m]: what 1x1 convolutions and pooling make of a map.
Kernels: csrc/cpu/self_attention2d.cpp and gankern/triton/self_attention2d.py; the formulas stand there. What is kept
beside inputs and result is two numbers a query, ``stats``: its largest score and 1 over its sum of exponentials.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from gankern.core import autograd, registry
from gankern.core.autograd import Kept, Tensors
from gankern.core.layout import accumulation_dtype
from gankern.reference.self_attention2d import self_attention2d as reference

NAME = "self_attention2d"
primitive = registry.declare(NAME, gradient_order=2)
MOST_ON_GPU = 256  # channels of keys or of values that a Triton program holds


def _result(q: Tensor, kv: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], kv.shape[1] - q.shape[1], q.shape[2])


registry.define(
    NAME,
    "forward",
    "self_attention2d(Tensor q, Tensor kv) -> (Tensor o, Tensor stats)",
    lambda q, kv: (_result(q, kv), q.new_empty(q.shape[0], 2, q.shape[2], dtype=accumulation_dtype(q))),
)
registry.define(
    NAME,
    "backward",
    "self_attention2d_backward(Tensor grad, Tensor q, Tensor kv, Tensor o, Tensor stats) -> "
    "(Tensor grad_q, Tensor grad_kv)",
    lambda grad, q, kv, o, stats: (q.new_empty(q.shape), kv.new_empty(kv.shape)),
)
registry.define(
    NAME,
    "double_backward",
    "self_attention2d_double_backward(Tensor? grad_grad_q, Tensor? grad_grad_kv, Tensor grad, Tensor q, Tensor kv, "
    "Tensor o, Tensor stats) -> (Tensor grad_grad, Tensor grad_q, Tensor grad_kv)",
    lambda h_q, h_kv, grad, q, kv, o, stats: (_result(q, kv), q.new_empty(q.shape), kv.new_empty(kv.shape)),
)


def _forward(options: tuple, q: Tensor, kv: Tensor) -> tuple[Tensor, ...]:
    return registry.kernel(options[0], NAME, "forward", q.device)(q, kv)


def _backward(options: tuple, needed: Sequence[bool], grads: Tensors, saved: Kept) -> Tensors:
    return registry.kernel(options[0], NAME, "backward", saved[0].device)(grads[0], *saved)


def _double_backward(
    options: tuple, needed: Sequence[bool], grad_grads: Tensors, grads: Tensors, saved: Kept
) -> Tensors:
    kernel = registry.kernel(options[0], NAME, "double_backward", saved[0].device)
    grad_grad, grad_q, grad_kv = kernel(*grad_grads, grads[0], *saved)
    # How the result and its statistics depend on q and kv is in these gradients already.
    return grad_grad, None, grad_q, grad_kv, None, None


_ANY_ORDER = f"{NAME}, any order"  # for who may not refuse a third one, at the price of nodes in Python
_RULES: tuple[tuple[str, Callable[..., Tensor] | None], ...] = (
    (NAME, None),
    (_ANY_ORDER, lambda options, q, kv, o, stats: reference(q, kv)),
)
for _rule, _plain in _RULES:
    autograd.Rule(
        _rule,
        _forward,
        lambda options, tensors, outputs: (*tensors, *outputs),
        _backward,
        _double_backward,
        non_differentiable=(1,),
        plain=_plain,
    )


def attention(q: Tensor, kv: Tensor, implementation: str | None, any_order: bool = False) -> Tensor:
    """The values' means, [N, e, n], for checked arguments. ``any_order``: with derivatives beyond the second."""
    chosen = primitive.select(q, implementation)
    widest = max(q.shape[1], kv.shape[1] - q.shape[1])
    if chosen == "triton" and widest > MOST_ON_GPU:
        if primitive.wish(implementation) == "triton":
            why = f"it takes {MOST_ON_GPU} channels of keys or of values at most, and these are {widest}"
            raise primitive.refuse("triton", {**primitive.refusals(q.device.type, q.dtype), "triton": why})
        primitive.ran(chosen := "reference")
    if chosen == "reference":
        return reference(q, kv)
    return autograd.differentiate(_ANY_ORDER if any_order else NAME, (chosen,), q, kv)[0]
