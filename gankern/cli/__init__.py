"""The command ``gankern``.

A command's module, and torch with it, is imported when the command is called: the list of commands and their completion
need neither.
"""

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gankern import __version__

# Each is the function of that name in the module of that name.
COMMANDS = {
    "info": "What runs on this machine, what does not, and why.",
    "verify": "Is every kernel right here? Each is held against fp64, beside plain PyTorch.",
    "bench": "Is every kernel fast here? Each is timed against eager PyTorch and torch.compile.",
    "report": "Make a page out of measurements.",
    "accelerate": "What gankern.accelerate would make of a model, and by how much faster it is then.",
    "checkerboard": "Does a generator make checkerboards, and which of its layers does?",
    "train": "Train a GAN, on torch's layers, on gankern's, or on both side by side.",
    "sample": "Draw what a trained generator makes.",
    "evaluate": "FID, KID, precision, recall and other figures of a run or of a folder of pictures.",
    "edit": "Find an image among what a generator makes, and paint on it there.",
    "export": "Write a trained generator as ONNX, safetensors or TorchScript.",
    "theory": "The page of theory: every figure computed and drawn.",
    "play": "GANs in the plane, recorded while they train, as one HTML file.",
}
PANELS = {
    "This machine": ("info", "verify", "bench", "report"),
    "Your model": ("accelerate", "checkerboard"),
    "Training": ("train", "sample", "edit", "evaluate", "export"),
    "Teaching": ("theory", "play"),
}


class Commands(TyperGroup):
    """Puts a command in the place of its entry in the list when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if command is None or name is None:  # completion asks for what is not there yet
            return name, command, rest
        alone = typer.Typer(add_completion=False)
        alone.command(name)(getattr(import_module(f"gankern.cli.{name}"), name))
        return name, typer.main.get_command(alone), rest


app = typer.Typer(
    cls=Commands,
    help="Compiled kernels for the primitives of generative adversarial networks.",
    epilog="Exit codes: 0 done, 1 it failed or a check did not pass, 2 it was called wrongly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"gankern {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for panel, names in PANELS.items():
    for name in names:
        app.command(name, help=COMMANDS[name], rich_help_panel=panel)(lambda: None)


def main() -> None:
    app()
