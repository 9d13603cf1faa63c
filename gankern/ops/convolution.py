"""Convolutions by bilinear algorithms: which one runs, its operators, and its gradients of any order.

A *kind* is what is computed, for example "same": 3x3, stride 1. With the kernel fixed it is a linear map of images;
the data gradient is that map's transpose, the weight gradient is bilinear in the image and the gradient, and the
derivatives of each of the three are the other two. So two Functions that call each other have every order, and each
computes only what the running backward asks for.

Each of the three passes has several *ways*; the fastest one that the precision allows runs
(gankern/ops/convolution_choice.py). Where that is "reference" in the forward of a kind that resamples, or "torch" in
all three passes of another kind, plain PyTorch runs with its own autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gankern.core import autograd, dispatch, native, precision, registry, zeros
from gankern.core.batching import one_gradient_at_a_time
from gankern.core.dispatch import ANY_ORDER, FLOATING, Implementation, Primitive
from gankern.core.layout import has_channels_together, lies_in_channels_last
from gankern.core.torch_internals import transformed
from gankern.ops import convolution_choice as choice
from gankern.ops.convolution_choice import ALLOWED, KINDS, PASSES

NAME = "convolution"
primitive = Primitive(
    NAME,
    (
        Implementation("cpu", ("cpu",), FLOATING, ANY_ORDER, native.NATIVE_MISSING),
        Implementation("reference", (), (), ANY_ORDER),
    ),
)

# ---- the operators --------------------------------------------------------------------------------------

registry.library.define(
    "convolution_row(Tensor x, Tensor weight, Tensor? bias, int row, SymInt height, SymInt width, int padding, "
    "bool flip, bool swap, float scale, float slope, int border=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
registry.library.define(
    "convolution_row_weight_gradient(Tensor x, Tensor grad, int row, int padding, bool flip, bool swap, float scale, "
    "int border=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fake_row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: int,
    height: int,
    width: int,
    padding: int,
    flip: bool,
    swap: bool,
    scale: float,
    slope: float,
    border: int = 0,
) -> Any:
    last = has_channels_together(x) or has_channels_together(weight)
    size = (x.shape[0], weight.shape[1 if swap else 0], height, width)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


# Of each row, the taps of its kinds; the direct one is of any number, of stride 1.
_TAPS = {
    number: kind.taps
    for kind in KINDS.values()
    for row in kind.rows.values()
    if row is not choice.DIRECT
    for number in (row.forward, row.transpose)
}


def _fake_weight_gradient(
    x: Tensor, grad: Tensor, row: int, padding: int, flip: bool, swap: bool, scale: float, border: int = 0
) -> Any:
    taps = _TAPS.get(row, x.shape[2] + 2 * padding + 1 - grad.shape[2])
    outer, inner = (x.shape[1], grad.shape[1]) if swap else (grad.shape[1], x.shape[1])
    return x.new_empty(outer, inner, taps, taps)


def _fake_window_sums(x: Tensor, up: bool, grow: bool) -> Any:
    first, second, taps, _ = x.shape
    taps += 1 if grow else -1
    size = (second, first, taps, taps) if up else (first, second, taps, taps)
    memory_format = torch.channels_last if lies_in_channels_last(x) else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


torch.library.register_fake("gankern::convolution_row", _fake_row, lib=registry.library)
torch.library.register_fake("gankern::convolution_row_weight_gradient", _fake_weight_gradient, lib=registry.library)

# _collapse and _uncollapse of a kind that enlarges ("up") or reduces, on GPUs, where C++ calls it.
registry.define(
    NAME, "window_sums", "convolution_window_sums(Tensor x, bool up, bool grow) -> Tensor", _fake_window_sums
)

# ---- the passes -----------------------------------------------------------------------------------------


def _window_sums(x: Tensor) -> Tensor:
    """[..., n, n] -> [..., n - 1, n - 1]."""
    x = x[..., 1:, :] + x[..., :-1, :]
    return x[..., 1:] + x[..., :-1]


def _collapse(kind: str, weight: Tensor) -> Tensor:
    """The 4x4 kernel of stride 2 that does both steps: for "upsample" that of a transposed convolution."""
    sums = _window_sums(F.pad(weight, (1, 1, 1, 1)))
    return sums.flip(2, 3).transpose(0, 1) if kind == "upsample" else sums / 4


def _uncollapse(kind: str, grad: Tensor) -> Tensor:
    """The transpose of _collapse."""
    return _window_sums(grad.transpose(0, 1).flip(2, 3) if kind == "upsample" else grad / 4)


native.nodes.set_convolution_kinds(
    [
        (name, k.taps, k.swap, k.flip, k.scale, k.collapsed, k.stride, k.transposed, k.zeros)
        for name, k in KINDS.items()
    ],
    choice.rows_for,
    choice.ways_on_device,
    registry.TRITON_MISSING is None,
)


def _more(direct: choice.Kind, taps: int, padding: int, small: Tensor, height: int, width: int) -> list[int]:
    """Of a transposed convolution by torch that gives height times width: rows and columns of that than the least that
    there can be."""
    return [
        n - ((before - 1) * direct.stride - 2 * padding + taps) for n, before in zip((height, width), small.shape[2:])
    ]


def _convolve_by_torch(
    kind: Any, transpose: bool, padding: int, height: int, width: int, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Any:
    direct = KINDS[kind]
    if direct.collapsed:
        weight, padding = _collapse(kind, weight), 1
    transposed = direct.transposed != transpose
    more = _more(direct, weight.shape[2], padding, x, height, width) if transposed else [0, 0]
    return torch.ops.aten.convolution(x, weight, bias, [direct.stride] * 2, [padding] * 2, [1, 1], transposed, more, 1)


def _exchanged(weight: Tensor) -> Tensor:
    """The weight of the convolution that is the transpose of one of stride 1, whose padding is taps - 1 - padding."""
    return weight.flip(2, 3).transpose(0, 1)


def _enlarged_by_phases(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int) -> Any:
    """The transposed convolution of a 4x4 kernel, stride 2 and padding 1, to an image of height times width. The four
    phases of the result, its even and odd rows and columns, are one convolution of 2x2 taps: in one dimension
    y[2 i + a] = sum_m w[3 - a - 2 m] x[i - 1 + a + m]."""
    inner, outer = weight.shape[:2]
    taps = weight.flip(2, 3).reshape(inner, outer, 2, 2, 2, 2)  # [.., m, a, n, b]
    kernel = taps.permute(3, 5, 1, 0, 2, 4).reshape(4 * outer, inner, 2, 2)
    last = has_channels_together(x) or lies_in_channels_last(weight)
    memory_format = torch.channels_last if last else torch.contiguous_format
    kernel, biases = kernel.contiguous(memory_format=memory_format), None if bias is None else bias.repeat(4)
    phases = torch.ops.aten.convolution(x, kernel, biases, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    size = (x.shape[0], outer, height, width)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)
    for a in (0, 1):
        for b in (0, 1):
            part = y[:, :, a::2, b::2]
            of_phase = phases.narrow(1, (2 * a + b) * outer, outer)
            part.copy_(of_phase[:, :, a : a + part.shape[2], b : b + part.shape[3]])
    return y


def _weight_gradient_by_torch(kind: Any, padding: int, x: Tensor, grad: Tensor) -> Any:
    direct = KINDS[kind]
    taps, padding = (4, 1) if direct.collapsed else (direct.taps, padding)
    shape = (x.shape[1], grad.shape[1]) if direct.transposed else (grad.shape[1], x.shape[1])
    result = torch.ops.aten.convolution_backward(
        grad,
        x,
        x.new_empty(*shape, taps, taps),  # of which only the shape is read
        None,
        [direct.stride] * 2,
        [padding] * 2,
        [1, 1],
        direct.transposed,
        _more(direct, taps, padding, x, *grad.shape[2:]) if direct.transposed else [0, 0],
        1,
        [False, True, False],
    )[1]
    return _uncollapse(kind, result) if direct.collapsed else result


def _side_by_side(x: Tensor) -> Tensor:
    """[N, C, ...] -> [C, N ...]."""
    return x[0].flatten(1) if x.shape[0] == 1 else x.transpose(0, 1).flatten(1)


def _columns(kind: choice.Kind, padding: int, x: Tensor) -> Tensor:
    """The pixels that each tap reads, [C taps^2, pixels of the smaller image of all images]."""
    if kind.taps > 1:
        x = F.unfold(x, kind.taps, padding=padding, stride=kind.stride)
    return _side_by_side(x)


def _matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; with few columns the other way round, for which it was measured to take up to ten times as long."""
    return a @ b if torch.compiler.is_compiling() or b.shape[1] >= 16 else (b.mT @ a.mT).mT


