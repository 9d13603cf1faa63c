"""The Triton kernels of gradient penalties' pieces against plain PyTorch in fp64."""

import math

import pytest
import torch
from torch.autograd import grad

import gankern
import gankern.functional as GF

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# NumPy's, about the interpreter: loops whose bound is known at run time, and roots of NaN.

SHAPES = [(1, 1), (3, 5), (2, 3, 8, 8), (2, 2048), (1, 2049), (2, 20000), (5,), (0, 3), (3, 0)]


def values(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def results(implementation, g, target, one_sided):
    g = g.detach().requires_grad_()
    out = GF.gradient_penalty(g, target=target, one_sided=one_sided, implementation=implementation)
    # Values that all dtypes have.
    weights = values(*out.shape, dtype=torch.bfloat16, seed=1).to(out).requires_grad_()
    (first,) = grad(out, g, weights, create_graph=True)
    return [out, first, *grad(first, [weights, g], values(*g.shape, dtype=torch.bfloat16, seed=2).to(g))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("target", "one_sided"), [(1.0, False), (1.0, True), (0.0, False), (30.0, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_penalty(shape, target, one_sided, dtype, device):
    g = values(*shape, dtype=dtype, device=device)
    ours = results("triton", g, target, one_sided)
    assert gankern.last_implementation("gradient_penalty") == "triton"
    plain = results("reference", g, target, one_sided)
    exact = results("reference", g.double(), target, one_sided)
    accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * math.sqrt(max(g.numel(), 1))
    for mine, other, right in zip(ours, plain, exact):
        assert mine.shape == right.shape
        if not right.numel():
            continue
        scale = right.abs().max().item()
        floor = (2 * torch.finfo(mine.dtype).eps + accumulated) * scale + accumulated * target * (target + 1)
        plain_error = (other.double() - right).abs().max().item()
        assert (mine.double() - right).abs().max().item() <= 2 * plain_error + floor


def test_special_values(device):
    g = values(5, 70, dtype=torch.float32, device=device)
    g[0], g[1, 2], g[2, 3] = 0, float("nan"), float("inf")
    for target, one_sided in ((1.0, False), (1.0, True), (0.0, False)):
        out, first, to_weights, second = results("triton", g, target, one_sided)
        assert out[0] == (0 if one_sided else target**2) and not first[0].any() and to_weights[0] == 0
        assert second[0].isfinite().all() and (target == 0 or not second[0].any())
        assert out[1].isnan() and first[1, 2].isnan() and out[2].isinf()
        assert all(x[3:].isfinite().all() for x in (out, first, to_weights, second))


def test_any_strides(device):
    x = values(4, 3, 5, 6, device=device).to(memory_format=torch.channels_last)
    y = values(3, 6, 5, 4, device=device, seed=1).permute(3, 0, 2, 1)
    for a in (x, y, x[:, ::2], y[:, ::2]):
        for mine, right in zip(results("triton", a, 1.0, False), results("reference", a, 1.0, False)):
            torch.testing.assert_close(mine, right)
