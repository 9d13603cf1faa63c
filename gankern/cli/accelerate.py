"""gankern accelerate: what would become faster in a model, by how much, and that its numbers stay."""

import ast
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import gankern
from gankern.cli import _target
from gankern.cli._choose import JSON, check_output, console_beside, write_results
from gankern.cli._fail import fail
from gankern.core import memory
from gankern.core.arguments import seed as check_seed
from gankern.core.dispatch import check_environment


def accelerate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_PACKAGE:NAME",
            help="a torch.nn.Module, or a class or function that makes one without arguments",
            show_default=False,
        ),
    ],
    input: Annotated[
        list[str] | None,
        typer.Option(
            help="an argument of its forward, repeat for several: 8,3,32,32 for normal numbers of that shape, 8:10 for "
            "8 integers from 0 to 9 (labels), =0.7 for a Python value",
        ),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="a submodule, as in gankern.accelerate; repeat")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="a submodule that is left as it is; repeat")] = None,
    fast_double_backward: Annotated[bool, typer.Option(help="as in gankern.accelerate")] = True,
    json: Annotated[Path | None, JSON] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads", show_default="torch's")] = None,
    seed: Annotated[int, typer.Option(help="decides weights and inputs")] = 0,
) -> None:
    """Report what gankern.accelerate replaces in a model, and what it leaves and why.

    With --input, results, gradients and the gradients of a gradient penalty are compared with those of before, and
    forward, backward and double backward are timed before and after. Exits with 1 where a result differs.
    """
    try:
        check_environment()
        check_output("--json", json)
        torch.manual_seed(check_seed("--seed", seed))
        if threads:
            torch.set_num_threads(threads)
        inputs = [_input(text) for text in input or ()]
        model = _target.make(target)
        if inputs:
            memory.keep_freed_memory()
            _try(model, inputs)
        report = gankern.accelerate(
            model,
            only=only,
            exclude=exclude,
            fast_double_backward=fast_double_backward,
            verify=tuple(inputs) if inputs else None,
        )
        write_results(json, report.to_dict())
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        fail(error)
    console = console_beside(json)
    console.print(report)
    if not inputs:
        console.print("Nothing was measured: give --input, such as --input 8,3,32,32.", soft_wrap=True)


def _input(text: str) -> Any:
    try:
        if text.startswith("="):
            return ast.literal_eval(text[1:])
        shape, colon, classes = text.partition(":")
        size = [int(n) for n in shape.split(",")]
        if min(size) < 0 or (colon and int(classes) < 1):
            raise ValueError
        return torch.randint(int(classes), size) if colon else torch.randn(size)
    except (ValueError, SyntaxError):
        raise ValueError(
            f"--input is {text!r}; it must be a shape such as 8,3,32,32, labels such as 8:10 (8 integers below 10), or "
            f"=VALUE"
        ) from None


def _try(model: nn.Module, inputs: list[Any]) -> None:
    """The model's own complaints about these inputs, said to be that."""
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:  # somebody else's code: anything may come
        given = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in inputs)
        raise ValueError(
            f"{type(model).__name__} cannot be called with inputs of shape {given}: "
            f"{str(error).strip().partition(chr(10))[0] or type(error).__name__}"
        ) from error
