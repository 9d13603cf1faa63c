"""What a GPU's kernels take without the host, and what the host takes without the kernels.

A step is captured once as a CUDA graph and replayed: no Python runs between its kernels, so the time is the device's.
On the CPU, where there are no graphs, the step itself is timed: that serves to try a script out, and no claim.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gankern.core import devices

Step = Callable[[], Any]


def graph_of(step: Step, device: str) -> Step:
    """A function that replays what the step launches; on the CPU the step itself. Raises what the capture raises."""
    if device == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with devices.to_be_replayed(), torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with devices.to_be_replayed(), torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def milliseconds(step: Step, device: str, seconds: float = 0.2, rounds: int = 5) -> float:
    """The median over ``rounds`` of the mean time of the step, repeated without a wait between; about ``seconds``."""
    step()
    begin = _now(device)
    step()
    once = max(_now(device) - begin, 1e-6)
    repeats = max(1, min(1000, int(seconds / rounds / once)))
    means = []
    for _ in range(rounds):
        begin = _now(device)
        for _ in range(repeats):
            step()
        means.append((_now(device) - begin) / repeats)
    return 1e3 * statistics.median(means)


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def host_microseconds(step: Step, device: str, calls: int = 200, rounds: int = 7) -> float:
    """What a call of the step takes the host: the least of the rounds' means. The device has little to do on the tiny
    tensors that this is for, and is waited for between the rounds alone."""
    for _ in range(20):
        step()
    means = []
    for _ in range(rounds):
        _now(device)
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        means.append((time.perf_counter() - begin) / calls)
    return 1e6 * min(means)


def peak_megabytes(step: Step, device: str) -> float | None:
    """The most that torch's allocator holds during the step, beyond what it held before; None on the CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def top_kernels(step: Step, device: str) -> list[dict[str, Any]]:
    """The 20 kernels of one step that take the device the most time: name, number of launches, milliseconds in all. On
    the CPU, operators."""
    step()
    on_device = device != "cpu"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]) as profiler:
        step()
        _now(device)
    spent: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if not on_device:
            spent[event.name].append(event.self_cpu_time_total / 1e3)
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name].append(event.device_time_total / 1e3)
    rows: Sequence[dict[str, Any]] = [
        {"kernel": name, "launches": len(times), "ms": sum(times)} for name, times in spent.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:20]
