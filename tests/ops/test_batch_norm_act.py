"""Batch normalisation with an activation against torch's own in fp64, and its reference against NumPy.

A result may differ from fp64 by twice what plain PyTorch differs in the same dtype, plus one unit in the last place of
the result, plus one of the accumulation dtype times the square root of the reduction's length.
"""

import functools
import math

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

import gankern
import gankern.functional as GF
from gankern.core import native
from gankern.reference.batch_norm_act import batch_norm_act as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPILED = "reference" if native.NATIVE_MISSING else "cpu"
ACTIVATIONS = [(None, 1.0), ("relu", 0.0), ("leaky_relu", 0.2)]

# Planes of 64 values and more are lines, of which vectors take 2 to 16; shorter ones are columns; of one sample all up to
# 1024 are lines, in blocks of 64. Segments of 4096, few channels in parts, blocks of 512 columns, parts of 256 rows.
SHAPES = [
    (2, 1),
    (7, 3),
    (300, 5),
    (40, 700),
    (4, 3, 5),
    (3, 2, 67),
    (2, 3, 4, 4),
    (1, 5, 3, 3),
    (1, 1100, 4, 4),
    (1, 20, 30, 33),
    (9, 37, 4, 4),
    (3, 5, 9, 11),
    (2, 20, 8, 8),
    (5, 2, 40, 110),
    (2, 1, 95, 97),
    (2, 3, 2, 3, 5),
    (2, 3, 4, 5, 6),
]
AFFINE = ["none", "channel", "sample", "weight", "bias"]
# The cases that take parts of rows of a block of columns, and of each sample's.
LONG = [(3, 5, 200, 300), (17, 130, 40, 41)]


def act(y, slope):
    return y if slope == 1 else y.relu() if slope == 0 else F.leaky_relu(y, slope)


def textbook(x, weight, bias, running, slope, eps=1e-5):
    """torch's own. Affine values of samples by hand behind it, and so a weight or a bias alone, for which torch's second
    order raises."""
    mean, var = (None, None) if running is None else (r.to(torch.promote_types(x.dtype, r.dtype)) for r in running)
    by_hand = (weight is None) != (bias is None) or (weight is not None and weight.ndim == 2)
    own = (None, None) if by_hand else (weight, bias)
    y = F.batch_norm(x, mean, var, *own, training=running is None, eps=eps)
    if by_hand:
        over = (...,) + (None,) * (x.ndim - 2)
        y = y * (1 if weight is None else weight[over]) + (0 if bias is None else bias[over])
    return act(y, slope).to(x.dtype)


def ours(x, weight, bias, running, slope, eps=1e-5, implementation=None):
    mean, var = (None, None) if running is None else running
    options = {1.0: {}, 0.0: {"activation": "relu"}}
    activation = options.get(slope, {"activation": "leaky_relu", "negative_slope": slope})
    return GF.batch_norm_act(
        x, mean, var, weight, bias, running is None, eps=eps, implementation=implementation, **activation
    )


def random(*shape, dtype=torch.float64, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64) + shift).to(dtype)


def affine_of(kind, shape, dtype, seed=10):
    size = shape[:2] if kind == "sample" else shape[1:2]
    weight = None if kind in ("none", "bias") else random(*size, dtype=dtype, seed=seed, shift=0.3)
    bias = None if kind in ("none", "weight") else random(*size, dtype=dtype, seed=seed + 1, scale=0.5)
    return weight, bias


def running_of(channels, dtype):
    return random(channels, dtype=dtype, seed=20), random(channels, dtype=dtype, seed=21).square() + 0.1


