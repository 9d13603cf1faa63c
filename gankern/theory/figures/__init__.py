"""The figures of docs/theory.md: a file a figure, and their words in ``page.md``.

Each file has ``compute()``, the numbers by name and what else is drawn, and ``draw(found)``, the picture. The words
have ``{figure[number]:format}`` for every number: none is typed in.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from gankern.core.files import write_bytes
from gankern.theory.figures._figure import render

__all__ = ["ORDER", "computed", "page", "write"]

ORDER = (
    "optimal_discriminator",
    "divergences",
    "parallel_lines",
    "vanishing_gradients",
    "kl_directions",
    "min_max",
    "bilinear",
    "moving_plans",
    "value_surfaces",
    "weight_clipping",
    "lipschitz",
    "in_motion",
    "training_progress",
    "sharpness",
    "batch_statistics",
    "checkerboards",
    "painters",
    "mixtures",
)
_TEMPLATE = Path(__file__).with_name("page.md")


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


def computed() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what its ``compute`` found) of every figure, in the order of the page, when it is asked for."""
    for name in ORDER:
        yield name, _module(name).compute()


def page(found: dict[str, dict[str, Any]], template: str | None = None) -> str:
    """The page in Markdown (or another ``template``), its numbers from what the figures ``found``; a minus sign where a
    number has one."""
    text = (_TEMPLATE.read_text(encoding="utf-8") if template is None else template).format(**found)
    text = re.sub(r"(?<![^\s|(])-(?=\d)", "\N{MINUS SIGN}", re.sub(r"(?<=\d)%", " %", text))
    return "\n\n".join(map(_filled, text.rstrip("\n").split("\n\n"))) + "\n"


def _filled(paragraph: str) -> str:
    """A paragraph with its lines of one length again; headings, pictures and tables as they are."""
    if paragraph.lstrip().startswith(("#", "!", "|")):
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), 124, break_long_words=False, break_on_hyphens=False)


def write(folder: Path) -> Iterator[Path]:
    """Writes the pictures to ``folder``/theory one after the other, then ``folder``/theory.md; each one's path."""
    found = {}
    for name, numbers in computed():
        found[name] = numbers
        path = folder / "theory" / f"{name}.png"
        write_bytes(path, render(_module(name).draw, numbers))
        yield path
    path = folder / "theory.md"
    write_bytes(path, page(found).encode())
    yield path
