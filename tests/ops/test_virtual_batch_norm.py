"""Virtual batch norm against its definition in NumPy and plain PyTorch in fp64."""

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
from gankern.reference.virtual_batch_norm import virtual_batch_norm as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPILED = "reference" if native.NATIVE_MISSING else "cpu"
FORMATS = [torch.contiguous_format, torch.channels_last]
SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.2}

# Vectors are of 2 to 16 lanes, rows are summed 64 at a time in groups of 4, blocks have 128 KiB: the last ones have
# several of them, of channels or of pixels, and one plane longer than what is summed at once.
SHAPES = [(1, 1), (3, 17), (2, 1, 1, 1), (4, 3, 70), (2, 33, 5, 3), (3, 4, 2, 3, 2), (1, 5, 67, 66), (2, 70, 31, 33)]


def sample(shape, dtype=torch.float64, memory_format=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=memory_format) if x.ndim == 4 else x


def vectors(channels, dtype=torch.float64):
    """ref_mean, ref_mean_square, weight, bias."""
    mean, spread, weight, bias = (sample((channels,), seed=seed) for seed in (1, 2, 3, 4))
    return [v.to(dtype) for v in (0.5 * mean, 0.25 * mean**2 + 0.5 + spread.abs(), 1 + 0.1 * weight, bias)]


def definition(x, mean, mean_square, count, weight, bias, eps, slope):
    """Example by example, with s - mu^2 as it stands."""
    share = 0 if count is None else 1 / (count + 1)
    out = np.empty_like(x)
    for n in range(len(x)):
        for c in range(x.shape[1]):
            values = x[n, c]
            mu = share * values.mean() + (1 - share) * mean[c]
            s = share * (values**2).mean() + (1 - share) * mean_square[c]
            y = (values - mu) / np.sqrt(s - mu**2 + eps) * weight[c] + bias[c]
            out[n, c] = np.where(y > 0, y, slope * y)
    return out


