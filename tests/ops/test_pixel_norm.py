"""Pixel norm, alone and after bias and leaky ReLU: the reference against NumPy, the kernels against PyTorch in fp64."""

import contextlib
import math

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import compiles_to_one_graph, every_order
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

import gankern
import gankern.functional as GF
from gankern.core import native

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPILED = "reference" if native.NATIVE_MISSING else "cpu"

# Lines and tiles, whole vectors and rests, one and several tiles and chunks.
SHAPES = [(1, 1), (3, 5), (2, 512), (2, 17, 1, 1), (3, 5, 2, 3), (2, 33, 4, 4), (1, 3, 40, 41), (2, 1, 7, 9), (300, 40)]
SHAPES += [(2, 700, 17), (5, 4, 2, 3, 5), (1, 130, 1100)]


def values(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def textbook(x, bias, dim=1, activation="leaky_relu", negative_slope=0.2, gain=1.0, eps=1e-8):
    """The definition, in the dtype of the arguments."""
    a = x if bias is None else x + bias.view([-1 if d == dim else 1 for d in range(x.ndim)])
    if activation != "linear":
        a = F.leaky_relu(a, negative_slope) if activation == "leaky_relu" else F.relu(a)
    a = a * gain
    return a * torch.rsqrt(a.square().mean(dim, keepdim=True) + eps)


def assert_as_good_as_torch(x, bias, **options):
    ours = every_order(lambda x, b: GF.bias_act_pixel_norm(x, b, **options), (x, bias))
    assert gankern.last_implementation("pixel_norm") == COMPILED
    theirs = every_order(lambda x, b: textbook(x, b, **options), (x, bias))
    exact = every_order(lambda x, b: textbook(x, b, **options), (x.double(), None if bias is None else bias.double()))
    for mine, plain, right in zip(ours, theirs, exact):
        assert mine.dtype == x.dtype and mine.shape == right.shape
        if not x.numel():
            continue
        # Gradients are differences of values of the scale of the first ones.
        largest = max(right.abs().max().item(), exact[1].abs().max().item(), 1.0)
        length = x.shape[options.get("dim", 1)] if right.shape == x.shape else x.numel()
        floor = torch.finfo(x.dtype).eps * math.sqrt(length) * largest
        # In fp64 plain PyTorch is the exact result itself, with an error that cannot be seen: once more the floor.
        allowed = 2 * (plain.double() - right).abs().max().item() + (8 if x.dtype == torch.float64 else 1) * floor
        assert (mine.double() - right).abs().max().item() <= allowed


@pytest.mark.parametrize("implementation", ["reference", None])
def test_the_definition(implementation):
    x, bias = values(3, 5, 4, 2), values(5, seed=1)
    z = x.numpy() + bias.numpy()[:, None, None]
    a = 1.5 * np.where(z > 0, z, 0.2 * z)
    right = a / np.sqrt((a**2).mean(1, keepdims=True) + 1e-3)
    y = GF.bias_act_pixel_norm(x, bias, gain=1.5, eps=1e-3, implementation=implementation)
    np.testing.assert_allclose(y.numpy(), right, rtol=1e-13)
    alone = GF.pixel_norm(x, eps=1e-3, dim=-1, implementation=implementation)
    np.testing.assert_allclose(alone.numpy(), x.numpy() / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype):
    # A scale below which eps counts, too.
    x, bias = values(*shape, dtype=dtype), values(shape[1], dtype=dtype, seed=1)
    assert_as_good_as_torch(x, bias, eps=1e-2)
    assert_as_good_as_torch(x, None, activation="relu", gain=-0.7, eps=1e-2)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 16, 37])
def test_channels_last(memory_format, channels):
    spatial = (3, 5) if memory_format == torch.channels_last else (2, 3, 5)
    x = values(4, channels, *spatial, dtype=torch.float32).to(memory_format=memory_format)
    bias = values(channels, dtype=torch.float32, seed=1)
    assert_as_good_as_torch(x, bias, eps=1e-2)
    leaf = x.detach().requires_grad_()
    y = GF.bias_act_pixel_norm(leaf, bias)
    (dx,) = grad(y.sum(), leaf)
    assert y.stride() == x.stride() and dx.stride() == x.stride()


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.data(), st.booleans())
def test_any_shape_and_strides(shape, data, with_bias):
    dim = data.draw(st.integers(0, len(shape) - 1))
    order = data.draw(st.permutations(range(len(shape))))
    steps = data.draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)))
    base = values(*(shape[d] * steps[d] for d in order))
    x = base.permute([order.index(d) for d in range(len(shape))])[tuple(slice(None, None, s) for s in steps)]
    bias = values(shape[dim], seed=1) if with_bias else None
    assert_as_good_as_torch(x, bias, dim=dim, eps=0.1)
    assert GF.pixel_norm(x, dim=dim).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("activation", ["linear", "relu", "leaky_relu"])
