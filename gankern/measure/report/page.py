"""One self-contained page for any number of records, and its pictures as files."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, select_autoescape

from gankern.core.files import write_bytes
from gankern.measure.benchmark import OURS, Result
from gankern.measure.report.pictures import pictures
from gankern.measure.report.record import Record

_environment = Environment(loader=PackageLoader("gankern.measure.report", "."), autoescape=select_autoescape(["html"]))


def write_report(records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes ``report.html`` and the PNGs that it shows; their paths, the page first."""
    sections: list[dict[str, Any]] = []
    files: list[Path] = []
    for record in records:
        shown = []
        for title, content in _drawn(record).items():
            file = folder / _file_name(f"{record.path.stem}-{title}", [path.name for path in files])
            write_bytes(file, content)
            files.append(file)
            shown.append((title, base64.b64encode(content).decode()))
        sections.append(
            {
                "record": record,
                "pictures": shown,
                "summary": _summary(record),
                "bars": _bars(record),
                "scale": _scale(record),
            }
        )
    page = folder / "report.html"
    html = _environment.get_template("page.html").render(sections=sections, OURS=OURS, ended=_ended, words=_words)
    write_bytes(page, html.encode())
    return [page, *files]


def _drawn(record: Record) -> dict[str, bytes]:
    """The pictures as PNG files. Names in a record are text, whatever signs are in them."""
    with matplotlib.rc_context({"text.parse_math": False}):
        drawn = {}
        for title, figure in pictures(record).items():
            buffer = io.BytesIO()
            figure.savefig(buffer, dpi=110, format="png")
            drawn[title] = buffer.getvalue()
        return drawn


def _file_name(title: str, taken: Sequence[str]) -> str:
    """A name for a picture, of harmless signs alone: what a record calls things cannot lead out of the folder."""
    stem = re.sub(r"_\+_|[^\w.-]+", "_", title.replace(", ", "-").replace(" ", "_")).lstrip(".-")[:100]
    names = (f"{stem}{'' if number == 1 else f'-{number}'}.png" for number in itertools.count(1))
    return next(name for name in names if name.lower() not in {other.lower() for other in taken})


def _compared(record: Record) -> list[Result]:
    return [r for r in record.results if r.ratio and r.interval and r.along is None]


def _ended(result: Result) -> str:
    """How a comparison ended, in one of three words."""
    if result.verdict == "no difference":
        return result.verdict
    return "faster" if result.ratio and result.ratio > 1 else "slower"


def _summary(record: Record) -> dict[str, int]:
    """How the comparisons with peers ended."""
    counts = {"faster": 0, "no difference": 0, "slower": 0}
    for result in record.results:
        if result.ratio is not None and result.along is None:
            counts[_ended(result)] += 1
    return counts


def _bars(record: Record) -> dict[str, dict[str, list[Result]]]:
    """The comparisons, by primitive and case: a bar each."""
    bars: dict[str, dict[str, list[Result]]] = {}
    for result in _compared(record):
        case = result.case if result.dtype == "float32" else f"{result.case}, {result.dtype}"
        bars.setdefault(result.primitive, {}).setdefault(case, []).append(result)
    return bars


@dataclass(frozen=True)
class _Scale:
    """A logarithmic axis of ratios between two powers of two, in percent of its width."""

    lowest: int
    highest: int

    def at(self, ratio: float) -> float:
        place = (math.log2(ratio) - self.lowest) / (self.highest - self.lowest)
        return round(100 * min(max(place, 0.0), 1.0), 2)

    def ticks(self) -> list[tuple[str, float]]:
        every = 1 if self.highest - self.lowest <= 4 else 2
        powers = [p for p in range(self.lowest, self.highest + 1) if p % every == 0]  # 1 among them
        return [(f"{2.0**p:g}x", self.at(2.0**p)) for p in powers]


def _scale(record: Record) -> _Scale:
    ratios = [1.0, *(r.ratio for r in _compared(record) if r.ratio)]
    return _Scale(min(-1, math.floor(math.log2(min(ratios)))), max(1, math.ceil(math.log2(max(ratios)))))


def _words(value: Any) -> str:
    """What a record says of the machine, as words."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_words(x)}" for name, x in value.items()) or "torch's"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not known" if value is None else str(value)
