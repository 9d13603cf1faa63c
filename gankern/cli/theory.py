"""gankern theory: the page of theory with its pictures, every number computed."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gankern.cli._fail import fail
from gankern.core import extras


def theory(
    output: Annotated[Path, typer.Option(help="the folder for theory.md and theory/, its pictures")] = Path("theory"),
) -> None:
    """Compute, train and draw all figures of docs/theory.md, and write the page: about two minutes."""
    try:
        for package in ("matplotlib", "sklearn", "ot"):
            extras.load(package, "gankern theory", "train")
        from gankern.theory.figures import write

        for path in write(output):
            Console().print(str(path), soft_wrap=True, markup=False)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        fail(error)
