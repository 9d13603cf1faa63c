"""What every benchmark file shares: one pytest-benchmark group a case and mode, its contenders side by side.

    python -m pytest benchmarks --benchmark-only

pytest-benchmark times one contender after the other. For ratios, use `gankern bench`, which interleaves them.
"""

import pytest
import torch

from gankern import keep_freed_memory
from gankern.measure import benchmark
from gankern.measure import steps as training_steps
from gankern.measure.cases import all_cases

keep_freed_memory()
device = "cuda" if torch.cuda.is_available() else "cpu"


def parameters():
    """(case, mode, contender's name) of all benchmarked cases of all primitives."""
    return [
        pytest.param(case, mode, name, id=f"{case.primitive}-{case.name}-{mode}-{name}")
        for case in all_cases()
        if case.bench
        for mode in benchmark.MODES
        for name in benchmark.candidates_of(case, mode, compiled=True)
    ]


def steps():
    """(training step, variant) of all models."""
    return [
        pytest.param(step, variant, id=f"{step.model}-{step.name}-{variant}")
        for step in training_steps.STEPS
        for variant in training_steps.variants_of(True, device)
    ]


def run_step(timer, step, variant):
    """Times one variant of a training step."""
    timer.group = step.name
    timer.pedantic(training_steps.make_step(step, variant, device), rounds=5, warmup_rounds=1)


def run(timer, case, mode, name):
    """Times one contender with pytest-benchmark's fixture ``timer``."""
    timer.group = f"{case.name}, {mode}"
    step = benchmark.step_of(benchmark.candidates_of(case, mode, True)[name], case, torch.float32, device, mode)
    timer.pedantic(step, rounds=20, warmup_rounds=3)
