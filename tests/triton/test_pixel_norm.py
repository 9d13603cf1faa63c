"""The Triton kernels of pixel_norm against plain PyTorch in fp64."""

import pytest
import torch
from torch.autograd import gradgradcheck

import gankern.functional as GF

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def values(*shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


@pytest.mark.parametrize("shape", [(2, 3, 2), (3, 5), (2, 1, 3), (1, 300)], ids=str)
def test_pixel_norm(shape, device):
    x, bias = values(*shape, device=device), values(shape[1], device=device, seed=1)
    options = {"gain": -1.5, "eps": 1e-2}
    y, right = (GF.bias_act_pixel_norm(x, bias, implementation=i, **options) for i in ("triton", "reference"))
    torch.testing.assert_close(y, right)
    if x.numel() < 20:
        inputs = x.requires_grad_(), bias.requires_grad_()

        def function(x, bias):
            return GF.bias_act_pixel_norm(x, bias, implementation="triton", **options)

        assert gradgradcheck(function, inputs, fast_mode=True)


def test_nothing(device):
    x, bias = values(0, 3, 2, device=device).requires_grad_(), values(3, device=device).requires_grad_()
    y = GF.bias_act_pixel_norm(x, bias, implementation="triton")
    dx, db = torch.autograd.grad(y.sum(), (x, bias))
    assert dx.shape == x.shape and torch.equal(db, torch.zeros_like(db))
