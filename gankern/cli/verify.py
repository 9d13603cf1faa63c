"""gankern verify: is every kernel right on this machine?"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from gankern.cli._choose import DEVICES, JSON, PRIMITIVES, check_run, choice, console_beside, write_results
from gankern.cli._fail import fail
from gankern.measure import verification
from gankern.measure.benchmark import environment
from gankern.measure.cases import all_cases


def verify(
    op: Annotated[list[str] | None, PRIMITIVES] = None,
    device: Annotated[str, choice(DEVICES, "where it runs")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="fewer shapes, fp32 and bf16 only")] = False,
    json_file: Annotated[Path | None, JSON] = None,
) -> None:
    """Hold each primitive x implementation x dtype x derivative against fp64, beside plain PyTorch's own error.

    Exits with 1 if a check fails.
    """
    try:
        check_run(op, device, json_file)
    except ValueError as error:
        fail(error)
    console = console_beside(json_file)
    checks = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("verifying", total=None)
        for check in verification.verify(op, device, quick):
            checks.append(check)
            progress.update(bar, advance=1, description=f"{check.primitive}, {check.implementation}, {check.dtype}")

    console.print("Largest error against fp64, over all shapes, relative to the largest value")
    for primitive in dict.fromkeys(check.primitive for check in checks):
        table = Table("ran", "dtype", "derivative", "error", "plain", "bound", "", title=primitive)
        groups: dict[tuple[str, ...], list[verification.Check]] = {}
        for check in checks:
            if check.primitive == primitive:
                groups.setdefault((check.implementation, check.dtype, check.mode), []).append(check)
        for key, members in groups.items():
            worst = max(members, key=lambda c: c.error / c.bound)
            figures = [f"{x:.1e}" for x in (worst.error, worst.plain_error, worst.bound)]
            passed = all(c.passed for c in members)
            table.add_row(*key, *figures, "[green]pass" if passed else f"[bold red]FAIL[/] {worst.case}")
        console.print(table)
    failed = sum(not c.passed for c in checks)
    write_results(json_file, {"environment": environment(), "checks": [asdict(c) for c in checks]})
    if not checks:
        known = ", ".join(sorted({c.primitive for c in all_cases()}))
        fail(f"nothing to verify: no implementation but the reference takes {device} tensors (primitives: {known}; "
             "`gankern info` says why)")  # fmt: skip
    console.print(f"{len(checks) - failed} of {len(checks)} checks passed")
    if failed:
        raise typer.Exit(1)
