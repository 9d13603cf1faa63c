"""What a call costs the host: the microseconds of calls on tensors so small that nothing else is left.

A step of many small kernels takes as long as its calls. The contenders of a case are timed in turn; the figure of each
is the least of its rounds' medians, so that what else runs on the machine is in it as little as can be.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gankern.core.dispatch import last_implementation
from gankern.measure.benchmark import OURS
from gankern.measure.cases import Case, all_cases

MODES = ("forward, no grad", "forward", "forward + backward", "double backward")


@dataclass(frozen=True)
class HostCost:
    """Of one case and mode."""

    primitive: str
    case: str
    mode: str
    device: str
    microseconds: dict[str, float]  # of a call, by contender
    implementation: str | None  # what ran

    @property
    def peer(self) -> str:
        """The cheapest contender but gankern."""
        return min((name for name in self.microseconds if name != OURS), key=self.microseconds.__getitem__)

    @property
    def share(self) -> float:
        """What gankern's call costs, the peer's being 1."""
        return self.microseconds[OURS] / self.microseconds[self.peer]


def cases(primitives: Sequence[str] | None = None) -> list[Case]:
    return [case for case in all_cases() if case.host and (not primitives or case.primitive in primitives)]


def measure(case: Case, mode: str, device: str, rounds: int = 7, samples: int = 9) -> HostCost:
    """The cost of a call of each contender; a sample is of several calls, a millisecond in all."""
    inputs = case.make(torch.float32, device)
    calls = {OURS: call_of(partial(case.run, None), inputs, mode)}
    for name, peer in case.peers.items():
        call = call_of(peer, inputs, mode)
        try:
            call()
        except RuntimeError as error:  # torch.cdist and torch's fused attention have no second derivative
            if mode != "double backward" or "not implemented" not in str(error):
                raise
            continue
        calls[name] = call
    best = dict.fromkeys(calls, float("inf"))
    counts = {}
    for name, call in calls.items():
        for _ in range(10):
            call()
        counts[name] = max(1, int(1e3 / _median(call, 1, samples, device)))
    calls[OURS]()
    implementation = last_implementation(case.primitive)
    for _ in range(rounds):
        for name, call in calls.items():
            best[name] = min(best[name], _median(call, counts[name], samples, device))
    return HostCost(case.primitive, case.name, mode, device, best, implementation)


def call_of(run: Callable[[Sequence[Tensor]], Tensor | Sequence[Tensor]], inputs: list[Tensor], mode: str) -> Callable:
    """A function without arguments that does what a mode's name says."""

    def outputs() -> list[Tensor]:
        result = run(inputs)
        return [result] if isinstance(result, Tensor) else list(result)

    if mode == "forward":
        return lambda: run(inputs)
    if mode == "forward, no grad":

        def without() -> None:
            with torch.no_grad():
                run(inputs)

        return without

    leaves = [x for x in inputs if x.requires_grad]
    ones = [torch.ones_like(y) for y in outputs()]
    if mode == "forward + backward":
        return lambda: torch.autograd.grad(outputs(), leaves, ones)
    cotangents = [one.requires_grad_() for one in ones]

    def twice() -> None:
        firsts = torch.autograd.grad(outputs(), leaves, cotangents, create_graph=True)
        wanted = [*leaves, *cotangents]
        torch.autograd.grad(firsts, wanted, [torch.ones_like(g) for g in firsts], allow_unused=True)

    return twice


def _median(call: Callable[[], object], count: int, samples: int, device: str) -> float:
    times = []
    for _ in range(samples):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count)
    return 1e6 * statistics.median(times)


def geometric_mean(costs: Sequence[HostCost]) -> float:
    """Of the shares."""
    return statistics.geometric_mean(cost.share for cost in costs)
