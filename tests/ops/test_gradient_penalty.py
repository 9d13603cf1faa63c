"""The penalty of each sample's gradient norm."""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

import gankern
import gankern.functional as GF
from gankern.core import native
from gankern.ops.gradient_penalty import penalty_and_direction

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPILED = "reference" if native.NATIVE_MISSING else "cpu"
OPTIONS = [(1.0, False), (1.0, True), (0.0, False), (3.0, True), (750.0, False)]
SHAPES = [(1, 1), (3, 5), (4, 3, 8, 8), (2, 3, 70, 50), (1, 40000), (7,), (64, 2), (3, 0), (0, 4), (2, 8192), (2, 8193)]


def values(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def textbook(g, target, one_sided):
    """The definition in torch, with an infinite derivative at 0."""
    norms = g.flatten(1).norm(dim=1) if g.ndim > 1 else g.abs()
    excess = norms - target
    return (excess.clamp_min(0) if one_sided else excess).square()


def results(function, g, target, one_sided):
    """Penalties, gradient, and the gradients of that: of the incoming gradient and of g."""
    g = g.detach().requires_grad_()
    out = function(g, target, one_sided)
    weights = values(*out.shape, dtype=torch.bfloat16, seed=1).to(out.dtype).requires_grad_()
    (first,) = grad(out, g, weights, create_graph=True)
    second = grad(first, [weights, g], values(*g.shape, dtype=torch.bfloat16, seed=2).to(g.dtype))
    return [out, first, *second]


def ours(g, target, one_sided, implementation=None):
    return GF.gradient_penalty(g, target=target, one_sided=one_sided, implementation=implementation)


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize(("target", "one_sided"), OPTIONS)
def test_values_against_numpy(target, one_sided, implementation):
    g = values(6, 3, 5)
    norms = np.sqrt((g.numpy() ** 2).reshape(6, -1).sum(1))
    excess = norms - target
    expected = np.maximum(excess, 0) ** 2 if one_sided else excess**2
    np.testing.assert_allclose(ours(g, target, one_sided, implementation).numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("target", "one_sided"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_good_as_torch(shape, target, one_sided, dtype):
    g = values(*shape, dtype=dtype)
    mine, plain = results(ours, g, target, one_sided), results(textbook, g, target, one_sided)
    assert gankern.last_implementation("gradient_penalty") == COMPILED
    exact = results(textbook, g.double(), target, one_sided)
    for a, b, right in zip(mine, plain, exact):
        if not right.numel():
            assert a.shape == right.shape
            continue
        finite = right.isfinite()  # torch's second derivative at 0 is not
        scale = right[finite].abs().max().item() if finite.any() else 0
        accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * math.sqrt(g.numel())
        floor = (2 * torch.finfo(a.dtype).eps + accumulated) * scale
        plain_error = (b.double() - right)[finite].abs().nan_to_num(0, 0, 0).max().item() if finite.any() else 0
        # What cancels in the penalty, target against norm, is in units of the target.
        floor += accumulated * target * (target + 1)
        assert (a.double() - right)[finite].abs().max().item() <= 2 * plain_error + floor


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(0, 9), st.integers(1, 40), st.booleans(), st.sampled_from([0.0, 1.0, 5.0]))
def test_any_shape(count, size, one_sided, target):
    g = values(count, size, dtype=torch.float32)
    for a, b in zip(results(ours, g, target, one_sided), results(textbook, g.double(), target, one_sided)):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize(("target", "one_sided"), OPTIONS)
def test_gradients_are_exact(target, one_sided, implementation):
    g = values(4, 3, 2).requires_grad_()
    assert gradcheck(lambda g: ours(g, target, one_sided, implementation), g)
    assert gradgradcheck(lambda g: ours(g, target, one_sided, implementation), g)


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize(("target", "one_sided"), OPTIONS)
def test_a_zero_gradient_has_subgradient_zero(target, one_sided, implementation):
    g = values(3, 4)
    g[1] = 0
    out, first, to_weights, second = results(lambda *a: ours(*a, implementation), g, target, one_sided)
    assert out[1] == (0 if one_sided else target**2)
    assert not first[1].any() and to_weights[1] == 0
    if target:
        assert not second[1].any()
    assert all(x.isfinite().all() for x in (out, first, to_weights, second))


@pytest.mark.parametrize("implementation", ["reference", None])
def test_special_values(implementation):
    g = values(4, 5, dtype=torch.float32)
    g[0, 1], g[1, 2], g[2] = float("nan"), float("inf"), 1e15
    out, first, _, _ = results(lambda *a: ours(*a, implementation), g, 1.0, True)
    assert out[0].isnan() and first[0].isnan().all()
    assert out[1].isinf() and out[2].isfinite() and out[3].isfinite()
    assert first[2:].isfinite().all()


def test_third_order_is_refused():
    g = values(2, 3).requires_grad_()
    (first,) = grad(ours(g, 1.0, False).sum(), g, create_graph=True)
    (second,) = grad(first.square().sum(), g, create_graph=True)
    if COMPILED == "cpu":
        with pytest.raises(RuntimeError, match="gradient order 2"):
            second.sum().backward()


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize(("target", "one_sided"), OPTIONS)
def test_direction_is_the_gradient(target, one_sided, implementation):
    g = values(5, 3, 7)
    g[2] = 0
    with gankern.use_implementation(implementation or "auto"):
        out, direction = penalty_and_direction(g, 0.3, target, one_sided)
    g.requires_grad_()
    reference = ours(g, target, one_sided, "reference")
    torch.testing.assert_close(out, reference)
    torch.testing.assert_close(direction, grad(0.3 * reference.sum(), g)[0])


# ---- memory formats, threads, operators -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: values(3, 4, 5, 6).to(memory_format=torch.channels_last), True),
        (lambda: values(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d), True),
        (lambda: values(5, 4, 3).transpose(0, 2), False),
        (lambda: values(3, 8, 4)[:, ::2], False),
        (lambda: values(1, 4).expand(3, 4), False),
    ],
)
def test_memory_formats(make, kept):
    x = make()
    for a, b in zip(results(ours, x, 1.0, False), results(textbook, x, 1.0, False)):
        torch.testing.assert_close(a, b)
    if kept:
        _, direction = penalty_and_direction(x, 1.0, 1.0, False)
        assert direction.stride() == x.stride()


