"""What runs in place of torch's layers and functions. Each takes torch's arguments, and leaves to torch what it cannot
do better."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

import gankern.functional as GF
from gankern.acceleration import _functions
from gankern.acceleration._code import original
from gankern.acceleration._functions import VALUE, matters, pays
from gankern.acceleration._scope import (
    HANDLERS,
    PAIRS,
    PLAIN,
    PLAIN_TYPES,
    STEPS,
    Deferred,
    defer,
    followed_by,
    fuse,
    gain,
    is_half,
    joined,
    may_defer,
    plain,
    preserve,
    say,
    settle,
    settled,
    state,
)
from gankern.core import activations, devices
from gankern.core.dispatch import last_implementation
from gankern.core.layout import has_channels_together
from gankern.core.native import nodes
from gankern.core.torch_internals import autocasting, functions_replaced, recomputed, seen_by_others, transformed
from gankern.functional._norm_act import update_running
from gankern.ops.batch_norm_act import batch_norm_act as _batch_norm_act
from gankern.ops.bias_act import bias_prelu as _bias_prelu
from gankern.ops.convolution import BORDERS, convolution, level_of, ways_for
from gankern.ops.convolution_choice import KINDS, kind_of, result_size, saved
from gankern.ops.group_norm_act import group_norm_act as _group_norm_act
from gankern.ops.instance_norm_act import instance_norm_act as _instance_norm_act


class Replaced(functools.partial):
    """What stands in place of a method of one module: a function of the module (and further constants). It goes with
    the module into copies and pickles. ``name`` is the method's, and to who asks its signature is that too."""

    name = "forward"
    whole = False  # whether what it calls is a part of it, for the report

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.args[0]
        return inspect.signature(getattr(type(module), self.name).__get__(module))

    @property
    def __name__(self) -> str:
        return self.name

    keeps_results = True  # those of the class's method: for gankern.nn.coupling


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
    say(_SECOND if result is not None else "torch", why)
    return result


_ONLY_SECOND = "only its second derivative is ours, under a penalty and of large tensors"
_SECOND = "torch, with a second derivative of gankern's"


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
    return value == number or (not isinstance(value, int) and all(v == number for v in value))


class Followed:
    """Whether a first half has a second one behind it (a convolution a 2x2 mean, a norm an activation), wherever
    in the model that is called: found out while it runs, until it is clear that it has none."""

    patience = 4

    def __init__(self) -> None:
        self.misses = 0

    @property
    def waits(self) -> bool:
        return self.misses < self.patience

    def __reduce__(self) -> Any:
        return Followed, ()


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
    return _pooled(_functions.avg_pool2d, input, *constants)


def _pooled(function: Callable[..., Any], input: Tensor, *arguments: Any) -> Any:
    input = settled(input)
    _say_second(input)
    return function(input, *arguments)


def _say_second(x: Tensor) -> None:
    """Of an operation whose first derivative is torch's."""
    say(*((_SECOND,) if matters(x) and x.numel() >= _functions.FROM.get(x.device.type, 0) else ("torch", _ONLY_SECOND)))


# ---- batch norm and activations ---------------------------------------------------------------------------------

# Values from which on ours is faster in training (measured); torch's is in evaluation, and without a backward where
# channels lie last.
LARGE = 131072
WIDE = 256  # positions: likewise of group norm, whose kernel takes short lines one by one
SMALL = 4096  # likewise of instance norm, for which torch repeats statistics and affine values, or copies x
_NOT_FASTER_FOR_EACH = f"ours is faster from {SMALL} values on, and under a penalty"
_NOT_FASTER_FOR_GROUPS = f"ours is faster in training on maps of {WIDE} positions on, and under a penalty"
_NOT_FASTER = f"ours is faster in training from {LARGE} values on, and under a penalty"


