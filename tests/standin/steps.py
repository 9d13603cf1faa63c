"""What whole steps of training cost the host, without a GPU: the table of docs/gpu.md.

    python -m tests.standin.steps [a step's name, or its beginning ...]

with the Python of an environment that tests/standin/device.py describes. Three contenders take the steps that `make gpu`
measures, without graphs: stock torch, the same after `gankern.accelerate`, and gankern, in fp32 and in bf16 with
channels_last. The time is the processor's, of all threads of the process on one core, with ten steps of each contender in
turn, so that each goes by code that the processor still knows, as in training; medians of 120. On a machine that does
something else meanwhile they are no figures to write down.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.standin import device

ROUNDS, IN_TURN = 12, 10


def milliseconds(contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median time of a step of each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, step in contenders.items():
            for _ in range(IN_TURN):
                begin = time.process_time()
                step()
                times[name].append(1e3 * (time.process_time() - begin))
    return {name: statistics.median(of_steps) for name, of_steps in times.items()}


def measured(step: Any, fast: bool) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds and launches of a step of each contender."""
    from gankern.measure import steps

    variants = steps.variants_of(steps.WHOLE_STEP, compiled=False)
    contenders = {name: steps.make_step(step, variant, "cuda", fast) for name, variant in variants.items()}
    launches = {}
    for name, run in contenders.items():
        for _ in range(5):
            before = device.launches()
            run()
            launches[name] = device.launches() - before
    with device.nothing_moves():
        return milliseconds(contenders), launches


def row(name: str, found: Sequence[tuple[dict[str, float], dict[str, int]]]) -> str:
    """Of the table, from what was measured in fp32 and in bf16."""
    from gankern.measure.benchmark import ACCELERATED, OURS

    def both(form: Callable[[dict[str, float]], str]) -> str:
        return " / ".join(form(times) for times, _ in found)

    (_, launches), _ = found
    cells = [
        name,
        both(lambda times: f"{times['torch']:.1f}") + " ms",
        both(lambda times: f"{times[OURS]:.1f}") + " ms",
        both(lambda times: f"{times['torch'] / times[OURS]:.2f}"),
        both(lambda times: f"{times['torch'] / times[ACCELERATED]:.2f}"),
        f"{launches['torch']:,}, {launches[OURS]:,}",
    ]
    return f"| {' | '.join(cells)} |"


def main(chosen: Sequence[str]) -> None:
    """Prints the table, a row as soon as it is measured."""
    sys.path.append(str(device.ROOT / "scripts"))
    import torch
    from gpu_stages.training import whole_steps

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    head = ("step, fp32 / bf16 with channels_last", "torch", "gankern", "torch's time over gankern's",
            "over that after `accelerate`", "launches in fp32")  # fmt: skip
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for step in whole_steps("cuda"):
        if not chosen or step.name.startswith(tuple(chosen)):
            print(row(step.name, [measured(step, fast) for fast in (False, True)]), flush=True)


if __name__ == "__main__":
    if not device.is_there():
        device.start("-m", "tests.standin.steps", *sys.argv[1:])
    main(sys.argv[1:])
