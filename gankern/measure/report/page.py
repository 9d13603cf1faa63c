"""One self-contained page for any number of records, and its pictures as files."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, select_autoescape

from gankern.core.files import write_bytes
from gankern.measure.benchmark import MODES, OURS
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
        sections.append({"record": record, "pictures": shown, "summary": _summary(record)})
    page = folder / "report.html"
    html = _environment.get_template("page.html").render(sections=sections, OURS=OURS, modes=MODES)
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


def _summary(record: Record) -> dict[str, int]:
    """How the comparisons with peers ended."""
    counts = {"faster": 0, "no difference": 0, "slower": 0}
    for result in record.results:
        if result.ratio is not None and result.along is None:
            word = "no difference" if result.verdict == "no difference" else "faster" if result.ratio > 1 else "slower"
            counts[word] += 1
    return counts
