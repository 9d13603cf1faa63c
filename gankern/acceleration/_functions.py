"""Torch's own operators with a cheap second derivative, as functions of one module instead of the whole process.

The forward and the first derivative are torch's, to the bit. The second derivative is that of
:class:`gankern.fast_double_backward`: what does not exist is absent instead of being a tensor of zeros, and the weight
gradient comes from the weight-gradient kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gankern.acceleration._scope import SECOND, gain, plain, say, state
from gankern.core import autograd, devices, zeros
from gankern.core.batching import one_gradient_at_a_time
from gankern.core.double_backward import convolution_double_backward
from gankern.core.torch_internals import autocasting

_aten = torch.ops.aten


def matters(x: Tensor) -> bool:
    """Whether the gradient of what is made of x may be differentiated twice, where ours is known to be worth it."""
    return (
        state.double
        and x.requires_grad
        and not x.is_complex()
        and torch.is_grad_enabled()
        and devices.is_known(SECOND, x)
        and plain()
        and not autocasting(x.device.type)
    )


# Values from which on a second derivative of our own is worth what its calls cost, by type of device. Measured on the
# CPU; on GPUs, where the host's time decides, it is what as many microseconds of memory traffic make, and a device's
# file says whether anything is done there at all.
FROM = {"cpu": 2**18, "cuda": 2**22}


def pays(x: Tensor) -> bool:
    """Whether the gradient of what is made of x may be differentiated twice and x is large enough to gain by ours."""
    if not matters(x) or x.numel() < FROM.get(x.device.type, 2**22):
        return False
    gain(x.numel() * VALUE)
    return True


VALUE = 2e-4  # microseconds that a fused or an absent pass over a value is taken to be worth
OWN_SECOND = "torch, with a second derivative of gankern's"


def say_second(x: Tensor) -> None:
    """Of an operation whose first derivative is torch's."""
    if matters(x) and x.numel() >= FROM.get(x.device.type, 0):
        say(OWN_SECOND)
    else:
        say("torch", "only its second derivative is ours, under a penalty and of large tensors")


# ---- convolutions -------------------------------------------------------------------------------------------