def _is_faster(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool
) -> bool:
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 2 or not plain():
        return False
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias, mean, var)):
        return False
    if (mean is None) != (var is None) or (weight is None) != (bias is None):
        return False
    if x.numel() <= x.shape[1]:
        return False  # one value a channel: torch's own error
    if matters(x):
        return True
    return (
        training
        and x.device.type == "cpu"
        and x.numel() >= LARGE
        and (x.is_contiguous() or (torch.is_grad_enabled() and x.requires_grad))
    )


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    of: _Norm,
    followed: Followed | None,
    counts: bool = True,
    activation: str | None = None,
    slope: float | Tensor = 0.0,
) -> Tensor:
    """A norm and an activation; ``counts``: whether it has a part in the running statistics."""
    if activation is None:
        gain((10.0 if isinstance(of, _OfEach) else 0.0) + x.numel() * VALUE)
        if followed is not None:
            followed.misses += 1
    if isinstance(of, _OfEach):
        result = _norm_of_each(x, weight, bias, of, counts, activation, slope)
        if activation is None:
            say(f"gankern: {of.kind} norm ({last_implementation(f'{of.kind}_norm_act')})")
        return result
    mean, var, training, momentum = of.now(counts)
    if mean is not None and var is not None:
        # torch's kernel saves these and updates them unseen; a forward by it may still wait for its backward.
        mean, var = mean.data, var.data
    each, prelu = (0.0, slope) if isinstance(slope, Tensor) else (slope, None)
    if matters(x):  # to any order, as the original's
        each = activations.slope(activation, each)
        own = training or mean is None
        result, stats = _batch_norm_act(x, (weight, bias, prelu), (mean, var), (own, of.eps, each), any_order=True)
        if training and mean is not None:
            update_running(mean, var, stats, momentum)
    else:
        result = GF.batch_norm_act(
            *(x, mean, var, weight, bias, training, momentum, of.eps),
            activation=activation,
            negative_slope=each,
            slope=prelu,
        )
    if activation is None:
        say(f"gankern: batch norm ({last_implementation('batch_norm_act')})")
    return result


def _norm_of_each(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    of: _OfEach,
    counts: bool,
    activation: str | None,
    slope: float | Tensor,
) -> Tensor:
    mean, var = (of.mean, of.var) if counts else (None, None)
    each, prelu = (0.0, slope) if isinstance(slope, Tensor) else (slope, None)
    if not matters(x):
        behind: Any = {"activation": activation, "negative_slope": each, "slope": prelu}
        if of.groups is not None:
            return GF.group_norm_act(x, of.groups, weight, bias, of.eps, **behind)
        return GF.instance_norm_act(x, mean, var, weight, bias, True, of.momentum, of.eps, **behind)
    affine, each = (weight, bias, prelu), activations.slope(activation, each)
    if of.groups is not None:
        return _group_norm_act(x, affine, (), (of.groups, of.eps, each), any_order=True)[0]
    result, stats = _instance_norm_act(x, affine, (), (of.eps, each), any_order=True)
    if mean is not None:
        update_running(mean, var, stats.mean(1), of.momentum)
    return result


def _normalize_plainly(
    new: Callable[[Any], Any], x: Tensor, weight: Tensor | None, bias: Tensor | None, of: _Norm, *_: Any
) -> Tensor:
    x, weight, bias = new(x), new(weight), new(bias)
    if isinstance(of, _OfEach):
        if of.groups is not None:
            return F.group_norm(x, of.groups, weight, bias, of.eps)
        return F.instance_norm(x, None, None, weight, bias, True, 0.0, of.eps)
    mean, var = of.fixed or (None, None)
    return F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, of.eps)


class _OfEach(NamedTuple):
    """What group or instance norm, by each sample's own statistics, is told; of instance norm, of the running ones."""

    eps: float
    groups: int | None = None  # None: instance norm
    mean: Tensor | None = None
    var: Tensor | None = None
    momentum: float = 0.0

    @property
    def fixed(self) -> tuple[Tensor | None, ...]:
        """The statistics that are read, and not made of x."""
        return ()

    @property
    def kind(self) -> str:
        return "instance" if self.groups is None else "group"


class _Statistics(NamedTuple):
    """What a call of F.batch_norm says of them."""

    mean: Tensor | None
    var: Tensor | None
    training: bool
    momentum: float
    eps: float

    @property
    def fixed(self) -> tuple[Tensor | None, ...]:
        return () if self.training else (self.mean, self.var)

    def now(self, counts: bool) -> tuple[Tensor | None, Tensor | None, bool, float]:
        kept = counts or not self.training
        return self.mean if kept else None, self.var if kept else None, self.training, self.momentum


