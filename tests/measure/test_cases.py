"""The cases' least work: what every ratio to a limit rests on."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gankern.measure.cases import all_cases
from gankern.measure.cases.convolution import KINDS

# The memory format changes nothing in what must be done.
CASES = [
    pytest.param(case, id=f"{case.primitive}: {case.name}")
    for case in all_cases()
    if case.bench and "last" not in case.name
]


def outputs_of(case, inputs):
    result = case.run(None, inputs)
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("case", CASES)
def test_least_bytes_hold_every_tensor_once(case):
    inputs = case.make(torch.float32, "cpu")
    work = case.work(inputs)
    with torch.no_grad():
        outputs = outputs_of(case, inputs)
    leaves = sum(x.nbytes for x in inputs if x.requires_grad)
    written = sum(y.nbytes for y in outputs)
    # Vectors of one number a channel are left out of the formulas.
    assert work["forward"].bytes >= 0.99 * (leaves + written)
    # The gradient comes in, the gradients of the leaves go out.
    assert work["backward"].bytes >= 0.99 * (leaves + written)
    # And no more than a few passes over them: a generous limit makes every kernel look good.
    for mode in ("forward", "backward"):
        assert work[mode].bytes <= 3.1 * (leaves + written)


@pytest.mark.parametrize("case", [p for p in CASES if p.values[0].primitive == "convolution"])
def test_least_products_of_convolutions(case):
    """The direct form's, as torch counts them, times the share that the table of rows leaves."""
    kind = next(k for k in sorted(KINDS, key=len, reverse=True) if case.name.startswith(k))
    share = {"upsample": 9 / 36, "downsample": 9 / 36, "3x3": 4 / 9}.get(kind, 9 / 16)
    inputs = case.make(torch.float32, "cpu")
    direct = next(iter(case.peers.values()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        direct(inputs)
    work = case.work(inputs)
    assert work["forward"].operations == pytest.approx(share * counter.get_total_flops() / 2)
    assert work["backward"].operations == 2 * work["forward"].operations


def test_every_primitive_has_cases_and_limits():
    for primitive in {case.primitive for case in all_cases()}:
        own = [case for case in all_cases() if case.primitive == primitive]
        assert any(case.verify for case in own) and any(case.bench and case.quick for case in own), primitive
        assert any(case.along for case in own), primitive
        timed = next(case for case in own if case.bench)
        assert {"forward", "backward"} <= timed.work(timed.make(torch.float32, "cpu")).keys()