def _convolve_by_product(
    kind: choice.Kind, transpose: bool, padding: int, height: int, width: int, x: Tensor, weight: Tensor, scale: float
) -> Any:
    n, matrix = x.shape[0], weight.flatten(1)
    if kind.transposed == transpose:  # to the smaller image
        y = _matrix_product(matrix, _columns(kind, padding, x)).unflatten(1, (n, height, width)).transpose(0, 1)
    else:
        y = _matrix_product(matrix.mT, _side_by_side(x)).unflatten(1, (n, -1)).transpose(0, 1)
        if kind.taps > 1:
            y = F.fold(y, (height, width), kind.taps, padding=padding, stride=kind.stride)
        y = y.reshape(n, -1, height, width)
    # As torch's: channels last where either of the two has them so.
    last = has_channels_together(x) or lies_in_channels_last(weight)
    y = y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return y if scale == 1 else y * scale


def _weight_gradient_by_product(kind: choice.Kind, padding: int, x: Tensor, grad: Tensor) -> Tensor:
    small, large = (x, grad) if kind.transposed else (grad, x)
    product = _side_by_side(small) @ _columns(kind, padding, large).mT
    return product.view(small.shape[1], large.shape[1], kind.taps, kind.taps)


BORDERS = {"zeros": 0, "reflect": 1, "replicate": 2}  # torch's padding modes; of one pixel, around a 3x3 convolution


