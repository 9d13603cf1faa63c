"""Triton kernels against plain PyTorch in fp64, by the cases that `gankern verify` runs: of bias_act and pixel_norm, and
of every primitive that has no tests of its own here."""

from pathlib import Path

import pytest
import torch

from gankern.core.dispatch import FLOATING, Primitive
from gankern.measure import verification
from gankern.measure.cases import all_cases

HERE = Path(__file__).parent
CASES = [
    case
    for case in all_cases()
    if case.verify
    and any(i.name == "triton" for i in Primitive.registry[case.primitive].implementations)
    and (case.primitive in ("bias_act", "pixel_norm") or not (HERE / f"test_{case.primitive}.py").is_file())
]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.primitive} {c.name}")
def test_every_order(case, dtype, device):
    # The interpreter cuts bfloat16 off instead of rounding it: twice the error.
    slack = 2 if dtype == torch.bfloat16 and device.type == "cpu" else 1
    assert all(check.error <= slack * check.bound for check in verification.check(case, "triton", dtype, device.type))