def results(function, tensors, dtype=torch.float64, seed=10):
    """The result, the gradients of all tensors, and the gradients of those, of the incoming gradient too. What comes in
    as gradients is rounded to ``dtype``, so that another one gets the same values."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    gs = [sample(y.shape, dtype, seed=seed).to(y).requires_grad_() for y in outs]
    first = grad(outs, leaves, gs, create_graph=True)
    hs = [sample(f.shape, dtype, seed=seed + 1 + i).to(f) for i, f in enumerate(first)]
    second = grad(first, [*leaves, *gs], hs, allow_unused=True)
    return [*outs, *first, *(torch.zeros_like(t) if s is None else s for s, t in zip(second, [*leaves, *gs]))]


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("activation", SLOPES)
@pytest.mark.parametrize("count", [None, 1, 64])
def test_against_the_definition(count, activation, implementation):
    x, v = sample((5, 3, 4, 6)), vectors(3)
    out = GF.virtual_batch_norm(x, *v[:2], count, *v[2:], activation=activation, implementation=implementation)
    arrays = [t.numpy() for t in v]
    expected = definition(x.numpy(), *arrays[:2], count, *arrays[2:], 1e-5, SLOPES[activation])
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", None])
def test_reference_batch_norm_of_itself_is_batch_norm(implementation):
    x, (_, _, weight, bias) = sample((8, 5, 4, 3)), vectors(5)
    statistics = GF.virtual_batch_norm_statistics(x, implementation=implementation)
    np.testing.assert_allclose(statistics[0].numpy(), x.numpy().mean((0, 2, 3)), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(statistics[1].numpy(), (x.numpy() ** 2).mean((0, 2, 3)), rtol=1e-12)

    def ours(x, weight, bias):
        mean, mean_square = GF.virtual_batch_norm_statistics(x, implementation=implementation)
        return GF.virtual_batch_norm(x, mean, mean_square, None, weight, bias, implementation=implementation)

    def theirs(x, weight, bias):
        return torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)

    for mine, right in zip(results(ours, [x, weight, bias]), results(theirs, [x, weight, bias])):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_order(shape, memory_format, dtype):
    count, activation = ((None, "relu"), (3, "leaky_relu"), (20, None))[sum(shape) % 3]
    tensors = [sample(shape, dtype, memory_format), *vectors(shape[1], dtype)]
    share = 0.0 if count is None else 1 / (count + 1)

    def ours(x, mean, mean_square, weight, bias):
        return GF.virtual_batch_norm(x, mean, mean_square, count, weight, bias, activation=activation)

    def plain(x, mean, mean_square, weight, bias):
        return reference(x, mean, mean_square, share, weight, bias, 1e-5, SLOPES[activation])

    mine = results(ours, tensors, dtype)
    assert gankern.last_implementation("virtual_batch_norm") == COMPILED
    check(mine, results(plain, tensors, dtype), results(plain, [t.double() for t in tensors], dtype), tensors[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_every_order(shape, memory_format, dtype):
    x = sample(shape, dtype, memory_format)

    def plain(x):
        x = x.double().transpose(0, 1).flatten(1)
        return x.mean(1), x.square().mean(1)

    mine, exact = results(GF.virtual_batch_norm_statistics, [x], dtype), results(plain, [x.double()], dtype)
    for value, right in zip(mine, exact):
        assert value.shape == right.shape
        eps = torch.finfo(torch.float32 if value.dtype == torch.float64 != dtype else value.dtype).eps
        assert (value.double() - right).abs().max() <= 8 * eps * math.sqrt(x[0].numel()) * right.abs().max() + 1e-300


def check(mine, plain, exact, x):
    for value, theirs, right in zip(mine, plain, exact):
        assert value.dtype == theirs.dtype and value.shape == right.shape
        error, plain_error = ((y.double() - right).abs().max().item() for y in (value, theirs))
        # Gradients of y's are of size 1, and a channel's sums of them are as long as its examples.
        scale = max(right.abs().max().item(), 1.0)
        # In fp64 plain PyTorch is the exact result itself, with an error that cannot be seen.
        units = 8 if x.dtype == torch.float64 else 2
        accumulation = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        floor = units * (accumulation * math.sqrt(x.numel()) + torch.finfo(x.dtype).eps) * scale
        assert error <= 2 * plain_error + floor


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(("count", "activation"), [(3, "leaky_relu"), (None, None), (1, "relu")])
def test_gradcheck(count, activation, memory_format):
    x = sample((3, 4, 3, 2), memory_format=memory_format)
    tensors = [t.requires_grad_() for t in (x, *vectors(4))]

    def function(x, mean, mean_square, weight, bias):
        return GF.virtual_batch_norm(x, mean, mean_square, count, weight, bias, activation=activation)

    assert gradcheck(function, tensors) and gradgradcheck(function, tensors)
    assert gradcheck(GF.virtual_batch_norm_statistics, tensors[:1])
    assert gradgradcheck(GF.virtual_batch_norm_statistics, tensors[:1])


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
# The last one is large enough to be written past the caches, and an example alone is not.
@pytest.mark.parametrize("shape", [(9, 40, 16, 15), (16, 3, 3, 3), (9, 130, 65, 66), (9, 64, 88, 88)])
def test_an_example_does_not_depend_on_its_batch(shape, memory_format):
    x = sample(shape, torch.float32, memory_format)
    v, g = vectors(shape[1]), sample(shape, torch.float32, memory_format, seed=5)

    def run(x, g):
        x = x.detach().requires_grad_()
        out = GF.virtual_batch_norm(x, *v[:2], 16, *v[2:], activation="leaky_relu")
        return [out.detach(), *grad(out, x, g)]

    whole = run(x, g)
    for n in (0, 4, 8):
        for part in (slice(n, n + 1), slice(max(n - 1, 0), n + 1)):
            alone = run(x[part].contiguous(memory_format=memory_format), g[part])
            assert all(torch.equal(a[-1], b[n]) for a, b in zip(alone, whole))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("implementation", ["reference", None])
def test_large_mean(memory_format, implementation):
    """Mean 1e4 and standard deviation 1 in float32."""
    x = (1e4 + sample((6, 5, 33, 32), memory_format=memory_format)).float()
    mean, mean_square = GF.virtual_batch_norm_statistics(x, implementation=implementation)
    exact = x.double().var((0, 2, 3), correction=0)
    assert mean.dtype == mean_square.dtype == torch.float64
    assert ((mean_square - mean**2) / exact - 1).abs().max() < 1e-5
    for count in (None, 1, 6):
        out = GF.virtual_batch_norm(x, mean, mean_square, count, eps=0.0, implementation=implementation).double()
        right = reference(x.double(), mean, mean_square, 0 if count is None else 1 / (count + 1), None, None, 0.0, 1.0)
        assert ((out.var((2, 3)) / right.var((2, 3))) - 1).abs().max() < 1e-3
        assert (out - right).abs().max() < 1e-5 * right.abs().max()


def test_own_variance_far_from_the_reference():
    """The sums of an example are relative to the reference mean: what that loses is not to be seen in the result."""
    x = (1e4 + sample((2, 3, 40, 40))).float()
    mean, mean_square = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    exact = reference(x.double(), mean, mean_square, 0.5, None, None, 1e-5, 1.0)
    assert (GF.virtual_batch_norm(x, mean, mean_square, 1).double() - exact).abs().max() < 1e-6 * exact.abs().max()


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.data())
def test_any_strides(data):
    shape = [data.draw(st.integers(1, 5)) for _ in range(4)]
    order = data.draw(st.permutations(range(4)))
    steps = [data.draw(st.integers(1, 2)) for _ in range(4)]
    base = torch.randn([shape[d] * steps[d] for d in order], dtype=torch.float64)
    base = base.permute([order.index(d) for d in range(4)])
    x = base[tuple(slice(None, None, step) for step in steps)]
    wide = [torch.stack([v, v], 1)[:, 0] for v in vectors(shape[1])]
    before = base.clone()
    mine = results(lambda x, m, s, w, b: GF.virtual_batch_norm(x, m, s, 2, w, b), [x, *wide])
    right = results(lambda x, m, s, w, b: reference(x, m, s, 1 / 3, w, b, 1e-5, 1.0), [x, *wide])
    for a, b in zip(mine, right):
        torch.testing.assert_close(a, b)
    assert torch.equal(base, before)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_memory_format_and_mixed_dtypes(memory_format):
    x = sample((2, 3, 5, 6), torch.bfloat16, memory_format).requires_grad_()
    mean, mean_square = vectors(3)[:2]
    weight, bias = (v.float().requires_grad_() for v in vectors(3)[2:])
    out = GF.virtual_batch_norm(x, mean, mean_square, 3, weight, bias)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=memory_format)
    grads = grad(out.sum(), [x, weight, bias])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    assert grads[0].is_contiguous(memory_format=memory_format)


def test_only_what_is_needed():
    x, v = sample((2, 3, 4)), vectors(3)
    weight = v[2].clone().requires_grad_()
    out = GF.virtual_batch_norm(x, *v[:2], 3, weight)
    full = [x.clone().requires_grad_(), weight]
    expected = grad(GF.virtual_batch_norm(full[0], *v[:2], 3, weight).square().sum(), full)[1]
    torch.testing.assert_close(grad(out.square().sum(), weight)[0], expected)


def test_special_values():
    v = vectors(2, torch.float32)
    x = torch.randn(3, 2, 4)
    x[1, 0, 2] = float("nan")
    out = GF.virtual_batch_norm(x, *v[:2], 3, *v[2:], activation="relu")
    assert out[1, 0].isnan().all() and out[1, 1].isfinite().all() and out[[0, 2]].isfinite().all()
    infinite = torch.tensor([[[-math.inf, 1.0]]])
    out = GF.virtual_batch_norm(infinite, torch.zeros(1), torch.ones(1), None, activation="relu")
    assert out[0, 0, 0] == 0 and out[0, 0, 1] > 0
    half = torch.full((2, 1, 64), 3e4, dtype=torch.float16)
    half[:, :, ::2] *= -1
    statistics = GF.virtual_batch_norm_statistics(half)
    assert GF.virtual_batch_norm(half, *statistics, 2).abs().max() == 1
    # A mean of squares that rounding left below the squared mean: a variance of 0, and no NaN.
    out = GF.virtual_batch_norm(torch.ones(2, 1, 3), torch.ones(1), torch.full((1,), 0.99), 3)
    assert out.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4, 3, 0, 4), (0, 2), (2, 0, 3)])
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.ones(shape[1], requires_grad=True)
    out = GF.virtual_batch_norm(x, torch.zeros(shape[1]), torch.ones(shape[1]), 3, weight)
    assert out.shape == shape
    of_x, of_weight = grad(out.sum(), [x, weight])
    assert of_x.shape == shape and torch.equal(of_weight, torch.zeros(shape[1]))
    with pytest.raises(ValueError, match="empty batch"):
        GF.virtual_batch_norm_statistics(x)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_threads_do_not_change_bits(memory_format, same_bits):
    tensors = [sample((5, 70, 65, 63), torch.float32, memory_format), *vectors(70)]

    def compute():
        run = results(lambda x, m, s, w, b: GF.virtual_batch_norm(x, m, s, 4, w, b, activation="relu"), tensors)
        return [*run, *results(GF.virtual_batch_norm_statistics, tensors[:1])]

    same_bits(compute)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_opcheck(memory_format):
    if COMPILED == "reference":
        pytest.skip("there are no CPU kernels")
    x, g = (sample((2, 3, 4, 2), torch.float32, memory_format, seed) for seed in (0, 1))
    v, ops = vectors(3, torch.float32), torch.ops.gankern
    options = (0.25, 1e-5, 0.2)
    _, saved = ops.virtual_batch_norm(x, *v, *options)
    moments = ops.virtual_batch_norm_statistics(x)
    for name, arguments in {
        "": (x, *v, *options),
        "_backward": (g, x, *v, saved, *options, True, True),
        "_double_backward": (x, None, None, v[0], None, g, x, *v, saved, *options, True, False, True),
        "_statistics": (x,),
        "_statistics_backward": (moments, x, moments),
        "_statistics_double_backward": (g, moments, x, moments),
    }.items():
        op = getattr(ops, f"virtual_batch_norm{name}").default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compile():
    x = sample((4, 3, 5, 5), torch.float32, torch.channels_last).requires_grad_()
    v = [t.requires_grad_() for t in vectors(3, torch.float32)]

    def step(x, mean, mean_square, weight, bias):
        own = GF.virtual_batch_norm_statistics(x)
        return (
            GF.virtual_batch_norm(x, mean + own[0], mean_square + own[1], 3, weight, bias, activation="relu")
            .square()
            .sum()
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(grad(compiled(x, *v), [x, *v]), grad(step(x, *v), [x, *v])):
        torch.testing.assert_close(a, b)


def test_third_order_raises():
    if COMPILED == "reference":
        pytest.skip("the reference has every order")
    x = sample((4, 2, 3)).requires_grad_()
    out = GF.virtual_batch_norm(x, *vectors(2)[:2], 3)
    first = grad(out.pow(3).sum(), x, create_graph=True)[0]
    second = grad(first.pow(3).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="gradient order 2"):
        grad(second.sum(), x)


X, ONES = torch.ones(2, 3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, torch.ones(2), ONES, 3), {}, r"ref_mean has shape \(2,\); x of shape \(2, 3, 4\) has 3 channels"),
        ((X, ONES, torch.ones(3, 1), 3), {}, "ref_mean_square has shape"),
        ((X, ONES, ONES, 3, torch.ones(4)), {}, "weight has shape"),
        ((X, ONES, ONES, 0), {}, "ref_count is 0; .* at least 1, or None"),
        ((X, ONES, ONES, 3), {"eps": -1e-5}, "eps is -1e-05"),
        ((X, ONES, ONES, 3), {"activation": "gelu"}, "accepted are 'linear', 'relu', 'leaky_relu', None"),
        ((X, ONES, ONES, 3), {"activation": "leaky_relu", "negative_slope": math.inf}, "negative_slope is inf"),
        ((torch.ones(3), ONES, ONES, 3), {}, "it must be"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=f"virtual_batch_norm: .*{message}"):
        GF.virtual_batch_norm(*arguments, **options)


def test_wrong_type():
    with pytest.raises(TypeError, match="virtual_batch_norm: x is int64"):
        GF.virtual_batch_norm(X.long(), ONES, ONES, 3)
    with pytest.raises(TypeError, match="virtual_batch_norm: ref_mean is NoneType"):
        GF.virtual_batch_norm(X, None, ONES, 3)
