"""Operators and gradients of bias, activation, gain and clamp, in one pass each.

Kernels: csrc/cpu/bias_act.cpp and gankern/triton/bias_act.py; csrc/cpu/activation.h has the formulas of the
activations, gankern/core/activations.py their table. What the backward needs is kept: the result, or for some
activations the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from gankern.core import activations, autograd, native, registry
from gankern.core.activations import Activation
from gankern.core.autograd import Kept, Tensors
from gankern.core.torch_internals import transformed
from gankern.reference.bias_act import bias_act as reference

NAME = "bias_act"
primitive = registry.declare(NAME, gradient_order=2)


native.nodes.set_activations(
    [*map(astuple, activations.ACTIVATIONS.values()), ("folded", *astuple(activations.LEAKY_RELU_OF_INPUT)[1:])]
)

_ARGUMENTS = "int dim, int activation, float negative_slope, float gain, float? clamp"


def _along(needed: bool, x: Tensor, dim: int) -> Tensor:
    return x.new_empty(x.shape[dim] if needed else 0)


def _like(needed: bool, x: Tensor) -> Tensor:
    return torch.empty_like(x) if needed else x.new_empty(0)


def _gradients(x: Tensor, dim: int, *sums: bool) -> tuple[Tensor, ...]:
    """That of x, and those of what belongs to its channels: whether each is needed."""
    return torch.empty_like(x), *(_along(needed, x, dim) for needed in sums)


registry.define(
    NAME,
    "forward",
    f"bias_act(Tensor x, Tensor? bias, {_ARGUMENTS}) -> Tensor",
    lambda x, bias, *arguments: torch.empty_like(x),
)
registry.define(
    NAME,
    "forward_",
    f"bias_act_forward_(Tensor(a!) x, Tensor? bias, {_ARGUMENTS}) -> ()",
    lambda x, bias, *arguments: None,
)
registry.define(
    NAME,
    "backward",
    f"bias_act_backward(Tensor grad, Tensor saved, Tensor? bias, {_ARGUMENTS}, bool sums) -> "
    "(Tensor grad_x, Tensor grad_bias)",
    lambda grad, saved, bias, dim, activation, slope, gain, clamp, sums: _gradients(saved, dim, sums),
)
registry.define(
    NAME,
    "double_backward",
    f"bias_act_double_backward(Tensor? grad_grad_x, Tensor? grad_grad_bias, Tensor grad, Tensor saved, Tensor? bias, "
    f"{_ARGUMENTS}, bool needs_grad, bool needs_saved, bool sums) -> "
    "(Tensor grad_grad, Tensor grad_saved, Tensor grad_bias)",
    lambda h, h_bias, grad, saved, bias, dim, activation, slope, gain, clamp, needs_grad, needs_saved, sums: (
        _like(needs_grad, saved),
        _like(needs_saved or sums, saved),
        _along(sums, saved, dim),
    ),
)

# Options: implementation, activation, and the constants that every kernel takes.


def _forward(options: tuple, x: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return (registry.kernel(options[0], NAME, "forward", x.device)(x, bias, *options[2]),)


def _saved(options: tuple, tensors: Tensors, outputs: Tensors) -> Tensors:
    return tensors if options[1].keeps_input else outputs


def _backward(options: tuple, needed: Sequence[bool], grads: Tensors, saved: Kept) -> Tensors:
    implementation, activation, constants = options
    bias = saved[1] if activation.keeps_input else None
    kernel = registry.kernel(implementation, NAME, "backward", saved[0].device)
    grad_x, grad_bias = kernel(grads[0], saved[0], bias, *constants, needed[1])
    return grad_x, grad_bias if needed[1] else None


def _double_backward(
    options: tuple, needed: Sequence[bool], grad_grads: Tensors, grads: Tensors, saved: Kept
) -> Tensors:
    implementation, activation, constants = options
    needs_grad = needed[0]
    needs_saved, *needs_bias = (need and activation.curved for need in needed[1:])
    sums = any(needs_bias)
    if not (needs_grad or needs_saved or sums):
        return (None,) * len(needed)
    bias = saved[1] if activation.keeps_input else None
    kernel = registry.kernel(implementation, NAME, "double_backward", saved[0].device)
    grad_grad, grad_saved, grad_bias = kernel(
        *grad_grads, grads[0], saved[0], bias, *constants, needs_grad, needs_saved, sums
    )
    result = grad_grad if needs_grad else None, grad_saved if needs_saved else None
    return (*result, grad_bias if sums else None) if activation.keeps_input else result


def _pieces(options: tuple) -> bool:
    return not options[1].curved and options[1].name != "linear"


autograd.Rule(NAME, _forward, _saved, _backward, _double_backward, pieces=_pieces)


# ---- PReLU: a slope of each channel, which is a tensor with a gradient ------------------------------------------

_PRELU = "Tensor x, Tensor? bias, Tensor slope, int dim, float gain, float? clamp"
registry.define(
    NAME, "prelu", f"bias_act_prelu({_PRELU}) -> Tensor", lambda x, bias, slope, *arguments: torch.empty_like(x)
)
registry.define(
    NAME,
    "prelu_backward",
    f"bias_act_prelu_backward(Tensor grad, {_PRELU}, bool sums, bool slope_sums) -> "
    "(Tensor grad_x, Tensor grad_bias, Tensor grad_slope)",
    lambda grad, x, bias, slope, dim, gain, clamp, sums, slope_sums: _gradients(x, dim, sums, slope_sums),
)
registry.define(
    NAME,
    "prelu_double_backward",
    "bias_act_prelu_double_backward(Tensor? grad_grad_x, Tensor? grad_grad_bias, Tensor? grad_grad_slope, Tensor grad, "
    f"{_PRELU}, bool needs_x, bool sums, bool slope_sums) -> "
    "(Tensor grad_grad, Tensor grad_x, Tensor grad_bias, Tensor grad_slope)",
    lambda h, h_bias, h_slope, grad, x, bias, slope, dim, gain, clamp, needs_x, sums, slope_sums: (
        torch.empty_like(x),
        _like(needs_x, x),
        _along(sums, x, dim),
        _along(slope_sums, x, dim),
    ),
)


def _prelu_forward(options: tuple, x: Tensor, bias: Tensor | None, slope: Tensor) -> tuple[Tensor, ...]:
    return (registry.kernel(options[0], NAME, "prelu", x.device)(x, bias, slope, *options[1]),)


def _prelu_backward(options: tuple, needed: Sequence[bool], grads: Tensors, saved: Kept) -> Tensors:
    kernel = registry.kernel(options[0], NAME, "prelu_backward", saved[0].device)
    grad_x, grad_bias, grad_slope = kernel(grads[0], *saved, *options[1], needed[1], needed[2])
    return grad_x, grad_bias if needed[1] else None, grad_slope if needed[2] else None


def _prelu_double_backward(
    options: tuple, needed: Sequence[bool], grad_grads: Tensors, grads: Tensors, saved: Kept
) -> Tensors:
    of_slope = grad_grads[2] is not None  # without, nothing depends on x other than by the kink
    needs_x, sums, slope_sums = needed[1] and of_slope, needed[2] and of_slope, needed[3]
    kernel = registry.kernel(options[0], NAME, "prelu_double_backward", saved[0].device)
    result = kernel(*grad_grads, grads[0], *saved, *options[1], needs_x, sums, slope_sums)
    return [value if need else None for value, need in zip(result, (True, needs_x, sums, slope_sums))]


def _prelu_plain(options: tuple, x: Tensor, bias: Tensor | None, slope: Tensor) -> Tensor:
    dim, gain, clamp = options[1]
    return reference(x, bias, dim, "prelu", 0.0, gain, clamp, slope)


PRELU = f"{NAME}, prelu"
PRELU_ANY_ORDER = f"{PRELU}, any order"
for _name, _of_any_order in ((PRELU, None), (PRELU_ANY_ORDER, _prelu_plain)):
    autograd.Rule(
        _name,
        _prelu_forward,
        lambda options, tensors, outputs: tensors,
        _prelu_backward,
        _prelu_double_backward,
        pieces=lambda options: True,
        plain=_of_any_order,
    )


def bias_prelu(
    x: Tensor,
    bias: Tensor | None,
    slope: Tensor,
    dim: int,
    gain: float,
    clamp: float | None,
    implementation: str | None,
    any_order: bool = False,
) -> Tensor:
    """The result for checked arguments; slope is [1] or [channels]."""
    chosen = primitive.select(x, implementation)
    if chosen == "reference":
        return reference(x, bias, dim, "prelu", 0.0, gain, clamp, slope)
    name = PRELU_ANY_ORDER if any_order else PRELU
    if x.ndim and len(slope) != x.shape[dim]:
        if x.dtype in (torch.float16, torch.bfloat16):  # sums of channels would be rounded before they are added up
            if bias is not None:
                x = x + bias.view([-1 if d == dim else 1 for d in range(x.ndim)])
            one = autograd.differentiate(name, (chosen, (0, gain, clamp)), x.unsqueeze(0), None, slope)[0]
            return one.squeeze(0)
        slope = slope.expand(x.shape[dim])
    return autograd.differentiate(name, (chosen, (dim, gain, clamp)), x, bias, slope)[0]


class _InPlace(autograd._Forward):
    """Overwrites its tensor, which is then its own result. For activations that keep that."""

    @staticmethod
    def forward(name: str, options: tuple, *tensors: Any) -> Any:
        x, bias = tensors
        registry.kernel(options[0], NAME, "forward_", x.device)(x, bias, *options[2])
        return (x,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        autograd._Forward.setup_context(ctx, inputs, output)
        ctx.mark_dirty(inputs[2])


def _options(
    chosen: str, dim: int, name: str, negative_slope: float, gain: float, clamp: float | None
) -> tuple[str, Activation, tuple]:
    activation = activations.row(name, negative_slope)
    return chosen, activation, (dim, activation.index, negative_slope, gain, clamp)


def bias_act(
    x: Tensor,
    bias: Tensor | None,
    dim: int,
    activation: str,
    negative_slope: float,
    gain: float,
    clamp: float | None,
    implementation: str | None,
) -> Tensor:
    """The result for checked arguments."""
    chosen = primitive.select(x, implementation)
    if chosen == "reference":
        return reference(x, bias, dim, activation, negative_slope, gain, clamp)
    options = _options(chosen, dim, activation, negative_slope, gain, clamp)
    return autograd.differentiate(NAME, options, x, bias)[0]


def activate_(x: Tensor, activation: str, negative_slope: float, implementation: str | None) -> Tensor | None:
    """x, overwritten by relu or leaky_relu of it; None, and x as it was, where that is left to torch's own operator:
    for the reference, on a tape, under a transformation of programs, and for a negative slope, with which torch has its
    own refusal."""
    if transformed() or autograd.recording.recorder is not None:
        return None
    options = _options(primitive.select(x, implementation), 0, activation, negative_slope, 1.0, None)
    if options[0] == "reference" or options[1].keeps_input or (0 in x.stride() and not x.is_contiguous()):
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return autograd.apply(_InPlace, NAME, options, x, None)[0]
    registry.kernel(options[0], NAME, "forward_", x.device)(x, None, *options[2])
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return x
