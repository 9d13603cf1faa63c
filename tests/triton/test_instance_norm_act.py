"""The Triton kernels of instance normalisation with an activation against torch's own: those of batch normalisation
(test_batch_norm_act.py), with each sample's channels as channels of their own."""

import functools

import pytest
import torch
import torch.nn.functional as F
from common import every_order
from torch.autograd import grad

import gankern
import gankern.functional as GF

# NumPy's, about the interpreter: loops whose bound is known at run time.

# A block is 1024 values of a channel, or 32 rows of 32 channels, which may be of two samples.
SHAPES = [(3, 5, 6), (2, 40, 3, 5), (3, 2, 30, 40), (2, 3, 2, 3, 4), (1, 1, 130, 140)]


def random(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype).to(device)


def torchs(x, weight, bias, slope):
    y = F.instance_norm(x)
    if weight is not None:
        over = (...,) + (None,) * (x.ndim - 2)
        y = y * weight[over] + bias[over]
    return (y if slope == 1 else y.relu() if slope == 0 else F.leaky_relu(y, slope)).to(x.dtype)


def triton(x, weight, bias, slope):
    activation = {1.0: None, 0.0: "relu"}.get(slope, "leaky_relu")
    return GF.instance_norm_act(
        x, None, None, weight, bias, activation=activation, negative_slope=slope, implementation="triton"
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_order_and_layout(shape, device):
    for size, slope in ((None, 1.0), (shape[1:2], 0.2), (shape[:2], 0.0)):
        weight, bias = (None if size is None else random(*size, device=device, seed=s) for s in (10, 11))
        x = random(*shape, device=device)
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        # Where a channel's values are neighbours, many channels are the same program many times.
        for values in (x, last) if shape[1] < 32 else (last,):
            mine, right = (
                every_order(functools.partial(f, slope=slope), (values, weight, bias)) for f in (triton, torchs)
            )
            assert gankern.last_implementation("instance_norm_act") == "triton"
            assert mine[0].stride() == values.stride()
            for a, b in zip(mine, right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype, device):
    x, weight, bias = random(2, 5, 7, 9, dtype=dtype, device=device), random(5, seed=1), random(5, seed=2)
    weight, bias = weight.float().to(device), bias.float().to(device)
    right = torchs(x.double(), weight.double(), bias.double(), 0.2)
    error = (triton(x, weight, bias, 0.2).double() - right).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * right.abs().max()


def test_strides_empty_batches_and_missing_gradients(device):
    x = random(3, 8, 5, 6, device=device)
    for values in (x[:, ::2, :, ::2], x.permute(2, 1, 0, 3)):
        torch.testing.assert_close(triton(values, None, None, 0.2), torchs(values, None, None, 0.2))
    weight = torch.ones(3, dtype=x.dtype, device=device, requires_grad=True)
    y = triton(x[:0, :3].requires_grad_(), weight, None, 0.2)
    assert y.shape == (0, 3, 5, 6) and not grad(y.sum(), weight)[0].any()
    # Of the weight's gradient alone: what it is differentiated by has no part of x's.
    x = random(2, 3, 4, 4, device=device).requires_grad_()
    (first,) = grad(triton(x, weight, None, 0.0).square().sum(), weight, create_graph=True)
    (right,) = grad(torchs(x, weight, torch.zeros_like(weight), 0.0).square().sum(), weight, create_graph=True)
    torch.testing.assert_close(grad(first.sum(), x), grad(right.sum(), x))