def all_bits():
    bits = []
    for shape in ((3, 50000), (700, 300), (65, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            x = values(*shape, dtype=dtype)
            bits += results(ours, x, 1.0, False)
    return bits


def test_inputs_are_not_written():
    g, h, weights = values(3, 9).requires_grad_(), values(3, 9, seed=1), values(3, seed=2).requires_grad_()
    before = [x.clone() for x in (g, h, weights)]
    (first,) = grad(ours(g, 1.0, False), g, weights, create_graph=True)
    grad(first, [g, weights], h)
    assert all(torch.equal(a, b) for a, b in zip(before, (g, h, weights)))


@pytest.mark.skipif(COMPILED != "cpu", reason="the native library was not built")
def test_operators_are_sound():
    ops = torch.ops.gankern
    g = values(4, 3, 5, dtype=torch.float32)
    for x in (g, values(4, 3, 5, 2, dtype=torch.bfloat16).to(memory_format=torch.channels_last), g.transpose(0, 2)):
        torch.library.opcheck(ops.gradient_penalty.default, (x, 1.0, False))
        weights = torch.rand(len(x))
        torch.library.opcheck(ops.gradient_penalty_backward.default, (weights, x, weights, 1.0, True))
        torch.library.opcheck(ops.gradient_penalty_double_backward.default, (x, weights, x, weights, 1.0, True))


def test_compiles_to_one_graph():
    def step(x):
        return GF.gradient_penalty(2 * x).mean()

    x = values(4, 6, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    torch.testing.assert_close(grad(compiled(x), x), grad(step(x), x))


def test_sums_of_half_precision_are_in_float32():
    g = torch.full((1, 60000), 0.03, dtype=torch.float16)
    exact = (g.double().norm() - 1) ** 2
    torch.testing.assert_close(ours(g, 1.0, False)[0].double(), exact, rtol=1e-5, atol=0)


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: GF.gradient_penalty(X.int()), TypeError, "gradient is int32; accepted are float64"),
        (lambda: GF.gradient_penalty(torch.zeros(())), ValueError, "gradient has no dimensions"),
        (lambda: GF.gradient_penalty(X, target=-1), ValueError, "target is -1; it must be at least 0"),
        (lambda: GF.gradient_penalty(X, target=math.nan), ValueError, "target is nan"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()