def results(function, x, weight, bias, running, slope):
    """The result, the first-order gradients, and the gradients of those: of x, weight, bias and the incoming gradient."""
    inputs = [v.detach().requires_grad_() for v in (x, weight, bias) if v is not None]
    given = iter(inputs)
    arguments = [None if v is None else next(given) for v in (x, weight, bias)]
    out = function(*arguments, running, slope)
    # Rounded to the dtype under test, so that fp64 sees the same values.
    coarse = results.dtype
    g = random(*out.shape, seed=3).to(coarse).to(out.dtype).requires_grad_()
    first = grad(out, inputs, g, create_graph=True)
    hs = [random(*v.shape, seed=4 + i).to(coarse).to(v.dtype) for i, v in enumerate(first)]
    second = grad(first, [*inputs, g], hs, allow_unused=True)
    return [out, *first, *[torch.zeros_like(v) if s is None else s for s, v in zip(second, [*inputs, g])]]


def size_of_terms(x, weight, bias, running):
    """Of the result, and of what the gradients of first and of second order are sums of: it may cancel, to nothing where
    a channel has two values. The incoming gradients are about 3 at most."""
    over = [0, *range(2, x.ndim)]
    var = x.var(over, correction=0) if running is None else running[1].double()
    r = (var + 1e-5).rsqrt().max().item()
    k = max(1.0, 0 if weight is None else weight.abs().max().item()) * r
    return 0, 3 * k, 9 * k * max(r, 1)


def assert_as_good_as_torch(x, weight, bias, running, slope, function=ours):
    results.dtype = x.dtype
    mine = results(function, x, weight, bias, running, slope)
    plain = results(textbook, x, weight, bias, running, slope)
    wide = [None if v is None else v.double() for v in (x, weight, bias)]
    exact = results(textbook, *wide, None if running is None else [r.double() for r in running], slope)
    accumulation = torch.float64 if x.dtype == torch.float64 else torch.float32
    length = math.sqrt(x.numel() / x.shape[1])
    terms = size_of_terms(*wide, running)
    inputs = sum(v is not None for v in (x, weight, bias))
    for i, (a, b, right) in enumerate(zip(mine, plain, exact)):
        assert a.dtype == b.dtype and a.shape == right.shape
        largest = max(right.abs().max().item(), terms[(i > 0) + (i > inputs)])
        floor = (torch.finfo(a.dtype).eps + torch.finfo(accumulation).eps * length) * largest
        plain_error = (b.double() - right).abs().max().item()
        # In fp64 plain PyTorch is the exact result itself: the floor, once for it as that and twice for it as the peer.
        allowed = 4 * floor if x.dtype == torch.float64 else floor
        if x.dtype != torch.float64 and math.isfinite(plain_error):  # torch's float16 overflows in its second order
            allowed += 2 * plain_error
        error = (a.double() - right).abs().max().item()
        assert error <= allowed, (i, error, allowed, plain_error)


def half_affine(dtype):
    """Affine values of half-precision x are float32, as AMP has it."""
    return dtype if dtype == torch.float64 else torch.float32


