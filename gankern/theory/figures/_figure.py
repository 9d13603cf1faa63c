"""How all figures look: lines told apart by their dashes and markers, bars by hatches, fields by their lightness."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gankern.core import extras

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib is imported when something is drawn

INK = ("#111111", "#0062a3", "#c14a00", "#7a7a7a", "#007a55", "#8b4a9c")
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "x")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")
FIELD = "cividis"  # dark to light without a break, in black and white too


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes: one, or an array [rows · columns]."""
    figure = extras.load("matplotlib.figure", "a figure").Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    return figure, axes.ravel() if rows * columns > 1 else axes


def line(index: int, marker: bool = False) -> dict[str, Any]:
    """How the line of that index is drawn."""
    look: dict[str, Any] = {"color": INK[index], "linestyle": DASHES[index]}
    return look | ({"marker": MARKERS[index], "markersize": 4} if marker else {})


def bar(index: int) -> dict[str, Any]:
    """How the bars of that index are filled."""
    greys = ("#444444", "#f2f2f2", "#bdbdbd", "#ffffff", "#8f8f8f", "#dddddd")
    return {"color": greys[index], "edgecolor": "black", "hatch": HATCHES[index], "linewidth": 0.8}


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "image.cmap": FIELD,
    "hatch.linewidth": 0.6,
}


def render(draw: Callable[[dict[str, Any]], Figure], found: dict[str, Any]) -> bytes:
    """The picture that ``draw`` makes, a PNG."""
    matplotlib = extras.load("matplotlib", "a figure")
    with matplotlib.rc_context(STYLE):
        buffer = io.BytesIO()
        draw(found).savefig(buffer, dpi=110, format="png", metadata={"Software": None})
    return buffer.getvalue()
