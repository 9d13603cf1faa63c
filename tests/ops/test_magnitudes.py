"""Norms of values far from 1: finite, and right, wherever plain torch is."""

import pytest
import torch
import torch.nn.functional as F
from common import iterated

import gankern.functional as GF
from gankern.core.native import NATIVE_MISSING

pytestmark = pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))

SINGLE = [1e30, 1e25, 1e20, 1.9e19, 1e15, 1e-9, 1e-12, 1e-15]
DOUBLE = [1e150, 1e30, 1e-30, 1e-150]


def weight_and_vectors(magnitude, dtype, shape=(6, 5, 3, 3)):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    m = w.flatten(1)
    u = F.normalize(m @ torch.randn(m.shape[1], generator=generator, dtype=torch.float64), dim=0)
    v = F.normalize(m.T @ u, dim=0)
    return (w * magnitude).to(dtype), u, v


def exact(weight, u, v, dialect, n, eps):
    """In double, where all of these fit."""
    rules = GF.SPECTRAL_NORM_DIALECTS[dialect]
    m = weight.double().flatten(1)

    def normalize(x):
        norm = (x / x.abs().max()).norm() * x.abs().max()
        return x / (norm + eps if rules.add_eps else norm.clamp_min(eps))

    u, v = iterated(m, u, v, rules, normalize, n)
    return u, v, u @ (m @ v)


@pytest.mark.parametrize("magnitude", SINGLE)
@pytest.mark.parametrize("dialect", GF.SPECTRAL_NORM_DIALECTS)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_spectral_norm_in_single(magnitude, dialect, n, transposed):
    weight, u, v = weight_and_vectors(magnitude, torch.float32)
    if transposed:
        weight = weight.flatten(1).t().contiguous().t()
    right_u, right_v, sigma = exact(weight, u, v, dialect, n, 1e-12)
    us, vs, kept = u.float(), v.float(), torch.zeros(())
    leaf = weight.clone().requires_grad_()
    y = GF.spectral_norm(
        leaf, us, vs, n_power_iterations=n, dialect=dialect, sigma=kept, implementation="cpu"
    )  # fmt: skip
    torch.testing.assert_close(us.double(), right_u, rtol=1e-4, atol=1e-5 * right_u.abs().max().item())
    torch.testing.assert_close(vs.double(), right_v, rtol=1e-4, atol=1e-5 * right_v.abs().max().item())
    torch.testing.assert_close(kept.double(), sigma, rtol=1e-4, atol=0)
    expected = weight.double() / sigma
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())

    # Its gradients, of both orders, by the closed form (whose u and v are what this forward ended with).
    g = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (grad,) = torch.autograd.grad(y, leaf, g, create_graph=True)
    uv = torch.outer(right_u, right_v).view(weight.shape)
    gd, wd = g.detach().double(), weight.double()
    right = gd / sigma - (gd * wd).sum() / sigma / sigma * uv
    if right.abs().max() > 1e-37:
        torch.testing.assert_close(grad.double(), right, rtol=1e-3, atol=1e-4 * right.abs().max().item())
    assert grad.isfinite().all()
    second = torch.autograd.grad(grad, g, torch.ones_like(grad))[0]
    ones = torch.ones_like(gd)
    right = ones / sigma - (ones * uv).sum() / sigma / sigma * wd
    torch.testing.assert_close(second.double(), right, rtol=1e-3, atol=1e-4 * right.abs().max().item())


@pytest.mark.parametrize("magnitude", DOUBLE)
def test_spectral_norm_in_double(magnitude):
    weight, u, v = weight_and_vectors(magnitude, torch.float64)
    right_u, right_v, sigma = exact(weight, u, v, "parametrization", 1, 1e-300)
    us, vs = u.clone(), v.clone()
    y = GF.spectral_norm(weight, us, vs, eps=1e-300, implementation="cpu")
    torch.testing.assert_close(us, right_u)
    torch.testing.assert_close(vs, right_v)
    torch.testing.assert_close(y, weight / sigma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e30, 1e20, 1e-18, 1e-30])
def test_spectral_norm_is_finite_where_torch_is(dtype, magnitude):
    """Zero and denormal norms included, as torch's parametrization leaves them."""
    weight, u, v = weight_and_vectors(magnitude, dtype)
    us, vs = u.float(), v.float()
    GF.spectral_norm(weight, us, vs, implementation="cpu")
    assert us.isfinite().all() and vs.isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e30, 1e20, 1.0, 1e-20, 1e-30])
def test_virtual_batch_norm_squares_in_double(magnitude, dtype, channels_last):
    x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)).mul(magnitude).to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    mean, square = GF.virtual_batch_norm_statistics(x, implementation="cpu")
    wide = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, wide.mean(1), rtol=1e-4, atol=1e-6 * magnitude)
    torch.testing.assert_close(square, wide.square().mean(1), rtol=1e-4, atol=0)
    if magnitude < 1:
        return
    y = GF.virtual_batch_norm(x, mean, square, 4, implementation="cpu")
    own = x.double().flatten(2)
    mu = own.mean(2) / 5 + mean * 4 / 5
    s = own.square().mean(2) / 5 + square * 4 / 5
    right = ((own - mu[..., None]) / (s - mu**2)[..., None].sqrt()).view(x.shape)
    torch.testing.assert_close(y.double(), right, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2 if dtype == torch.bfloat16 else 1e-4)  # fmt: skip


def test_virtual_batch_norm_of_values_whose_squares_no_dtype_has():
    x = torch.randn(4, 6, 5, 7, dtype=torch.float64) * 1e160
    mean, square = torch.zeros(6), torch.ones(6)
    y = GF.virtual_batch_norm(x, mean, square, 4, implementation="cpu")
    right = GF.virtual_batch_norm(x, mean, square, 4, implementation="reference")
    assert right.isfinite().all() and torch.equal(y.isfinite(), right.isfinite())


@pytest.mark.parametrize("magnitude", [1e30, 1e20, 1e-20, 1e-30])
def test_gradient_penalty_of_any_size(magnitude):
    g = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).mul(magnitude).requires_grad_()
    norms = g.detach().double().flatten(1).norm(dim=1)
    values = GF.gradient_penalty(g, implementation="cpu")
    torch.testing.assert_close(values, (norms - 1).square().float())
    (grad,) = torch.autograd.grad(values.sum(), g)
    right = (2 * (1 - 1 / norms)).view(-1, 1, 1) * g.detach().double()
    torch.testing.assert_close(grad.double(), right, rtol=1e-5, atol=0)
