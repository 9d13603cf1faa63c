"""gankern info: what runs here, what does not, and why."""

import importlib.metadata
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import gankern.functional  # noqa: F401 (declares the primitives)
from gankern.cli._choose import TERMINAL, check_output, write_results
from gankern.cli._fail import fail
from gankern.core import memory
from gankern.core.dispatch import Primitive, check_environment
from gankern.core.native import CUDA_MISSING, NATIVE_MISSING, NODES_MISSING, nodes_library
from gankern.core.registry import TRITON_MISSING
from gankern.measure.benchmark import environment


def native() -> dict[str, Any] | str:
    """The facts of the native build, or why there is none."""
    if NATIVE_MISSING:
        return NATIVE_MISSING
    try:
        _C = import_module("gankern._C")
    except ImportError:  # the operators serve every Python, this module the one that it was built for
        return "loaded; its facts are for another Python"

    facts = ("instruction_sets", "compiler", "build_type", "torch_version")
    return {"instruction_set": _C.instruction_set(), **{name: getattr(_C, name) for name in facts}}


def autograd_nodes() -> str:
    """The library of the C++ autograd nodes, or why there are none and what to do."""
    return NODES_MISSING or nodes_library()


def triton() -> str:
    missing = TRITON_MISSING
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return missing or "not installed"
    return version + (f" ({missing})" if missing else "")


def advice() -> list[str]:
    """What would make CPU training faster on this machine."""
    lines = []
    if sys.platform == "linux" and "THP_MEM_ALLOC_ENABLE" not in memory.settings():
        lines.append("export THP_MEM_ALLOC_ENABLE=1: torch then asks for huge pages for large tensors")
    if sys.platform == "linux" and not {"MALLOC_MMAP_MAX_", "LD_PRELOAD"} & memory.settings().keys():
        lines.append("call gankern.keep_freed_memory() first: large results then reuse memory instead of page-faulting")
    return lines


def info(
    json_output: Annotated[
        bool, typer.Option("--json", help="write JSON instead of tables: to FILE, or to the terminal without one")
    ] = False,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="where --json writes", show_default=False)
    ] = None,
) -> None:
    """Versions, instruction set, which implementation of what is available and why not, and allocator advice."""
    try:
        check_environment()
        if file is not None and not json_output:
            raise ValueError(f"{file}: only --json writes to a file")
        check_output("--json", file)
    except ValueError as error:
        fail(error)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    available = {
        primitive.name: {
            d: {name: reason or "available" for name, reason in primitive.refusals(d, torch.float32).items()}
            for d in dict.fromkeys(("cpu", device))
        }
        for primitive in Primitive.registry.values()
    }
    facts: dict[str, Any] = {
        "environment": environment(),
        "native library": native(),
        "autograd nodes": autograd_nodes(),
        "triton": triton(),
        "cuda kernels": CUDA_MISSING or "loaded",
        "implementations": available,
        "advice": advice(),
    }
    if json_output:
        write_results(file or TERMINAL, facts)
        return
    console = Console()
    table = Table(title="gankern", show_header=False)
    rows = {name: facts[name] for name in ("native library", "autograd nodes", "triton", "cuda kernels")}
    for name, value in {**facts["environment"], **rows}.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, text)
    console.print(table)
    table = Table("primitive", "device", "implementation", "float32 tensors", title="Implementations, best first")
    for primitive, devices in available.items():
        for d, reasons in devices.items():
            for name, reason in reasons.items():
                table.add_row(primitive, d, name, reason)
    console.print(table)
    for line in facts["advice"]:
        console.print(f"[bold]advice[/bold] {line}")