class _Layer(NamedTuple):
    """What torch's layer, which counts its calls, was when it was called: an activation may be waited for meanwhile."""

    mean: Tensor | None
    var: Tensor | None
    training: bool
    momentum: float | None
    eps: float
    batches: Tensor | None  # counts; None: not kept
    tracks: bool

    @property
    def fixed(self) -> tuple[Tensor | None, ...]:
        return () if self.training or self.mean is None else (self.mean, self.var)

    @classmethod
    def of(cls, module: nn.modules.batchnorm._BatchNorm) -> _Layer:
        mean, var, training = module.running_mean, module.running_var, module.training
        tracks = training and module.track_running_stats
        return cls(mean, var, training, module.momentum, module.eps, module.num_batches_tracked, tracks)

    def now(self, counts: bool) -> tuple[Tensor | None, Tensor | None, bool, float]:
        mean, var, momentum = self.mean, self.var, self.momentum
        training = self.training or (mean is None and var is None)
        if self.tracks:
            if counts and self.batches is not None:
                self.batches.add_(1)
            if momentum is None and self.batches is not None:
                momentum = 1 / float(self.batches)
        if training and not (counts and self.tracks):
            mean = var = None
        return mean, var, training, momentum or 0.0


_Norm = _Layer | _Statistics | _OfEach


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    input, followed = settled(input), state.followed[1]
    tensors = (running_mean, running_var, weight, bias)
    told = type(training) is bool and type(momentum) is float and type(eps) is float and eps > 0
    ordinary = told and (training or running_mean is not None) and all(_is_vector(t, input) for t in tensors)
    if not ordinary or autocasting(input.device.type) or not _is_faster(input, *tensors, training):
        say("torch", _NOT_FASTER)
        return F.batch_norm(input, *tensors, training, momentum, eps)
    statistics = _Statistics(running_mean, running_var, training, momentum, eps)
    if followed is not None and followed.waits and may_defer(input):
        return defer("norm", input.shape, _normalize, input, weight, bias, statistics, followed, True)
    return _normalize(input, weight, bias, statistics, None)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    input = settled(input)
    tensors = (running_mean, running_var, weight, bias)
    told = use_input_stats is True and type(momentum) is float and type(eps) is float and eps > 0
    ordinary = told and isinstance(input, Tensor) and all(_is_vector(t, input) for t in tensors)
    if not ordinary or autocasting(input.device.type) or not _is_faster_for_each(input, *tensors):
        say("torch", _NOT_FASTER_FOR_EACH)
        return F.instance_norm(input, *tensors, use_input_stats, momentum, eps)
    of, followed = _OfEach(eps, None, running_mean, running_var, momentum), state.followed[1]
    input = input.contiguous()  # so is torch's result, wherever the channels lie
    if followed is not None and followed.waits and may_defer(input):
        return defer("norm", input.shape, _normalize, input, weight, bias, of, followed, True)
    return _normalize(input, weight, bias, of, None)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    input, followed = settled(input), state.followed[1]
    told = type(num_groups) is int and num_groups > 0 and type(eps) is float and eps > 0
    ordinary = told and isinstance(input, Tensor) and all(_is_vector(t, input) for t in (weight, bias))
    if not ordinary or autocasting(input.device.type) or not _is_faster_for_groups(input, num_groups, weight, bias):
        say("torch", _NOT_FASTER_FOR_GROUPS)
        return F.group_norm(input, num_groups, weight, bias, eps)
    if input.ndim not in (4, 5):
        input = input.contiguous()  # so is torch's result, wherever the channels lie
    of = _OfEach(eps, num_groups)
    if followed is not None and followed.waits and may_defer(input):
        return defer("norm", input.shape, _normalize, input, weight, bias, of, followed, True)
    return _normalize(input, weight, bias, of, None)


def _is_faster_for_groups(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> bool:
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 2 or not plain():
        return False
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)) or (weight is None) != (bias is None):
        return False
    if x.shape[1] == 0 or x.shape[1] % groups or x.numel() <= x.shape[0] * groups:
        return False  # torch's own error
    if matters(x):
        return True
    training = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    return training and x.device.type == "cpu" and x.numel() >= LARGE and x.shape[2:].numel() >= WIDE


