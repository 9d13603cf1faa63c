"""Draws cases of a family: ``python tests/fuzz/run.py FAMILY SEED`` runs one and says what is wrong with it.

Without a seed (or a family) it goes on through all seeds, for SECONDS of the environment (default 600), and prints a
line for each wrong case, which is the command that runs it again, and one of progress a minute.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

# What continuous integration runs of each family: a thousand in all.
CASES = {
    "primitives": 350, "penalties": 150, "accelerated": 100, "calls": 200, "threads": 50, "modules": 100, "files": 50,
}  # fmt: skip
FAMILIES = tuple(CASES)


def run(family: str, seed: int) -> str | None:
    """The line of a wrong case."""
    case = importlib.import_module(family).case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            problem = case(seed)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return None if problem is None else f"python tests/fuzz/run.py {family} {seed}  # {problem}"


def main(arguments: list[str]) -> int:
    families = (arguments[0],) if arguments else FAMILIES
    if len(arguments) > 1:
        line = run(arguments[0], int(arguments[1]))
        print(line or "right")
        return bool(line)
    torch.set_num_threads(1)
    start = told = time.monotonic()
    seconds = float(os.environ.get("SECONDS", "600"))
    seed = first = int(os.environ.get("FIRST", "0"))
    wrong: Counter[str] = Counter()
    while time.monotonic() - start < seconds:
        for family in families:
            line = run(family, seed)
            if line:
                wrong[family] += 1
                print(line, flush=True)
        seed += 1
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{seed - first} cases of each of {', '.join(families)}; wrong: {dict(wrong)}", flush=True)
    print(f"{seed - first} cases of each of {', '.join(families)}; wrong: {dict(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
