"""The Triton kernels of self-attention against plain PyTorch in fp64."""

import pytest
import torch

import gankern
import gankern.functional as GF
from gankern.measure import verification
from gankern.measure.cases import self_attention2d as cases

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|underflow|divide by zero) encountered:RuntimeWarning"),
]
CASES = [c for c in cases.CASES if c.verify]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_order(case, dtype, device):
    # The interpreter cuts bfloat16 off instead of rounding it: twice the error.
    slack = 2 if dtype == torch.bfloat16 and device.type == "cpu" else 1
    assert all(check.error <= slack * check.bound for check in verification.check(case, "triton", dtype, device.type))
    assert gankern.last_implementation("self_attention2d") is not None


def test_what_runs_and_nothing(device):
    x, *weights = (t.detach().to(device) for t in CASES[0].make(torch.float32, "cpu"))
    GF.self_attention2d(x, *weights, implementation="triton")
    assert gankern.last_implementation("self_attention2d") == "triton"
    inputs = [t.requires_grad_() for t in (x[:0], *weights)]
    y = GF.self_attention2d(*inputs, implementation="triton")
    assert y.shape == (0, *x.shape[1:])
    assert torch.equal(torch.autograd.grad(y.sum(), inputs[1])[0], torch.zeros_like(weights[0]))