# ---- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", AFFINE)
def test_reference_is_the_formula(affine, training):
    x = random(5, 3, 4, 2, shift=2, scale=3)
    weight, bias = affine_of(affine, x.shape, x.dtype)
    running = running_of(3, x.dtype)
    y, stats = reference(x, weight, bias, *(running if not training else (None, None)), training, 1e-3, 0.2)
    a = x.numpy()
    mean, var = a.mean((0, 2, 3)), a.var((0, 2, 3))
    kept = a.var((0, 2, 3), ddof=1)
    if not training:
        mean, var = (r.numpy() for r in running)
        kept = var
    z = (a - mean[:, None, None]) / np.sqrt(var + 1e-3)[:, None, None]
    for values, combine in ((weight, np.multiply), (bias, np.add)):
        if values is not None:
            z = combine(z, values.numpy()[..., None, None])
    np.testing.assert_allclose(y, np.where(z > 0, z, 0.2 * z), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(stats, [mean, 1 / np.sqrt(var + 1e-3), kept], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype, training):
    for i, affine in enumerate(AFFINE):
        x = random(*shape, dtype=dtype, shift=0.5)
        weight, bias = affine_of(affine, shape, half_affine(dtype))
        running = None if training else running_of(shape[1], half_affine(dtype))
        formats = [torch.contiguous_format]
        if len(shape) > 3:
            formats.append(torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
        for memory_format in formats:
            slope = ACTIVATIONS[i % 3][1]
            assert_as_good_as_torch(x.contiguous(memory_format=memory_format), weight, bias, running, slope)
    assert gankern.last_implementation("batch_norm_act") == COMPILED


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("affine", ["channel", "sample"])
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long(shape, affine, memory_format):
    x = random(*shape, dtype=torch.float32, shift=0.5).contiguous(memory_format=memory_format)
    weight, bias = affine_of(affine, shape, torch.float32)
    assert_as_good_as_torch(x, weight, bias, None, 0.2)
    assert_as_good_as_torch(x, weight, bias, running_of(shape[1], torch.float32), 0.0)


@pytest.mark.parametrize("affine", ["channel", "sample"])
@pytest.mark.parametrize("shape", [(3000, 60), (2000, 3, 3, 3)], ids=str)
def test_many_samples_of_few_positions(shape, affine):
    weight, bias = affine_of(affine, shape, torch.float32)
    assert_as_good_as_torch(random(*shape, dtype=torch.float32), weight, bias, None, 0.2)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_any_strides(data):
    shape = data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=5))
    hypothesis.assume(math.prod(shape) > shape[1])
    order = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.integers(1, 2)) for _ in shape]
    affine = data.draw(st.sampled_from(AFFINE))
    slope = data.draw(st.sampled_from([1.0, 0.0, 0.2, -0.5]))
    base = random(*[n * s for n, s in zip(shape, steps)], shift=0.3)
    base = base.permute(order).contiguous().permute(sorted(range(len(order)), key=order.__getitem__))
    x = base[tuple(slice(None, None, s) for s in steps)]
    before = base.clone()
    weight, bias = affine_of(affine, shape, torch.float64)
    running = data.draw(st.sampled_from([None, running_of(shape[1], torch.float64)]))
    # Few values a channel can lie close together: their derivatives are large, and so is everyone's error.
    for a, b in zip(
        results_in_double(ours, x, weight, bias, running, slope),
        results_in_double(textbook, x, weight, bias, running, slope),
    ):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * scale)
    assert torch.equal(base, before)


def results_in_double(*arguments):
    results.dtype = torch.float64
    return results(*arguments)


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 3, 2), (2, 2, 70)], ids=str)
def test_gradients_are_exact(shape, affine, training, implementation):
    if len(shape) == 3 and implementation == "reference":
        pytest.skip("covered by the smaller shapes")
    x, (weight, bias) = random(*shape), affine_of(affine, shape, torch.float64)
    running = None if training else running_of(shape[1], torch.float64)
    slope = {"none": 1.0, "channel": 0.2, "sample": 0.2}.get(affine, 0.0)
    inputs = [v.requires_grad_() for v in (x, weight, bias) if v is not None]

    def function(*given):
        given = iter(given)
        arguments = [None if v is None else next(given) for v in (x, weight, bias)]
        return ours(*arguments, running, slope, eps=0.1, implementation=implementation)

    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


# ---- statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 5), (4, 30, 16, 16)], ids=str)
def test_running_statistics_are_torchs(shape, implementation):
    ours_, theirs = ([torch.zeros(shape[1]), torch.ones(shape[1])] for _ in range(2))
    for step, momentum in enumerate([0.1, 0.7, 1.0, 0.0]):
        x = random(*shape, dtype=torch.float32, seed=step, shift=3)
        GF.batch_norm_act(x, *ours_, training=True, momentum=momentum, implementation=implementation)
        F.batch_norm(x, *theirs, training=True, momentum=momentum)
        torch.testing.assert_close(ours_, theirs)
    before = [v.clone() for v in ours_]
    GF.batch_norm_act(x, *ours_, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(before, ours_))


