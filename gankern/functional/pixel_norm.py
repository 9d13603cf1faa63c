"""Pixelwise feature normalisation, alone and as the tail of a generator's layer."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gankern.core.activations import PIECEWISE
from gankern.core.native import nodes
from gankern.functional import _checks
from gankern.functional.bias_act import bias_act, check_channels
from gankern.ops.pixel_norm import pixel_norm as _pixel_norm


def pixel_norm(x: Tensor, *, eps: float = 1e-8, dim: int = 1, implementation: str | None = None) -> Tensor:
    r"""Normalises the channels of each pixel to a mean square of 1,
    :math:`y = x / \sqrt{\mathrm{mean}_c\, x^2 + \epsilon}`.

    One pass over memory forward and backward, which keeps y and one number a pixel.

    Source: Karras et al. 2018, arXiv 1710.10196, section 4.2.

    Args:
        x: any number of dimensions, float64, float32, bfloat16 or float16, any strides; computed in float32 (float64
            for float64).
        eps: at least 0. With 0, a pixel of zeros is NaN.
        dim: the channels' dimension.
        implementation: see the module.

    Returns:
        A tensor like x, in its memory format.

    Gradient order: 2 (any order for "reference").

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> import torch
    >>> pixel_norm(torch.tensor([[3.0, 4.0]]))
    tensor([[0.8485, 1.1314]])
    """
    if not is_dynamo_compiling():
        y = nodes.pixel_norm(x, None, dim, "linear", 1.0, 1.0, eps, implementation)
        if y is not NotImplemented:
            return y
    dim = check_channels("pixel_norm", x, None, dim)
    _checks.number("pixel_norm", "eps", eps, least=0)
    return _pixel_norm(x, None, dim, "linear", 1.0, 1.0, eps, implementation)


def bias_act_pixel_norm(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    dim: int = 1,
    activation: str | None = "leaky_relu",
    negative_slope: float = 0.2,
    gain: float = 1.0,
    eps: float = 1e-8,
    implementation: str | None = None,
) -> Tensor:
    r"""What follows the convolutions of ProGAN's generator, in one pass: bias, leaky ReLU, pixel norm.

    With :math:`a = g f(x + b)` the result is :math:`y = a / \sqrt{\mathrm{mean}_c\, a^2 + \epsilon}`. The backward is
    one pass too and gives the gradients of x and of the bias; it keeps y and one number a pixel, and not x.

    Source: Karras et al. 2018, arXiv 1710.10196, section 4.2 and table 2.

    Args:
        x: as :func:`pixel_norm`'s.
        bias: [channels], of x's dtype and device; None for none.
        dim: the channels' dimension.
        activation: "leaky_relu", "relu" or "linear"; None is "linear".
        negative_slope: of "leaky_relu", for negative arguments. (Where it is negative, y does not tell the sign of
            x + b: this is then :func:`bias_act` followed by :func:`pixel_norm`.)
        gain: a finite factor; it matters beside eps only.
        eps: at least 0. With 0, a pixel of zeros is NaN.
        implementation: see the module.

    What is returned, the gradient order and what is raised: :func:`pixel_norm`'s.

    >>> import torch
    >>> bias_act_pixel_norm(torch.tensor([[-5.0, 3.0]]), torch.tensor([0.0, 4.0]))
    tensor([[-0.2000,  1.4000]])
    """
    if not is_dynamo_compiling():
        y = nodes.pixel_norm(x, bias, dim, activation, negative_slope, gain, eps, implementation)
        if y is not NotImplemented:
            return y
    name = "bias_act_pixel_norm"
    dim = check_channels(name, x, bias, dim)
    check_options(name, activation, negative_slope, gain, eps)
    if bias is not None and bias.dtype != x.dtype:  # under autocast
        bias = bias.to(x.dtype)
    if activation == "leaky_relu" and negative_slope < 0:
        return pixel_norm(
            bias_act(
                x,
                bias,
                dim=dim,
                activation=activation,
                negative_slope=negative_slope,
                gain=gain,
                implementation=implementation,
            ),
            eps=eps,
            dim=dim,
            implementation=implementation,
        )
    return _pixel_norm(x, bias, dim, activation, negative_slope, gain, eps, implementation)


def check_options(name: str, activation: str | None, negative_slope: float, gain: float, eps: float) -> None:
    _checks.activation(name, activation, negative_slope, PIECEWISE)
    _checks.number(name, "gain", gain)
    _checks.number(name, "eps", eps, least=0)
