"""Layers that people wrote themselves, taken over where their code is known to compute what one of ours does.

For each size of input that arrives, the code is read (see :mod:`gankern.acceleration._read`), and so is the formula of
ours in this file; where both are one expression, our operation runs, for as long as everything that was looked up stays
what it was. For anything else the module's own forward runs. Nothing is concluded from trying values.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern.functional as GF
from gankern.acceleration._code import original
from gankern.acceleration._expressions import (
    INPUT,
    Joined,
    Node,
    Unknown,
    Value,
    axes_of,
    node,
    nodes_in,
    numbers_in,
)
from gankern.acceleration._layers import leaf
from gankern.acceleration._read import Reader, holds
from gankern.acceleration._scope import say
from gankern.core.dispatch import last_implementation


@dataclass(frozen=True)
class Found:
    """One of our functions, with options, for inputs of one size."""

    name: str
    run: Callable[..., Tensor]  # of the module and the input
    views: bool  # whether the code views its input as other sizes, so that torch may refuse what is not contiguous


@dataclass
class Reading:
    found: Found | None
    guards: Sequence[Callable[[nn.Module], bool]]
    reason: str = ""


# ---- our formulas, as they are read -----------------------------------------------------------------------------


def _pixel_norm(x: Any, eps: float) -> Any:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)


def _stddev_strided(x: Any, group: int, channels: int, correction: int, eps: float) -> Any:
    n, c, h, w = x.shape
    y = x.reshape(group, n // group, channels, c // channels, h, w)
    y = (y.var(0, correction=correction) + eps).sqrt().mean([2, 3, 4])
    return y.reshape(n // group, channels, 1, 1).repeat(group, 1, h, w)


def _stddev_contiguous(x: Any, group: int, channels: int, correction: int, eps: float) -> Any:
    n, c, h, w = x.shape
    y = x.reshape(n // group, group, channels, c // channels, h, w)
    y = (y.var(1, correction=correction) + eps).sqrt().mean([2, 3, 4])
    return y.reshape(n // group, 1, channels, 1, 1).expand(-1, group, -1, h, w).reshape(n, channels, h, w)


def _similarity(x: Any, kernel: Any, kernels: int, own: bool) -> Any:
    m = (x @ kernel.reshape(x.shape[1], -1)).reshape(x.shape[0], kernels, -1)
    return (-(m[:, None] - m[None]).abs().sum(3)).exp().sum(1) - own


def _mean_similarity(x: Any, kernel: Any, kernels: int, own: bool) -> Any:
    return _similarity(x, kernel, kernels, own) / (x.shape[0] - own)


def _bias_act(x: Any, bias: Any, name: str, slope: float, gain: float, clamp: float | None) -> Any:
    if bias is not None:
        x = x + bias.reshape([1, x.shape[1]] + [1] * (x.ndim - 2))
    if name == "leaky_relu":
        x = F.leaky_relu(x, slope)
    elif name == "relu":
        x = F.relu(x)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x


def _upfirdn2d(x: Any, filter: Tensor, up: int, down: int, before: int, after: int, flip: bool) -> Any:
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up - 1, 0, 0, 0, up - 1])
    x = F.pad(x.reshape(n, c, h * up, w * up), [max(before, 0), max(after, 0), max(before, 0), max(after, 0)])
    x = x[:, :, max(-before, 0) : x.shape[2] - max(-after, 0), max(-before, 0) : x.shape[3] - max(-after, 0)]
    if not flip:
        filter = filter.flip([0, 1])
    x = F.conv2d(x, filter[None, None].repeat(c, 1, 1, 1), groups=c)
    return x[:, :, ::down, ::down]


# ---- what code may be -------------------------------------------------------------------------------------------


def _eps(of: Node) -> list[float]:
    return [e for e in sorted(numbers_in(of) | {0.0}) if 0 <= e < math.inf]


def _as_pixel_norm(reader: Reader, x: Value, result: Any, views: bool) -> Iterator[Found]:
    if isinstance(result, Value) and result.dims == x.dims:
        for eps in _eps(result.node):
            if result.same(_ours(reader, _pixel_norm, x, eps)):
                yield Found("pixel_norm", functools.partial(_run_pixel_norm, eps), views)


def _run_pixel_norm(eps: float, module: nn.Module, x: Tensor) -> Tensor:
    return GF.pixel_norm(x, eps=eps)


def _as_stddev(reader: Reader, x: Value, result: Any, views: bool) -> Iterator[Found]:
    if not (isinstance(result, Joined) and len(result.parts) == 2 and result.dim == 1 and result.parts[0].same(x)):
        return
    deviation = result.parts[1]
    if len(x.shape) != 4 or deviation.shape[0] != x.shape[0] or x.shape[1] % deviation.shape[1]:
        return
    samples, channels = x.shape[0], deviation.shape[1]
    for formula, layout in ((_stddev_strided, "strided"), (_stddev_contiguous, "contiguous")):
        for group in (n for n in range(2, samples + 1) if samples % n == 0):
            for correction in (0, 1):
                for eps in _eps(deviation.node):
                    if deviation.same(_ours(reader, formula, x, group, channels, correction, eps)):
                        options = (group, channels, layout, bool(correction), eps)
                        yield Found("minibatch_stddev", functools.partial(_run_stddev, options), True)


def _run_stddev(options: tuple, module: nn.Module, x: Tensor) -> Tensor:
    group, channels, layout, unbiased, eps = options
    return GF.minibatch_stddev(x, group_size=group, num_channels=channels, layout=layout, unbiased=unbiased, eps=eps)


def _as_discrimination(reader: Reader, x: Value, result: Any, views: bool) -> Iterator[Found]:
    appended = isinstance(result, Joined)
    if appended:
        if len(result.parts) != 2 or result.dim != 1 or not result.parts[0].same(x):
            return
        result = result.parts[1]
    kernels = [(name, cell) for name, cell in reader.cells.items() if name in reader.root.module._parameters]
    if not isinstance(result, Value) or len(kernels) != 1 or len(x.shape) != 2 or len(result.shape) != 2:
        return
    ((name, kernel),) = kernels
    number, samples = result.shape[1], x.shape[0]
    if kernel.shape[0] != x.shape[1] or math.prod(kernel.shape[1:]) % number:
        return
    for formula, reduction in ((_similarity, "sum"), (_mean_similarity, "mean")):
        for own in (1, 0):
            if own == samples and reduction == "mean":
                continue
            expected = _ours(reader, formula, x, kernel, number, own)
            if expected is not None and _unpaired(result) == _unpaired(expected):
                options = (name, number, not own, reduction, appended)
                yield Found("minibatch_discrimination", functools.partial(_run_discrimination, options), views)


def _unpaired(value: Value) -> Any:
    """A distance is the same from either side, so it does not matter over which of the two samples it was summed."""

    def plain(part: Any) -> Any:
        if isinstance(part, str):
            return part.removeprefix("row of ").removeprefix("column of ")
        return tuple(map(plain, part)) if isinstance(part, tuple) else part

    return plain(value.node), plain(value.dims)


def _run_discrimination(options: tuple, module: nn.Module, x: Tensor) -> Tensor:
    name, kernels, include_self, reduction, appended = options
    kernel = getattr(module, name)
    kernel = kernel.view(kernel.shape[0], kernels, -1)
    similarity = GF.minibatch_discrimination(x, kernel, include_self=include_self, reduction=reduction)
    return torch.cat([x, similarity], 1) if appended else similarity


def _as_bias_act(reader: Reader, x: Value, result: Any, views: bool) -> Iterator[Found]:
    if not isinstance(result, Value) or result.dims != x.dims or len(x.shape) < 2:
        return
    biases: list[Any] = [(n, c) for n, c in reader.cells.items() if c.shape and math.prod(c.shape) == x.shape[1]]
    kinds = _kinds(result.node)
    names = [name for name in ("leaky_relu", "relu") if name in kinds]
    if len(names) != 1 or len(reader.cells) > 1:
        return
    numbers = sorted(n for n in numbers_in(result.node) if math.isfinite(n))
    slopes = [n for n in numbers if n >= 0] if names == ["leaky_relu"] else [0.0]
    clamps = [n for n in numbers if n > 0] if "clamp" in kinds else [None]
    for (bias, cell), slope, gain, clamp in itertools.product(
        biases if reader.cells else [(None, None)], slopes, {*numbers, 1.0}, clamps
    ):
        own = None if cell is None else Value(cell.node, ((cell.dims[-1] if len(cell.dims) == 1 else _axis(cell)),))
        if result.same(_ours(reader, _bias_act, x, own, names[0], slope, gain, clamp)):
            options = (bias, names[0], slope, gain, clamp)
            yield Found("bias_act", functools.partial(_run_bias_act, options), False)


def _axis(cell: Value) -> Any:
    """The one dimension of a tensor such as [1, channels, 1, 1] that is not of size 1."""
    return next((axes for axes in cell.dims if axes), ())


def _kinds(of: Any) -> set[str]:
    """The names of the operations in an expression."""
    return {part[0] for part in nodes_in(of)}


def _run_bias_act(options: tuple, module: nn.Module, x: Tensor) -> Tensor:
    name, activation, slope, gain, clamp = options
    bias = None if name is None else getattr(module, name).reshape(-1)
    return GF.bias_act(x, bias, activation=activation, negative_slope=slope, gain=gain, clamp=clamp)


def _as_upfirdn2d(reader: Reader, x: Value, result: Any, views: bool) -> Iterator[Found]:
    if not isinstance(result, Value) or len(x.shape) != 4 or len(result.shape) != 4 or len(reader.cells) != 1:
        return
    ((name, filter),) = reader.cells.items()
    if len(filter.shape) != 2 or filter.node[0] != "constant" or "filtered" not in _kinds(result.node):
        return
    pads, steps, starts = _resampling(result.node)
    ups = {1, *(after + 1 for axes, before, after in pads if axes[0] == "after" and before == 0)}
    edges = [(before, after) for axes, before, after in pads if axes[0] != "after"] or [(0, 0)]
    befores = {0, *(before for before, _ in edges), *(-n for n in starts)}
    afters = {0, *(after for _, after in edges), *(range(-max(filter.shape), 0) if 1 in steps else ())}
    for up, down, before, after, flip in itertools.product(ups, {1, *steps}, befores, afters, (False, True)):
        if result.same(_ours(reader, _upfirdn2d, x, filter, up, down, before, after, flip)):
            options = (name, up, down, (before, after, before, after), flip)
            yield Found("upfirdn2d", functools.partial(_run_upfirdn2d, options), True)


def _resampling(of: Node) -> tuple[list[Any], list[int], list[int]]:
    """What an expression pads by, and by which steps and from where it takes parts."""
    pads, steps, starts = [], [], []
    while isinstance(of, Node) and of[0] in ("padded", "part", "filtered"):
        if of[0] == "padded":
            pads.append(of[2:])
        elif of[0] == "part":
            starts.append(of[3])
            steps.append(of[4])
        of = of[1]
    return pads, steps, starts


def _run_upfirdn2d(options: tuple, module: nn.Module, x: Tensor) -> Tensor:
    name, up, down, padding, flip = options
    return GF.upfirdn2d(x, getattr(module, name), up, down, padding, flip)


def _ours(reader: Reader, formula: Callable[..., Any], *arguments: Any) -> Value | None:
    try:
        return reader.function(formula, arguments, {})
    except Unknown:  # not for these sizes
        return None


FORMS = (_as_pixel_norm, _as_stddev, _as_discrimination, _as_bias_act, _as_upfirdn2d)


# ---- the layer --------------------------------------------------------------------------------------------------


def read(module: nn.Module, shape: Sequence[int], device: str = "cpu", dtype: torch.dtype | None = None) -> Reading:
    reader = Reader(module, device, dtype=torch.float32 if dtype is None else dtype)
    try:
        reader.guard("forward", _same_forward(type(module).forward))
        forward = reader.forward(reader.root)
        x = Value(node("tensor", INPUT), axes_of(INPUT, shape))
        result = reader.call(forward, [x], {})
    except Unknown as reason:
        return Reading(None, (), str(reason))
    if reader.written:
        return Reading(None, (), f"it writes to {next(iter(reader.written))}")
    guards = tuple(reader.guards.values())
    for form in FORMS:
        for found in form(reader, x, result, bool(reader.seen)):
            return Reading(found, guards)
    return Reading(None, guards, "it computes none of the forms that are known")


def _same_forward(forward: Any) -> Callable[[nn.Module], bool]:
    return lambda module: type(module).forward is forward


class Known:
    """What is known of one layer: for each size of input and either mode, what its code computes. It is not copied
    with the layer but found out anew, since names in the code may mean something else in another process."""

    most = 64  # sizes; a layer that meets more is left to itself from there

    def __init__(self) -> None:
        self.readings: dict[Any, Reading] = {}

    def __reduce__(self) -> Any:
        return Known, ()

    def find(self, module: nn.Module, x: Tensor) -> Found | None:
        key = x.shape, module.training, x.device.type, x.dtype
        reading = self.readings.get(key)
        if reading is None or not holds(reading.guards, module):
            if reading is None and len(self.readings) >= self.most:
                return None
            reading = self.readings[key] = read(module, x.shape, x.device.type, x.dtype)
        return reading.found


def _is_taken(x: Any) -> bool:
    return (
        type(x) is Tensor
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
        and not torch.is_autocast_enabled(x.device.type)
    )


@functools.partial(leaf, constants=1)
def known_forward(module: nn.Module, known: Known, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and not kwargs and _is_taken(x := args[0]) and not torch.compiler.is_compiling():
        found = known.find(module, x)
        if found is not None and (x.is_contiguous() or not found.views) and _fits(module, x):
            result = found.run(module, x)
            say(f"gankern: {found.name} ({last_implementation(found.name)})")
            return result
    say("its own code", "another size, type or code than what is known")
    return original(module)(*args, **kwargs)


def _fits(module: nn.Module, x: Tensor) -> bool:
    return all(
        type(p) in (Tensor, nn.Parameter) and p.dtype == x.dtype and p.device == x.device and p.is_contiguous()
        for p in (*module._parameters.values(), *module._buffers.values())
        if p is not None and p.is_floating_point()
    )


MAPS = [(8, 4, 3, 5), (4, 4, 2, 2), (6, 4, 2, 2), (2, 4, 2, 2), (16, 4, 4, 4), (1, 4, 2, 2)]


def _shapes(module: nn.Module) -> Sequence[tuple[int, ...]]:
    """Of inputs as a layer with such tensors is given them."""
    vectors = [p.numel() for p in module.parameters() if p.numel() == max(p.shape, default=0)]
    rows = [(n, p.shape[0]) for p in module.parameters() if p.ndim > 1 and p.numel() > max(p.shape) for n in (8, 2)]
    if vectors:
        return [(n, vectors[0], size, size) for n, size in ((8, 4), (2, 6), (1, 2))]
    filters = any(b.ndim == 2 for b in module.buffers() if b is not None)
    return rows or ([(2, 4, 16, 16), (3, 2, 12, 20), (1, 1, 16, 16)] if filters else MAPS)


def recognise(module: nn.Module) -> tuple[str | None, str]:
    """The name of the function of ours that a layer without submodules computes, in either mode, for inputs of sizes as
    they are common; or None and the reason. What then runs is decided anew for the sizes that arrive."""
    if next(module.children(), None) is not None:
        return None, "it has layers inside"
    if isinstance(inspect.getattr_static(type(module), "forward"), staticmethod):
        return None, "its forward is a static method"  # which the compiler does not tell from another function
    shapes = _shapes(module)
    before = module.training
    names: set[str | None] = set()
    reasons: list[str] = []
    try:
        for training in (True, False):
            module.__dict__["training"] = training
            readings = [read(module, shape) for shape in shapes]
            found: list[str | None] = [r.found.name for r in readings if r.found is not None]
            names.update(found[:1] or [None])
            reasons += [r.reason for r in readings if r.reason]
    finally:
        module.__dict__["training"] = before
    if None in names or len(names) != 1:
        return None, reasons[0]
    return names.pop(), ""
