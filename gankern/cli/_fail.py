"""How a command says that it cannot do what was asked: one line, no traceback, a non-zero exit code."""

from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text


def fail(error: Exception | str, code: int = 1) -> NoReturn:
    line = Text.assemble(("Error: ", "bold red"), str(error))
    Console(stderr=True).print(line, soft_wrap=True)
    raise typer.Exit(code)
