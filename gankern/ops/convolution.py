"""Convolutions by bilinear algorithms: which one runs, its operators, and its gradients of any order.

A *kind* is what is computed, for example "same": 3x3, stride 1. With the kernel fixed it is a linear map of images;
the data gradient is that map's transpose, the weight gradient is bilinear in the image and the gradient, and the
derivatives of each of the three are the other two. So two Functions that call each other have every order, and each
computes only what the running backward asks for.

Each of the three passes has several *ways*: the rows of the engine's table (csrc/cpu/convolution_rows.h), and "torch":
its direct convolution, for the two kinds that resample with the 4x4 kernel that both steps collapse into. The fastest
way that the precision allows runs; which that is was measured (gankern/ops/convolution_ways.py). For the forward of
the kinds that resample there is also "reference", both steps one after the other: where that is fastest, or "torch" is
in all three passes of another kind, plain PyTorch runs with its own autograd.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gankern.core import autograd, dispatch, native, precision, registry, zeros
from gankern.core.dispatch import ANY_ORDER, FLOATING, Implementation, Primitive
from gankern.core.torch_internals import transformed
from gankern.ops.convolution_ways import MEASURED

NAME = "convolution"
primitive = Primitive(
    NAME,
    (
        Implementation("cpu", ("cpu",), FLOATING, ANY_ORDER, native.NATIVE_MISSING),
        Implementation("reference", (), (), ANY_ORDER),
    ),
)

# ---- the table ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A pair of rows of the C++ table: of a map and of its transpose."""

    forward: int
    transpose: int
    precision: str  # the highest one that allows it


@dataclass(frozen=True)
class Kind:
    """What is computed. The weight is [out, in, taps, taps], or with ``swap`` [in, out, taps, taps]."""

    taps: int
    rows: dict[str, Row]
    swap: bool = False
    flip: bool = True  # whether the transpose reads the taps back to front
    scale: float = 1.0  # from the rows' result to this kind's
    collapsed: bool = False  # has the way "collapsed"
    zeros: bool = False  # torch's form is a pooling, with a second derivative of zeros by its input: see core.zeros


KINDS = {
    "upsample": Kind(3, {"nine": Row(0, 1, "highest")}, collapsed=True),
    "downsample": Kind(3, {"nine": Row(1, 0, "highest")}, scale=0.25, collapsed=True, zeros=True),
    "same": Kind(3, {"tiles2": Row(2, 2, "highest"), "tiles4": Row(3, 3, "high")}),
    "strided": Kind(4, {"tiles2": Row(4, 6, "highest"), "tiles4": Row(5, 7, "medium")}, flip=False),
    "transposed": Kind(4, {"tiles2": Row(6, 4, "highest"), "tiles4": Row(7, 5, "medium")}, swap=True, flip=False),
}
PASSES = ("forward", "transpose", "weight")


# The engine's rows for a kind that a precision allows, the one with the largest tile last.
ALLOWED = {
    (name, level): tuple(
        way
        for way, row in kind.rows.items()
        if precision.PRECISIONS.index(row.precision) <= precision.PRECISIONS.index(level)
    )
    for name, kind in KINDS.items()
    for level in precision.PRECISIONS
}


Shape = tuple[int, int, int]  # channels in, channels out, pixels of the smaller image times images


def _distance(shape: Shape, measured: Shape) -> float:
    a, b, p = (abs(math.log2(max(mine, 1) / theirs)) for mine, theirs in zip(shape, measured))
    return a + b + p / 2


@functools.lru_cache(maxsize=4096)
def is_known(kind: str, channels_in: int, channels_out: int, pixels: int) -> bool:
    """Whether the measured table tells which way is fastest: with few channels only near a shape in it, and 4x4 kernels
    not below the smallest shape in it."""
    if KINDS[kind].taps == 4 and channels_in * channels_out * pixels < 2**19:
        return False
    if min(channels_in, channels_out) >= 8:
        return True
    shape = (channels_in, channels_out, pixels)
    return min(_distance(shape, measured) for measured in MEASURED[kind, "forward", "contiguous"]) < 1


