"""The table that README carries, made from records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gankern.benchmark import ACCELERATED, MODES, OURS, Result
from gankern.report.record import Record

BEGIN, END = "<!-- made from records: begin -->", "<!-- made from records: end -->"


def markdown_table(records: Sequence[Record]) -> str:
    """A line a case: the ratios of all modes, and time, share of the limit and memory of forward + backward. Then a
    line a whole training step."""
    lines = [
        f"| | {' | '.join(MODES)} | ms | of the limit | memory |",
        "|---|" + "---|" * (len(MODES) + 3),
    ]
    steps = []
    for record in records:
        cases: dict[tuple[str, str, str], dict[str, Result]] = {}
        for result in record.results:
            if result.along is None:
                cases.setdefault((result.primitive, result.case, result.dtype), {})[result.mode] = result
        for (primitive, case, dtype), modes in cases.items():
            if not modes.keys() & set(MODES):
                steps += [_step(result) for result in modes.values()]
                continue
            name = f"{primitive.replace('_', ' ')}, {case}" + ("" if dtype == "float32" else f", {dtype}")
            ratios = [modes[m].verdict if m in modes else "" for m in MODES]
            lines.append(f"| {' | '.join([name, *ratios, *_facts(modes.get(MODES[1]))])} |")
    if steps:
        lines += [
            "",
            "| training step, or part of one | ms | the faster peer's ms | ratio | accelerated torch | memory |",
            "|---|" + "---|" * 5,
            *steps,
        ]
    return "\n".join(lines)


def _step(result: Result) -> str:
    ours, peer = result.contenders[OURS], result.contenders[result.peer]
    memory = f"{ours.peak_bytes / peer.peak_bytes:.2f}"
    name = result.case if result.mode == "whole step" else f"{result.case}: {result.mode}"
    accelerated = result.contenders.get(ACCELERATED)
    helped = "" if accelerated is None or not accelerated.median else f"{peer.median / accelerated.median:.2f}x"
    theirs = f"{peer.median:.0f} ({result.peer})"
    return f"| {name} | {ours.median:.0f} | {theirs} | {result.verdict} | {helped} | {memory} |"


def _facts(result: Result | None) -> tuple[str, str, str]:
    if result is None:
        return "", "", ""
    ours = result.contenders[OURS]
    peer = result.contenders.get(result.peer or "")
    share = "" if result.limit is None else f"{result.limit / ours.median:.0%}"
    memory = "" if not (peer and peer.peak_bytes) else f"{ours.peak_bytes / peer.peak_bytes:.2f}"
    return f"{ours.median:.3g}", share, memory


def update_between_markers(path: Path, text: str) -> bool:
    """Puts a text between the two markers of a file; whether that changed it."""
    before = path.read_text()
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: does not hold the lines {BEGIN!r} and {END!r}, between which the table belongs")
    after = f"{head}{BEGIN}\n{text}\n{END}{tail}"
    if after == before:
        return False
    path.write_text(after)
    return True
