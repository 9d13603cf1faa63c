"""gankern report: records of measurements as a page, pictures and README's table."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gankern.cli._fail import fail
from gankern.core import extras
from gankern.measure.report.record import load
from gankern.measure.report.tables import markdown_table, update_between_markers


def report(
    records: Annotated[list[Path], typer.Argument(help="files that `gankern bench --json` wrote", metavar="RECORD...")],
    out: Annotated[Path, typer.Option(help="the folder for report.html and its pictures")] = Path("report"),
    markdown: Annotated[
        Path | None, typer.Option(help="instead, put the table between the markers of this markdown file")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="in the table, of primitives only the cases that bench --quick has")
    ] = False,
) -> None:
    """Make one self-contained page (and PNG files) out of records: ratios, limits, roofline, memory, all numbers."""
    try:
        loaded = [load(path) for path in records]
        if markdown is not None:
            changed = update_between_markers(markdown, markdown_table(loaded, quick))
            Console().print(f"{markdown}: {'updated' if changed else 'was up to date'}", soft_wrap=True, markup=False)
            return
        for package in ("matplotlib", "jinja2"):
            extras.load(package, "gankern report", "report")
        from gankern.measure.report.page import write_report

        page, *pictures = write_report(loaded, out)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    Console().print(f"{page} and {len(pictures)} pictures", soft_wrap=True, markup=False)
