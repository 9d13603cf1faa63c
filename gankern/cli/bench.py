"""gankern bench: is every kernel fast on this machine, and how far from its limit?"""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gankern.cli._choose import DEVICES, JSON, PRIMITIVES, TERMINAL, check_run, choice, console_beside, write_results
from gankern.cli._fail import fail
from gankern.core import memory
from gankern.core.names import look_up
from gankern.measure import benchmark, host, steps
from gankern.measure.cases import Case, all_cases
from gankern.measure.report.compare import Change, compare
from gankern.measure.report.record import Record, load

MODELS = (*dict.fromkeys(step.model for step in steps.STEPS), "all")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def bench(
    op: Annotated[list[str] | None, PRIMITIVES] = None,
    model: Annotated[
        list[str] | None,
        choice(MODELS, "a model's whole training step; repeat for several", show_default="none"),
    ] = None,
    device: Annotated[str, choice(DEVICES, "where it runs")] = "cpu",
    precision: Annotated[str, choice(PRECISIONS, "of the tensors")] = "fp32",
    dtype: Annotated[str | None, typer.Option(hidden=True)] = None,  # what --precision was called, by torch's names
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads", show_default="torch's")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="one or two shapes a primitive, a second each, one peer compiled")
    ] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="also time against size, batch, layers and threads, eager peers only")
    ] = False,
    host_only: Annotated[
        bool, typer.Option("--host", help="what a call costs the host, on tensors of some ten elements; nothing else")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="all primitives, all models' steps, scaling; one peer compiled")
    ] = False,
    compiled: Annotated[bool, typer.Option(help="also time each peer under torch.compile")] = True,
    json_file: Annotated[Path | None, JSON] = None,
    against: Annotated[
        Path | None, typer.Option(help="an earlier record: name what became slower, and exit with 1 if anything did")
    ] = None,
) -> None:
    """Time each primitive against the faster of eager PyTorch and torch.compile, interleaved in this process.

    A ratio is peer / gankern, the median over rounds; "no difference" where its 95 % interval holds 1. The limit is
    the least bytes that must move, or operations, over the copy bandwidth and the multiply-add rate measured first
    (shapes that fit into the caches can beat it). glibc is told to keep freed memory, for all contenders
    alike (see gankern.keep_freed_memory).

    With --model, whole training steps: stock torch layers and a penalty written by hand, compiled where that runs,
    against gankern's, and what the time goes to; also torch's layers after gankern.accelerate. On CUDA once more with
    every one of them as a CUDA graph.

    With --host, microseconds a call of each primitive on one CPU thread, beside eager PyTorch's formulations; the
    share is gankern's cost, the cheapest formulation's being 1.

    With --against, a case that seems slower is measured twice more, and counts only if it is slower each time.
    """
    try:
        check_run(op, device, json_file)
        named = {str(kind).removeprefix("torch."): name for name, kind in PRECISIONS.items()}
        precision = named.get(dtype, dtype) if dtype is not None else precision
        look_up(PRECISIONS, precision, "precision")
        if quick and full:
            raise ValueError("--quick and --full exclude each other")
        model, scaling = (["all"], True) if full else (model, scaling)
        wanted = _steps(model, quick)
        earlier = None if against is None else load(against)
    except ValueError as error:
        fail(error)
    if host_only:
        _host(op, device, json_file)
        return
    if threads is not None:
        torch.set_num_threads(threads)
    kept = memory.keep_freed_memory()
    if device == "cpu":
        memory.refuse_more_than_there_is()
    console = console_beside(json_file)
    bandwidth, rate = benchmark.copy_bandwidth(device), benchmark.multiply_add_rate(device)
    seconds = 1.0 if quick or full else 3.0
    primitives = [c for c in all_cases() if not op or c.primitive in op] if op or full or not model else []
    cases = [c for c in primitives if c.bench and (c.quick or not quick)]
    options: dict[str, Any] = {"device": device, "compiled": compiled}
    measure = partial(
        benchmark.measure, dtype=PRECISIONS[precision], bandwidth=bandwidth, rate=rate, seconds=seconds, **options
    )
    # What is measured, by what it is called.
    work: dict[str, Callable[[], benchmark.Result]] = {
        f"{case.primitive}: {case.name}, {mode}": partial(measure, case, mode, fastest_only=quick or full)
        for case in cases
        for mode in benchmark.MODES
    }
    if scaling:
        work |= _scaling(primitives, partial(measure, compiled=False), device)
    work |= {
        f"{step.name}, {mode}": partial(steps.measure, step, seconds=10 * seconds, mode=mode, **options)
        for step in wanted
        for mode in steps.modes_of(device, step)
    }

    settings = {
        "quick": quick,
        "seconds": seconds,
        "freed_memory_kept": kept,
        "copy_bandwidth": bandwidth,
        "multiply_add_rate": rate,
    }
    environment = benchmark.environment()

    def record(results: list[benchmark.Result], breakdowns: dict | None = None) -> dict:
        return {
            "environment": environment,
            "settings": settings,
            "results": [benchmark.to_dict(r) for r in results],
            "breakdowns": breakdowns or {},
        }

    results = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=len(work))
        for name, once in work.items():
            progress.update(bar, description=name)
            results.append(once())
            if earlier is not None:
                results[-1] = _confirmed(results[-1], earlier, once)
            if json_file not in (None, TERMINAL):
                write_results(json_file, record(results))  # a run that is stopped keeps what it has
            progress.advance(bar)
        breakdowns = {}
        for step in wanted:
            progress.update(bar, description=f"{step.name}: what its time goes to")
            breakdowns[step.name] = {v: steps.breakdown(step, v, device) for v in ("torch", benchmark.OURS)}

    limits = f"copy {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} G multiply-adds/s"
    console.print(f"{limits}, {torch.get_num_threads()} threads, {precision}")
    # What a narrow terminal has no room for comes last.
    columns = ["case", "mode", "ratio", "gankern ms", "peer ms", "peer", "95 %", "of limit", "memory", "ran"]
    columns = columns[: 10 if console.width >= 150 else 6 if console.width >= 110 else 4]
    table = Table()
    for column in columns:
        table.add_column(column, no_wrap=column not in ("case", "mode", "peer"), overflow="fold")
    for r in results:
        ours, peer = r.contenders[benchmark.OURS], r.contenders.get(r.peer or "")
        interval = "" if r.interval is None else f"{r.interval[0]:.2f} to {r.interval[1]:.2f}"
        limit = "" if r.limit is None else f"{r.limit / ours.ms:.0%}"
        held = "" if peer is None else f"{ours.megabytes:.1f} / {peer.megabytes:.1f} MB"
        theirs = "" if peer is None else f"{peer.median:.3f}"
        mode = r.mode + ("" if r.along is None else f", {r.along[0]} {r.along[1]:g}")
        row = [f"{r.primitive}: {r.case}", mode, r.verdict, f"{ours.median:.3f}", theirs, r.peer or "",
               interval, limit, held, r.implementation]  # fmt: skip
        table.add_row(*row[: len(columns)])
    console.print(table)
    for r in results:
        for name, contender in r.contenders.items():
            if contender.failure:
                console.print(f"{r.case}, {r.mode}: {name} cannot: {contender.failure}", style="dim")
    if wanted:
        _print_breakdowns(console, breakdowns)
    write_results(json_file, record(results, breakdowns))
    if json_file is not None:
        console.print(f"record written to {json_file}", markup=False)
    if earlier is not None:
        _print_changes(console, compare(earlier, results))


