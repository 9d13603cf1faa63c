"""Whether gankern.accelerate makes anything slower: small models, where a few microseconds a layer would show.

    python benchmarks/accelerate_never_slower.py [--seconds 1.0] [--only PART_OF_A_NAME] [--record FILE] [--cpu-time]

The patterns of tests/acceleration, the models from PyPI there, and the library's own models with stock torch layers,
tiny and of ordinary size. Each is built twice; one of the two is accelerated. A forward without gradients, a forward
and backward, for critics the step on a gradient penalty, and for patterns and models from PyPI a whole step (the
repository's loss and penalty, Adam) take turns with the original's in one process, after a few that neither counts.
A ratio is the median over the rounds of the original's time by the accelerated one's: below 1 is slower. On a machine
that does other work too, ``--cpu-time`` with ``--threads 1`` counts what the process itself computes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gankern
from gankern.core.files import write_json
from gankern.models import build

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "acceleration"))
import patterns
import pypi_models
from harness import Case
from test_chains import BIAS_ACT, STDDEV, bias, body

Make = Callable[[], nn.Module]
Inputs = tuple[Any, ...]


def models() -> Iterator[tuple[str, Make, Inputs, Case | None]]:
    for kind, cases in (("pattern", patterns.CASES), ("PyPI", pypi_models.cases())):
        for case in cases.values():
            try:
                case.new()
            except pypi_models.NotAvailable as reason:
                print(reason, file=sys.stderr)
                continue
            yield f"{kind}: {case.name}", case.new, case.inputs(), case
    for name, inline, channels in (
        ("deviation of the minibatch", STDDEV["rosinality's"], 9),
        ("bias, activation and factor", BIAS_ACT["a function in a layer"], 8),
    ):
        for count, size in ((4, 8), (16, 64)):
            net = body(inline, channels, bias=bias(8), act=nn.LeakyReLU(0.1))
            x = torch.randn(count, 3, size, size)
            yield f"chain: {name}, {count} samples of {size}", lambda net=net: copy.deepcopy(net), (x,), None
    for name, make, x in ours():
        yield name, make, x, None


def ours() -> Iterator[tuple[str, Make, Inputs]]:
    tiny = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
    yield "tiny: two convolutions of 4 channels", lambda: copy.deepcopy(tiny), (torch.randn(1, 1, 8, 8),)
    dense = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    yield "tiny: two dense layers", lambda: copy.deepcopy(dense), (torch.randn(16, 2),)
    for name, size, width, count in (
        *(("dcgan", 32, 8, 4), ("dcgan", 64, 64, 8), ("sn_dcgan", 32, 8, 4), ("sn_dcgan", 32, 64, 16)),
        *(("wgan_gp", 32, 8, 4), ("wgan_gp", 32, 64, 8), ("sngan", 32, 8, 4), ("sngan", 32, 64, 8)),
    ):
        for part in ("discriminator", "generator"):
            gan = build(name, size=size, channels=3, width=width, layers="torch")
            x = torch.randn(count, 3, size, size) if part == "discriminator" else torch.randn(count, gan.latent)
            yield f"{name} {part}, width {width}", lambda gan=gan, part=part: copy.deepcopy(getattr(gan, part)), (x,)


def _outputs(module: nn.Module, inputs: Inputs) -> Tensor:
    y = module(*inputs)
    return y["score"] if isinstance(y, dict) else y[0] if isinstance(y, (tuple, list)) else y


def forward(module: nn.Module, inputs: Inputs) -> None:
    with torch.no_grad():
        module(*inputs)


def training(module: nn.Module, inputs: Inputs) -> None:
    module.zero_grad()
    _outputs(module, inputs).sum().backward()


def penalised(module: nn.Module, inputs: Inputs) -> None:
    module.zero_grad()
    x = inputs[0].detach().requires_grad_()
    (grad,) = torch.autograd.grad(_outputs(module, (x, *inputs[1:])).sum(), x, create_graph=True)
    (grad.flatten(1).norm(dim=1) - 1).square().mean().backward()


PASSES = {"forward": forward, "forward + backward": training, "penalty": penalised}


def whole_step(case: Case) -> Callable[[nn.Module, Inputs], None]:
    optimisers: dict[int, torch.optim.Optimizer] = {}

    def step(module: nn.Module, inputs: Inputs) -> None:
        optimiser = optimisers.setdefault(id(module), torch.optim.Adam(module.parameters(), 1e-4))
        optimiser.zero_grad()
        loss = case.loss(module, inputs)
        (loss if case.penalty is None else loss + case.penalty(module, inputs)).backward()
        optimiser.step()

    return step


def measure(make: Make, inputs: Inputs, step: Any, seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    before, after = make(), make()
    gankern.accelerate(after)
    if step is not forward:
        training(before, inputs), training(after, inputs)
    steps = [lambda m=module: step(m, inputs) for module in (before, after)]
    # The order changes in every round, so that neither always comes second.
    first, second = [], []
    for _ in range(8):
        steps[0](), steps[1]()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(first) < 7:
        for which in (0, 1) if len(first) % 2 else (1, 0):
            begin = clock()
            steps[which]()
            (first, second)[which].append(clock() - begin)
    ratio = statistics.median(a / b for a, b in zip(first, second))
    return {"before": 1e3 * statistics.median(first), "after": 1e3 * statistics.median(second), "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="a pass of a model")
    parser.add_argument("--only", default="", help="a part of the model's name")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, not of the clock on the wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", type=Path, help="JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gankern.keep_freed_memory()
    torch.manual_seed(0)
    results = []
    clock = time.process_time if options.cpu_time else time.perf_counter
    for name, make, inputs, case in models():
        if options.only not in name:
            continue
        for label, step in (PASSES if case is None else PASSES | {"whole step": whole_step(case)}).items():
            try:
                step(make(), inputs)
            except (RuntimeError, TypeError):  # no penalty for a generator of labels, for instance
                continue
            results.append({"model": name, "pass": label} | measure(make, inputs, step, options.seconds, clock))
    table = Table("model", "pass", "before", "after", "faster", title="Milliseconds; slowest first")
    for r in sorted(results, key=lambda r: r["ratio"]):
        table.add_row(r["model"], r["pass"], f"{r['before']:.3f}", f"{r['after']:.3f}", f"{r['ratio']:.3f}x")
    Console(width=140).print(table)
    if options.record:
        write_json(options.record, {"results": results})


if __name__ == "__main__":
    main()
