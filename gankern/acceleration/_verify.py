"""Compares and times a module and its accelerated self."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gankern.acceleration._report import Measured, Report

SECONDS = 3.0  # for all timings together
# Relative. In double precision a difference is a mistake. In single precision a ReLU whose argument is zero up to
# rounding may decide otherwise, in the original as well as here, which shows in a gradient.
ALLOWED = {torch.float64: 1e-6, torch.float32: 0.1}
GAINED = 1.02


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy, also of a module that keeps a computed tensor (as torch's spectral norm does)."""
    computed = [
        x for inner in module.modules() for x in inner.__dict__.values() if isinstance(x, Tensor) and not x.is_leaf
    ]
    return copy.deepcopy(module, {id(x): x.detach().clone() for x in computed})


def verify(before: nn.Module, after: nn.Module, inputs: Any, report: Report) -> bool:
    """Enters errors and times into the report; whether anything became faster. Works on copies.

    Raises: RuntimeError where a result differs by more than rounding.
    """
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    after = copy_of(after)
    for mode, run in MODES.items():
        try:
            error = _compare(mode, before, after, inputs)
            exact = _compare_in_double(mode, before, after, inputs)
        except _NotPossible as reason:
            report.measured.append(Measured(mode, None, None, None, None, str(reason)))
            continue
        for found, dtype in ((error, torch.float32), (exact, torch.float64)):
            if found is not None and not found <= ALLOWED[dtype]:
                raise RuntimeError(
                    f"accelerate: {mode} differs from the original by {found:.1e} of its largest value in {dtype} "
                    f"({ALLOWED[dtype]:.0e} is allowed): the module was left as it was. Find the layer with only= or "
                    f"exclude=, and please report it"
                )
        times = _times([partial(_once, run, m, inputs) for m in (before, after)], SECONDS / len(MODES))
        report.measured.append(Measured(mode, *times, error, exact))
    return any(m.ratio is not None and m.ratio >= GAINED for m in report.measured)


class _NotPossible(Exception):
    pass


def _compare(mode: str, before: nn.Module, after: nn.Module, inputs: tuple[Any, ...]) -> float:
    results = []
    with torch.random.fork_rng():
        seed = torch.random.initial_seed()
        for module in (before, after):
            torch.manual_seed(seed)
            results.append([*MODES[mode](module, fresh(inputs)), *(b.clone() for b in module.buffers())])
    return _error(*results)


def _compare_in_double(mode: str, before: nn.Module, after: nn.Module, inputs: tuple[Any, ...]) -> float | None:
    """The same in double precision; None where the module does not run in it."""

    def double(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    try:
        before, after = (copy_of(module).double() for module in (before, after))
        after.load_state_dict(before.state_dict())  # the runs so far may have left buffers that differ in rounding
        inputs = tree_map_only(Tensor, double, inputs)
        MODES[mode](copy_of(before), fresh(inputs))
    except (RuntimeError, TypeError, ValueError):
        return None
    return _compare(mode, before, after, inputs)


def _once(run: Callable[..., Any], module: nn.Module, inputs: Sequence[Any]) -> Any:
    return run(module, fresh(inputs))


def fresh(inputs: Sequence[Any]) -> tuple[Any, ...]:
    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.is_floating_point())

    return tree_map_only(Tensor, leaf, tuple(inputs))


def _scalar(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
    outputs = [x for x in tree_leaves(module(*inputs)) if isinstance(x, Tensor) and x.is_floating_point()]
    if not any(x.requires_grad for x in outputs):
        raise _NotPossible("no result requires a gradient")
    # Weights that are not all the same: a sum would hide what a normalisation does.
    terms = ((x * torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x)).sum() for x in outputs)
    return reduce(torch.add, terms), outputs


def _forward(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor | None]:
    with torch.no_grad():
        return [x for x in tree_leaves(module(*inputs)) if isinstance(x, Tensor)]


def _backward(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor | None]:
    # As a training step has it: the inputs are data.
    module.zero_grad()
    inputs = tree_map_only(Tensor, Tensor.detach, inputs)
    scalar, outputs = _scalar(module, inputs)
    scalar.backward()
    return [x.detach() for x in outputs] + [p.grad for p in module.parameters()]


def _double_backward(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor | None]:
    """A gradient penalty."""
    module.zero_grad()
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        raise _NotPossible("no input is floating point")
    scalar, _ = _scalar(module, inputs)
    try:
        found = torch.autograd.grad(scalar, leaves, create_graph=True, allow_unused=True)
        grads = [g for g in found if g is not None and g.requires_grad]
        if not grads:
            raise _NotPossible("the gradient of the inputs does not depend on the parameters")
        terms = [(g.flatten(1).norm(dim=1) - 1).square().sum() if g.ndim > 1 else g.square().sum() for g in grads]
        reduce(torch.add, terms).backward()
    except RuntimeError as error:
        raise _NotPossible(str(error).splitlines()[0][:120]) from error
    return [g.detach() for g in grads] + [p.grad for p in module.parameters()]


MODES: dict[str, Callable[..., list[Tensor | None]]] = {
    "forward": _forward,
    "forward + backward": _backward,
    "double backward": _double_backward,
}


def _error(before: list[Tensor | None], after: list[Tensor | None]) -> float:
    """The largest difference, relative to the largest value of the same result. A result that is rounding alone (the
    gradient of a bias before a batch norm) counts as a thousandth of the largest result."""
    largest = max((_peak(x) for x in before if x is not None), default=0.0)
    error = 0.0
    for a, b in zip(before, after, strict=True):
        # A gradient that does not exist may be zeros.
        if a is None:
            if b is None:
                continue
            a = torch.zeros_like(b)
        elif b is None:
            b = torch.zeros_like(a)
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        difference = _peak(a.double() - b.double())
        if difference:
            error = max(error, difference / max(_peak(a), 1e-3 * largest, 1e-30))
        if difference != difference and not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
    return error


def _peak(x: Tensor) -> float:
    return x.abs().max().double().item() if x.numel() else 0.0


def _times(steps: Sequence[Callable[[], Any]], seconds: float) -> tuple[float, float]:
    """Median milliseconds of each, in turns."""
    times: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for step, its_times in zip(steps, times):
            begin = time.perf_counter()
            step()
            _synchronize()
            its_times.append(1e3 * (time.perf_counter() - begin))
    before, after = (statistics.median(t) for t in times)
    return before, after


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
