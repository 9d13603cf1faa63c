"""Bias, activation, gain and clamp, and the two activations that need nothing else."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from gankern.core import activations
from gankern.core.dispatch import short
from gankern.core.native import nodes
from gankern.core.torch_internals import autocasting, transformed
from gankern.functional import _checks
from gankern.ops import bias_act as _ops

ACTIVATIONS = tuple(activations.ACTIVATIONS)


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    dim: int = 1,
    activation: str | None = "linear",
    negative_slope: float = 0.2,
    slope: Tensor | None = None,
    gain: float = 1.0,
    clamp: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Adds a bias to each channel, applies an activation, multiplies by a gain and clamps, in one pass:
    :math:`y = \mathrm{clamp}(f(x + b)\, g, -c, c)`.

    The backward is one pass too, which gives the gradients of x, of the bias and of PReLU's slope. It keeps y, which
    the next layer usually keeps anyway, and not x; "silu", "prelu", and "leaky_relu" with a negative slope, keep x.
    The second derivative of "linear", "relu" and "leaky_relu" does not exist, rather than being zeros; of "prelu",
    max(z, 0) + a min(z, 0), only that by z and a.

    Source: the epilogue of the layers of ProGAN and StyleGAN, Karras et al. 2018, arXiv 1710.10196.

    Args:
        x: any number of dimensions, float64, float32, bfloat16 or float16, any strides; computed in float32 (float64
            for float64).
        bias: [channels], of x's dtype and device; None for none.
        dim: the channels' dimension.
        activation: "linear", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "selu", "softplus" or "silu";
            None is "linear". "prelu" takes ``slope``.
        negative_slope: of "leaky_relu", for negative arguments.
        slope: of "prelu", for negative arguments: [1] or [channels], of x's dtype and device.
        gain: a finite factor.
        clamp: greater than 0; None for none. The gradient is 0 where the result, in x's dtype, is at the clamp.
        implementation: see the module.

    Returns:
        A tensor like x, in its memory format.

    Gradient order: 2 (any order for "reference").

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> bias_act(torch.tensor([[-1.0, 0.5]]), torch.tensor([0.0, 1.0]), activation="leaky_relu", gain=2.0)
    tensor([[-0.4000,  3.0000]])
    """
    if not is_dynamo_compiling():
        if slope is None:
            y = nodes.bias_act(x, bias, dim, activation, negative_slope, gain, clamp, implementation)
        elif activation == "prelu":
            y = nodes.bias_prelu(x, bias, slope, dim, gain, clamp, implementation)
        else:
            y = NotImplemented
        if y is not NotImplemented:
            return y
    name = "bias_act"
    dim = check_channels(name, x, bias, dim)
    check_options(name, activation, negative_slope, gain, prelu=True)
    _checks.slope(name, activation, slope, x, x.shape[dim])
    if clamp is not None:
        _checks.number(name, "clamp", clamp, above=0)
    if bias is not None and bias.dtype != x.dtype:  # under autocast
        bias = bias.to(x.dtype)
    if slope is not None:
        return _ops.bias_prelu(x, bias, slope.to(x.dtype), dim, gain, clamp, implementation)
    return _ops.bias_act(x, bias, dim, activation or "linear", negative_slope, gain, clamp, implementation)


def _for_torch(x: Tensor, implementation: str | None) -> bool:
    """Whether torch's own function is to do it: inside torch.compile, where it fuses with what is around it, under
    a transformation of programs, and for what only torch takes (integers, sparse tensors)."""
    if torch.compiler.is_compiling():
        return True
    if implementation is not None:
        return False
    other = not x.is_floating_point() or x.layout is not torch.strided
    return other or transformed()