@functools.lru_cache(maxsize=4096)
def way_for(
    kind: str, which: str, level: str, channels_last: bool, channels_in: int, channels_out: int, pixels: int
) -> str:
    """The way that was fastest where it was measured nearest to this shape: "torch", "reference" or a row's name.

    ``which`` is one of PASSES, ``pixels`` are those of the smaller of the two images times the number of images.
    """

    shape = (channels_in, channels_out, pixels)
    if pixels < 1:
        return "torch"
    measured = MEASURED[kind, which, "channels_last" if channels_last else "contiguous"]
    times = measured[min(measured, key=functools.partial(_distance, shape))]
    # The collapsed form's errors are up to 2.7 times those of direct convolution: too much for the highest precision.
    collapsed = KINDS[kind].collapsed and level == "highest"
    allowed = {"reference", *ALLOWED[kind, level], *(() if collapsed else ("torch",))}
    if "torch" in allowed and not is_known(kind, *shape):
        return "torch"
    return min(allowed & times.keys(), key=times.__getitem__)


def _nodes_ways(kind: str, level: str, channels_in: int, channels_out: int, pixels: int) -> list[list[int]]:
    """For the C++ nodes: of each pass, for contiguous and channels_last images, its row, or -1 and -2 for "torch" and
    "reference"."""

    def number(which: str, way: str) -> int:
        if way in ("torch", "reference"):
            return -1 if way == "torch" else -2
        row = KINDS[kind].rows[way]
        return row.transpose if which == "transpose" else row.forward

    return [
        [number(which, way_for(kind, which, level, last, channels_in, channels_out, pixels)) for last in (False, True)]
        for which in PASSES
    ]


# ---- the operators --------------------------------------------------------------------------------------

