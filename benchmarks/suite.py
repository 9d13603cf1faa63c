"""What every benchmark file shares: one pytest-benchmark group a case and mode, its contenders side by side.

    python -m pytest benchmarks --benchmark-only

pytest-benchmark times one contender after the other. For ratios, use `gankern bench`, which interleaves them.
"""

import pytest
import torch

from gankern import benchmark, keep_freed_memory
from gankern.cases import all_cases

keep_freed_memory()


def parameters(primitive):
    """(case, mode, contender's name) of all benchmarked cases of a primitive."""
    return [
        pytest.param(case, mode, name, id=f"{case.name}-{mode}-{name}")
        for case in all_cases()
        if case.bench and case.primitive == primitive
        for mode in benchmark.MODES
        for name in benchmark.candidates_of(case, mode, compiled=True)
    ]


def run(timer, case, mode, name):
    """Times one contender with pytest-benchmark's fixture ``timer``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    timer.group = f"{case.name}, {mode}"
    step = benchmark.step_of(benchmark.candidates_of(case, mode, True)[name], case, torch.float32, device, mode)
    timer.pedantic(step, rounds=20, warmup_rounds=3)