def test_gradients_are_exact(activation, implementation):
    for options in ({}, {"gain": -1.5, "eps": 1e-2}, {"negative_slope": -0.4}):
        for channels_last in (False, True):
            x, bias = values(1, 3, 2, 2), values(3, seed=1).requires_grad_()
            x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()

            def function(x, bias, options=options):
                return GF.bias_act_pixel_norm(x, bias, activation=activation, implementation=implementation, **options)

            assert gradcheck(function, (x, bias))
            assert gradgradcheck(function, (x, bias))
    if activation == "linear":
        assert gradgradcheck(
            lambda x: GF.pixel_norm(x, implementation=implementation), (values(2, 3, 2).requires_grad_(),)
        )


@pytest.mark.skipif(COMPILED != "cpu", reason="the native library was not built")
def test_third_order_is_refused():
    x, g = values(2, 3, 4).requires_grad_(), values(2, 3, 4, seed=1).requires_grad_()
    (first,) = grad(GF.pixel_norm(x), x, g, create_graph=True)
    for wanted in (x, g):
        (second,) = grad(first.square().sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="gradient order 2"):
            grad(second.square().sum(), x)


@pytest.mark.parametrize("implementation", ["reference", None])
class TestSpecialValues:
    @pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 3)], ids=str)
    def test_nothing(self, implementation, shape):
        x, bias = torch.zeros(shape, requires_grad=True), torch.ones(shape[1], requires_grad=True)
        y = GF.bias_act_pixel_norm(x, bias, implementation=implementation)
        dx, db = grad(y.sum(), (x, bias))
        assert y.shape == dx.shape == x.shape and torch.equal(db, torch.zeros_like(bias))

    def test_zeros(self, implementation):
        x = torch.zeros(2, 3, 4, requires_grad=True)
        y = GF.pixel_norm(x, implementation=implementation)
        assert torch.equal(y, torch.zeros_like(y))
        (dx,) = grad(y, x, torch.ones_like(y))
        torch.testing.assert_close(dx, torch.full_like(dx, 1e4))
        assert GF.pixel_norm(x, eps=0.0, implementation=implementation).isnan().all()

    def test_nan_stays_in_its_pixel(self, implementation):
        for x in (values(2, 5, 33, dtype=torch.float32), values(2, 33, 5, dtype=torch.float32).mT):
            x[1, 3, 7] = math.nan
            y = GF.bias_act_pixel_norm(x, implementation=implementation)
            nan = torch.zeros(2, 5, 33, dtype=torch.bool)
            nan[1, :, 7] = True
            assert torch.equal(y.isnan(), nan)

    def test_half_precision_does_not_overflow(self, implementation):
        x = torch.full((2, 8, 3), 6e4, dtype=torch.float16)
        torch.testing.assert_close(GF.pixel_norm(x, implementation=implementation), torch.ones_like(x))


def test_what_is_kept():
    """The result, which the next layer keeps anyway, and one number a pixel."""
    x, bias, kept = values(4, 5, 6, 7).requires_grad_(), values(5).requires_grad_(), []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = GF.bias_act_pixel_norm(x, bias)
    if COMPILED == "cpu":
        assert [t.numel() for t in kept] == [y.numel(), 4 * 6 * 7] and kept[0].data_ptr() == y.data_ptr()


def test_inputs_are_not_written():
    x, bias = values(5, 6, 7).requires_grad_(), values(6, seed=1).requires_grad_()
    g = values(5, 6, 7, seed=2).requires_grad_()
    before = [v.clone() for v in (x, bias, g)]
    first = grad(GF.bias_act_pixel_norm(x, bias), (x, bias), g, create_graph=True)
    hs = [torch.ones_like(v) for v in first]
    grad(first, (x, bias, g), hs)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, bias, g)))
    assert all(torch.equal(h, torch.ones_like(h)) for h in hs)


def all_bits():
    bits = []
    for shape in ((40, 16, 33, 9), (64, 300, 3, 3), (500, 300), (16, 64, 66, 66)):
        x, bias = values(*shape, dtype=torch.float32), values(shape[1], dtype=torch.float32, seed=1)
        bits += every_order(GF.bias_act_pixel_norm, (x, bias))
    return bits


