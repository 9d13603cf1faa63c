"""Triton's kernels on tensors that begin at no multiple of 16 bytes, which are compiled apart: run by test_kernels.py."""

import dataclasses
import os

import pytest
import torch
from common import small_cases

from gankern.measure import verification

pytestmark = pytest.mark.skipif(os.environ.get("GANKERN_PTX") != "1", reason="for what Triton compiles, emulated")
CASES = small_cases("triton")


def shifted(x):
    """The same values in the same strides, one element further on in memory; and so is the gradient."""
    if x.is_contiguous():
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return torch.cat([x.new_zeros(1), x.movedim(1, -1).flatten()])[1:].view(x.movedim(1, -1).shape).movedim(-1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.primitive} {c.name}")
def test_inputs_and_gradients_that_are_not_aligned(case, dtype):
    def make(dtype, device):
        return [shifted(x.detach()).requires_grad_(x.requires_grad) for x in case.make(dtype, device)]

    def run(implementation, inputs):
        outputs = case.run(implementation, inputs)
        return [*map(shifted, [outputs] if isinstance(outputs, torch.Tensor) else outputs)]

    moved = dataclasses.replace(case, make=make, run=run)
    assert all(check.error <= check.bound for check in verification.check(moved, "triton", dtype, "cpu"))
