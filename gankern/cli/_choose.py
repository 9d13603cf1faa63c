"""Options that several commands share, and their checks."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

import gankern.functional  # noqa: F401 (declares the primitives)
from gankern.core.dispatch import Primitive, check_environment
from gankern.core.files import check_can_write, write_json
from gankern.core.names import look_up
from gankern.models.layers import LAYERS

DEVICES = ("cpu", "cuda")


def choice(names: Iterable[str], help: str, *declarations: str, **more: Any) -> Any:
    """An option that is one of some names: the help has them, and the shell completes them.

    That it is one of them is checked where the names are at home, in one sentence with the nearest ones.
    """
    if names := tuple(names):
        more = {"autocompletion": completing(names)} | more
        if "metavar" not in more and sum(map(len, names)) <= 14:
            more["metavar"] = "|".join(names)
        elif "metavar" not in more:
            more["metavar"], help = "NAME", f"{help}: {', '.join(names)}"
    return typer.Option(*declarations, help=help, **more)


def completing(names: Iterable[str]) -> Callable[[str], list[str]]:
    """What the shell asks for completions."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


PRIMITIVES = choice(Primitive.registry, "a primitive; repeat for several", metavar="NAME", show_default="all")


# One meaning for all commands.
JSON = typer.Option(
    "--json", metavar="FILE", help="write the results as JSON; with - to the terminal, and tables to the error stream"
)
SIDE = choice(LAYERS, "which side of a comparison", show_default="the last of those there are")
TERMINAL = Path("-")


def console_beside(json_file: Path | None) -> Console:
    """Where tables go: the terminal, unless that gets the JSON."""
    return Console(stderr=json_file == TERMINAL)


def write_results(json_file: Path | None, value: Any) -> None:
    """What --json asks for."""
    if json_file == TERMINAL:
        print(json.dumps(value, indent=1))
    elif json_file is not None:
        write_json(json_file, value)


def check_output(option: str, path: Path | None) -> None:
    """Raises a ValueError where a file could not be written: asked before what goes into it is worked for."""
    if path is None or (path == TERMINAL and option == "--json"):
        return
    try:
        check_can_write(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written: {error.strerror}") from error


def check_run(names: Sequence[str] | None, device: str, json_file: Path | None) -> None:
    """Raises a ValueError where these primitives could not run on that device, or the results not be written."""
    check_environment()
    for name in names or ():
        look_up(Primitive.registry, name, "primitive")
    check_output("--json", json_file)
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; there are: {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch finds no CUDA or ROCm device")
