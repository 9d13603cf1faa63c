"""The Triton kernels of pixel_norm against plain PyTorch in fp64."""

import pytest
import torch
from torch.autograd import gradgradcheck

import gankern.functional as GF
from gankern.triton.launch import recorded
from gankern.triton.pixel_norm import BLOCKS

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 5, 7), (1, 520, 2, 9), (1, 2100, 1, 3)], ids=str)
def test_channels_that_are_held_and_that_are_not(shape, memory_format, dtype, device):
    """Whether a program has all channels of its pixels at once, or reads them twice: against fp64, in each order."""
    x = values(*shape, device=device).to(dtype).contiguous(memory_format=memory_format)
    leaves = x, values(shape[1], device=device, seed=1).to(dtype)
    cotangents = [values(*y.shape, device=device, seed=2 + k).to(dtype) for k, y in enumerate((x, *leaves))]

    def results(implementation, dtype):
        inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        g, *h = (y.to(dtype).requires_grad_() for y in cotangents)
        y = GF.bias_act_pixel_norm(*inputs, implementation=implementation)
        first = torch.autograd.grad(y, inputs, g, create_graph=True)
        return [y, *first, *torch.autograd.grad(first, [inputs[0], g], h)]

    right, plain = results("reference", torch.float64), results("reference", dtype)
    slack = 2 if dtype == torch.bfloat16 and device.type == "cpu" else 1  # the interpreter cuts bfloat16 off
    held = set()
    for variant in (BLOCKS.variants[0], next(v for v in BLOCKS.variants if not v["HELD"])):
        with BLOCKS.use(variant), recorded() as launches:
            GF.bias_act_pixel_norm(*leaves, implementation="triton")
        held.add(launches[0].constants["HELD"])
        with BLOCKS.use(variant):
            for ours, theirs, y in zip(results("triton", dtype), plain, right):
                error, allowed = ((z.double() - y).abs().max().item() for z in (ours, theirs))
                assert error <= slack * (2 * allowed + torch.finfo(dtype).eps * x[0].numel() ** 0.5 * y.abs().max())
    assert held == ({False} if shape[1] > 2048 else {True} if shape[1] == 70 and x.stride(1) == 1 else {True, False})


def test_nothing(device):
    x, bias = values(0, 3, 2, device=device).requires_grad_(), values(3, device=device).requires_grad_()
    y = GF.bias_act_pixel_norm(x, bias, implementation="triton")
    dx, db = torch.autograd.grad(y.sum(), (x, bias))
    assert dx.shape == x.shape and torch.equal(db, torch.zeros_like(db))
