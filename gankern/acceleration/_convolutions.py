"""What runs in place of torch's convolutions, borders, interpolation and pooling, alone and as pairs in one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern.functional as GF
from gankern.acceleration import _functions
from gankern.acceleration._functions import OWN_SECOND, VALUE, pays, say_second
from gankern.acceleration._layers import leaf, unwatched
from gankern.acceleration._scope import (
    HANDLERS,
    PAIRS,
    PLAIN,
    Followed,
    defer,
    followed_by,
    fuse,
    gain,
    is_half,
    joined,
    may_defer,
    say,
    settled,
    state,
)
from gankern.core import devices
from gankern.core.dispatch import last_implementation
from gankern.core.layout import has_channels_together
from gankern.core.native import nodes
from gankern.core.torch_internals import autocasting
from gankern.ops.convolution import BORDERS, convolution, level_of, ways_for
from gankern.ops.convolution_choice import KINDS, kind_of, result_size, saved

# ---- convolutions -------------------------------------------------------------------------------------------


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    kind, pad = _kind(weight, stride, padding, dilation, groups)
    if kind == "same" and pad == 1 and is_half(input, "upsample"):
        small, *_ = fuse(input)
        result = _resampled("upsample", small, weight, bias)
        if result is not None:
            followed_by(input, result, functools.partial(F.conv2d, weight=weight, bias=bias, padding=1))
            joined(
                input,
                _ran("upsample", small, weight) + ", in one with the upsampling",
                0.5 * _worth("upsample", 1, small, weight) - PAIR,
            )
            return result
    if kind == "same" and pad == 0 and is_half(input, "pad"):
        inner, mode = fuse(input)
        result = _with_border(inner, weight, bias, mode)
        if result is not None:
            followed_by(input, result, functools.partial(F.conv2d, weight=weight, bias=bias))
            joined(input, f"{_ran('same', inner, weight)}, in one with the padding", 2 * inner.numel() * VALUE)
            return result
    input = settled(input)
    if kind == "same" and pad == 1 and state.followed[0] is not None:
        deferred = _wait_for_mean(state.followed[0], input, weight, bias)
        if deferred is not None:
            return deferred
    return _conv2d(kind, pad, input, weight, bias, stride, padding, dilation, groups)


def _resampled(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Both steps in one, the whole call in C++ where nothing wants to know of it; None where torch's two are faster."""
    if not state.double:
        y = nodes.resample_conv2d(kind, x, weight, bias, 1.0, None)
        if y is not NotImplemented:
            return y
    return convolution(kind, x, weight, bias)