def statistics(x):
    mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    GF.batch_norm_act(x, mean, var, training=True, momentum=1.0)
    return mean.double(), var.double()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(16, 20, 64, 64), (64, 100, 8, 8), (64, 40, 4, 4), (4, 2, 256, 256)], ids=str)
def test_far_from_zero(shape, channels_last):
    x = random(*shape, dtype=torch.float32, shift=1e4)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    mean, var = statistics(x)
    exact = x.double().var((0, 2, 3))
    assert ((var - exact) / exact).abs().max() < 1e-5  # the bar is 1e-3
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    # A first sample, or a first value, far from all others.
    for where in (0, (0, slice(None), 0, 0)):
        y = x.clone()
        y[where] = 0
        _, var = statistics(y)
        exact = y.double().var((0, 2, 3))
        assert ((var - exact) / exact).abs().max() < 1e-4


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [3, 16])
def test_squares_that_overflow(size, channels_last):
    x = random(4, 3, size, size, dtype=torch.float32, scale=1e25, shift=1e25)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    torch.testing.assert_close(ours(x, None, None, None, 1.0).double(), textbook(x.double(), None, None, None, 1.0))
    half = random(4, 3, size, size, dtype=torch.float16, scale=9000, shift=20000)
    exact = textbook(half.double(), None, None, None, 1.0).half()
    torch.testing.assert_close(ours(half, None, None, None, 1.0), exact)


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 3, 16, 16)], ids=str)
class TestSpecialValues:
    def test_constant_channel(self, shape, implementation):
        x = torch.full(shape, 3.7).requires_grad_()
        y = ours(x, None, None, None, 0.2, implementation=implementation)
        assert y.abs().max() < 1e-3
        (first,) = grad((y * random(*shape, dtype=torch.float32)).sum(), x)
        assert first.isfinite().all()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_stays_in_its_channel(self, shape, implementation, bad):
        x = random(*shape, dtype=torch.float32)
        x[2, 1, 3, 3] = bad
        x.requires_grad_()
        mean, var = torch.zeros(3), torch.ones(3)
        y = GF.batch_norm_act(x, mean, var, training=True, activation="relu", implementation=implementation)
        (first,) = grad(y.sum(), x, create_graph=True)
        (second,) = grad(first.square().sum(), x)
        for result in (y, first, second):
            assert result[:, 1].isnan().all() and result[:, [0, 2]].isfinite().all()
        assert mean.isfinite().tolist() == [True, False, True] and var.isnan().tolist() == [False, True, False]

    def test_evaluation_of_what_is_not_finite(self, shape, implementation):
        x = random(*shape, dtype=torch.float32)
        x[2, 1, 3, 3], x[2, 1, 3, 4], x[2, 1, 4, 3] = float("nan"), float("inf"), -float("inf")
        x.requires_grad_()
        running = torch.zeros(3), torch.ones(3)
        bias = torch.zeros(3, requires_grad=True)
        given, h = (
            random(*shape, dtype=torch.float32, seed=1).requires_grad_(),
            random(*shape, dtype=torch.float32, seed=2),
        )
        for slope in (1.0, 0.0, 0.2):
            found = []
            for function in (functools.partial(ours, implementation=implementation), textbook):
                y = function(x, None, bias, running, slope)
                first = grad(y, (x, bias), given, create_graph=True)
                found.append((y, *first, *grad(first[0], given, h)))
            torch.testing.assert_close(*found, equal_nan=True)
            # Gradients are finite: that of ReLU passes a NaN, that of a leaky one takes its slope.
            assert all(g.isfinite().all() for g in found[0][1:])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_gradients_of_evaluation_stay_where_they_are(self, shape, implementation, bad):
        """No value depends on another one: a gradient that is not finite spoils its own place alone, in both orders."""
        given = [random(*shape, dtype=torch.float32, seed=seed) for seed in range(3)]
        given[1][1, 1, 3, 3] = given[2][1, 0, 2, 2] = bad
        running, bias = (torch.zeros(3), torch.ones(3)), torch.zeros(3)
        found = []
        for function in (functools.partial(ours, implementation=implementation), textbook):
            x, g, h = (t.clone() for t in given)
            x.requires_grad_(), g.requires_grad_()
            weight = torch.full((3,), 1.5, requires_grad=True)
            first = grad(function(x, weight, bias, running, 0.2), (x, weight), g, create_graph=True)
            found.append((*first, *grad(first[0], (g, weight), h)))
        for mine, other in zip(*found):
            torch.testing.assert_close(mine, other, equal_nan=True, rtol=1e-4, atol=1e-4)

    def test_zero_weight(self, shape, implementation):
        x, zeros = random(*shape).requires_grad_(), torch.zeros(3, dtype=torch.float64)
        y = ours(x, zeros, zeros, None, 0.2, implementation=implementation)
        assert not y.any()
        # At the kink, the negative slope's.
        weight = zeros.clone().requires_grad_()
        first = grad(ours(x, weight, zeros, None, 0.2, implementation=implementation).pow(1).sum(), weight)[0]
        torch.testing.assert_close(first, zeros, atol=1e-10, rtol=0)


