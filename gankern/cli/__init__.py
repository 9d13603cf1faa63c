"""The command ``gankern``."""

import typer

from gankern.cli.accelerate import accelerate
from gankern.cli.bench import bench
from gankern.cli.checkerboard import checkerboard
from gankern.cli.info import info
from gankern.cli.report import report
from gankern.cli.sample import sample
from gankern.cli.train import train
from gankern.cli.verify import verify

app = typer.Typer(
    help="Compiled kernels for the primitives of generative adversarial networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (info, verify, bench, report, train, sample, checkerboard, accelerate):
    app.command()(command)


def main() -> None:
    app()
