"""Layers that people wrote themselves, recognised by what they compute: a copy in double precision is tried on inputs
that tell the variants apart, and has to agree with one of ours to the last few digits, in the gradient too."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gankern.functional as GF
from gankern.acceleration._layers import leaf
from gankern.acceleration._verify import copy_of

TOLERANCE = 1e-9  # relative, in double precision


@dataclass(frozen=True)
class Kind:
    """A layer of ours. ``run(module, options, x)`` is what it computes with a module's parameters;
    ``takes(options, x)`` whether it is called for x, or the module's own forward."""

    name: str
    options: Callable[[nn.Module], Iterator[tuple]]
    inputs: Callable[[nn.Module], Sequence[tuple[int, ...]]]  # sizes
    run: Callable[[nn.Module, tuple, Tensor], Tensor]
    takes: Callable[[tuple, Tensor], bool]


# ---- minibatch standard deviation -----------------------------------------------------------------------------


def _numbers_of(module: nn.Module, kind: type) -> list[Any]:
    """Of an instance, and the defaults of its forward."""
    defaults = [p.default for p in inspect.signature(type(module).forward).parameters.values()]
    values = [*vars(module).values(), *defaults]
    return [v for v in values if isinstance(v, kind) and not isinstance(v, bool)]


def _stddev_options(module: nn.Module) -> Iterator[tuple]:
    if any(True for _ in module.parameters()):
        return
    groups = dict.fromkeys([n for n in _numbers_of(module, int) if n > 1] + [4, 2**30])
    eps = dict.fromkeys([v for v in _numbers_of(module, float) if 0 <= v < 1] + [1e-8, 0.0])
    channels = dict.fromkeys([1, *(n for n in _numbers_of(module, int) if n > 1)])
    indivisible = ("raise", "largest_divisor", "whole_batch")
    yield from itertools.product(groups, channels, ("strided", "contiguous"), (False, True), indivisible, eps)


def _stddev(module: nn.Module, options: tuple, x: Tensor) -> Tensor:
    group, channels, layout, unbiased, indivisible, eps = options
    return GF.minibatch_stddev(
        x, group, channels, layout=layout, unbiased=unbiased, on_indivisible=indivisible, eps=eps
    )


def _stddev_takes(options: tuple, x: Tensor) -> bool:
    group, channels, _, unbiased, indivisible, _ = options
    samples = x.shape[0]
    # Of channels_last maps the memory format of the result depends on how the module put it together.
    if x.ndim != 4 or not x.is_contiguous() or samples == 0 or x.shape[1] % channels:
        return False
    return not (unbiased and samples == 1) and (indivisible != "raise" or samples % min(group, samples) == 0)


# ---- pixel norm -----------------------------------------------------------------------------------------------


def _pixel_norm_options(module: nn.Module) -> Iterator[tuple]:
    if not any(True for _ in module.parameters()):
        for eps in dict.fromkeys([v for v in _numbers_of(module, float) if 0 <= v < 1] + [1e-8]):
            yield (eps,)


def _pixel_norm(module: nn.Module, options: tuple, x: Tensor) -> Tensor:
    return GF.pixel_norm(x, *options)


# ---- minibatch discrimination ---------------------------------------------------------------------------------


def _discrimination_options(module: nn.Module) -> Iterator[tuple]:
    parameters = list(module.parameters())
    if len(parameters) != 1 or parameters[0].ndim not in (2, 3) or not parameters[0].is_contiguous():
        return
    shape = parameters[0].shape
    kernels = [shape[1]] if len(shape) == 3 else [n for n in _numbers_of(module, int) if n > 0 and shape[1] % n == 0]
    yield from itertools.product(dict.fromkeys(kernels), (True, False), (False, True), ("sum", "mean"))


def _discrimination_inputs(module: nn.Module) -> Sequence[tuple[int, ...]]:
    features = next(module.parameters()).shape[0]
    return [(n, features) for n in (5, 2, 1)]