@pytest.mark.parametrize("implementation", ["reference", None])
def test_empty_batch(implementation):
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    for training in (True, False):
        mean, var = torch.full((3,), 2.0), torch.full((3,), 5.0)
        y = GF.batch_norm_act(
            x, mean, var, weight, bias, training, activation="leaky_relu", implementation=implementation
        )
        assert y.shape == x.shape
        first = grad(y.sum(), [x, weight, bias], create_graph=True)
        assert first[0].shape == x.shape and not first[1].any() and not first[2].any()
        assert torch.equal(mean, torch.full((3,), 2.0)) and torch.equal(var, torch.full((3,), 5.0))


def test_single_values():
    with pytest.raises(ValueError, match=r"more than 1 value per channel when training, got input size \(1, 3\)"):
        GF.batch_norm_act(torch.zeros(1, 3), None, None, training=True)
    with pytest.raises(ValueError, match=r"more than 1 value per channel .* \(1, 3, 1, 1\)"):
        GF.batch_norm_act(torch.zeros(1, 3, 1, 1), torch.zeros(3), torch.ones(3), training=True)
    x = random(1, 3)
    torch.testing.assert_close(
        ours(x, None, None, running_of(3, x.dtype), 0.2), textbook(x, None, None, running_of(3, x.dtype), 0.2)
    )


# ---- gradients that do not exist ----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", None])
def test_no_zeros_for_gradients_that_do_not_exist(implementation):
    x, weight = random(4, 3, 5, 5).requires_grad_(), random(3).requires_grad_()
    inner = x * 1
    y = ours(inner, weight, None, running_of(3, x.dtype), 0.2, implementation=implementation)
    g = torch.ones_like(y).requires_grad_()
    (first,) = grad(y, inner, g, create_graph=True)
    second = grad(first.square().sum(), [inner, weight, g], allow_unused=True)
    assert second[0] is None or not second[0].any()
    assert second[1] is not None and second[2] is not None
    if implementation is None and COMPILED == "cpu":
        assert second[0] is None  # within the graph; a leaf has zeros, as torch's


def test_second_order_of_affine_gradients_alone():
    for running in (None, running_of(3, torch.float64)):
        for affine in ("channel", "sample"):
            x, (weight, bias) = random(4, 3, 5, 5), affine_of(affine, (4, 3), torch.float64)
            inputs = [v.requires_grad_() for v in (x, weight, bias)]
            g = random(4, 3, 5, 5, seed=3).requires_grad_()
            for wanted in ([1], [2], [1, 2]):
                both = []
                for function in (ours, textbook):
                    first = grad(function(*inputs, running, 0.2), [inputs[i] for i in wanted], g, create_graph=True)
                    hs = [random(*v.shape, seed=5) for v in first]
                    both.append(grad(first, [*inputs, g], hs, allow_unused=True))
                for a, b in zip(*both):
                    if a is None or b is None:
                        assert a is None and (b is None or not b.any())
                    else:
                        torch.testing.assert_close(a, b)


