"""The Triton kernels of group normalisation with an activation against torch's own: those of instance normalisation,
with statistics of several channels."""

import functools

import pytest
import torch
import torch.nn.functional as F
from common import every_order
from torch.autograd import grad

import gankern
import gankern.functional as GF

# A block is 1024 values of a channel, or 32 rows of 32 channels: of several groups and samples, or of a part of one.
SHAPES = [((3, 6, 7), 2), ((2, 40, 3, 5), 4), ((2, 40, 5), 1), ((3, 2, 30, 40), 1), ((2, 4, 2, 3, 4), 2), ((5, 6), 3)]


def random(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype).to(device)


def torchs(x, weight, bias, groups, slope):
    y = F.group_norm(x, groups)
    over = (...,) + (None,) * (x.ndim - 2)
    y = y if weight is None else y * weight[over] + bias[over]
    return (y if slope == 1 else y.relu() if slope == 0 else F.leaky_relu(y, slope)).to(x.dtype)


def triton(x, weight, bias, groups, slope):
    activation = {1.0: None, 0.0: "relu"}.get(slope, "leaky_relu")
    options = {"activation": activation, "negative_slope": slope, "implementation": "triton"}
    return GF.group_norm_act(x, groups, weight, bias, **options)


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_every_order_and_layout(shape, groups, device):
    for size, slope in ((None, 1.0), (shape[1:2], 0.2), (shape[:2], 0.0)):
        weight, bias = (None if size is None else random(*size, device=device, seed=s) for s in (10, 11))
        x = random(*shape, device=device)
        for values in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
            options = {"groups": groups, "slope": slope}
            mine, right = (
                every_order(functools.partial(f, **options), (values, weight, bias)) for f in (triton, torchs)
            )
            assert gankern.last_implementation("group_norm_act") == "triton"
            assert mine[0].stride() == values.stride()
            for a, b in zip(mine, right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("affine", [(6,), (2, 6)], ids=str)
def test_prelu(affine, samples, device):
    x, weight, bias = (random(*s, device=device, seed=n) for n, s in enumerate(((samples, 6, 5), affine, affine)))
    weight, bias = (v[:samples] if v.ndim == 2 else v for v in (weight, bias))
    slope = random(6, device=device, seed=3)

    def mine(x, w, b, a):
        return GF.group_norm_act(x, 3, w, b, activation="prelu", slope=a, implementation="triton")

    def right_one(x, w, b, a):
        return F.prelu(F.group_norm(x, 3) * w[..., None] + b[..., None], a)

    found = every_order(mine, (x, weight, bias, slope))
    right = every_order(right_one, (x, weight, bias, slope))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes(dtype, device):
    x, weight, bias = random(2, 6, 7, 9, dtype=dtype, device=device), random(6, seed=1), random(6, seed=2)
    weight, bias = weight.float().to(device), bias.float().to(device)
    right = torchs(x.double(), weight.double(), bias.double(), 3, 0.2)
    error = (triton(x, weight, bias, 3, 0.2).double() - right).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * right.abs().max()


def test_empty_batches(device):
    weight = torch.ones(4, dtype=torch.float64, device=device, requires_grad=True)
    y = triton(random(0, 4, 5, device=device).requires_grad_(), weight, torch.zeros_like(weight), 2, 0.2)
    assert y.shape == (0, 4, 5) and not grad(y.sum(), weight)[0].any()
