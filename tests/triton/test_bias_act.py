"""The Triton kernels of bias_act against plain PyTorch in fp64."""

import pytest
import torch

import gankern.functional as GF
from gankern.triton import bias_act as bias_act_kernel

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def values(*shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


@pytest.mark.parametrize("options", [{"gain": -1.5, "clamp": 0.5, "negative_slope": -0.3}, {"gain": 1.5, "clamp": 0.4}])
@pytest.mark.parametrize("activation", GF.ACTIVATIONS)
def test_options(activation, options, device):
    x, bias, g = (values(*s, device=device, seed=i) for i, s in enumerate([(2, 3, 5), (3,), (2, 3, 5)]))
    x.requires_grad_()
    y, right = (
        GF.bias_act(x, bias, activation=activation, implementation=i, **options) for i in ("triton", "reference")
    )
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(right, x, g))


def test_in_place(device):
    x = values(3, 4, device=device)
    right = torch.nn.functional.leaky_relu(x, 0.3)
    assert GF.leaky_relu(x, 0.3, True, implementation="triton") is x
    torch.testing.assert_close(x, right)


def test_nothing(device):
    x, bias = values(0, 3, 2, device=device).requires_grad_(), values(3, device=device).requires_grad_()
    y = GF.bias_act(x, bias, implementation="triton")
    dx, db = torch.autograd.grad(y.sum(), (x, bias))
    assert dx.shape == x.shape and torch.equal(db, torch.zeros_like(db))


@pytest.mark.parametrize("variant", bias_act_kernel.BLOCKS.variants[:2], ids=str)
@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((2, 3, 2048), False),
        ((3, 4, 5, 7), True),
        ((2, 5, 3, 4), True),
        ((300, 8), False),
        ((7, 5, 4, 16), False),
        ((37, 31, 2, 2), False),
        ((2, 3, 33), False),
    ],
    ids=["a channel a block", "all in turn", "five in turn", "rows", "whole channels", "tiny channels", "neither"],
)
def test_bias_gradient_of_the_same_pass(shape, last, activation, variant, device):
    """Where a block is of one channel, of several whole ones, of all in turn, or of none of these; the last block is not
    full."""
    x, h = (values(*shape, device=device, seed=i) for i in (0, 2))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    bias = values(shape[1], device=device, seed=1)
    results = []
    for implementation in ("triton", "reference"):
        leaves = x.detach().requires_grad_(), bias.detach().requires_grad_()
        with bias_act_kernel.BLOCKS.use(variant):
            y = GF.bias_act(*leaves, activation=activation, gain=1.5, clamp=2.0, implementation=implementation)
            first = torch.autograd.grad(y, leaves, h, create_graph=True)
            second = torch.autograd.grad(first[0].mul(h).sum() + first[1].square().sum(), leaves, allow_unused=True)
        results.append([*first, *(s for s in second if s is not None)])
    torch.testing.assert_close(*results)