def test_third_order_is_refused():
    x = random(4, 3, 2).requires_grad_()
    first = grad(ours(x, None, None, None, 0.2).pow(2).sum(), x, create_graph=True)[0]
    second = grad(first.square().sum(), x, create_graph=True)[0]
    if COMPILED == "cpu":
        with pytest.raises(RuntimeError, match="gradient order 2"):
            second.sum().backward()


# ---- what callers see ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3, 20, 20), (2, 3, 4, 5, 6)], ids=str)
def test_memory_format_is_kept(shape):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for memory_format in (torch.contiguous_format, last):
        x = random(*shape).contiguous(memory_format=memory_format).requires_grad_()
        y = ours(x, None, None, None, 0.2)
        first = grad(y.square().sum(), x, create_graph=True)[0]
        second = grad(first.square().sum(), x)[0]
        for result in (y, first, second):
            assert result.stride() == x.stride()
    assert ours(random(*shape)[..., ::2], None, None, None, 0.2).is_contiguous()


def test_inputs_are_not_written():
    x = random(4, 3, 20, 20).requires_grad_()
    weight, bias = (v.requires_grad_() for v in affine_of("channel", x.shape, x.dtype))
    g = random(4, 3, 20, 20, seed=1).requires_grad_()
    before = [v.detach().clone() for v in (x, weight, bias, g)]
    first = grad(ours(x, weight, bias, None, 0.2), [x, weight, bias], g, create_graph=True)
    hs = [torch.ones_like(v) for v in first]
    grad(first, [x, weight, g], hs)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias, g)))
    assert all(torch.equal(h, torch.ones_like(h)) for h in hs)


def test_expanded_gradients():
    x = random(4, 3, 9, 9).requires_grad_()
    g = torch.ones(1, dtype=x.dtype).expand(4, 3, 9, 9)
    both = [
        grad(grad(f(x, None, None, None, 0.2), x, g, create_graph=True)[0].square().sum(), x)[0]
        for f in (ours, textbook)
    ]
    torch.testing.assert_close(*both)


def all_bits():
    """Every order's results, for shapes of every layout and way to share out the work."""
    bits = []
    for dtype in (torch.float32, torch.float64):
        results.dtype = dtype
        for shape in ((9, 37, 4, 4), (5, 2, 40, 110), (3, 20, 32, 32), (3, 5, 200, 300)):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                for affine in ("channel", "sample"):
                    x = random(*shape, dtype=dtype).contiguous(memory_format=memory_format)
                    bits += results(ours, x, *affine_of(affine, shape, dtype), None, 0.2)
    return bits


def test_every_instruction_set(bits_elsewhere):
    there = bits_elsewhere(__file__)
    for a, b in zip(all_bits(), there):
        tolerance = 1e-11 if a.dtype == torch.float64 else 2e-4
        # Where rounding moves a value over the activation's kink, its gradients are others.
        different = (a - b).abs() > tolerance * a.abs().max()
        assert different.sum() <= 1e-4 * a.numel()


