"""How a command says that it cannot do what was asked: one line, no traceback, a non-zero exit code."""

from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from gankern.core.files import UnusableFile

FAILED, WRONGLY_CALLED = 1, 2


def fail(error: Exception | str) -> NoReturn:
    """Exits with 2 where an argument is to blame (a ValueError or TypeError, as in the whole library), else with 1."""
    wrongly_called = isinstance(error, ValueError | TypeError) and not isinstance(error, UnusableFile)
    said = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:  # without its number
        said = f"{error.filename}: {error.strerror}"
    line = Text.assemble(("Error: ", "bold red"), said)
    Console(stderr=True).print(line, soft_wrap=True)
    raise typer.Exit(WRONGLY_CALLED if wrongly_called else FAILED)