def _discrimination(module: nn.Module, options: tuple, x: Tensor) -> Tensor:
    kernels, appended, include_self, reduction = options
    (parameter,) = module.parameters()
    kernel = parameter.view(parameter.shape[0], kernels, -1)
    similarity = GF.minibatch_discrimination(x, kernel, include_self=include_self, reduction=reduction)
    return torch.cat([x, similarity], 1) if appended else similarity


MAPS = [
    (8, 4, 3, 5),
    (6, 4, 2, 2),
    (4, 4, 1, 3),
    (3, 4, 2, 2),
    (2, 4, 2, 2),
    (1, 4, 3, 3),
    (16, 4, 2, 1),
    (12, 4, 1, 1),
]

KINDS = (
    Kind("minibatch_stddev", _stddev_options, lambda m: MAPS, _stddev, _stddev_takes),
    Kind("pixel_norm", _pixel_norm_options, lambda m: MAPS[:3], _pixel_norm, lambda o, x: x.ndim == 4),
    Kind(
        "minibatch_discrimination",
        _discrimination_options,
        _discrimination_inputs,
        _discrimination,
        lambda o, x: x.ndim == 2 and x.shape[0] > 0,
    ),
)
BY_NAME = {kind.name: kind for kind in KINDS}


@functools.partial(leaf, constants=2)
def probed_forward(module: nn.Module, name: str, options: tuple, *args: Any, **kwargs: Any) -> Tensor:
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].is_floating_point():
        kind = BY_NAME[name]
        if kind.takes(options, args[0]):
            return kind.run(module, options, args[0])
    return type(module).forward(module, *args, **kwargs)


def recognise(module: nn.Module) -> tuple[str, tuple] | None:
    """(kind, options) of a layer without submodules that computes what one of ours does; None for any other."""
    if next(module.children(), None) is not None or list(module.buffers()):
        return None
    for kind in KINDS:
        candidates = list(kind.options(module))
        if not candidates:
            continue
        expected = _tried(module, kind.inputs(module))
        for options in candidates:
            if expected and _agrees(module, kind, options, expected):
                return kind.name, options
    return None


def _tried(module: nn.Module, sizes: Sequence[tuple[int, ...]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(input, result, gradient) for the inputs that the module takes."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        # Channels of small values, so that a constant under a square root counts.
        scales = 10.0 ** -torch.arange(size[1]).double().remainder(5)
        x = torch.randn(size, generator=generator, dtype=torch.float64) * scales.view(1, -1, *[1] * (len(size) - 2))
        x.requires_grad_()
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                trial = copy_of(module).to("cpu", torch.float64)
                y = trial.forward(x)  # hooks are not asked: they see only what the model computes
                if not isinstance(y, Tensor) or y.dtype != x.dtype or y.ndim != x.ndim:
                    return []
                (grad,) = torch.autograd.grad((y * torch.arange(1, y.numel() + 1).view(y.shape)).sum(), x)
        except Exception:  # somebody else's code, called in a way of ours: anything may come
            continue
        found.append((x, y.detach(), grad))
    return found


def _agrees(module: nn.Module, kind: Kind, options: tuple, expected: list[tuple[Tensor, Tensor, Tensor]]) -> bool:
    trial = copy_of(module).to("cpu", torch.float64)
    tested = 0
    for x, y, grad in expected:
        if not kind.takes(options, x):
            continue
        try:
            with torch.enable_grad():
                z = kind.run(trial, options, x)
                if z.shape != y.shape:
                    return False
                (its_grad,) = torch.autograd.grad((z * torch.arange(1, z.numel() + 1).view(z.shape)).sum(), x)
        except (ValueError, RuntimeError):
            return False
        for a, b in ((y, z), (grad, its_grad)):
            known = ~a.isnan()
            if not torch.equal(known, ~b.isnan()):
                return False
            if not ((a - b)[known].abs() <= TOLERANCE * a[known].abs().max()).all():
                return False
        tested += 1
    return tested >= 2