@pytest.mark.skipif(COMPILED != "cpu", reason="the native library was not built")
@pytest.mark.parametrize("affine", ["none", "channel", "sample"])
@pytest.mark.parametrize("training", [True, False])
def test_operators_are_sound(training, affine):
    ops = torch.ops.gankern
    x = random(4, 3, 5, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight, bias = affine_of(affine, x.shape, torch.float32)
    running = (None, None) if training else running_of(3, torch.float32)
    arguments = (x, weight, bias, *running, training, 1e-5, 0.2)
    torch.library.opcheck(ops.batch_norm_act.default, arguments)
    _, stats = ops.batch_norm_act(*arguments)
    g, h = torch.ones_like(x), torch.ones_like(x)
    arguments = (g, x, weight, bias, stats, training, 0.2, True)
    torch.library.opcheck(ops.batch_norm_act_backward.default, arguments)
    torch.library.opcheck(ops.batch_norm_act_double_backward.default, (h, weight, bias, *arguments))
    torch.library.opcheck(ops.batch_norm_act_double_backward.default, (None, weight, None, *arguments))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(training):
    x = random(4, 3, 9, 9, dtype=torch.float32).requires_grad_()
    weight, bias = (v.requires_grad_() for v in affine_of("channel", x.shape, torch.float32))

    def step(x, weight, bias, mean, var):
        y = GF.batch_norm_act(x, mean, var, weight, bias, training, activation="leaky_relu", negative_slope=0.2)
        return y.square().sum()

    compiled = torch.compile(step, fullgraph=True)
    ours_, theirs = ([torch.zeros(3), torch.ones(3)] for _ in range(2))
    inputs = x, weight, bias
    torch.testing.assert_close(grad(compiled(*inputs, *ours_), inputs), grad(step(*inputs, *theirs), inputs))
    torch.testing.assert_close(ours_, theirs)


def test_func_transforms():
    x = random(5, 2, 3)

    def penalty(function):
        return lambda x: torch.func.grad(lambda x: function(x, None, None, None, 0.2).pow(3).sum())(x).square().sum()

    torch.testing.assert_close(torch.func.grad(penalty(ours))(x), torch.func.grad(penalty(textbook))(x))


def test_the_second_order_does_not_go_through_torchs_formula():
    """Not one of torch's own operators on a tensor of x's size, but the sum that the test makes itself."""
    x, weight = random(4, 20, 16, 16).requires_grad_(), random(20).requires_grad_()
    (first,) = grad(ours(x, weight, None, None, 0.2), x, torch.ones_like(x), create_graph=True)
    h = random(4, 20, 16, 16, seed=2)
    with torch.profiler.profile() as profile:
        grad(first, [x, weight], h)
    if COMPILED == "cpu":
        assert [e.key for e in profile.key_averages() if "batch_norm" in e.key and "gankern" in e.key]
        assert not [
            e.key for e in profile.key_averages() if e.key in ("aten::mul", "aten::sum", "aten::native_batch_norm")
        ]


@pytest.mark.parametrize("training", [True, False])
def test_gradients_that_nobody_asks_for(training):
    x, weight = random(4, 3, 5, 5).requires_grad_(), random(3).requires_grad_()
    running = None if training else running_of(3, x.dtype)
    first = [grad(f(x, weight, None, running, 0.2).square().sum(), x)[0] for f in (ours, textbook)]
    torch.testing.assert_close(*first)
    first = [grad(f(x, weight, None, running, 0.2).square().sum(), weight)[0] for f in (ours, textbook)]
    torch.testing.assert_close(*first)


def test_autocast():
    x, weight, bias = random(9, 6, 4, 4, dtype=torch.bfloat16), torch.rand(6), torch.rand(6)
    mean, var = torch.zeros(6), torch.ones(6)
    with torch.autocast("cpu", torch.bfloat16):
        out = GF.batch_norm_act(x, mean, var, weight, bias, True)
    assert out.dtype == torch.bfloat16 and mean.dtype == torch.float32
    torch.testing.assert_close(out, F.batch_norm(x, None, None, weight, bias, True))


def test_peak_memory():
    """Beyond what is saved and returned, less than a tenth of x."""
    x = torch.randn(16, 32, 64, 64).requires_grad_()
    mean, var, weight, bias = torch.zeros(32), torch.ones(32), torch.ones(32), torch.zeros(32)
    for memory_format, tensors in ((torch.contiguous_format, 2), (torch.channels_last, 2)):
        leaf = x.detach().contiguous(memory_format=memory_format).requires_grad_()
        with torch.profiler.profile(profile_memory=True) as profile:
            y = GF.batch_norm_act(leaf, mean, var, weight, bias, True, activation="leaky_relu")
            g = grad(y, leaf, y.detach())
        held = peak = 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        assert peak < (tensors + 0.1) * x.nbytes, peak / x.nbytes  # y and the gradient
        del y, g


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "norm",
    [
        lambda x, *affine, **options: GF.batch_norm_act(x, None, None, *affine, True, **options),
        lambda x, *affine, **options: GF.instance_norm_act(x, None, None, *affine, **options),
        lambda x, *affine, **options: GF.group_norm_act(x, 2, *affine, **options),
    ],
    ids=["batch", "instance", "group"],
)
def test_a_half_condition_of_a_single_map(norm, dtype, implementation):
    """As autocast makes them on CUDA, which interpolates maps in float32: widened, which loses nothing."""
    if implementation == "cpu" and native.NATIVE_MISSING:
        pytest.skip(native.NATIVE_MISSING)
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    affine = [torch.randn(3, 4).to(dtype).requires_grad_() for _ in range(2)]
    y = norm(x, *affine, activation="leaky_relu", implementation=implementation)
    wide = [value.detach().float().requires_grad_() for value in affine]
    right = norm(x, *wide, activation="leaky_relu", implementation=implementation)
    assert torch.equal(y, right) and y.dtype == torch.float32
    direction = torch.randn_like(y)
    own, others = (
        torch.autograd.grad(out, [x, *values], direction, create_graph=True)
        for out, values in ((y, affine), (right, wide))
    )
    assert [g.dtype for g in own] == [torch.float32, dtype, dtype]
    for a, b in zip(own, others):
        assert torch.equal(a, b.to(a.dtype))


