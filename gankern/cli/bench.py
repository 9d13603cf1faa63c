"""gankern bench: is every kernel fast on this machine, and how far from its limit?"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gankern import benchmark, memory
from gankern.cases import all_cases
from gankern.cli._choose import check_device, check_primitives
from gankern.cli._fail import fail
from gankern.cli._write import write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def bench(
    op: Annotated[list[str] | None, typer.Option(help="a primitive; repeat for several [default: all]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads [default: torch's]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer shapes, a second each")] = False,
    compiled: Annotated[bool, typer.Option(help="also time each peer under torch.compile")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the record to this file")] = None,
) -> None:
    """Time each primitive against the faster of eager PyTorch and torch.compile, interleaved in this process.

    A ratio is peer / gankern, the median over rounds; "no difference" where its 95 % interval holds 1. The limit is
    the least bytes that must move, or operations, over the copy bandwidth and the multiply-add rate measured first
    (shapes that fit into the caches can beat it). glibc is told to keep freed memory, for all contenders
    alike (see gankern.keep_freed_memory).
    """
    try:
        check_primitives(op)
        check_device(device)
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; there are: {', '.join(DTYPES)}")
    except ValueError as error:
        fail(error, code=2)
    if threads is not None:
        torch.set_num_threads(threads)
    kept = memory.keep_freed_memory()
    console = Console()
    bandwidth, rate = benchmark.copy_bandwidth(device), benchmark.multiply_add_rate(device)
    cases = [c for c in all_cases() if c.bench and (not op or c.primitive in op) and (c.quick or not quick)]
    work = [(case, mode) for case in cases for mode in benchmark.MODES]
    results = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=len(work))
        for case, mode in work:
            progress.update(bar, description=f"{case.primitive}: {case.name}, {mode}")
            seconds = 1.0 if quick else 4.0
            results.append(
                benchmark.measure(case, mode, dtype=DTYPES[dtype], device=device, bandwidth=bandwidth, rate=rate,
                                  compiled=compiled, seconds=seconds)
            )  # fmt: skip
            progress.advance(bar)

    rates = f"copy {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} G multiply-adds/s"
    console.print(f"{rates}, {torch.get_num_threads()} threads, {dtype}")
    table = Table("case", "mode", "ran", "gankern ms", "peer ms", "peer", "ratio", "95 %", "of limit", "memory")
    for r in results:
        ours, peer = r.contenders[benchmark.OURS], r.contenders.get(r.peer or "")
        interval = "" if r.interval is None else f"{r.interval[0]:.2f} to {r.interval[1]:.2f}"
        limit = "" if r.limit is None else f"{r.limit / ours.median:.0%}"
        held = "" if peer is None else f"{ours.peak_bytes / 1e6:.1f} / {peer.peak_bytes / 1e6:.1f} MB"
        theirs = "" if peer is None else f"{peer.median:.3f}"
        table.add_row(f"{r.primitive}: {r.case}", r.mode, r.implementation, f"{ours.median:.3f}",
                      theirs, r.peer or "", r.verdict, interval, limit, held)  # fmt: skip
    console.print(table)
    for r in results:
        for name, contender in r.contenders.items():
            if contender.failure:
                console.print(f"{r.case}, {r.mode}: {name} cannot: {contender.failure}", style="dim")
    if json_file is not None:
        record = {
            "environment": benchmark.environment(),
            "settings": {
                "quick": quick,
                "freed_memory_kept": kept,
                "copy_bandwidth": bandwidth,
                "multiply_add_rate": rate,
            },
            "results": [benchmark.to_dict(r) for r in results],
        }
        write_json(json_file, record)
        console.print(f"record written to {json_file}")