def _is_faster_for_each(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> bool:
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 3 or not plain():
        return False
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias, mean, var)):
        return False
    if (mean is None) != (var is None) or (weight is None) != (bias is None):
        return False
    if x.shape[1] == 0 or x.shape[2:].numel() < 2:
        return False  # torch's own error
    return matters(x) or (x.device.type == "cpu" and x.numel() >= SMALL)


def _is_vector(t: Any, x: Tensor) -> bool:
    """Whether it has a value for each channel of x: of anything else torch's own error, or nothing, is known."""
    return t is None or (isinstance(t, Tensor) and x.ndim > 1 and t.shape == x.shape[1:2] and t.device == x.device)


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda slope, x: F.relu(x),
    "leaky_relu": lambda slope, x: F.leaky_relu(x, slope),
    "prelu": lambda slope, x: F.prelu(x, slope),
}


def _activate(name: str, input: Tensor, slope: float | Tensor, inplace: bool) -> Tensor | None:
    if not is_half(input, "norm"):
        return None
    x, weight, bias, of, followed, counts = fuse(input)
    followed.misses = 0
    result = _normalize(x, weight, bias, of, followed, counts, name, slope)
    if not inplace:
        followed_by(input, result, functools.partial(_ACTIVATIONS[name], slope))
    kind = getattr(of, "kind", "batch")
    joined(input, f"gankern: {kind} norm + {name} ({last_implementation(f'{kind}_norm_act')})", x.numel() * VALUE)
    if inplace:
        input.pair.result = result
    else:  # who still wants it without the activation gets it, and it is not counted twice
        input.pair.arguments = (x, weight, bias, of, followed, False)
    return result