def relu(input: Tensor, inplace: bool = False, *, implementation: str | None = None) -> Tensor:
    """:func:`torch.nn.functional.relu`, whose second derivative does not exist rather than being zeros.

    Keeps its result for the backward. Inside torch.compile (where torch's own fuses with what is around it), under
    torch.func's transforms and for integers and sparse tensors it is torch's own. Gradient order: 2 (any order for
    "reference").

    >>> relu(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    if not is_dynamo_compiling():
        y = nodes.activate(input, inplace, None, implementation)
        if y is not NotImplemented:
            return y
    if has_torch_function_unary(input):
        return handle_torch_function(relu, (input,), input, inplace=inplace, implementation=implementation)
    _checks.tensor("relu", "input", input)
    if _for_torch(input, implementation):
        return F.relu(input, inplace)
    if inplace:
        result = _ops.activate_(input, "relu", 0.0, implementation)
        return F.relu(input, inplace=True) if result is None else result
    return _ops.bias_act(input, None, 0, "relu", 0.0, 1.0, None, implementation)


def leaky_relu(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False, *, implementation: str | None = None
) -> Tensor:
    """:func:`torch.nn.functional.leaky_relu`, whose second derivative does not exist rather than being zeros: a
    gradient penalty then has nothing to carry back through the rest of the network from here.

    Keeps its result for the backward (torch keeps the input, which is memory of its own), and the input where the slope
    is negative. Torch's own in the same cases as :func:`relu`. Gradient order: 2 (any order for "reference").

    >>> leaky_relu(torch.tensor([-1.0, 2.0]), 0.5)
    tensor([-0.5000,  2.0000])
    """
    if not isinstance(negative_slope, float):
        _checks.number("leaky_relu", "negative_slope", negative_slope)
    if not is_dynamo_compiling():
        y = nodes.activate(input, inplace, negative_slope, implementation)
        if y is not NotImplemented:
            return y
    if has_torch_function_unary(input):
        return handle_torch_function(
            leaky_relu, (input,), input, negative_slope, inplace=inplace, implementation=implementation
        )
    _checks.tensor("leaky_relu", "input", input)
    _checks.number("leaky_relu", "negative_slope", negative_slope)
    if _for_torch(input, implementation):
        return F.leaky_relu(input, negative_slope, inplace)
    if inplace:
        result = _ops.activate_(input, "leaky_relu", negative_slope, implementation)
        return F.leaky_relu(input, negative_slope, inplace=True) if result is None else result
    return _ops.bias_act(input, None, 0, "leaky_relu", negative_slope, 1.0, None, implementation)


def prelu(input: Tensor, weight: Tensor, *, implementation: str | None = None) -> Tensor:
    """:func:`torch.nn.functional.prelu`: max(x, 0) + a min(x, 0), whose backward sums the gradient of a in the same
    pass (torch writes it out for each value of x first).

    Source: He et al. 2015, arXiv 1502.01852. ``weight``: one slope, or one of each channel, dimension 1. Inside
    torch.compile, under torch.func's transforms and for what only torch takes it is torch's own. Gradient order: 2 (any
    order for "reference"), for both.

    >>> prelu(torch.tensor([[-1.0, 2.0]]), torch.tensor([0.25]))
    tensor([[-0.2500,  2.0000]])
    """
    if not is_dynamo_compiling():
        try:
            dim = 1 if input.ndim > 1 else 0
        except AttributeError:
            dim = 0  # of no tensor: see below
        y = nodes.bias_prelu(input, None, weight, dim, 1.0, None, implementation)
        if y is not NotImplemented:
            return y
    if has_torch_function(tensors := (input, weight)):
        return handle_torch_function(prelu, tensors, input, weight, implementation=implementation)
    _checks.tensor("prelu", "input", input)
    _checks.tensor("prelu", "weight", weight)
    # Under autocast and of other dtypes, and with a slope that is a number, torch's own, or its own error.
    if _for_torch(input, implementation) or weight.dtype != input.dtype or weight.ndim != 1 or not input.ndim:
        return F.prelu(input, weight)
    dim = 1 if input.ndim > 1 else 0
    if weight.shape[0] != 1 and (input.ndim < 2 or weight.shape[0] != input.shape[1]):
        return F.prelu(input, weight)  # torch's error
    if weight.device != input.device:
        return F.prelu(input, weight)
    return _ops.bias_prelu(input, None, weight, dim, 1.0, None, implementation)


def check_channels(name: str, x: Tensor, bias: Tensor | None, dim: int) -> int:
    """Checks a tensor and the bias of its channels; the channels' dimension, counted from the front."""
    _checks.floating(name, "x", x)
    _checks.whole(name, "dim", dim, least=-math.inf)
    if not -x.ndim <= dim < x.ndim:
        accepted = f"accepts {-x.ndim} to {x.ndim - 1}" if x.ndim else "has no channels"
        raise ValueError(f"{name}: dim is {dim}; a tensor of shape {tuple(x.shape)} {accepted}")
    dim %= x.ndim
    if bias is None:
        return dim
    _checks.floating(name, "bias", bias)
    if bias.shape != (x.shape[dim],):
        raise ValueError(
            f"{name}: bias has shape {tuple(bias.shape)}; x has {x.shape[dim]} channels in dimension {dim} (shape "
            f"{tuple(x.shape)}) and needs ({x.shape[dim]},)"
        )
    same_dtype = bias.dtype == x.dtype or autocasting(x.device.type)
    if bias.device != x.device or not same_dtype:
        raise ValueError(
            f"{name}: x and bias must share dtype and device, got {short(x.dtype)} on {x.device} and "
            f"{short(bias.dtype)} on {bias.device}"
        )
    return dim


def check_options(
    name: str, activation: str | None, negative_slope: float, gain: float, *, prelu: bool = False
) -> None:
    _checks.activation(name, activation, negative_slope, (*ACTIVATIONS, *("prelu",) * prelu))
    _checks.number(name, "gain", gain)