class _Convolution(Function):
    """Inputs: options of aten.convolution, x, weight, bias or None."""

    @staticmethod
    def forward(options: Any, x: Any, weight: Any, bias: Any) -> Any:
        return _aten.convolution(x, weight, bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.options, x, weight, bias = inputs
        ctx.present = (True, True, bias is not None)
        ctx.sizes = None if bias is None else list(bias.shape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, grad: Any) -> Any:
        if grad is None:
            return None, None, None, None
        needed = autograd._needed(ctx, skip=1)
        x, weight = ctx.saved_tensors
        if autograd.first_order_only():
            result = _ConvolutionBackward.forward(ctx.options, needed, ctx.sizes, grad, x, weight)
        else:
            result = autograd.apply(_ConvolutionBackward, ctx.options, needed, ctx.sizes, grad, x, weight)
        return None, *result


class _ConvolutionBackward(Function):
    """Inputs: options, which gradients, the bias's size; the gradient, x, weight."""

    @staticmethod
    def forward(options: Any, needed: Any, sizes: Any, grad: Any, x: Any, weight: Any) -> Any:
        return _aten.convolution_backward(grad, x, weight, sizes, *options, list(needed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.options, _, _, *tensors = inputs
        ctx.present = (True, True, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, *grad_grads: Any) -> Any:
        if all(h is None for h in grad_grads):
            return (None,) * 6
        for_grad, for_x, for_weight = autograd._needed(ctx, skip=3)
        grad, x, weight = ctx.saved_tensors
        needed = [for_grad, for_x, for_weight]
        result = convolution_double_backward(*grad_grads, grad, weight, x, *ctx.options, needed)
        return None, None, None, *result


def _numbers(value: Any, dimensions: int) -> list[int] | None:
    if isinstance(value, int):
        return [value] * dimensions
    if isinstance(value, str):
        return None
    value = list(value)
    return value * dimensions if len(value) == 1 else value


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor | None:
    """aten.convolution; None for what only torch's functions take (unbatched input, padding by name)."""
    dimensions = weight.ndim - 2
    padding = _numbers(padding, dimensions) if padding != "valid" else [0] * dimensions
    if x.ndim != weight.ndim or padding is None:
        return None
    options = (
        _numbers(stride, dimensions),
        padding,
        _numbers(dilation, dimensions),
        transposed,
        _numbers(output_padding, dimensions),
        groups,
    )
    return autograd.apply(_Convolution, options, x, weight, bias)


# ---- functions that are linear in pieces --------------------------------------------------------------------


@dataclass(frozen=True)
class Piecewise:
    """A function of x and constants, and its derivative, which depends on x (or the result) through signs and places
    only: (gradient, what is kept, size of x, constants) -> gradient of x."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    keeps_input: bool


class _Piecewise(Function):
    @staticmethod
    def forward(function: Any, constants: tuple, x: Any) -> Any:
        return function.forward(x, *constants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.function, ctx.constants, x = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.function.keeps_input else output)

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, grad: Any) -> Any:
        if grad is None:
            return None, None, None
        (kept,) = ctx.saved_tensors
        return None, None, zeros.carry(ctx.function.backward(grad, kept.detach(), *ctx.constants), kept)


class _PiecewiseInPlace(_Piecewise):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.mark_dirty(inputs[2])
        _Piecewise.setup_context(ctx, inputs, output)


_RELU = Piecewise(torch.relu, lambda grad, y: _aten.threshold_backward(grad, y, 0), False)
_RELU_ = Piecewise(torch.relu_, _RELU.backward, False)
_LEAKY_RELU = Piecewise(F.leaky_relu, lambda grad, x, slope: _aten.leaky_relu_backward(grad, x, slope, False), True)
_LEAKY_RELU_ = Piecewise(
    torch._C._nn.leaky_relu_, lambda grad, y, slope: _aten.leaky_relu_backward(grad, y, slope, True), False
)


class _MaxPool2d(Function):
    """torch's, which keeps where each largest value was."""

    @staticmethod
    def forward(constants: tuple, x: Any) -> Any:
        return _aten.max_pool2d_with_indices(x, *constants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.constants, x = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1])

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, grad: Any, _: Any) -> Any:
        if grad is None:
            return None, None
        x, indices = ctx.saved_tensors
        result = _aten.max_pool2d_with_indices_backward(grad, x.detach(), *ctx.constants, indices)
        return None, zeros.carry(result, x)


_AVG_POOL2D = Piecewise(F.avg_pool2d, _aten.avg_pool2d_backward, True)
_ADAPTIVE_AVG_POOL2D = Piecewise(
    _aten._adaptive_avg_pool2d, lambda grad, x, size: _aten._adaptive_avg_pool2d_backward(grad, x), True
)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    if not pays(input):
        return torch.relu_(input) if inplace else torch.relu(input)
    return autograd.apply(*((_PiecewiseInPlace, _RELU_) if inplace else (_Piecewise, _RELU)), (), input)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    # torch refuses the in-place form with a negative slope when it differentiates: that is left to it.
    if not pays(input) or (inplace and negative_slope < 0):
        return F.leaky_relu(input, negative_slope, inplace)
    function = (_PiecewiseInPlace, _LEAKY_RELU_) if inplace else (_Piecewise, _LEAKY_RELU)
    return autograd.apply(*function, (negative_slope,), input)


def avg_pool2d(input: Tensor, kernel_size: Any, stride: Any, padding: Any, *rest: Any) -> Tensor:
    """torch's, given all of its arguments."""
    if not pays(input):
        return F.avg_pool2d(input, kernel_size, stride, padding, *rest)
    strides = [] if stride is None else _numbers(stride, 2)
    constants = (_numbers(kernel_size, 2), strides, _numbers(padding, 2), *rest)
    return autograd.apply(_Piecewise, _AVG_POOL2D, constants, input)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    size: Any = _numbers(output_size, 2) if output_size is not None else [None]
    if not pays(input) or None in size or size == [1, 1]:  # that is a mean, in torch too
        return F.adaptive_avg_pool2d(input, output_size)
    return autograd.apply(_Piecewise, _ADAPTIVE_AVG_POOL2D, (size,), input)


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if return_indices or not pays(input):
        return F.max_pool2d(  # type: ignore[call-overload]  # torch's stubs take return_indices as a literal alone
            input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    stride = [] if stride is None else _numbers(stride, 2)
    constants = (_numbers(kernel_size, 2), stride, _numbers(padding, 2), _numbers(dilation, 2), ceil_mode)
    return autograd.apply(_MaxPool2d, constants, input)[0]
