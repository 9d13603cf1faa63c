"""A first thousand cases of all families; ``make fuzz`` goes on from there."""

import pytest
import torch
from run import CASES, run

CHUNK = 50


@pytest.mark.parametrize(
    ("family", "first"), [(family, first) for family, cases in CASES.items() for first in range(0, cases, CHUNK)]
)
def test_cases(family, first):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lines = [run(family, seed) for seed in range(first, min(first + CHUNK, CASES[family]))]
    finally:
        torch.set_num_threads(threads)
    lines = [line for line in lines if line]
    assert not lines, "\n".join(lines)