def _longer(function: Callable[..., Tensor], input: Tensor, inplace: bool, *args: Any) -> Tensor | None:
    """The activation as one more operation of a chain."""
    if inplace or not is_half(input, "chain"):
        return None
    result = STEPS[function](function, (input, *args), {})
    if result is NotImplemented:
        return None
    state.waiting = (*state.waiting, weakref.ref(input))  # who announced this operation took it off
    return result


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    result = _activate("relu", input, 0.0, inplace)
    if result is not None:
        return result
    longer = _longer(F.relu, input, inplace)
    if longer is not None:
        return longer
    input = settled(input)
    _say_second(input)
    return _functions.relu(input, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    result = _activate("leaky_relu", input, negative_slope, inplace) if negative_slope > 0 else None
    if result is not None:
        return result
    longer = _longer(F.leaky_relu, input, inplace, negative_slope)
    if longer is not None:
        return longer
    input = settled(input)
    _say_second(input)
    return _functions.leaky_relu(input, negative_slope, inplace)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Behind a norm in its pass, else alone: torch writes the gradient of the slope out for each value of x, and sums
    it then."""
    fits = (
        isinstance(weight, Tensor)
        and weight.ndim == 1
        and input.ndim > 1
        and input.dtype == weight.dtype in (torch.float32, torch.float64)
        and weight.device == input.device
        and len(weight) in (1, input.shape[1])
    )
    result = _activate("prelu", input, weight, False) if fits else None
    if result is not None:
        return result
    input = settled(input)
    trains = torch.is_grad_enabled() and (input.requires_grad or (fits and weight.requires_grad))
    large = input.device.type == "cpu" and input.numel() >= SMALL
    if not (fits and trains and large and plain()) or autocasting(input.device.type):
        say("torch", f"ours is faster in training, from {SMALL} values on")
        return F.prelu(input, weight)
    gain(input.numel() * VALUE)
    result = _bias_prelu(input, None, weight, 1, 1.0, None, None, any_order=True)
    say(f"gankern: prelu ({last_implementation('bias_act')})")
    return result


# ---- the functions that a model calls by itself -------------------------------------------------------------


def _settling(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For a function that completes no pair."""

    def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        input = settled(input)
        _say_second(input)
        return function(input, *args, **kwargs)

    return run


def _relu_(input: Tensor) -> Tensor:
    return relu(input, True)


def _leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    return leaky_relu(input, negative_slope, True)


PLAIN.update(
    {
        "upsample": lambda new, x, *arguments: F.interpolate(new(x), *arguments),
        "pad": lambda new, x, mode: F.pad(new(x), (1, 1, 1, 1), mode),
        "convolution": lambda new, x, weight, bias, _: F.conv2d(new(x), new(weight), new(bias), padding=1),
        "norm": _normalize_plainly,
    }
)

HANDLERS.update(
    {
        torch.conv2d: conv2d,
        torch.conv_transpose2d: conv_transpose2d,
        F.interpolate: interpolate,
        F.pad: pad,
        F.batch_norm: batch_norm,
        F.group_norm: group_norm,
        F.instance_norm: instance_norm,
        F.avg_pool2d: avg_pool2d,
        F.adaptive_avg_pool2d: _settling(_functions.adaptive_avg_pool2d),
        torch.max_pool2d: _settling(_functions.max_pool2d),
        F.relu: relu,
        torch.relu: relu,
        Tensor.relu: relu,
        F.relu_: _relu_,
        torch.relu_: _relu_,
        Tensor.relu_: _relu_,
        F.leaky_relu: leaky_relu,
        F.leaky_relu_: _leaky_relu_,
        F.prelu: prelu,
        Tensor.prelu: prelu,
    }
)


# ---- modules ------------------------------------------------------------------------------------------------

_CONV = {"_conv_forward": nn.Conv2d._conv_forward}
_TRANSPOSED = {"_output_padding": nn.ConvTranspose2d._output_padding}
_NORM_OF_EACH = {name: getattr(nn.InstanceNorm2d, name) for name in ("_apply_instance_norm", "_handle_no_batch_input")}
# The methods that a forward of torch's calls, and in place of which ours runs: of a class with others it is another.
PARTS: dict[Any, dict[str, Any]] = {
    nn.Conv1d.forward: {"_conv_forward": nn.Conv1d._conv_forward},
    nn.Conv2d.forward: _CONV,
    nn.Conv3d.forward: {"_conv_forward": nn.Conv3d._conv_forward},
    nn.ConvTranspose1d.forward: _TRANSPOSED,
    nn.ConvTranspose2d.forward: _TRANSPOSED,
    nn.ConvTranspose3d.forward: _TRANSPOSED,
    nn.GroupNorm.forward: {},
    nn.InstanceNorm2d.forward: _NORM_OF_EACH,
    **{
        cls.forward: {}
        for cls in (
            nn.ReflectionPad2d, nn.ReplicationPad2d, nn.BatchNorm2d, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.AvgPool2d,
            nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Upsample,
        )
    },
}  # fmt: skip


def changed_part(module: nn.Module, parts: Iterable[tuple[str, Any]] | None = None) -> str | None:
    """The name of a method, of those its torch class's forward calls, that is the module's own; None: there is none."""
    cls = type(module)
    for name, method in PARTS[cls.forward].items() if parts is None else parts:
        if getattr(cls, name) is not method or name in module.__dict__:
            return name
    return None if cls.__getattr__ is nn.Module.__getattr__ else "__getattr__"


def _is_known(module: nn.Module, known: dict[Any, tuple[tuple[str, Any], ...]]) -> bool:
    parts = known.get(type(module).forward)
    return parts is not None and changed_part(module, parts) is None


def leaf(
    function: Callable[..., Tensor], constants: int = 0, stands_for: Sequence[type[nn.Module]] = ()
) -> Callable[..., Tensor]:
    """A module's forward, which tells the scope that an operation comes. ``constants`` of its arguments stand before
    those of torch's forward. ``stands_for``: the modules whose forward it replaces; where the module became one with
    another forward since, or with other methods that it calls, that runs."""
    known = {cls.forward: tuple(PARTS[cls.forward].items()) for cls in stands_for}

    @functools.wraps(function)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if known and not _is_known(module, known):
            return original(module)(*args[constants:], **kwargs)
        if torch.compiler.is_compiling():  # the compiler fuses by itself; it traces convolutions, see conv2d_forward
            return type(module).forward(module, *args[constants:], **kwargs)
        # torch's own has rules for it, saves what it saves again, and calls torch's functions or those in their place.
        # Tensors of somebody's class have functions of their own; of what is none, the error is torch's.
        taken = type(
            args[constants] if len(args) > constants else kwargs.get("input")
        ) in PLAIN_TYPES and _PLAIN_PARAMETERS.issuperset(map(type, module._parameters.values()))
        if not taken or transformed() or recomputed() or seen_by_others() or functions_replaced():
            args = tree_map_only(Deferred, Deferred.value, args[constants:])
            return type(module).forward(module, *args, **kwargs)
        if not state.intercepting:
            return function(module, *args, **kwargs)
        if state.waiting:
            settle(args[-1] if args else None, pure=not getattr(module, "inplace", False))
        if state.fused and getattr(module, "inplace", False):
            preserve()
        with torch._C.DisableTorchFunction():
            return function(module, *args, **kwargs)

    return forward


_PLAIN_PARAMETERS = {nn.Parameter, Tensor, type(None)}


def left_forward(module: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a module that is to stay as it is: what it calls is torch's, too, and nothing waits meanwhile."""
    forward = functools.partial(type(module).forward, module) if inner is None else inner
    if torch.compiler.is_compiling() or not state.intercepting or state.left:
        return forward(*args, **kwargs)
    args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs))
    settle()
    preserve()
    state.left = True
    try:
        return forward(*args, **kwargs)
    finally:
        state.left = False


