"""Convolutions: torch's own two, and the two that change the resolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from gankern.core.activations import ACTIVATIONS
from gankern.core.dispatch import short
from gankern.core.native import nodes
from gankern.core.torch_internals import autocasting
from gankern.functional import _checks
from gankern.functional.bias_act import bias_act
from gankern.ops.convolution import BORDERS, as_product, convolution, no_row
from gankern.ops.convolution_choice import Ints, kind_of
from gankern.reference import convolution as reference

SLOPE = 0.2  # where none is given: whether it is this very object is the cheapest question


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, as torch's convolutions: all in its dtype."""
    device = x.device.type
    if not autocasting(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    x, weight = (t.to(dtype) if t.dtype in (torch.float32, dtype) else t for t in (x, weight))
    return x, weight, bias.to(dtype) if bias is not None and bias.dtype in (torch.float32, dtype) else bias


def _check_tensors(name: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Their shapes and dtypes are torch's to check."""
    _checks.tensor(name, "input", input)
    _checks.tensor(name, "weight", weight)
    if bias is not None:
        _checks.tensor(name, "bias", bias)


def _scaled(
    name: str, scale: float, convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None,
    *options: Any,
) -> Tensor:  # fmt: skip
    """convolve(x, weight, bias, *options) with its weight scaled, without a scaled copy of the weight: the result is
    scaled instead. (A function in the caller would cost its every call a cell for each name.)"""
    if scale == 1:
        return convolve(x, weight, bias, *options)
    y = convolve(x, weight, None, *options) * scale
    if bias is None:
        return y
    _checks.bias_of(name, bias, y, y.shape[-3])  # as torch's convolutions: no other shape or dtype
    return y + bias[:, None, None]


def _padded(x: Tensor, weight: Tensor, padding: Ints | str, dilation: Ints, mode: str) -> Tensor:
    """The image with what stands around it, as torch.nn.Conv2d makes it."""
    before: list[int]
    if isinstance(padding, str):
        steps = [dilation] * 2 if isinstance(dilation, int) else [*dilation]
        whole = [d * (k - 1) if padding == "same" else 0 for d, k in zip(steps, weight.shape[2:])]
        before, after = [n // 2 for n in whole], [n - n // 2 for n in whole]
    else:
        before = [padding] * 2 if isinstance(padding, int) else [*padding] * (2 // len(padding))
        after = before
    most = [n - int(mode == "reflect") for n in x.shape[-2:]]
    if mode != "replicate" and any(max(b, a) > m for b, a, m in zip(before, after, most)):
        raise ValueError(
            f"conv2d: padding is {padding}; padding_mode {mode!r} takes at most {tuple(most)} around images of "
            f"{tuple(x.shape[-2:])} pixels"
        )
    return F.pad(x, (before[1], after[1], before[0], after[0]), mode)


def _activates(name: str, activation: str | None, negative_slope: float) -> bool:
    """Whether an activation follows; raises for one that there is not, before anything is computed. Callers look at the
    defaults themselves: a tiny convolution takes five microseconds, and this call a tenth of that."""
    _checks.activation(name, activation, negative_slope, ACTIVATIONS)
    return activation is not None


def _activated(
    name: str, y: Tensor, bias: Tensor | None, activation: str | None, slope: float, implementation: str | None
) -> Tensor:
    _checks.bias_of(name, bias, y, y.shape[-3])
    return bias_act(y, bias, dim=y.ndim - 3, activation=activation, negative_slope=slope, implementation=implementation)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    weight_scale: float = 1.0,
    activation: str | None = None,
    negative_slope: float = SLOPE,
    implementation: str | None = None,
) -> Tensor:
    r"""torch.nn.functional.conv2d, on the CPU with fewer multiplications: :math:`y_o = b_o + \sum_i w_{oi} \star x_i`.

    A 3x3 kernel of stride 1 with padding 0, 1 or 2 runs as Winograd's F(2x2) with 4 instead of 9 products a pixel, a
    4x4 kernel of stride 1 with padding 0 to 3 with 5.06 instead of 16, one of stride 2 with padding 1 as four filters
    of two taps with 9 instead of 16, and a 3x3 kernel of stride 2 with padding 1 as filters of two taps and of one with
    6.25 instead of 9, where that was measured to be faster; :func:`gankern.set_convolution_precision` allows larger
    tiles. With few channels on one side (an image's), square kernels of 1, 3, 4, 5, 7 and 9 taps of stride 1, and the
    4x4 kernel of stride 2 with padding 1, are computed with neighbouring pixels in a vector. Of few pixels and many
    channels, it is a matrix product, and so is a kernel as large as the image, without padding. Everything else (other
    kernels and strides, groups, dilation, unbatched input, torch.func's transforms) is torch's own convolution. All
    gradients, of any order, run the same way, and only those are computed that are asked for.

    Source: Winograd 1980; Lavin and Gray 2015, arXiv 1509.09308.

    Args:
        input: [N, C_in, H, W] (or [C_in, H, W]), any strides; a channels_last one gives a channels_last result.
        weight: [C_out, C_in / groups, kernel height, kernel width].
        bias: [C_out].
        stride, padding, dilation, groups: as in torch.
        padding_mode: what stands around the image: "zeros", "reflect" (the pixels mirrored at the outermost ones),
            "replicate" (these themselves) or "circular". Around a 3x3 kernel of stride 1 with padding 1 the rows read
            reflected and replicated pixels where they lie, and no padded copy of the image is made or kept; elsewhere
            there is one, as torch.nn.Conv2d makes it.
        weight_scale: the weight is multiplied with it, in the rows' own pass over it, and no copy of it is kept:
            equalised learning rates.
        activation, negative_slope: of the result, as in :func:`gankern.functional.bias_act`: bias and activation are
            one pass, and one in the backward, which gives the bias's gradient too and keeps the result alone.
        implementation: "cpu" runs the rows or raises, "reference" is torch's own convolution; see
            :mod:`gankern.functional`.

    Returns:
        What torch returns. A NaN or an infinity in the input makes NaN of a whole tile of results: of the 2x2 (or,
        in larger tiles, 4x4) results beside each that torch would make NaN or infinite.

    Gradient order: any; 2 with an activation.

    Raises:
        ValueError: for an implementation that cannot take these arguments. Otherwise torch's own errors.

    >>> conv2d(torch.randn(2, 8, 16, 16), torch.randn(4, 8, 3, 3), padding=1).shape
    torch.Size([2, 4, 16, 16])
    """
    if (activation is not None or negative_slope is not SLOPE) and _activates("conv2d", activation, negative_slope):
        y = conv2d(
            input, weight, None, stride, padding, dilation, groups,
            padding_mode=padding_mode, weight_scale=weight_scale, implementation=implementation,
        )  # fmt: skip
        return _activated("conv2d", y, bias, activation, negative_slope, implementation)
    if not is_dynamo_compiling():
        y = nodes.conv2d(
            input, weight, bias, stride, padding, dilation, groups, weight_scale, implementation, padding_mode
        )
        if y is not NotImplemented:
            return y
    if has_torch_function((input, weight)):
        return handle_torch_function(
            conv2d,
            (input, weight),
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            padding_mode=padding_mode,
            weight_scale=weight_scale,
            implementation=implementation,
        )
    _check_tensors("conv2d", input, weight, bias)
    _checks.number("conv2d", "weight_scale", weight_scale)
    _checks.choice("conv2d", "padding_mode", padding_mode, (*BORDERS, "circular"))
    x, weight, bias = _cast(input, weight, bias)
    kind, pad = kind_of(weight.shape, stride, padding, dilation, groups)
    border = BORDERS.get(padding_mode, 0)
    result = None
    if border and kind == "same" and pad == 1 and x.ndim == 4 and min(x.shape[2:]) > 1:
        result = convolution(kind, x, weight, bias, pad, weight_scale, implementation, border)
        if result is not None:
            return result
    if padding_mode != "zeros":
        x, padding = _padded(x, weight, padding, dilation, padding_mode), 0
        kind, pad = kind_of(weight.shape, stride, padding, dilation, groups)
    result = as_product(x, weight, bias, padding, dilation, groups, implementation, scale=weight_scale)
    if result is not None or kind is None:
        no_row(
            implementation,
            "square kernels of 1, 3, 4, 5, 7 or 9 taps of stride 1, 3x3 and 4x4 of stride 2 and padding 1",
        )
    else:
        result = convolution(kind, x, weight, bias, pad, weight_scale, implementation)
    if result is not None:
        return result
    return _scaled("conv2d", weight_scale, F.conv2d, x, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    weight_scale: float = 1.0,
    activation: str | None = None,
    negative_slope: float = SLOPE,
    implementation: str | None = None,
) -> Tensor:
    r"""torch.nn.functional.conv_transpose2d, on the CPU with fewer multiplications for a 4x4 kernel of stride 2 and
    padding 1: 9 instead of 16 products an input pixel (with few channels on one side all 16, with neighbouring pixels
    in a vector); and for a 3x3 kernel of stride 2, padding 1 and output padding 1: 6.25 instead of 9. Of images of one
    pixel, without padding, it is one matrix product (a generator's first layer).

    Everything else is torch's own. Gradients, precision, memory formats, NaN and errors as in :func:`conv2d`; a tile
    has 4x4 results, in larger tiles 8x8.

    Args:
        input: [N, C_in, H, W] (or [C_in, H, W]).
        weight: [C_in, C_out / groups, kernel height, kernel width].
        bias: [C_out].
        stride, padding, output_padding, groups, dilation: as in torch.
        weight_scale, activation, negative_slope, implementation: as in :func:`conv2d`.

    Returns:
        What torch returns.

    Gradient order: any; 2 with an activation.

    >>> conv_transpose2d(torch.randn(2, 8, 16, 16), torch.randn(8, 4, 4, 4), stride=2, padding=1).shape
    torch.Size([2, 4, 32, 32])
    """
    if (activation is not None or negative_slope is not SLOPE) and _activates(
        "conv_transpose2d", activation, negative_slope
    ):
        y = conv_transpose2d(
            input, weight, None, stride, padding, output_padding, groups, dilation,
            weight_scale=weight_scale, implementation=implementation,
        )  # fmt: skip
        return _activated("conv_transpose2d", y, bias, activation, negative_slope, implementation)
    if not is_dynamo_compiling():
        y = nodes.conv_transpose2d(
            input,
            weight,
            bias,
            stride,
            padding,
            output_padding,
            groups,
            dilation,
            weight_scale,
            implementation,
        )
        if y is not NotImplemented:
            return y
    if has_torch_function((input, weight)):
        return handle_torch_function(
            conv_transpose2d,
            (input, weight),
            input,
            weight,
            bias,
            stride,
            padding,
            output_padding,
            groups,
            dilation,
            weight_scale=weight_scale,
            implementation=implementation,
        )
    _check_tensors("conv_transpose2d", input, weight, bias)
    _checks.number("conv_transpose2d", "weight_scale", weight_scale)
    x, weight, bias = _cast(input, weight, bias)
    kind, pad = kind_of(weight.shape, stride, padding, dilation, groups, True, output_padding)
    result = None
    if kind is not None:
        result = convolution(kind, x, weight, bias, pad, weight_scale, implementation)
    else:
        no_row(implementation, "4x4 kernels of stride 2, padding 1 and output_padding 0")
        result = as_product(
            x, weight, bias, padding, dilation, groups, implementation, True, output_padding, weight_scale
        )
    if result is not None:
        return result
    options = stride, padding, output_padding, groups, dilation
    return _scaled("conv_transpose2d", weight_scale, F.conv_transpose2d, x, weight, bias, *options)


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale_factor: float = 2,
    mode: str = "nearest",
    weight_scale: float = 1.0,
    activation: str | None = None,
    negative_slope: float = SLOPE,
    implementation: str | None = None,
) -> Tensor:
    r"""A larger image without checkerboards: conv2d(interpolate(x, scale_factor), weight, bias, padding="same").

    For nearest upsampling by 2 and a 3x3 kernel the larger image is never made. In one dimension

    .. math:: y_{2i} = w_0 (x_{i-1} - x_i) + S x_i, \quad y_{2i+1} = S x_i + w_2 (x_{i+1} - x_i), \quad
        S = w_0 + w_1 + w_2

    so three products give two results, and in two dimensions nine give four, where the convolution of the larger image
    makes 36. Where the transposed 4x4 convolution that both steps collapse into is faster (16 products; and on a GPU,
    unless another way was measured to be faster there), that runs. Everything else (other factors, modes and kernels)
    is computed as written above.

    Source: resize-convolution, Odena et al. 2016, distill.pub/2016/deconv-checkerboard; the nine products are its
    polyphase form with shared terms.

    Args:
        x: [N, C_in, H, W], float64, float32, bfloat16 or float16, any strides; channels_last gives channels_last.
        weight: [C_out, C_in, k, k].
        bias: [C_out].
        scale_factor: at least 1.
        mode: of torch.nn.functional.interpolate: "nearest", "nearest-exact", "bilinear", "bicubic" or "area".
        weight_scale, activation, negative_slope: as in :func:`conv2d`.
        implementation: "cpu" runs the nine products or raises, "reference" is the formula above; see
            :mod:`gankern.functional`.

    Returns:
        [N, C_out, scale_factor * H, scale_factor * W]. A NaN or an infinity in x can make NaN of all results of the
        2x2 pixels of each result that it has a part in.

    Gradient order: any; 2 with an activation.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> upsample_conv2d(torch.randn(2, 8, 16, 16), torch.randn(4, 8, 3, 3)).shape
    torch.Size([2, 4, 32, 32])
    """
    if (activation is not None or negative_slope is not SLOPE) and _activates(
        "upsample_conv2d", activation, negative_slope
    ):
        y = upsample_conv2d(
            x, weight, scale_factor=scale_factor, mode=mode, weight_scale=weight_scale, implementation=implementation
        )
        return _activated("upsample_conv2d", y, bias, activation, negative_slope, implementation)
    name = "upsample_conv2d"
    if not is_dynamo_compiling() and scale_factor == 2 and mode == "nearest":
        y = nodes.resample_conv2d("upsample", x, weight, bias, weight_scale, implementation)
        if y is not NotImplemented:
            return y
    _checks.number(name, "weight_scale", weight_scale)
    check_upsampling(name, scale_factor, mode)
    x, weight, bias = _check(name, x, weight, bias)
    if scale_factor == 2 and mode in ("nearest", "nearest-exact") and weight.shape[2:] == (3, 3):
        result = convolution("upsample", x, weight, bias, 1, weight_scale, implementation)
        if result is not None:
            return result
    else:
        no_row(implementation, "nearest upsampling by 2 with a 3x3 kernel")
    return _scaled(name, weight_scale, reference.upsample_conv2d, x, weight, bias, scale_factor, mode)


def conv2d_downsample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: float = 1.0,
    activation: str | None = None,
    negative_slope: float = SLOPE,
    implementation: str | None = None,
) -> Tensor:
    r"""A smaller image: the 2x2 means of conv2d(x, weight, bias, padding="same").

    For a 3x3 kernel the convolution at full resolution is never made. In one dimension

    .. math:: 2 y_j = w_0 (x_{2j-1} - x_{2j+1}) + S (x_{2j} + x_{2j+1}) + w_2 (x_{2j+2} - x_{2j}), \quad
        S = w_0 + w_1 + w_2

    so in two dimensions nine products give what takes 36. Where one 4x4 convolution of stride 2 is faster, that runs.
    Other kernels are computed as written above.

    Args:
        x: [N, C_in, H, W], H and W at least 2; of an odd size the last row or column of the convolution has no part in
            a mean. float64, float32, bfloat16 or float16, any strides; channels_last gives channels_last.
        weight: [C_out, C_in, k, k], k odd.
        bias: [C_out].
        weight_scale, activation, negative_slope: as in :func:`conv2d`.
        implementation: "cpu" runs the nine products or raises, "reference" is the formula above; see
            :mod:`gankern.functional`.

    Returns:
        [N, C_out, H // 2, W // 2]. NaN and infinity reach the results that they reach in the formula above.

    Gradient order: any; 2 with an activation.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> conv2d_downsample(torch.randn(2, 8, 16, 16), torch.randn(4, 8, 3, 3)).shape
    torch.Size([2, 4, 8, 8])
    """
    if (activation is not None or negative_slope is not SLOPE) and _activates(
        "conv2d_downsample", activation, negative_slope
    ):
        y = conv2d_downsample(x, weight, weight_scale=weight_scale, implementation=implementation)
        return _activated("conv2d_downsample", y, bias, activation, negative_slope, implementation)
    name = "conv2d_downsample"
    if not is_dynamo_compiling():
        y = nodes.resample_conv2d("downsample", x, weight, bias, weight_scale, implementation)
        if y is not NotImplemented:
            return y
    _checks.number(name, "weight_scale", weight_scale)
    x, weight, bias = _check(name, x, weight, bias)
    if min(x.shape[2:]) < 2:
        raise ValueError(f"{name}: x has {x.shape[2]} by {x.shape[3]} pixels; at least 2 by 2 are needed")
    if weight.shape[2:] == (3, 3):
        result = convolution("downsample", x, weight, bias, 1, weight_scale, implementation)
        if result is not None:
            return result
    else:
        no_row(implementation, "3x3 kernels")
    return reference.conv2d_downsample(x, weight if weight_scale == 1 else weight * weight_scale, bias)


def check_upsampling(name: str, scale_factor: float, mode: str) -> None:
    _checks.choice(name, "mode", mode, ("nearest", "nearest-exact", "bilinear", "bicubic", "area"))
    if isinstance(scale_factor, bool) or not isinstance(scale_factor, (int, float)):
        raise TypeError(f"{name}: scale_factor is {type(scale_factor).__name__}; it must be a number")
    _checks.number(name, "scale_factor", scale_factor, least=1)


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    for argument, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None or argument != "bias":
            _checks.floating(name, argument, tensor)
    if x.ndim != 4:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; it must be [N, C_in, H, W]")
    if weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}; for x of shape {tuple(x.shape)} it must be "
            f"[C_out, {x.shape[1]}, k, k]"
        )
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(
            f'{name}: weight has a kernel of {weight.shape[2]} by {weight.shape[3]}; with "same" padding it must be odd'
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}; it must be [{weight.shape[0]}]")
    x, weight, bias = _cast(x, weight, bias)
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name}: x and {argument} must share dtype and device, got {short(x.dtype)} on {x.device} and "
                f"{short(tensor.dtype)} on {tensor.device}"
            )
    return x, weight, bias