def _bordered(border: int, x: Tensor) -> Tensor:
    """The image with a border of one pixel."""
    return F.pad(x, (1, 1, 1, 1), "reflect" if border == 1 else "replicate")


def _folded(border: int, y: Tensor) -> Tensor:
    """The transpose of _bordered: the border's values go to the pixels that it was made of. Overwrites y."""
    last = has_channels_together(y)
    for dim in (2, 3):
        n = y.shape[dim] - 2
        for of, to in ((0, 2), (n + 1, n - 1)) if border == 1 else ((0, 1), (n + 1, n)):
            y.select(dim, to).add_(y.select(dim, of))
    return y[:, :, 1:-1, 1:-1].clone(memory_format=torch.channels_last if last else torch.contiguous_format)


def _images(x: Tensor) -> int:
    """By which a way is chosen. A compiled program is for batches of any size: it has the way of a usual one."""
    return _COMPILED_BATCH if torch.compiler.is_compiling() else x.shape[0]


_COMPILED_BATCH = 16


def _way(options: tuple, which: str, x: Tensor, channels_in: int, channels_out: int, height: int, width: int) -> str:
    """For an image, its channels and the other image's height and width."""
    kind, _, _, level, forced, _ = options
    if forced is not None:
        return forced
    pixels, taps = (x.shape[2] * x.shape[3], height * width), KINDS[kind].taps
    last = has_channels_together(x)
    args = (kind, which, level, last, channels_in, channels_out, _images(x) * min(pixels))
    if torch.compiler.is_compiling():
        from gankern.ops import _traced  # which loads Dynamo

        way = _traced.way_for(*args)
    elif KINDS[kind].stride == 1 < taps and x.shape[0] and sorted(pixels) == [1, taps * taps]:
        way = "product"  # a kernel as large as the image: tiles compute, and round, pixels that nobody asked for
    else:
        way = choice.way_for(*args)
    # Products of half precision would be rounded before their sum.
    return "torch" if way == "product" and x.dtype not in (torch.float32, torch.float64) else way


