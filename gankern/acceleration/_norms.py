"""What runs in place of torch's batch, group and instance norms and of piecewise linear activations, alone and both in
one pass."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gankern.functional as GF
from gankern.acceleration import _functions
from gankern.acceleration._functions import VALUE, matters, say_second
from gankern.acceleration._layers import leaf, unwatched
from gankern.acceleration._scope import (
    HANDLERS,
    PLAIN,
    STEPS,
    Followed,
    defer,
    followed_by,
    fuse,
    gain,
    is_half,
    joined,
    may_defer,
    plain,
    say,
    settled,
    state,
)
from gankern.core import activations
from gankern.core.dispatch import last_implementation
from gankern.core.torch_internals import autocasting
from gankern.functional._norm_act import update_running
from gankern.ops.batch_norm_act import batch_norm_act as _batch_norm_act
from gankern.ops.bias_act import bias_prelu as _bias_prelu
from gankern.ops.group_norm_act import group_norm_act as _group_norm_act
from gankern.ops.instance_norm_act import instance_norm_act as _instance_norm_act

# Values from which on ours is faster in training (measured); torch's is in evaluation, and without a backward where
# channels lie last.
LARGE = 131072
WIDE = 256  # positions: likewise of group norm, whose kernel takes short lines one by one
SMALL = 4096  # likewise of instance norm, for which torch repeats statistics and affine values, or copies x
_NOT_FASTER_FOR_EACH = f"ours is faster from {SMALL} values on, and under a penalty"
_NOT_FASTER_FOR_GROUPS = f"ours is faster in training on maps of {WIDE} positions on, and under a penalty"
_NOT_FASTER = f"ours is faster in training from {LARGE} values on, and under a penalty"


def _is_taken(x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether ours takes these; of statistics that require a gradient torch's own error is known."""
    return (
        x.dtype in (torch.float32, torch.float64)
        and plain()
        and all(_is_vector(t, x) for t in (mean, var, weight, bias))
        and (mean is None) == (var is None)
        and (weight is None) == (bias is None)
        and not any(t is not None and t.requires_grad for t in (mean, var))
    )


def _is_faster(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool
) -> bool:
    if x.ndim < 2 or not _is_taken(x, mean, var, weight, bias):
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


def _now_or_later(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, of: _Norm, followed: Followed | None
) -> Tensor:
    """The norm, which waits for the activation behind it where there may be one."""
    if followed is not None and followed.waits and may_defer(x):
        return defer("norm", x.shape, _normalize, x, weight, bias, of, followed, True)
    return _normalize(x, weight, bias, of, None)


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
    told = told and (training or running_mean is not None)
    if not told or autocasting(input.device.type) or not _is_faster(input, *tensors, training):
        say("torch", _NOT_FASTER)
        return F.batch_norm(input, *tensors, training, momentum, eps)
    statistics = _Statistics(running_mean, running_var, training, momentum, eps)
    return _now_or_later(input, weight, bias, statistics, followed)


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
    if (
        not (told and isinstance(input, Tensor))
        or autocasting(input.device.type)
        or not _is_faster_for_each(input, *tensors)
    ):
        say("torch", _NOT_FASTER_FOR_EACH)
        return F.instance_norm(input, *tensors, use_input_stats, momentum, eps)
    of, followed = _OfEach(eps, None, running_mean, running_var, momentum), state.followed[1]
    input = input.contiguous()  # so is torch's result, wherever the channels lie
    return _now_or_later(input, weight, bias, of, followed)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    input, followed = settled(input), state.followed[1]
    told = type(num_groups) is int and num_groups > 0 and type(eps) is float and eps > 0
    if (
        not (told and isinstance(input, Tensor))
        or autocasting(input.device.type)
        or not _is_faster_for_groups(input, num_groups, weight, bias)
    ):
        say("torch", _NOT_FASTER_FOR_GROUPS)
        return F.group_norm(input, num_groups, weight, bias, eps)
    if input.ndim not in (4, 5):
        input = input.contiguous()  # so is torch's result, wherever the channels lie
    of = _OfEach(eps, num_groups)
    return _now_or_later(input, weight, bias, of, followed)


def _is_faster_for_groups(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> bool:
    if x.ndim < 2 or not _is_taken(x, None, None, weight, bias):
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
    if x.ndim < 3 or not _is_taken(x, mean, var, weight, bias):
        return False
    if x.shape[1] == 0 or x.shape[2:].numel() < 2:
        return False  # torch's own error
    return matters(x) or (x.device.type == "cpu" and x.numel() >= SMALL)


def _is_vector(t: Any, x: Tensor) -> bool:
    """Whether it has a value for each channel of x: of anything else torch's own error, or nothing, is known."""
    return t is None or (
        isinstance(t, Tensor) and t.shape == x.shape[1:2] and t.dtype == x.dtype and t.device == x.device
    )


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
    say_second(input)
    return _functions.relu(input, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    result = _activate("leaky_relu", input, negative_slope, inplace) if negative_slope > 0 else None
    if result is not None:
        return result
    longer = _longer(F.leaky_relu, input, inplace, negative_slope)
    if longer is not None:
        return longer
    input = settled(input)
    say_second(input)
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


def _relu_(input: Tensor) -> Tensor:
    return relu(input, True)


def _leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    return leaky_relu(input, negative_slope, True)


PLAIN["norm"] = _normalize_plainly

HANDLERS.update(
    {
        F.batch_norm: batch_norm,
        F.group_norm: group_norm,
        F.instance_norm: instance_norm,
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


@functools.partial(leaf, constants=1, stands_for=(nn.BatchNorm2d,))
def batch_norm_forward(module: nn.BatchNorm2d, followed: Followed | None, input: Tensor) -> Tensor:
    input = settled(input)
    if parametrize.is_parametrized(module):  # each reading may compute its tensors anew
        say("torch", _NOT_FASTER)
        return type(module).forward(module, input)
    tensors = (module.running_mean, module.running_var, module.weight, module.bias)
    eps, momentum = module.eps, module.momentum
    told = type(eps) is float and eps > 0 and type(momentum) in (float, int, types.NoneType)  # or torch's own error
    if not told or not _is_faster(input, *tensors, module.training) or autocasting(input.device.type):
        say("torch", _NOT_FASTER)
        return type(module).forward(module, input)
    module._check_input_dim(input)
    of = _Layer.of(module)
    return _now_or_later(input, module.weight, module.bias, of, followed if unwatched(module) else None)


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
