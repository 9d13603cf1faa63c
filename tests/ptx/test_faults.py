"""Triton's kernels with faults, compiled and launched as those of the library: each is seen. Run by test_kernels.py."""

import os
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(os.environ.get("GANKERN_PTX") != "1", reason="for what Triton compiles, emulated")

if os.environ.get("GANKERN_PTX") == "1":
    import triton
    import triton.language as tl

    from gankern.triton.launch import launch

    Problem = sys.modules["emulator"].Problem

    @triton.jit
    def _copy(x, y, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < count if MASKED else i < count + BLOCK
        tl.store(y + i, tl.load(x + i, mask=inside), mask=inside)

    @triton.jit
    def _sum(x, y, BLOCK: tl.constexpr):
        total = tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0)
        tl.store(y, total)


def test_a_mask_that_is_missing():
    x, y = torch.randn(1000), torch.zeros(1000)
    launch(_copy, 4, x, y, 1000, MASKED=True, BLOCK=256, num_warps=4)
    assert torch.equal(x, y)
    with pytest.raises(Problem, match="memory: out of bounds: reads"):
        launch(_copy, 4, x, y, 1000, MASKED=False, BLOCK=256, num_warps=4)


def test_sums_of_several_programs_in_one_place():
    x, y = torch.randn(512), torch.zeros(1)
    launch(_sum, 1, x, y, BLOCK=512, num_warps=4)
    torch.testing.assert_close(y[0], x.sum())
    with pytest.raises(Problem, match="race: y"):
        launch(_sum, 2, x, y, BLOCK=256, num_warps=4)


def test_memory_that_nobody_wrote_is_nan():
    assert torch.empty(3).isnan().all()
