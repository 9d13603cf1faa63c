"""The table that README carries, made from records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gankern.core.files import write_bytes
from gankern.measure import host
from gankern.measure.benchmark import ACCELERATED, MODES, OURS, Result
from gankern.measure.cases import all_cases
from gankern.measure.host import HostCost
from gankern.measure.report.record import Record
from gankern.measure.steps import WHOLE_STEP

BEGIN, END = "<!-- made from records: begin -->", "<!-- made from records: end -->"


def markdown_table(records: Sequence[Record], quick: bool = False) -> str:
    """A line a training step, whole ones first; then a line a case of a primitive, ``quick`` for those alone that
    `gankern bench --quick` has: the ratios of all modes, and time, share of the limit and memory of forward +
    backward. Last, a line a case of what calls cost the host."""
    chosen = {(case.primitive, case.name) for case in all_cases() if case.quick}
    steps: list[Result] = []
    primitives: list[str] = []
    calls: dict[str, dict[str, HostCost]] = {}
    for record in records:
        for cost in record.host:
            calls.setdefault(f"{cost.primitive.replace('_', ' ')}, {cost.case}", {})[cost.mode] = cost
        cases: dict[tuple[str, str, str], dict[str, Result]] = {}
        for result in record.results:
            if result.along is None:
                cases.setdefault((result.primitive, result.case, result.dtype), {})[result.mode] = result
        for (primitive, case, dtype), modes in cases.items():
            if not modes.keys() & set(MODES):
                steps += modes.values()
                continue
            if quick and (primitive, case) not in chosen:
                continue
            name = f"{primitive.replace('_', ' ')}, {case}" + ("" if dtype == "float32" else f", {dtype}")
            ratios = [modes[m].verdict if m in modes else "" for m in MODES]
            primitives.append(f"| {' | '.join([name, *ratios, *_facts(modes.get(MODES[1]))])} |")
    rows = [_step(result) for result in sorted(steps, key=lambda result: result.mode != WHOLE_STEP)]
    tables = [
        ("| training step, or part of one | ms | the faster peer's ms | ratio | accelerated torch | memory |", rows),
        (f"| primitive | {' | '.join(MODES)} | ms | of the limit | memory |", primitives),
        (
            f"| µs a call, and the cheapest peer's | {' | '.join(host.MODES)} |",
            [
                f"| {name} | {' | '.join(_cost(modes[m]) if m in modes else '' for m in host.MODES)} |"
                for name, modes in calls.items()
            ],
        ),
    ]
    return "\n\n".join("\n".join([head, "|---" * head.count(" | ") + "|---|", *rows]) for head, rows in tables if rows)


def _cost(cost: HostCost) -> str:
    return f"{cost.microseconds[OURS]:.1f} / {cost.microseconds[cost.peer]:.1f}"


def _step(result: Result) -> str:
    ours = result.contenders[OURS]
    if result.peer is None:
        return f"| {result.case}: {result.mode} | {ours.median:.0f} | | {result.verdict} | | |"
    peer = result.contenders[result.peer]
    memory = f"{ours.peak_bytes / peer.peak_bytes:.2f}" if ours.peak_bytes and peer.peak_bytes else ""
    name = result.case if result.mode == WHOLE_STEP else f"{result.case}: {result.mode}"
    accelerated = result.contenders.get(ACCELERATED)
    helped = "" if accelerated is None or not accelerated.median else f"{peer.ms / accelerated.ms:.2f}x"
    theirs = f"{peer.median:.0f} ({result.peer})"
    return f"| {name} | {ours.median:.0f} | {theirs} | {result.verdict} | {helped} | {memory} |"


def _facts(result: Result | None) -> tuple[str, str, str]:
    if result is None:
        return "", "", ""
    ours = result.contenders[OURS]
    peer = result.contenders.get(result.peer or "")
    share = "" if result.limit is None else f"{result.limit / ours.ms:.0%}"
    memory = "" if not (peer and peer.peak_bytes and ours.peak_bytes) else f"{ours.peak_bytes / peer.peak_bytes:.2f}"
    return f"{ours.median:.3g}", share, memory


def update_between_markers(path: Path, text: str) -> bool:
    """Puts a text between the two markers of a file; whether that changed it."""
    before = path.read_text(encoding="utf-8")
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: does not hold the lines {BEGIN!r} and {END!r}, between which the table belongs")
    after = f"{head}{BEGIN}\n{text}\n{END}{tail}"
    if after == before:
        return False
    write_bytes(path, after.encode())
    return True