def _host(primitives: list[str] | None, device: str, json_file: Path | None) -> None:
    """Measures and prints what calls cost the host."""
    torch.set_num_threads(1)
    console = console_beside(json_file)
    cases = host.cases(primitives)
    work = [(case, mode) for mode in host.MODES for case in cases]
    costs = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=len(work))
        for case, mode in work:
            progress.update(bar, description=f"{case.primitive}: {case.name}, {mode}")
            costs.append(host.measure(case, mode, device))
            progress.advance(bar)
    table = Table("case", "mode", "gankern µs", "peer µs", "share", "peer", "ran")
    for cost in costs:
        ours, theirs = cost.microseconds[benchmark.OURS], cost.microseconds[cost.peer]
        table.add_row(f"{cost.primitive}: {cost.case}", cost.mode, f"{ours:.2f}", f"{theirs:.2f}", f"{cost.share:.2f}",
                      cost.peer, cost.implementation)  # fmt: skip
    console.print(table)
    for mode in host.MODES:
        console.print(f"{mode}: geometric mean {host.geometric_mean([c for c in costs if c.mode == mode]):.2f}")
    if json_file is not None:
        content = {"environment": benchmark.environment(), "settings": {}, "results": []}
        write_results(json_file, content | {"host": [asdict(cost) for cost in costs]})
        console.print(f"record written to {json_file}", markup=False)