registry.library.define(
    "convolution_row(Tensor x, Tensor weight, Tensor? bias, int row, SymInt height, SymInt width, int padding, "
    "bool flip, bool swap, float scale, float slope) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
registry.library.define(
    "convolution_row_weight_gradient(Tensor x, Tensor grad, int row, int padding, bool flip, bool swap, float scale) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def is_channels_last(x: Tensor) -> bool:
    """As the kernels see it."""
    return x.stride(1) == 1 and not x.is_contiguous()


def _fake_row(x, weight, bias, row, height, width, padding, flip, swap, scale, slope):
    last = is_channels_last(x) or is_channels_last(weight)
    size = (x.shape[0], weight.shape[1 if swap else 0], height, width)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _fake_weight_gradient(x, grad, row, padding, flip, swap, scale):
    taps = 3 if row < 4 else 4
    outer, inner = (x.shape[1], grad.shape[1]) if swap else (grad.shape[1], x.shape[1])
    return x.new_empty(outer, inner, taps, taps)


torch.library.register_fake("gankern::convolution_row", _fake_row, lib=registry.library)
torch.library.register_fake("gankern::convolution_row_weight_gradient", _fake_weight_gradient, lib=registry.library)

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


@dataclass(frozen=True)
class _Direct:
    """torch's own convolution that computes a kind's forward, with the weight or with the collapsed one."""

    stride: int
    transposed: bool


_DIRECT = {
    "same": _Direct(1, False),
    "strided": _Direct(2, False),
    "transposed": _Direct(2, True),
    "upsample": _Direct(2, True),
    "downsample": _Direct(2, False),
}


native.nodes.set_convolution_kinds(
    [
        (name, k.taps, k.swap, k.flip, k.scale, k.collapsed, _DIRECT[name].stride, _DIRECT[name].transposed, k.zeros)
        for name, k in KINDS.items()
    ],
    _nodes_ways,
)


def _convolve_by_torch(kind, transpose, padding, height, width, x, weight, bias):
    direct = _DIRECT[kind]
    if KINDS[kind].collapsed:
        weight, padding = _collapse(kind, weight), 1
    transposed = direct.transposed != transpose
    more = [0, 0]  # rows and columns of the result than the least that there can be
    if transposed:
        taps = weight.shape[2]
        least = [(n - 1) * direct.stride - 2 * padding + taps for n in x.shape[2:]]
        more = [height - least[0], width - least[1]]
    return torch.ops.aten.convolution(x, weight, bias, [direct.stride] * 2, [padding] * 2, [1, 1], transposed, more, 1)


def _weight_gradient_by_torch(kind, padding, x, grad):
    direct, collapsed = _DIRECT[kind], KINDS[kind].collapsed
    taps, padding = (4, 1) if collapsed else (KINDS[kind].taps, padding)
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
        [0, 0],
        1,
        [False, True, False],
    )[1]
    return _uncollapse(kind, result) if collapsed else result


def _images(x: Tensor) -> int:
    """By which a way is chosen. A compiled program is for batches of any size: it has the way of a usual one."""
    return _COMPILED_BATCH if torch.compiler.is_compiling() else x.shape[0]


_COMPILED_BATCH = 16


def _way(options: tuple, which: str, x: Tensor, channels_in: int, channels_out: int, pixels: int) -> str:
    kind, _, _, level, forced = options
    if forced is not None:
        return forced
    args = (kind, which, level, is_channels_last(x), channels_in, channels_out, pixels)
    if torch.compiler.is_compiling():
        from gankern.ops import _traced  # which loads Dynamo

        return _traced.way_for(*args)
    return way_for(*args)


def _convolve(options: tuple, transpose: bool, height: int, width: int, x, weight, bias):
    """The map of images that ``options`` name, or its transpose, to an image of height times width. Options are (kind,
    padding, scale, precision, None or the way that all passes take)."""
    name, padding, scale, _, _ = options
    kind = KINDS[name]
    first, second = weight.shape[:2]
    channels = (first, second) if kind.swap else (second, first)  # of the kind: in, out
    pixels = _images(x) * min(x.shape[2] * x.shape[3], height * width)
    way = _way(options, "transpose" if transpose else "forward", x, *channels, pixels)
    if way in kind.rows:
        row = kind.rows[way].transpose if transpose else kind.rows[way].forward
        pad = 2 - padding if transpose else padding
        flip, swap = transpose and kind.flip, kind.swap != transpose
        return torch.ops.gankern.convolution_row(
            x, weight, bias, row, height, width, pad, flip, swap, scale * kind.scale, 1.0
        )
    weight = weight if scale == 1 else weight * scale
    return _convolve_by_torch(name, transpose, padding, height, width, x, weight, bias)


def _weight_gradient(options: tuple, x, grad):
    """The gradient of the weight for the map's input x and the gradient of its result."""
    name, padding, scale, _, _ = options
    kind = KINDS[name]
    pixels = _images(x) * min(x.shape[2] * x.shape[3], grad.shape[2] * grad.shape[3])
    way = _way(options, "weight", x, x.shape[1], grad.shape[1], pixels)
    if way in kind.rows:
        row = kind.rows[way].forward
        return torch.ops.gankern.convolution_row_weight_gradient(
            x, grad, row, padding, False, kind.swap, scale * kind.scale
        )
    result = _weight_gradient_by_torch(name, padding, x, grad)
    return result if scale == 1 else result * scale


class _Convolve(Function):
    """Inputs: options, whether the transpose, height, width, x, weight, bias or None. Output: the image."""

    @staticmethod
    def forward(options, transpose, height, width, x, weight, bias):
        return _convolve(options, transpose, height, width, x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.options, ctx.transpose, _, _, x, weight, bias = inputs
        ctx.present = (True, True, bias is not None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad):
        if grad is None:
            return (None,) * 7
        for_x, for_weight, for_bias = autograd._needed(ctx, skip=4)
        x, weight = ctx.saved_tensors
        if KINDS[ctx.options[0]].zeros and not ctx.transpose and not autograd.first_order_only():
            grad = zeros.carry(grad, ctx)
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
    def forward(options, x, grad):
        return _weight_gradient(options, x, grad)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.options, x, grad = inputs
        ctx.present = (True, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, grad)

    @staticmethod
    def backward(ctx: Any, direction):
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


def _call(function: type[Function], kernel, *args):
    """The kernel alone where nobody will differentiate it, else the Function."""
    return kernel(*args) if autograd.first_order_only() else autograd.apply(function, *args)


# ---- what the functions call ----------------------------------------------------------------------------


def _result_size(kind: str, padding: int, height: int, width: int) -> tuple[int, int]:
    if kind == "same":
        return height + 2 * padding - 2, width + 2 * padding - 2
    if kind in ("strided", "downsample"):
        return height // 2, width // 2
    return 2 * height, 2 * width


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
    if min(*_result_size(kind, padding, *x.shape[2:]), *x.shape[1:], *weight.shape) < 1:
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
) -> Tensor | None:
    """The convolution of weight * scale, for tensors that torch's functions would accept; None where plain PyTorch is
    to run: where it is asked for, is fastest, or nothing else takes these tensors."""
    wish = primitive.wish(implementation)
    plainly = transformed()
    problem = _problem(kind, x, weight, bias, padding)
    problem = problem or (dispatch.transformation_refusal() if plainly else None)
    missing = problem or primitive.refusals(x.device.type, x.dtype)["cpu"]
    if wish not in ("auto", "reference") and (wish != "cpu" or missing):
        raise primitive.refuse(wish, {"cpu": missing, "reference": None})
    level = _level(x)
    height, width = (0, 0) if problem else _result_size(kind, padding, *x.shape[2:])
    forced = None
    if wish == "cpu":
        forced = ALLOWED[kind, level][-1]
    elif missing and KINDS[kind].collapsed:
        forced = "torch"  # not the engine, but fewer products than plain PyTorch all the same
    options = (kind, padding, scale, level, forced)
    if wish == "reference" or problem or (plainly and wish == "auto") or (missing and not forced):
        plain = True
    else:
        ways = _ways(options, x, weight, height, width)
        plain = ways[0] == "reference" or (forced is None and all(way == "torch" for way in ways))
    primitive.ran("reference" if plain or forced == "torch" else "cpu")
    if plain:
        return None
    recorder = autograd.recording.recorder
    if recorder is not None:
        return recorder.convolution(_run, options, height, width, x, weight, bias)
    return _run(options, height, width, x, weight, bias)


def _run(options: tuple, height: int, width: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not torch.compiler.is_compiling() and autograd.first_order_only():
        return _convolve(options, False, height, width, x, weight, bias)
    return autograd.apply(_Convolve, options, False, height, width, x, weight, bias)


def _level(x: Tensor) -> str:
    return "highest" if x.dtype == torch.float64 else precision.get_convolution_precision()


def _ways(options: tuple, x: Tensor, weight: Tensor, height: int, width: int) -> list[str]:
    first, second = weight.shape[:2]
    channels = (first, second) if KINDS[options[0]].swap else (second, first)
    pixels = _images(x) * min(x.shape[2] * x.shape[3], height * width)
    return [_way(options, which, x, *channels, pixels) for which in PASSES]


def passes(
    options: tuple, height: int, width: int
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """For who differentiates by himself, the three kernels of the convolution that gives height times width: of (x,
    weight, bias or None), of (gradient of the result, x, weight) for x, and of the same for the weight."""

    def forward(x, weight, bias=None):
        return _convolve(options, False, height, width, x, weight, bias)

    def for_x(grad, x, weight):
        return _convolve(options, True, *x.shape[2:], grad, weight, None)

    def for_weight(grad, x, weight):
        return _weight_gradient(options, x, grad)

    return forward, for_x, for_weight


def options_for_torch(x: Tensor, weight: Tensor, arguments: tuple) -> tuple[tuple, int, int] | None:
    """Options and size of the result for a call of aten.convolution with (stride, padding, dilation, transposed,
    output_padding, groups) of which some pass is faster by a row; None if there is none."""
    stride, padding, dilation, transposed, output_padding, groups = (
        [*a] if isinstance(a, list) else a for a in arguments
    )
    shape = (*weight.shape[2:], *stride, *padding)
    if x.ndim != 4 or dilation != [1, 1] or groups != 1 or any(output_padding):
        return None
    if shape == (4, 4, 2, 2, 1, 1):
        kind = "transposed" if transposed else "strided"
    elif shape in ((3, 3, 1, 1, 0, 0), (3, 3, 1, 1, 1, 1), (3, 3, 1, 1, 2, 2)) and not transposed:
        kind = "same"
    else:
        return None
    pad = padding[0]
    if primitive.wish(None) not in ("auto", "cpu") or _problem(kind, x, weight, None, pad):
        return None
    if primitive.refusals(x.device.type, x.dtype)["cpu"]:
        return None
    options = (kind, pad, 1.0, _level(x), None)
    size = _result_size(kind, pad, *x.shape[2:])
    if all(way == "torch" for way in _ways(options, x, weight, *size)):
        return None
    return options, *size


def no_row(implementation: str | None, rows: str) -> None:
    """For arguments that are of no kind: plain PyTorch runs. ``rows`` says what there is."""
    wish = primitive.wish(implementation)
    if wish not in ("auto", "reference"):
        raise primitive.refuse(wish, {"cpu": f"takes {rows}", "reference": None})
    primitive.ran("reference")


def ways_for(kind: str, x: Tensor, weight: Tensor, padding: int = 1) -> dict[str, str]:
    """For each pass of a kind, the way that "auto" takes for these tensors."""
    options = (kind, padding, 1.0, _level(x), None)
    return dict(zip(PASSES, _ways(options, x, weight, *_result_size(kind, padding, *x.shape[2:]))))
