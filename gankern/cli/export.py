"""gankern export: a run's generator for programs without gankern."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gankern import training
from gankern.cli._choose import SIDE, check_output
from gankern.cli._fail import fail


def export(
    run: Annotated[Path, typer.Argument(help="a run's folder, or one of its checkpoints", show_default=False)],
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX, for any batch size")] = False,
    safetensors: Annotated[bool, typer.Option("--safetensors", help="the weights, under torch's names")] = False,
    torchscript: Annotated[bool, typer.Option("--torchscript", help="TorchScript, for torch.jit.load")] = False,
    out: Annotated[
        Path | None, typer.Option(help="the file to write", show_default="generator.onnx and the like, beside RUN's")
    ] = None,
    layers: Annotated[str | None, SIDE] = None,
    average: Annotated[bool, typer.Option(help="the moving average of the weights, where the run kept one")] = True,
) -> None:
    """Write the generator of a run as files that need no gankern, and compare what they give with it.

    What is written is the network on torch's own layers. Exits with 1, and writes nothing, where a file gives other
    images than the run's generator.
    """
    kinds = [name for name, wanted in locals().items() if wanted is True and name in training.EXPORTS]
    console = Console()
    try:
        if not kinds:
            raise ValueError(f"one of --{', --'.join(training.EXPORTS)} says what to write")
        if out is not None and len(kinds) > 1:
            raise ValueError(f"--out names one file, and {len(kinds)} are to be written: leave it out")
        check_output("--out", out)
        for kind in kinds:
            path, difference = training.export(run, kind, out, layers, average)
            told = f"{path}: {kind}, equal to the run's generator to {difference:.1e}"
            console.print(told, soft_wrap=True, markup=False)
    except (OSError, ValueError, ImportError, training.TrainingError) as error:
        fail(error)