def _steps(names: list[str] | None, quick: bool) -> list[steps.Step | steps.Play]:
    """The training steps of the named models."""
    known = dict.fromkeys(step.model for step in steps.STEPS) | {"all": None}
    for name in names or ():
        look_up(known, name, "model")
    wanted = [s for s in steps.STEPS if names and (s.model in names or "all" in names)]
    return [s for s in wanted if s.quick or not quick]


def _scaling(cases: list[Case], measure: Callable[..., benchmark.Result], device: str) -> dict[str, Callable]:
    """The cases along a size, and on the CPU the quick ones along the number of threads."""
    mode = benchmark.MODES[1]

    def on_threads(count: int, case: Case) -> benchmark.Result:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return measure(replace(case, along=("threads", count)), mode)
        finally:
            torch.set_num_threads(before)

    work: dict[str, Callable] = {
        f"{case.primitive}: {case.name}, along {case.along[0]}": partial(measure, case, mode)
        for case in cases
        if case.along is not None
    }
    counts = [2**i for i in range((os.cpu_count() or 1).bit_length())] if device == "cpu" else []
    return work | {
        f"{case.primitive}: {case.name}, {count} threads": partial(on_threads, count, case)
        for case in cases
        if case.bench and case.quick
        for count in counts
    }


def _print_breakdowns(console: Console, breakdowns: dict[str, dict[str, dict[str, float]]]) -> None:
    kinds = next(iter(next(iter(breakdowns.values())).values()))
    table = Table("step", "layers", *kinds, title="milliseconds of one step, by what they are spent on")
    for name, variants in breakdowns.items():
        for variant, spent in variants.items():
            table.add_row(name, variant, *(f"{spent[kind]:.0f}" for kind in kinds))
    console.print(table)


def _confirmed(result: benchmark.Result, earlier: Record, again: Callable[[], benchmark.Result]) -> benchmark.Result:
    """The result; where that is slower than the earlier record, it is measured again, up to twice."""
    for _ in range(2):
        if any(change.verdict == "slower" for change in compare(earlier, [result])):
            result = again()
    return result


def _print_changes(console: Console, changes: list[Change]) -> None:
    table = Table("case", "mode", "before ms", "after ms", "relative to peers", "verdict", title="against the record")
    for change in changes:
        primitive, case, mode, *_, along = change.key
        mode += "" if along is None else f", {along[0]} {along[1]:g}"
        table.add_row(f"{primitive}: {case}", mode, f"{change.before_ms:.3f}", f"{change.after_ms:.3f}",
                      f"{change.factor - 1:+.0%}", change.verdict)  # fmt: skip
    console.print(table)
    slower = sum(change.verdict == "slower" for change in changes)
    console.print(f"{slower} of {len(changes)} cases became slower")
    if slower:
        raise typer.Exit(1)