# ---- bad input ----------------------------------------------------------------------------------------------

X, ONES = torch.zeros(4, 3, 2, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((X.int(), None, None), {}, TypeError, "x is int32; accepted are float64"),
        ((None, None, None), {}, TypeError, "x is NoneType"),
        ((X[0, 0, 0], None, None), {}, ValueError, r"x has shape \(2,\)"),
        ((X[:, :0], None, None), {}, ValueError, r"x has shape \(4, 0, 2, 2\)"),
        ((X, ONES, None), {}, ValueError, "running_var is None and the other is not"),
        (
            (X, ONES, ONES.clone().requires_grad_()),
            {},
            ValueError,
            "running_var requires a gradient, and would get none",
        ),
        ((X, ONES[:2], ONES[:2]), {}, ValueError, r"running_mean has shape \(2,\) .* must be \(3,\)"),
        ((X, ONES, ONES.long()), {}, TypeError, "running_var is int64"),
        ((X, ONES, ONES, ONES[:2]), {}, ValueError, r"weight has shape \(2,\).* must be \(3,\), or \(4, 3\)"),
        ((X, ONES, ONES, None, torch.ones(3, 3)), {}, ValueError, r"bias has shape \(3, 3\)"),
        ((X, ONES, ONES, ONES, torch.ones(4, 3)), {}, ValueError, r"weight has shape \(3,\) and bias \(4, 3\)"),
        (
            (X, ONES, ONES, ONES.double()),
            {},
            ValueError,
            "weight is float64 on cpu; x needs float32 or float16 or bfloat16 on cpu",
        ),
        (
            (X.half(), ONES, ONES, ONES.bfloat16()),
            {},
            ValueError,
            "weight is bfloat16 on cpu; x needs float16 or float32 on cpu",
        ),
        ((X, ONES, ONES, ONES.to("meta")), {}, ValueError, "weight is float32 on meta"),
        (
            (X, ONES, ONES),
            {"activation": "tanh"},
            ValueError,
            "activation is 'tanh'; accepted are 'linear', 'relu', 'leaky_relu', 'prelu', None",
        ),
        ((X, ONES, ONES), {"eps": -1e-5}, ValueError, "eps is -1e-05; it must be at least 0"),
    ],
)
def test_bad_input(arguments, options, error, says):
    with pytest.raises(error, match=f"batch_norm_act: {says}"):
        GF.batch_norm_act(*arguments, **options)