def _convolve(
    options: tuple, transpose: bool, height: int, width: int, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Any:
    """The map of images that ``options`` name, or its transpose, to an image of height times width. Options are (kind,
    padding, scale, precision, None or the way that all passes take, border)."""
    name, padding, scale, _, _, border = options
    if border and transpose:
        inner = (name, 0, *options[2:5], 0)  # of the image with its border
        return _folded(border, _convolve(inner, True, height + 2, width + 2, x, weight, bias))
    kind = KINDS[name]
    first, second = weight.shape[:2]
    channels = (first, second) if kind.swap else (second, first)  # of the kind: in, out
    way = _way(options, "transpose" if transpose else "forward", x, *channels, height, width)
    if way in kind.rows:
        row = kind.rows[way].transpose if transpose else kind.rows[way].forward
        pad = kind.taps - 1 - padding if transpose else padding
        flip, swap = transpose and kind.flip, kind.swap != transpose
        y = torch.ops.gankern.convolution_row(
            x, weight, bias, row, height, width, pad, flip, swap, scale * kind.scale, 1.0, border
        )
        # The engine takes a 1x1 kernel for contiguous; torch goes by its strides.
        last = kind.taps == 1 and lies_in_channels_last(weight)
        return y.contiguous(memory_format=torch.channels_last) if last else y
    if border:
        x, padding = _bordered(border, x), 0
    if way == "product":
        y = _convolve_by_product(kind, transpose, padding, height, width, x, weight, scale)
        return y if bias is None else y + bias.view(-1, 1, 1)
    weight = weight if scale == 1 else weight * scale
    if way == "phases" and kind.transposed != transpose:
        return _enlarged_by_phases(x, _collapse(name, weight), bias, height, width)
    if way == "exchanged":  # the gradient by torch's forward, and the other way round
        pad = kind.taps - 1 - padding
        return _convolve_by_torch(name, not transpose, pad, height, width, x, _exchanged(weight), bias)
    return _convolve_by_torch(name, transpose, padding, height, width, x, weight, bias)


def _weight_gradient(options: tuple, x: Tensor, grad: Tensor) -> Any:
    """The gradient of the weight for the map's input x and the gradient of its result."""
    name, padding, scale, _, _, border = options
    kind = KINDS[name]
    way = _way(options, "weight", x, x.shape[1], grad.shape[1], *grad.shape[2:])
    if way in kind.rows:
        row = kind.rows[way].forward
        return torch.ops.gankern.convolution_row_weight_gradient(
            x, grad, row, padding, False, kind.swap, scale * kind.scale, border
        )
    if border:
        x, padding = _bordered(border, x), 0
    if way == "product":
        result = _weight_gradient_by_product(kind, padding, x, grad)
    elif way == "exchanged":  # as that of a convolution from the gradient to the image
        result = _exchanged(_weight_gradient_by_torch(name, kind.taps - 1 - padding, grad, x)).contiguous()
    else:
        result = _weight_gradient_by_torch(name, padding, x, grad)
    return result if scale == 1 else result * scale


class _Convolve(Function):
    """Inputs: options, whether the transpose, height, width, x, weight, bias or None. Output: the image."""

    @staticmethod
    def forward(
        options: Any, transpose: bool, height: int, width: int, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Any:
        return _convolve(options, transpose, height, width, x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.options, ctx.transpose, _, _, x, weight, bias = inputs
        ctx.present = (True, True, bias is not None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, grad: Tensor) -> Any:
        if grad is None:
            return (None,) * 7
        for_x, for_weight, for_bias = autograd._needed(ctx, skip=4)
        x, weight, bias = ctx.saved_tensors
        if not (ctx.transpose or autograd.first_order_only()):
            # What torch's steps give to those below in the second order: a pooling behind the convolution zeros to all
            # of its inputs, a padding before it to x.
            if KINDS[ctx.options[0]].zeros:
                for before in (x, weight, bias):
                    grad = grad if before is None else zeros.carry(grad, before)
            else:
                grad = zeros.carry(grad, x, exist=bool(ctx.options[5]))
        grad_x = grad_weight = None
        if for_x:
            size = x.shape[2:]
            grad_x = _call(_Convolve, _convolve, ctx.options, not ctx.transpose, *size, grad, weight, None)
        if for_weight:
            pair = (grad, x) if ctx.transpose else (x, grad)
            grad_weight = _call(_WeightGradient, _weight_gradient, ctx.options, *pair)
        grad_bias = grad.sum((0, 2, 3)) if for_bias else None
        return None, None, None, None, grad_x, grad_weight, grad_bias


class _WeightGradient(Function):
    """Inputs: options, x, the gradient of the map's result. Output: the gradient of the weight."""

    @staticmethod
    def forward(options: Any, x: Tensor, grad: Tensor) -> Any:
        return _weight_gradient(options, x, grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.options, x, grad = inputs
        ctx.present = (True, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, grad)

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, direction: Tensor) -> Any:
        if direction is None:
            return None, None, None
        for_x, for_grad = autograd._needed(ctx, skip=1)
        x, grad = ctx.saved_tensors
        grad_x = grad_grad = None
        if for_x:
            grad_x = _call(_Convolve, _convolve, ctx.options, True, *x.shape[2:], grad, direction, None)
        if for_grad:
            grad_grad = _call(_Convolve, _convolve, ctx.options, False, *grad.shape[2:], x, direction, None)
        return None, grad_x, grad_grad


def _call(function: type[Function], kernel: Any, *args: Any) -> Any:
    """The kernel alone where nobody will differentiate it, else the Function."""
    return kernel(*args) if autograd.first_order_only() else autograd.apply(function, *args)


# ---- what the functions call ----------------------------------------------------------------------------


def _problem(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> str | None:
    """Why no way but plain PyTorch takes these tensors, which are of a kind."""
    tensors = [t for t in (x, weight, bias) if t is not None]
    if x.ndim != 4:
        return f"takes [N, C, H, W], got {x.ndim} dimensions"
    if any(t.dtype != x.dtype or t.device != x.device for t in tensors):
        return "takes tensors of one dtype on one device"
    if x.dtype not in FLOATING:
        return f"takes {', '.join(dispatch.short(d) for d in FLOATING)}, got {dispatch.short(x.dtype)}"
    if weight.shape[0 if KINDS[kind].swap else 1] != x.shape[1]:
        return "takes a weight of as many input channels as x has"
    if min(*choice.result_size(kind, padding, *x.shape[2:]), *x.shape[1:], *weight.shape) < 1:
        return "takes images that give at least one pixel, and at least one channel"
    return None


def convolution(
    kind: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int = 1,
    scale: float = 1.0,
    implementation: str | None = None,
    border: int = 0,
) -> Tensor | None:
    """The convolution of weight * scale, for tensors that torch's functions would accept (with a ``border``, one of
    BORDERS, of "same" with padding 1, for images of two pixels or more each way); None where plain PyTorch is
    to run: where it is asked for, is fastest, or nothing else takes these tensors."""
    wish = primitive.wish(implementation)
    plainly = transformed()
    problem = _problem(kind, x, weight, bias, padding)
    problem = problem or (dispatch.transformation_refusal() if plainly else None)
    missing = problem or primitive.refusals(x.device.type, x.dtype)["cpu"]
    if wish not in ("auto", "reference") and (wish != "cpu" or missing):
        raise primitive.refuse(wish, {"cpu": missing, "reference": None})
    level = level_of(x)
    height, width = (0, 0) if problem else choice.result_size(kind, padding, *x.shape[2:])
    forced = None
    if wish == "cpu":
        forced = ALLOWED[kind, level][-1]
    elif missing and KINDS[kind].collapsed and not problem:
        forced = _way_elsewhere(kind, x, weight, height, width)
    options = (kind, padding, scale, level, forced, border)
    if wish == "reference" or problem or (plainly and wish == "auto") or (missing and not forced):
        plain = True
    else:
        ways = _ways(options, x, weight, height, width)
        plain = ways[0] == "reference" or (forced is None and all(way == "torch" for way in ways))
    primitive.ran("reference" if plain or missing else "cpu")
    if plain:
        return None
    recorder = autograd.recording.recorder
    if recorder is not None:
        return recorder.convolution(_run, options, height, width, x, weight, bias)
    return _run(options, height, width, x, weight, bias)


def _way_elsewhere(kind: str, x: Tensor, weight: Tensor, height: int, width: int) -> str:
    """Where the engine is not, of a kind that resamples: the collapsed form, which has fewer products than plain
    PyTorch, but on a GPU what was measured to be faster there. (What is compiled is for any device.)"""
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return "torch"
    pixels = x.shape[0] * min(x.shape[2] * x.shape[3], height * width)
    channels_out, channels_in = weight.shape[:2]
    last = has_channels_together(x)
    return choice.way_on_device(kind, x.dtype, x.get_device(), last, channels_in, channels_out, pixels)


def _run(options: tuple, height: int, width: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not torch.compiler.is_compiling() and autograd.first_order_only():
        return _convolve(options, False, height, width, x, weight, bias)
    return autograd.apply(_Convolve, options, False, height, width, x, weight, bias)


def level_of(x: Tensor) -> str:
    """The precision that a convolution of this image has."""
    return "highest" if x.dtype == torch.float64 else precision.get_convolution_precision()


def _ways(options: tuple, x: Tensor, weight: Tensor, height: int, width: int) -> list[str]:
    first, second = weight.shape[:2]
    channels = (first, second) if KINDS[options[0]].swap else (second, first)
    return [_way(options, which, x, *channels, height, width) for which in PASSES]


def passes(
    options: tuple, height: int, width: int
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """For who differentiates by himself, the three kernels of the convolution that gives height times width: of (x,
    weight, bias or None), of (gradient of the result, x, weight) for x, and of the same for the weight."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return _convolve(options, False, height, width, x, weight, bias)

    def for_x(grad: Tensor, x: Tensor, weight: Tensor) -> Any:
        return _convolve(options, True, x.shape[2], x.shape[3], grad, weight, None)

    def for_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Any:
        return _weight_gradient(options, x, grad)

    return forward, for_x, for_weight


def options_for_torch(x: Tensor, weight: Tensor, arguments: tuple) -> tuple[tuple, int, int] | None:
    """Options and size of the result for a call of aten.convolution with (stride, padding, dilation, transposed,
    output_padding, groups) of which some pass is faster by a row; None if there is none."""
    stride, padding, dilation, transposed, output_padding, groups = arguments
    kind, pad = choice.kind_of(weight.shape, stride, padding, dilation, groups, transposed, output_padding)
    if kind is None or x.ndim != 4:
        return None
    if primitive.wish(None) not in ("auto", "cpu") or _problem(kind, x, weight, None, pad):
        return None
    if primitive.refusals(x.device.type, x.dtype)["cpu"]:
        return None
    options = (kind, pad, 1.0, level_of(x), None, 0)
    size = choice.result_size(kind, pad, *x.shape[2:])
    if all(way == "torch" for way in _ways(options, x, weight, *size)):
        return None
    return options, *size


def as_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: choice.Ints | str,
    dilation: choice.Ints,
    groups: int,
    implementation: str | None = None,
    transposed: bool = False,
    output_padding: choice.Ints = 0,
    scale: float = 1.0,
) -> Tensor | None:
    """torch's convolution where it is one matrix product: a transposed one of images of one pixel, as the first layer
    of a generator is, or a kernel as large as the image, as the last one of a discriminator. Torch's convolutions take
    up to ten times as long for these. None of any other, and where the memory format would be another one."""
    if x.ndim != 4 or weight.ndim != 4 or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return None
    if primitive.wish(implementation) != "auto" or autograd.recording.recorder is not None:
        return None
    if transformed() or torch.compiler.is_compiling():
        return None
    options = (0 if padding == "valid" else padding, 0), (dilation, 1), (output_padding, 0), (groups, 1)
    if any(value != plain and value != (plain, plain) for value, plain in options):
        return None
    size, out = ((1, 1), weight.shape[1]) if transposed else (weight.shape[2:], weight.shape[0])
    same = all(t.dtype == x.dtype and t.device == x.device for t in (weight, *(() if bias is None else (bias,))))
    if not same or x.shape[2:] != size or x.shape[1] != weight.shape[0 if transposed else 1]:
        return None
    if x.numel() == 0 or weight.numel() == 0 or (bias is not None and bias.shape != (out,)):
        return None
    if not (x.is_contiguous() and weight.is_contiguous()):
        return None
    if not transposed and scale == 1:
        return F.linear(x.flatten(1), weight.flatten(1), bias).view(-1, out, 1, 1)
    matrix = weight.flatten(1)
    y = torch.mm(x.flatten(1), matrix if transposed else matrix.mT)
    y = (y if scale == 1 else y * scale).view(-1, out, *(weight.shape[2:] if transposed else (1, 1)))
    return y if bias is None else y + bias.view(-1, 1, 1)


def no_row(implementation: str | None, rows: str) -> None:
    """For arguments that are of no kind: plain PyTorch runs. ``rows`` says what there is."""
    wish = primitive.wish(implementation)
    if wish not in ("auto", "reference"):
        problem = (dispatch.transformation_refusal() if transformed() else None) or f"takes {rows}"
        raise primitive.refuse(wish, {"cpu": problem, "reference": None})
    primitive.ran("reference")


def ways_for(kind: str, x: Tensor, weight: Tensor) -> dict[str, str]:
    """For each pass of a kind with padding 1, the way that "auto" takes for these tensors."""
    options = (kind, 1, 1.0, level_of(x), None, 0)
    return dict(zip(PASSES, _ways(options, x, weight, *choice.result_size(kind, 1, *x.shape[2:]))))
