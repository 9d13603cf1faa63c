"""Measures a case against its peers: one process, interleaved, medians, with the distance to the machine's limits.

Every contender runs once in each round, in an order that rotates; a ratio is the median of the rounds' ratios, with
a bootstrap interval over the rounds. What a peer cannot do (a second derivative, memory) is reported as such.
"""

from __future__ import annotations

import datetime
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gankern import __version__
from gankern.core import memory
from gankern.core.dispatch import last_implementation, short
from gankern.measure.cases import Case

MODES = ("forward", "forward + backward", "double backward")
OURS = "gankern"
ACCELERATED = "torch, accelerated"  # torch's layers under gankern.accelerate
OWN = (OURS, ACCELERATED)  # no peers
COMPILED = ", compiled"  # what a peer's name ends with under torch.compile
MOST_ROUNDS = 400
PLACEMENTS = 4


@dataclass
class Contender:
    """Milliseconds of one contender, or why there are none."""

    median: float | None = None
    quartiles: tuple[float, float] | None = None
    peak_bytes: int | None = None
    failure: str | None = None

    @property
    def ms(self) -> float:
        """The median of a contender that ran."""
        if self.median is None:
            raise ValueError(f"there is no time: {self.failure}")
        return self.median

    @property
    def megabytes(self) -> float:
        """``peak_bytes`` of a contender whose memory was measured."""
        if self.peak_bytes is None:
            raise ValueError("the memory was not measured")
        return self.peak_bytes / 1e6


@dataclass
class Result:
    """One case in one mode."""

    primitive: str
    case: str
    mode: str
    dtype: str
    device: str
    implementation: str
    contenders: dict[str, Contender] = field(default_factory=dict)
    peer: str | None = None  # the fastest one
    ratio: float | None = None  # peer / gankern
    interval: tuple[float, float] | None = None  # 95 %
    bytes: int | None = None  # the least that must move
    operations: int | None = None  # and be computed
    limit: float | None = None  # milliseconds that the larger of the two takes at the measured rates
    along: tuple[str, float] | None = None  # of a scaling run: what varies, and its value here

    @property
    def verdict(self) -> str:
        """The ratio, or "no difference" where its interval holds 1."""
        if self.ratio is None or self.interval is None:
            return "no peer"
        low, high = self.interval
        return "no difference" if low <= 1 <= high else f"{self.ratio:.2f}x"


