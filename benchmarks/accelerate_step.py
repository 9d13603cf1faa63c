"""What gankern.accelerate is worth for models that were not written here: a training step before and after.

    python benchmarks/accelerate_step.py [--only PART_OF_A_NAME] [--seconds 20] [--record FILE] [--quick]

A discriminator's step is its repository's own loss of a batch of real and one of made-up images, with the gradient
penalty of its repository where it has one, and Adam; a generator's is forward, backward and Adam. The model is built
twice with the same weights, and gankern.accelerate(model) is all that happens to one of them. The two steps take turns
in one process; a ratio is the median over the rounds. With --record, results are entered into that file, each in the
place of an earlier one of the same model. The table is that of all results in the record.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import gankern
from gankern.core.files import write_json
from gankern.measure import benchmark

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "acceleration"))
import patterns
import pypi_models
from harness import Case

STEP = "training step"


def step(case: Case, penalty: bool, accelerate: bool) -> Callable[[], Any]:
    model, batch = case.new(), case.inputs()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, (0.5, 0.999))
    if accelerate:
        gankern.accelerate(model)

    def run() -> None:
        optimizer.zero_grad()
        loss = case.loss(model, batch)
        if penalty:
            loss = loss + case.penalty(model, batch)
        loss.backward()
        optimizer.step()

    return run


def name_of(case: Case, batch: int, penalty: bool) -> str:
    return f"{case.name}, batch {batch}" + (", with penalty" if penalty else "")


def measure(case: Case, batch: int, penalty: bool, seconds: float) -> benchmark.Result:
    result = benchmark.Result("accelerate", name_of(case, batch, penalty), STEP, "float32", "cpu", "cpu")
    contenders = {
        benchmark.OURS: lambda: step(case, penalty, True),
        "the model as it is": lambda: step(case, penalty, False),
    }
    benchmark.contend(result, contenders, seconds)
    return result


def work(quick: bool) -> list[tuple[Case, int, bool]]:
    """(model, batch, whether with its penalty). The widths are the repositories' own."""
    if quick:
        return [(case, 4, case.penalty is not None) for case in (pypi_models.cases() | patterns.CASES).values()]
    listed = []
    for batch, names in ((64, ("sngan", "wgan_gp")), (16, ("dcgan", "sagan"))):
        made = pypi_models.cases(width=128, count=batch)
        for case in (made[f"mimicry {name}_32 discriminator"] for name in names):
            listed.append((case, batch, case.penalty is not None))
    for case in pypi_models.cases(width=256, count=8).values():
        if case.name.startswith("mimicry") and "generator" in case.name:
            listed.append((case, 8, False))
    for case in pypi_models.cases(width=64, count=32).values():
        if case.name.startswith("torchgan"):
            listed.append((case, 32, False))
            if case.penalty is not None:
                listed.append((case, 32, True))
    others = pypi_models.cases(width=64, count=8, progan_depth=5)
    listed.append((others["pytorch-pretrained-biggan generator"], 8, False))
    listed.append((others["pro-gan-pth discriminator"], 8, True))
    return listed


def table(results: list[dict[str, Any]]) -> Table:
    made = Table("model", "before", "after", "faster", "95 %", title="A training step, milliseconds")
    for result in results:
        ours, peer = result["contenders"][benchmark.OURS], result["contenders"][result["peer"]]
        low, high = result["interval"]
        ratio = f"{result['ratio']:.2f}x"
        made.add_row(
            result["case"], f"{peer['median']:.1f}", f"{ours['median']:.1f}", ratio, f"{low:.2f} to {high:.2f}"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a part of the model's name, as the table has it")
    parser.add_argument("--seconds", type=float, default=20.0, help="a model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", type=Path, help="JSON")
    parser.add_argument("--quick", action="store_true", help="small models, patterns too; figures mean little")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gankern.keep_freed_memory()
    console = Console(width=140)

    results: dict[str, dict[str, Any]] = {}
    if options.record and options.record.exists():
        results = {r["case"]: r for r in json.loads(options.record.read_text())["results"]}
    chosen = [w for w in work(options.quick) if options.only in name_of(*w)]
    if not chosen:
        listed = "; ".join(name_of(*w) for w in work(options.quick))
        raise SystemExit(f"no model's name has {options.only!r} in it; there are: {listed}")
    for case, batch, penalty in chosen:
        try:
            result = measure(case, batch, penalty, options.seconds)
        except pypi_models.NotAvailable as reason:
            console.print(f"{case.name}: {reason}")
            continue
        results[result.case] = benchmark.to_dict(result)
        if options.record:
            settings = {"freed_memory_kept": True, "seconds": options.seconds}
            record = {"environment": benchmark.environment(), "settings": settings, "results": list(results.values())}
            write_json(options.record, record)
    console.print(table(list(results.values())))


if __name__ == "__main__":
    main()
