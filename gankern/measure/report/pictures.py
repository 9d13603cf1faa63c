"""The pictures of a report. Colours tell gankern from its peers; every axis has its unit."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from gankern.measure.benchmark import MODES, OURS, Contender, Result
from gankern.measure.report.record import Record

BLUE, GREY = "#1f6feb", "#9aa4b2"


def _label(result: Result) -> str:
    return f"{result.primitive.replace('_', ' ')}: {result.case}"


def _rows(results: Sequence[Result]) -> Figure:
    return Figure(figsize=(9, 1.2 + 0.32 * max(len(results), 1)), layout="constrained")


def roofline(record: Record) -> dict[str, Figure]:
    """Operations a second against operations a byte, below the two measured limits."""
    # Operations, and operations a byte.
    points = [
        (r, r.operations, r.operations / r.bytes)
        for r in record.results
        if r.operations and r.bytes and r.along is None
    ]
    bandwidth, rate = record.settings.get("copy_bandwidth"), record.settings.get("multiply_add_rate")
    if not (points and bandwidth and rate):
        return {}
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    intensities = [intensity for *_, intensity in points]
    lowest, highest = min([*intensities, 0.05]) / 2, max([*intensities, rate / bandwidth]) * 2
    ends = [lowest, rate / bandwidth, highest]
    axes.loglog(ends, [min(rate, i * bandwidth) / 1e9 for i in ends], color="black", label="measured limits")
    for primitive in dict.fromkeys(r.primitive for r, *_ in points):
        own = [point for point in points if point[0].primitive == primitive]
        achieved = [operations / r.contenders[OURS].ms / 1e6 for r, operations, _ in own]
        axes.loglog([intensity for *_, intensity in own], achieved, "o", label=primitive.replace("_", " "))
    axes.set_xlabel("operations a byte (least of both)")
    axes.set_ylabel("10⁹ operations a second")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return {"roofline": figure}


def memory(record: Record) -> dict[str, Figure]:
    """The most memory that forward + backward hold, gankern beside the fastest peer."""
    results = [
        r
        for r in record.results
        if r.mode == MODES[1]
        and r.along is None
        and r.peer
        and r.contenders[OURS].peak_bytes
        and r.contenders[r.peer].peak_bytes
    ]
    if not results:
        return {}
    figure = _rows(results)
    axes = figure.subplots()
    for row, result in enumerate(reversed(results)):
        for offset, name, colour in ((0.18, OURS, BLUE), (-0.18, result.peer or "", GREY)):
            axes.barh(row + offset, result.contenders[name].megabytes, color=colour, height=0.34)
    axes.barh(0, 0, color=BLUE, label="gankern")
    axes.barh(0, 0, color=GREY, label="fastest peer")
    axes.set_yticks(range(len(results)), [_label(r) for r in reversed(results)], fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if str(x)[0] in "25" else "")
    axes.set_xlabel(f"MB held at most, {MODES[1]}")
    axes.legend(fontsize=8)
    return {"memory": figure}


def limits(record: Record) -> dict[str, Figure]:
    """How much of each case's time its least bytes or operations explain."""
    results = [r for r in record.results if r.limit and r.mode != MODES[2] and r.along is None]
    if not results:
        return {}
    figure = _rows(results)
    axes = figure.subplots()
    shares = [100 * (r.limit or 0.0) / r.contenders[OURS].ms for r in reversed(results)]
    axes.barh(range(len(results)), shares, color=BLUE, height=0.7)
    axes.set_yticks(range(len(results)), [f"{_label(r)}, {r.mode}" for r in reversed(results)], fontsize=8)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlim(0, max(110, math.ceil(max(shares) / 10) * 10))
    axes.set_xlabel("% of the measured limit (inputs that fit the caches can exceed 100)")
    return {"share of the limit": figure}


def breakdowns(record: Record) -> dict[str, Figure]:
    """What whole steps spend their time on, torch's layers above gankern's."""
    bars = [(f"{step}\n{layers}", spent) for step, both in record.breakdowns.items() for layers, spent in both.items()]
    if not bars:
        return {}
    figure = Figure(figsize=(9, 1.6 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for kind in bars[0][1]:
        widths = [spent[kind] for _, spent in bars]
        axes.barh(range(len(bars)), widths, left=left, label=kind, height=0.75)
        left = [a + b for a, b in zip(left, widths)]
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set_xlabel("milliseconds of one step, summed over threads' operators")
    axes.legend(fontsize=8)
    return {"where the time goes": figure}


def scaling(record: Record) -> dict[str, Figure]:
    """Time and memory of forward + backward against a size or the number of threads, of all contenders."""
    series: dict[tuple[str, ...], list[Result]] = {}
    for r in record.results:
        if r.along is not None:
            # Along the threads a series is one case, along a size each case is one point.
            name = (r.primitive, r.along[0], *([r.case] if r.along[0] == "threads" else []))
            series.setdefault(name, []).append(r)
    if not series:
        return {}
    sizes = [s for name, s in series.items() if name[1] != "threads"]
    threads = [s for name, s in series.items() if name[1] == "threads"]
    figures = {
        "time along a size": _small_multiples(sizes, "ms", lambda c: c.ms),
        "memory along a size": _small_multiples(sizes, "MB", lambda c: c.megabytes),
        "time along threads": _small_multiples(threads, "ms", lambda c: c.ms),
    }
    return {title: figure for title, figure in figures.items() if figure is not None}


def _small_multiples(
    series: Sequence[Sequence[Result]], unit: str, value: Callable[[Contender], float]
) -> Figure | None:
    """A small picture for each series."""
    if not series:
        return None
    columns = 3
    rows = math.ceil(len(series) / columns)
    figure = Figure(figsize=(9, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(series) :]:
        axes.remove()
    for axes, results in zip(grid.flat, series):
        for name in dict.fromkeys(name for r in results for name in r.contenders):
            found = [(r.along[1], r.contenders[name]) for r in results if r.along and name in r.contenders]
            points = [(x, value(c)) for x, c in found if c.median]
            style = {"color": BLUE, "linewidth": 2} if name == OURS else {"linewidth": 1}
            axes.loglog(*zip(*points), "o-", markersize=3, label=name, **style)
        along = [r.along for r in results if r.along]
        what, ticks = along[0][0], sorted({value for _, value in along})
        title = _label(results[0]) if what == "threads" else results[0].primitive.replace("_", " ")
        axes.set_title(textwrap.fill(title, 36), fontsize=7)
        axes.set_xlabel(what, fontsize=7)
        axes.set_ylabel(unit, fontsize=7)
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=6)
        axes.set_xticks([], minor=True)
        axes.tick_params(axis="y", which="both", labelsize=6)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter("")
        axes.legend(fontsize=5)
        axes.grid(alpha=0.3)
    return figure


def pictures(record: Record) -> dict[str, Figure]:
    return breakdowns(record) | scaling(record) | limits(record) | roofline(record) | memory(record)