def unwatched(module: nn.Module) -> bool:
    """Whether nobody but its caller sees a module's result."""
    everywhere = nn.modules.module
    return not (
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


@functools.partial(leaf, constants=2, stands_for=(nn.Conv2d,))
def conv2d_forward(module: nn.Conv2d, followed: Followed | None, left: Left, input: Tensor) -> Tensor:
    weight = module.weight
    padding: int | str | tuple[int, ...] = module.padding
    unpaired = followed is None or not followed.waits or not state.intercepting
    if unpaired and type(input) is Tensor and state.log is None:
        options = (module.stride, padding, module.dilation, module.groups)
        how = (input.shape, weight.shape, *options, torch.is_grad_enabled())
        if how == left.how and not state.double:
            return module._conv_forward(input, weight, module.bias)
        kind, pad = _kind(weight, *options)
        whole = input.shape[2:] == weight.shape[2:]  # perhaps one matrix product
        if kind is not None and not whole:
            whole = input.ndim == 4 and _repays(kind, pad, input, weight)
        if whole and module.padding_mode == "zeros":
            # The whole call in C++, where nothing wants to know of it.
            y = nodes.conv2d(input, weight, module.bias, *options, 1.0, None, "zeros")
            if y is not NotImplemented:
                if kind is not None and state.intercepting:
                    gain(_worth(kind, pad, input, weight))
                return y
        elif not whole and not state.double:
            left.how = how
            return module._conv_forward(input, weight, module.bias)
    if module.padding_mode in ("reflect", "replicate") and _kind(
        weight, module.stride, padding, module.dilation, module.groups
    ) == ("same", 1):
        input, bias = settled(input), module.bias  # read once: a parametrised one is computed
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
        return conv2d(input, weight, module.bias, module.stride, padding, module.dilation, module.groups)
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
    _say_second(input)
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


@functools.partial(leaf, constants=1, stands_for=(nn.BatchNorm2d,))
def batch_norm_forward(module: nn.BatchNorm2d, followed: Followed | None, input: Tensor) -> Tensor:
    input = settled(input)
    if parametrize.is_parametrized(module):  # each reading may compute its tensors anew
        say("torch", _NOT_FASTER)
        return type(module).forward(module, input)
    tensors = (module.running_mean, module.running_var, module.weight, module.bias)
    if not _is_faster(input, *tensors, module.training) or autocasting(input.device.type):
        say("torch", _NOT_FASTER)
        return type(module).forward(module, input)
    module._check_input_dim(input)
    of = _Layer.of(module)
    if followed is not None and followed.waits and unwatched(module) and may_defer(input):
        return defer("norm", input.shape, _normalize, input, module.weight, module.bias, of, followed, True)
    return _normalize(input, module.weight, module.bias, of, None)


@functools.partial(leaf, constants=1, stands_for=(nn.GroupNorm,))
def group_norm_forward(module: nn.GroupNorm, followed: Followed | None, input: Tensor) -> Tensor:
    if parametrize.is_parametrized(module):  # each reading may compute its tensors anew
        say("torch", _NOT_FASTER_FOR_GROUPS)
        return type(module).forward(module, settled(input))
    before = state.followed
    state.followed = before[0], followed if unwatched(module) else None
    try:
        return group_norm(input, module.num_groups, module.weight, module.bias, module.eps)
    finally:
        state.followed = before


@functools.partial(leaf, constants=1, stands_for=(nn.InstanceNorm2d,))
def instance_norm_forward(module: nn.InstanceNorm2d, followed: Followed | None, input: Tensor) -> Tensor:
    input = settled(input)
    batch = module._get_no_batch_dim() + 1
    if input.ndim != batch or input.shape[1] != module.num_features:  # or torch's own error, or warning
        say("torch", _NOT_FASTER_FOR_EACH)
        return type(module).forward(module, input)
    module._check_input_dim(input)
    before = state.followed
    state.followed = before[0], followed if unwatched(module) else None
    try:
        return instance_norm(
            input,
            module.running_mean,
            module.running_var,
            module.weight,
            module.bias,
            module.training or not module.track_running_stats,
            module.momentum or 0.0,
            module.eps,
        )
    finally:
        state.followed = before


_RELU, _LEAKY_RELU = nn.ReLU.forward, nn.LeakyReLU.forward


def relu_forward(module: nn.ReLU, input: Tensor) -> Tensor:
    plain_call = torch.compiler.is_compiling() or not (state.double or state.intercepting or state.log)
    if plain_call and type(module).forward is _RELU:  # nothing to do, at the least cost
        return F.relu(input, module.inplace)
    return _relu_forward(module, input)


@functools.partial(leaf, stands_for=(nn.ReLU,))
def _relu_forward(module: nn.ReLU, input: Tensor) -> Tensor:
    return relu(input, module.inplace)


def leaky_relu_forward(module: nn.LeakyReLU, input: Tensor) -> Tensor:
    plain_call = torch.compiler.is_compiling() or not (state.double or state.intercepting or state.log)
    if plain_call and type(module).forward is _LEAKY_RELU:
        return F.leaky_relu(input, module.negative_slope, module.inplace)
    return _leaky_relu_forward(module, input)


@functools.partial(leaf, stands_for=(nn.LeakyReLU,))
def _leaky_relu_forward(module: nn.LeakyReLU, input: Tensor) -> Tensor:
    return leaky_relu(input, module.negative_slope, module.inplace)


@functools.partial(leaf, stands_for=(nn.PReLU,))
def prelu_forward(module: nn.PReLU, input: Tensor) -> Tensor:
    return prelu(input, module.weight)


# What torch's forwards read, in the order of its functions.
_WINDOW = "kernel_size", "stride", "padding"
_OF_AVG_POOL = attrgetter(*_WINDOW, "ceil_mode", "count_include_pad", "divisor_override")
_OF_MAX_POOL = attrgetter(*_WINDOW, "dilation", "ceil_mode", "return_indices")


@functools.partial(leaf, stands_for=(nn.AvgPool2d,))
def avg_pool2d_forward(module: nn.AvgPool2d, input: Tensor) -> Tensor:
    return avg_pool2d(input, *_OF_AVG_POOL(module))


@functools.partial(leaf, stands_for=(nn.MaxPool2d,))
def max_pool2d_forward(module: nn.MaxPool2d, input: Tensor) -> Any:
    return _pooled(_functions.max_pool2d, input, *_OF_MAX_POOL(module))


@functools.partial(leaf, stands_for=(nn.AdaptiveAvgPool2d,))
def adaptive_avg_pool2d_forward(module: nn.AdaptiveAvgPool2d, input: Tensor) -> Tensor:
    return _pooled(_functions.adaptive_avg_pool2d, input, module.output_size)


@functools.partial(leaf, stands_for=(nn.Upsample,))
def upsample_forward(module: nn.Upsample, input: Tensor) -> Tensor:
    if not unwatched(module):
        input = settled(input)
        return type(module).forward(module, input)
    return interpolate(
        input, module.size, module.scale_factor, module.mode, module.align_corners, module.recompute_scale_factor
    )


def own_forward(module: nn.Module, convolution: Followed, norm: Followed, *args: Any, **kwargs: Any) -> Any:
    """Of a module that calls convolutions or norms by itself."""
    if torch.compiler.is_compiling() or not state.intercepting:
        return type(module).forward(module, *args, **kwargs)
    before, state.followed = state.followed, (convolution, norm)
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        state.followed = before
