"""What gankern.accelerate takes of networks that were written elsewhere: operations before, and what runs after.

    python benchmarks/accelerate_pairs.py [--width 64] [--count 16] [--only PART_OF_A_NAME] [--record FILE]

The networks of tests/acceleration/pypi_models.py and the patterns of tests/acceleration/patterns.py. Of each, one
forward with data as inputs and one as a gradient penalty calls it, as the report of ``example_inputs=`` lists them:

- operations: the layers and functions that the original's forward runs, all by torch;
- joined: those of them that, accelerated, run in one with what follows;
- gankern: those that run by gankern, with what was joined to them or alone. All others are torch's;
- under a penalty: those that run by gankern or are joined where gradients of the inputs are differentiated;
- what ran: the implementations and, of convolutions, the ways of the forward and the two gradients.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import gankern
from gankern.core.files import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "acceleration"))
import patterns
import pypi_models
from harness import Case

JOINED, OURS = "in one with what follows", "gankern: "  # what the report says
COLUMNS = "operations", "joined", "gankern", "under a penalty"


def short(how: str) -> str:
    """Of a convolution each way once: "same (cpu: forward a, transpose a, weight b)" is "same (a, b)"."""
    ways = re.search(r"\(cpu: forward (\w+), transpose (\w+), weight (\w+)\)", how)
    return f"{how[: ways.start()]}({', '.join(dict.fromkeys(ways.groups()))})" if ways else how


def counted(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    report = gankern.accelerate(case.new(), example_inputs=case.inputs())
    counts, ran = Counter(dict.fromkeys(COLUMNS, 0)), Counter[str]()
    for call in report.calls:
        counts["operations"] += call.count
        counts["joined"] += call.count * (call.now == JOINED)
        if call.now.startswith(OURS):
            counts["gankern"] += call.count
            ran[short(call.now.removeprefix(OURS))] += call.count
        counts["under a penalty"] += call.count * (call.in_penalty or call.now).startswith((OURS, JOINED))
    return {"network": case.name, **counts, "what ran": dict(ran)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=64, help="channels of the models from PyPI")
    parser.add_argument("--count", type=int, default=16, help="samples for them")
    parser.add_argument("--only", default="", help="a part of the network's name")
    parser.add_argument("--record", type=Path, help="JSON")
    options = parser.parse_args()
    results = []
    for case in (*pypi_models.cases(options.width, options.count).values(), *patterns.CASES.values()):
        if options.only not in case.name:
            continue
        try:
            results.append(counted(case))
        except pypi_models.NotAvailable as reason:
            print(reason, file=sys.stderr)
    table = Table("network", *COLUMNS, "what ran")
    for r in results:
        ran = ", ".join(f"{n} {how}" if n > 1 else how for how, n in r["what ran"].items())
        table.add_row(r["network"], *(str(r[column]) for column in COLUMNS), ran)
    Console(width=200).print(table)
    if options.record:
        write_json(options.record, {"results": results})


if __name__ == "__main__":
    main()