def _with_border(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor | None:
    """The 3x3 convolution of an image with a border of one pixel, which is not stored; None for torch's two steps."""
    if autocasting(x.device.type) or x.ndim != 4 or min(x.shape[2:]) < 2 or not _repays("same", 1, x, weight):
        return None
    return convolution("same", x, weight, bias, border=BORDERS[mode])


def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """A border of one pixel waits for the 3x3 convolution behind it."""
    if mode in ("reflect", "replicate") and tuple(pad) == (1, 1, 1, 1) and may_defer(input) and input.ndim == 4:
        n, c, height, width = input.shape
        if min(height, width) > 1:
            return defer("pad", torch.Size((n, c, height + 2, width + 2)), _padded, input, mode)
    say("torch", "no border of one mirrored or repeated pixel" if may_defer(input) else "nothing is fused here")
    return F.pad(settled(input), pad, mode, value)


def _padded(input: Tensor, mode: str) -> Tensor:
    say("torch", "no 3x3 convolution of ours follows")
    return F.pad(input, (1, 1, 1, 1), mode)


def _kind(weight: Tensor, *arguments: Any) -> tuple[str | None, int]:
    if torch.compiler.is_compiling():
        return kind_of(weight.shape, *arguments)
    try:
        return _kind_of(weight.shape, *arguments)
    except TypeError:  # lists
        return kind_of(weight.shape, *arguments)


_kind_of = functools.lru_cache(maxsize=1024)(kind_of)


def _conv2d(
    kind: str | None,
    pad: Any,
    input: Tensor,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    if autocasting(input.device.type):
        say("torch", "autocast")
        return GF.conv2d(input, weight, bias, stride, padding, dilation, groups)
    result = None
    if kind is not None and _repays(kind, pad, input, weight):
        result = convolution(kind, input, weight, bias, pad)
    if result is not None and kind is not None:
        gain(_worth(kind, pad, input, weight))
        say(_ran(kind, input, weight))
    else:
        result = _by_torch(kind, input, weight, bias, stride, padding, dilation, False, 0, groups)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups) if result is None else result


PAIR = 80.0  # microseconds that it costs to let a first half wait; of what a pair saves half is counted
CALL = 10.0  # microseconds of a layer that the way to a kernel of ours may take more than the call of torch's function
ON_GPUS = 5e-5  # that a fused pair is worth for a thousand products; not measured


def _worth(kind: str, pad: int, x: Tensor, weight: Tensor) -> float:
    """The microseconds that a convolution by our ways is faster than plain PyTorch's, as measured; with its gradients
    where there may be some."""
    height, width = x.shape[2:]
    if x.device.type != "cpu":
        if not devices.is_known(PAIRS, x):  # then none of them runs
            return 0.0
        enlarged = 4 if kind == "upsample" else 1
        return weight.numel() * x.shape[0] * height * width * enlarged * ON_GPUS / 1000
    first, second = weight.shape[:2]
    channels = (first, second) if KINDS[kind].swap else (second, first)
    new_height, new_width = result_size(kind, pad, height, width)
    pixels = x.shape[0] * min(height * width, new_height * new_width)
    return saved(kind, level_of(x), has_channels_together(x), *channels, pixels, torch.is_grad_enabled())


def _repays(kind: str, pad: int, x: Tensor, weight: Tensor) -> bool:
    """Whether that is more than the call costs."""
    if x.ndim != 4:
        return True
    return devices.is_known(PAIRS, x) and (x.device.type != "cpu" or _worth(kind, pad, x, weight) >= CALL)


def _ran(kind: str, x: Tensor, weight: Tensor) -> str:
    """Which implementation of a convolution ran, and which way of it forward and for the two gradients."""
    ran = last_implementation("convolution")
    if ran != "cpu" or state.log is None:
        return f"gankern: {kind}, by torch's 4x4 convolution"
    ways = ", ".join(f"{which} {way}" for which, way in ways_for(kind, x, weight).items())
    return f"gankern: {kind} ({ran}: {ways})"


def _by_torch(kind: str | None, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor | None:
    """The form with a second derivative of its own where that may be asked for; else None, for torch's."""
    why = "no kernel of ours for this form" if kind is None else "torch is faster for this shape, as measured"
    result = _functions.convolution(x, weight, bias, *options) if pays(x) else None
    say(OWN_SECOND if result is not None else "torch", why)
    return result


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    input = settled(input)
    arguments = (stride, padding, output_padding, groups, dilation)
    if autocasting(input.device.type):
        say("torch", "autocast")
        return GF.conv_transpose2d(input, weight, bias, *arguments)
    result = None
    kind, pad = kind_of(weight.shape, stride, padding, dilation, groups, True, output_padding)
    if kind is not None and _repays(kind, pad, input, weight):
        result = convolution(kind, input, weight, bias, pad)
    if result is not None and kind is not None:
        gain(_worth(kind, pad, input, weight))
        say(_ran(kind, input, weight))
    else:
        result = _by_torch(kind, input, weight, bias, stride, padding, dilation, True, output_padding, groups)
    return F.conv_transpose2d(input, weight, bias, *arguments) if result is None else result


def _is(value: Any, number: int) -> bool:
    return all(v == number for v in value) if isinstance(value, (tuple, list)) else value == number


class Left:
    """The shapes and options for which a convolution was last left to torch, whatever the settings: asked once."""

    how: tuple | None = None

    def __reduce__(self) -> Any:
        return Left, ()


def _wait_for_mean(followed: Followed | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The result of a 3x3 convolution with padding 1, which a 2x2 mean may follow."""
    if followed is None or not followed.waits or not may_defer(x):
        return None
    if x.ndim != 4 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype or x.device != weight.device:
        return None  # torch's own error
    size = torch.Size((x.shape[0], weight.shape[0], *x.shape[2:]))
    return defer("convolution", size, _without_mean, x, weight, bias, followed)


def _without_mean(x: Tensor, weight: Tensor, bias: Tensor | None, followed: Followed) -> Tensor:
    followed.misses += 1
    return _conv2d("same", 1, x, weight, bias, 1, 1, 1, 1)


# ---- resampling ---------------------------------------------------------------------------------------------


def _is_double(x: Tensor, size: Any, scale_factor: Any, mode: str, antialias: bool) -> bool:
    if mode not in ("nearest", "nearest-exact") or antialias:
        return False
    if size is not None:
        doubled = [2 * n for n in x.shape[2:]]
        return (list(size) == doubled) if not isinstance(size, int) else [size] * 2 == doubled
    return scale_factor is not None and (
        scale_factor == 2 if isinstance(scale_factor, (int, float)) else all(s == 2 for s in scale_factor)
    )


def interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    arguments = (size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    if may_defer(input) and input.ndim == 4 and _is_double(input, size, scale_factor, mode, antialias):
        n, c, height, width = input.shape
        return defer("upsample", torch.Size((n, c, 2 * height, 2 * width)), _interpolated, input, *arguments)
    say("torch", "not nearest by 2" if may_defer(input) else "nothing is fused here")
    return F.interpolate(settled(input), *arguments)


def _interpolated(input: Tensor, *arguments: Any) -> Tensor:
    say("torch", "no 3x3 convolution follows")
    return F.interpolate(input, *arguments)


def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    if is_half(input, "convolution"):
        halves = _is(kernel_size, 2) and (stride is None or _is(stride, 2)) and _is(padding, 0)
        if halves and not ceil_mode and divisor_override in (None, 4) and min(input.shape[2:]) >= 2:
            *arguments, followed = fuse(input)
            followed.misses = 0
            result = _resampled("downsample", *arguments)
            if result is not None:
                followed_by(input, result, functools.partial(F.avg_pool2d, kernel_size=2))
                x, weight, _ = arguments
                ran = _ran("downsample", x, weight)
                joined(input, f"{ran}, in one with the convolution", 0.5 * _worth("downsample", 1, x, weight) - PAIR)
                return result
    constants = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return pooled(_functions.avg_pool2d, input, *constants)


def pooled(function: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """By a function of torch's with a second derivative of ours."""
    input = settled(input)
    say_second(input)
    return function(input, *args, **kwargs)


PLAIN.update(
    {
        "upsample": lambda new, x, *arguments: F.interpolate(new(x), *arguments),
        "pad": lambda new, x, mode: F.pad(new(x), (1, 1, 1, 1), mode),
        "convolution": lambda new, x, weight, bias, _: F.conv2d(new(x), new(weight), new(bias), padding=1),
    }
)

HANDLERS.update(
    {
        torch.conv2d: conv2d,
        torch.conv_transpose2d: conv_transpose2d,
        F.interpolate: interpolate,
        F.pad: pad,
        F.avg_pool2d: avg_pool2d,
        F.adaptive_avg_pool2d: functools.partial(pooled, _functions.adaptive_avg_pool2d),
        torch.max_pool2d: functools.partial(pooled, _functions.max_pool2d),
    }
)


# ---- modules ------------------------------------------------------------------------------------------------


@functools.partial(leaf, constants=2, stands_for=(nn.Conv2d,))
def conv2d_forward(module: nn.Conv2d, followed: Followed | None, left: Left, input: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias  # read once: a parametrised one is computed
    padding: int | str | tuple[int, ...] = module.padding
    unpaired = followed is None or not followed.waits or not state.intercepting
    if unpaired and type(input) is Tensor and state.log is None:
        options = (module.stride, padding, module.dilation, module.groups)
        how = (input.shape, weight.shape, *options, torch.is_grad_enabled())
        if how == left.how and not state.double:
            return module._conv_forward(input, weight, bias)
        kind, pad = _kind(weight, *options)
        whole = input.shape[2:] == weight.shape[2:]  # perhaps one matrix product
        if kind is not None and not whole:
            whole = input.ndim == 4 and _repays(kind, pad, input, weight)
        if whole and module.padding_mode == "zeros":
            # The whole call in C++, where nothing wants to know of it.
            y = nodes.conv2d(input, weight, bias, *options, 1.0, None, "zeros")
            if y is not NotImplemented:
                if kind is not None and state.intercepting:
                    gain(_worth(kind, pad, input, weight))
                return y
        elif not whole and not state.double:
            left.how = how
            return module._conv_forward(input, weight, bias)
    if module.padding_mode in ("reflect", "replicate") and _kind(
        weight, module.stride, padding, module.dilation, module.groups
    ) == ("same", 1):
        input = settled(input)
        result = _with_border(input, weight, bias, module.padding_mode)
        if result is not None:
            gain(_worth("same", 1, input, weight))
            say(f"{_ran('same', input, weight)}, with its border")
            return result
        input = F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        return conv2d(input, weight, bias, module.stride, 0, module.dilation, module.groups)
    if module.padding_mode != "zeros":
        input = F.pad(settled(input), module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    before, state.followed = state.followed, (followed if unwatched(module) else None, None)
    try:
        return conv2d(input, weight, bias, module.stride, padding, module.dilation, module.groups)
    finally:
        state.followed = before


@functools.partial(leaf, stands_for=(nn.ReflectionPad2d, nn.ReplicationPad2d))
def pad_forward(module: Any, input: Tensor) -> Tensor:
    return pad(
        input, module.padding, "reflect" if isinstance(module, nn.modules.padding._ReflectionPadNd) else "replicate"
    )


@functools.partial(leaf, stands_for=(nn.ConvTranspose2d,))
def conv_transpose2d_forward(module: nn.ConvTranspose2d, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    if output_size is not None or module.padding_mode != "zeros":
        return type(module).forward(module, settled(input), output_size)
    weight, bias = module.weight, module.bias
    options = (module.stride, module.padding, module.output_padding, module.groups, module.dilation)
    if not state.double and type(input) is Tensor and state.log is None:
        y = nodes.conv_transpose2d(input, weight, bias, *options, 1.0, None)
        if y is not NotImplemented:
            if state.intercepting and input.ndim == 4:
                kind, pad = kind_of(weight.shape, *options[:2], options[4], options[3], True, options[2])
                gain(0.0 if kind is None else _worth(kind, pad, input, weight))
            return y
    return conv_transpose2d(input, weight, bias, *options)


@functools.partial(leaf, stands_for=(nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d))
def convolution_forward(module: Any, input: Tensor, *output_size: Any) -> Tensor:
    """Of one and three dimensions, either direction: torch's, with a cheap second derivative."""
    input = settled(input)
    say_second(input)
    batched = input.ndim == len(module.kernel_size) + 2
    # Asked before the weight is read, which may be computed anew at each reading: torch's forward reads it again.
    if batched and not output_size and module.padding_mode == "zeros" and module.padding != "same" and pays(input):
        result = _functions.convolution(
            input,
            module.weight,
            module.bias,
            module.stride,
            module.padding,
            module.dilation,
            module.transposed,
            module.output_padding,
            module.groups,
        )
        if result is not None:
            return result
    return type(module).forward(module, input, *output_size)


# What torch's forwards read, in the order of its functions.
_WINDOW = "kernel_size", "stride", "padding"
_OF_AVG_POOL = attrgetter(*_WINDOW, "ceil_mode", "count_include_pad", "divisor_override")
_OF_MAX_POOL = attrgetter(*_WINDOW, "dilation", "ceil_mode", "return_indices")


@functools.partial(leaf, stands_for=(nn.AvgPool2d,))
def avg_pool2d_forward(module: nn.AvgPool2d, input: Tensor) -> Tensor:
    return avg_pool2d(input, *_OF_AVG_POOL(module))


@functools.partial(leaf, stands_for=(nn.MaxPool2d,))
def max_pool2d_forward(module: nn.MaxPool2d, input: Tensor) -> Any:
    return pooled(_functions.max_pool2d, input, *_OF_MAX_POOL(module))


@functools.partial(leaf, stands_for=(nn.AdaptiveAvgPool2d,))
def adaptive_avg_pool2d_forward(module: nn.AdaptiveAvgPool2d, input: Tensor) -> Tensor:
    return pooled(_functions.adaptive_avg_pool2d, input, module.output_size)


@functools.partial(leaf, stands_for=(nn.Upsample,))
def upsample_forward(module: nn.Upsample, input: Tensor) -> Tensor:
    if not unwatched(module):
        input = settled(input)
        return type(module).forward(module, input)
    return interpolate(
        input, module.size, module.scale_factor, module.mode, module.align_corners, module.recompute_scale_factor
    )