def test_every_instruction_set(on_instruction_set):
    on_instruction_set(
        __file__,
        "for dtype in cases.DTYPES:",
        "    for shape in cases.SHAPES: cases.test_every_shape(shape, dtype)",
        "cases.test_the_definition(None)",
    )


@pytest.mark.skipif(COMPILED != "cpu", reason="the native library was not built")
def test_operators_are_sound():
    bias, ops = values(3, dtype=torch.float32), torch.ops.gankern
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = values(2, 3, 4, 5, dtype=torch.float32).to(memory_format=memory_format)
        torch.library.opcheck(ops.pixel_norm.default, (x, bias, 1, 1.0, 0.2, 1e-8))
        y, scale = ops.pixel_norm(x, bias, 1, 1.0, 0.2, 1e-8)
        torch.library.opcheck(ops.pixel_norm_backward.default, (x, None, y, scale, 1, 1.0, 0.2, True))
        torch.library.opcheck(ops.pixel_norm_backward.default, (x, scale, y, scale, 1, 1.0, 0.2, False))
        torch.library.opcheck(ops.pixel_norm_double_backward.default, (x, bias, x, y, scale, 1, 1.0, 0.2))
        torch.library.opcheck(ops.pixel_norm_double_backward.default, (None, bias, x, y, scale, 1, 1.0, 0.2))


def test_compiles_to_one_graph():
    x = values(2, 3, 4, 5, dtype=torch.float32).requires_grad_()
    bias = values(3, dtype=torch.float32).requires_grad_()

    def step(x, bias):
        return (GF.pixel_norm(GF.bias_act_pixel_norm(x, bias) + 1) ** 3).sum()

    compiles_to_one_graph(step, x, bias)


def test_func_transforms():
    x = values(2, 3, 4)

    def penalty(x, function):
        return torch.func.grad(lambda x: (function(x) ** 3).sum())(x).square().sum()

    ours, theirs = GF.pixel_norm, lambda x: textbook(x, None, activation="linear")
    torch.testing.assert_close(penalty(x, ours), penalty(x, theirs))
    torch.testing.assert_close(torch.func.grad(penalty)(x, ours), torch.func.grad(penalty)(x, theirs))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: GF.pixel_norm([1.0]), TypeError, "pixel_norm: x is list"),
        (
            lambda: GF.pixel_norm(torch.zeros(2, 3), eps=-1e-8),
            ValueError,
            "pixel_norm: eps is -1e-08; it must be at least 0",
        ),
        (lambda: GF.pixel_norm(torch.zeros(3)), ValueError, "pixel_norm: dim is 1"),
        (
            lambda: GF.bias_act_pixel_norm(torch.zeros(2, 3), torch.zeros(2)),
            ValueError,
            r"bias_act_pixel_norm: bias has shape \(2,\); x has 3 channels",
        ),
        (
            lambda: GF.bias_act_pixel_norm(torch.zeros(2, 3), activation="tanh"),
            ValueError,
            "activation is 'tanh'; accepted are 'linear', 'relu', 'leaky_relu'",
        ),
        (lambda: GF.bias_act_pixel_norm(torch.zeros(2, 3), eps=math.nan), ValueError, "eps is nan"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("gradients_of", ["nodes", "python"])
def test_a_result_may_be_overwritten(gradients_of, order):
    """torch's formulation keeps the input, not the result: an activation in place behind it is allowed."""

    def run(implementation):
        x = values(3, 4, 5, 5).requires_grad_()
        y = GF.pixel_norm(x * 2, implementation=implementation)
        y = torch.nn.functional.leaky_relu(y, 0.2, inplace=True)
        (first,) = grad((y * values(3, 4, 5, 5, seed=1)).sum(), x, create_graph=order == 2)
        return first if order == 1 else grad(first.square().sum(), x)[0]

    with native.python_gradients() if gradients_of == "python" else contextlib.nullcontext():
        torch.testing.assert_close(run(None), run("reference"))


@pytest.mark.parametrize("gradients_of", ["nodes", "python"])
def test_what_was_overwritten_altogether_is_refused(gradients_of):
    """The input too, and what keeps its result alone: torch's error, and no other numbers."""
    with native.python_gradients() if gradients_of == "python" else contextlib.nullcontext():
        x = values(3, 4, 5, 5).requires_grad_()
        middle = x * 2
        y = GF.pixel_norm(middle)
        y.mul_(2)
        middle.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        y = GF.bias_act_pixel_norm(x * 2, values(4, seed=1))
        if COMPILED == "cpu":
            y.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        y = GF.pixel_norm(x * 2)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()