def environment() -> dict[str, Any]:
    """What a record needs to be read later: versions, machine, threads, allocator, commit."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {
        "gankern": __version__,
        "commit": commit or None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "allocator": memory.settings(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Bytes per second (read plus written) of copying a tensor larger than the caches."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    seconds = [_seconds(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * source.nbytes / statistics.median(seconds[2:])


def multiply_add_rate(device: str) -> float:
    """Fused multiply-adds per second of a float32 matrix product, the most arithmetic that torch gets out of the
    device. A vector instruction of another kind takes the place of one."""
    size = 2048
    a = torch.ones(size, size, device=device)
    out = torch.empty_like(a)
    seconds = [_seconds(lambda: torch.mm(a, a, out=out), device) for _ in range(8)]
    return size**3 / statistics.median(seconds[2:])


def _seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # What the last contender left in the L2 cache is gone; and while the device writes, Python has time to launch.
    _larger_than_l2(device).zero_()
    before.record()
    function()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


@functools.cache
def _larger_than_l2(device: str) -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device=device)


def candidates_of(case: Case, mode: str, compiled: bool) -> dict[str, Callable[[Sequence[Tensor]], Any]]:
    """What takes part: gankern, every peer, and (``compiled``) every peer under torch.compile, which has no double
    backward. In a scaling run the reference is a peer."""
    candidates: dict[str, Callable[[Sequence[Tensor]], Any]] = {OURS: lambda inputs: case.run(None, inputs)}
    if case.along is not None:
        candidates["reference"] = lambda inputs: case.run("reference", inputs)
    for name, peer in case.peers.items():
        candidates[name] = peer
        if compiled and mode != "double backward":
            torch._dynamo.reset()
            candidates[name + COMPILED] = torch.compile(peer)
    return candidates


def step_of(
    run: Callable[[Sequence[Tensor]], Any], case: Case, dtype: torch.dtype, device: str, mode: str
) -> Callable[[], Any]:
    """A function that runs a mode once, on inputs of its own."""
    inputs = case.make(dtype, device)
    leaves = [x for x in inputs if x.requires_grad]

    def outputs() -> list[Tensor]:
        result = run(inputs)
        return [result] if isinstance(result, Tensor) else list(result)

    if mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                outputs()

        return forward

    cotangents = [torch.ones_like(y) for y in outputs()]
    if mode == "forward + backward":
        return lambda: torch.autograd.grad(outputs(), leaves, cotangents)

    cotangents = [c.requires_grad_() for c in cotangents]
    directions = [torch.ones_like(x) for x in leaves]

    def double_backward() -> None:
        grads = torch.autograd.grad(outputs(), leaves, cotangents, create_graph=True)
        torch.autograd.grad(grads, [*leaves, *cotangents], directions, allow_unused=True)

    return double_backward


def _peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most memory that a step holds beyond what it started with, as torch's allocator sees it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler writes two lines a use to stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(
    case: Case,
    mode: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bandwidth: float,
    rate: float,
    compiled: bool = True,
    fastest_only: bool = False,
    seconds: float = 2.0,
) -> Result:
    """Times one case in one mode: gankern, every peer, and (``compiled``) every peer under torch.compile, for about
    ``seconds`` in all. With ``fastest_only`` the eager formulations meet in a short trial, and only the fastest of
    them takes part in the rest, compiled too; the others keep the figures of the trial."""
    candidates = candidates_of(case, mode, compiled)
    makers = {name: partial(step_of, run, case, dtype, device, mode) for name, run in candidates.items()}
    slower: dict[str, Contender] = {}
    if fastest_only and len(case.peers) > 1:
        trial = Result(case.primitive, case.name, mode, short(dtype), device, "")
        contend(trial, {name: makers[name] for name in (OURS, *case.peers)}, 0.0, least=2)
        left = (OURS, trial.peer, f"{trial.peer}{COMPILED}")
        makers = {name: make for name, make in makers.items() if name in left}
        slower = {name: contender for name, contender in trial.contenders.items() if name not in left}
    result = Result(case.primitive, case.name, mode, short(dtype), device, "", along=case.along)
    contend(result, makers, seconds, placements=PLACEMENTS)
    result.contenders |= slower
    result.implementation = last_implementation(case.primitive) or "?"
    work = case.work(case.make(torch.float32, device))
    parts = {"forward": ("forward",), "forward + backward": ("forward", "backward")}.get(mode, ())
    if parts and all(part in work for part in parts):
        scale = torch.finfo(dtype).bits / 32
        least = [work[part] for part in parts]
        result.bytes = int(sum(w.bytes for w in least) * scale)
        result.operations = sum(w.operations for w in least)
        result.limit = max(result.bytes / bandwidth, result.operations / rate) * 1e3
    return result


def contend(
    result: Result,
    makers: Mapping[str, Callable[[], Callable[[], Any]]],
    seconds: float,
    least: int = 5,
    placements: int = 1,
) -> None:
    """Runs the contenders' steps in turn for about ``seconds``, but ``least`` times (three, once that has taken four
    times as long), and enters times, memory, ratio and interval into the result. ``makers`` has for each contender
    what makes its step. A peer that cannot do it is entered with the reason. gankern's step is the last that ran.

    Where the tensors lie decides up to half of a memory-bound step's time, so the contenders are made ``placements``
    times, each time in other memory.
    """
    steps: dict[str, Callable[[], Any]] = {}
    contenders, device = result.contenders, result.device
    for name, make in makers.items():
        try:
            steps[name] = make()
            steps[name]()  # what is compiled or cached at the first call is not part of any figure
            contenders[name] = Contender(peak_bytes=_peak_bytes(steps[name], device))
        except (RuntimeError, NotImplementedError, MemoryError) as error:
            if name == OURS:
                raise
            steps.pop(name, None)
            contenders[name] = Contender(failure=str(error).strip().splitlines()[0][:200])

    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()

    def enough(rounds: int) -> bool:
        spent = time.perf_counter() - start
        if rounds < least:
            return rounds >= 3 and spent > 4 * seconds
        return spent >= seconds or rounds >= MOST_ROUNDS

    made = 1
    while not enough(rounds := len(times[names[0]])):
        if made < placements and time.perf_counter() - start > made * seconds / placements:
            made += 1
            steps.clear()
            memory.give_back_freed_memory()
            for name in names:
                steps[name] = makers[name]()
                steps[name]()
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            times[name].append(_seconds(steps[name], device) * 1e3)
    enter_times(result, times, [name for name in names if name not in OWN])
    steps[OURS]()


def enter_times(result: Result, times: Mapping[str, Sequence[float]], peers: Sequence[str]) -> None:
    """Enters into the result the milliseconds of each contender's rounds, and how the fastest peer compares."""
    for name, own in times.items():
        result.contenders[name].median = float(np.median(own))
        result.contenders[name].quartiles = _percentiles(own, 25, 75)
    if peers:
        result.peer = min(peers, key=lambda name: result.contenders[name].ms)
        ratios = np.divide(times[result.peer], times[OURS])
        picks = np.random.default_rng(0).integers(0, len(ratios), (1000, len(ratios)))
        result.ratio = float(np.median(ratios))
        result.interval = _percentiles(np.median(ratios[picks], axis=1), 2.5, 97.5)


def _percentiles(values: Any, low: float, high: float) -> tuple[float, float]:
    return float(np.percentile(values, low)), float(np.percentile(values, high))


def to_dict(result: Result) -> dict[str, Any]:
    """A result as JSON holds it."""
    return asdict(result) | {"verdict": result.verdict}
