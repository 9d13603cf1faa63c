"""Minibatch standard deviation against NumPy's variance and plain PyTorch in fp64."""

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
from gankern.reference.minibatch_stddev import minibatch_stddev as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPILED = "reference" if native.NATIVE_MISSING else "cpu"
FORMATS = [torch.contiguous_format, torch.channels_last]

# Steps are of 4 vectors of up to 16 lanes; the last two have several chunks a group, and one group of two.
SHAPES = [
    ((4, 1), 4, 1),
    ((8, 6, 3, 5), 2, 3),
    ((6, 2, 71), 3, 2),
    ((4, 4, 2, 3, 2), 1, 1),
    ((1, 3, 1, 1), 1, 1),
    ((66, 5, 2, 2), 33, 1),
    ((4, 24, 31, 33), 4, 2),
    ((4, 4, 100, 100), 2, 1),
]


def numpy_stddev(x, group_size, num_channels, layout="strided", unbiased=False, eps=1e-8):
    """The definition, sample by sample."""
    x = np.asarray(x, dtype=np.float64).reshape(len(x), num_channels, -1)
    groups = len(x) // group_size
    of = [i % groups if layout == "strided" else i // group_size for i in range(len(x))]
    result = np.empty((len(x), num_channels))
    for i in range(len(x)):
        variance = x[[j for j in range(len(x)) if of[j] == of[i]]].var(axis=0, ddof=int(unbiased))
        result[i] = np.sqrt(variance + eps).mean(axis=1)
    return result


def sample(shape, dtype=torch.float64, memory_format=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=memory_format) if x.ndim == 4 else x


def results(function, x):
    x = x.detach().requires_grad_()
    out = function(x)
    g = sample(out.shape, seed=1).to(out.dtype).requires_grad_()
    (first,) = grad(out, x, g, create_graph=True)
    return [out, first, *grad(first, [x, g], sample(x.shape, seed=2).to(x.dtype))]


@pytest.mark.parametrize("layout", ["strided", "contiguous"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("implementation", ["reference", None])
def test_against_numpy(layout, unbiased, implementation):
    x = sample((12, 6, 5, 3))
    out = GF.minibatch_stddev(
        x, group_size=4, num_channels=2, layout=layout, unbiased=unbiased, implementation=implementation
    )
    assert torch.equal(out[:, :6], x)
    expected = numpy_stddev(x.numpy(), 4, 2, layout, unbiased)[:, :, None, None]
    np.testing.assert_allclose(out[:, 6:].numpy(), np.broadcast_to(expected, (12, 2, 5, 3)), rtol=1e-13)


@pytest.mark.parametrize("implementation", ["reference", None])
def test_known_values(implementation):
    x = torch.arange(8.0).square().view(8, 1)
    out = GF.minibatch_stddev(x, implementation=implementation)[:, 1]
    torch.testing.assert_close(out, torch.tensor([14.0, math.sqrt(336)] * 4))
    out = GF.minibatch_stddev(x, layout="contiguous", unbiased=True, implementation=implementation)[:, 1]
    torch.testing.assert_close(out, torch.tensor([4.0414520] * 4 + [14.2478068] * 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(("shape", "group", "channels"), SHAPES, ids=str)
def test_every_order(shape, group, channels, memory_format, dtype):
    x = sample(shape, dtype, memory_format)
    # Of one sample all is 0 but the second derivative, 1 / eps; of two samples the terms of the second derivatives cancel
    # but for eps.
    eps = 1e-8 if group > 2 else 0.1
    options = {"group_size": group, "num_channels": channels, "layout": "strided", "eps": eps}
    ours = results(lambda x: GF.minibatch_stddev(x, **options), x)
    assert gankern.last_implementation("minibatch_stddev") == COMPILED
    theirs, exact = (results(lambda x: reference(x, group, channels, True, False, eps), y) for y in (x, x.double()))
    for mine, plain, right in zip(ours, theirs, exact):
        assert mine.dtype == dtype and mine.shape == right.shape
        error, plain_error = ((y.double() - right).abs().max().item() for y in (mine, plain))
        # In fp64 plain PyTorch is the exact result itself, with an error that cannot be seen.
        units = 4 if dtype == torch.float64 else 1
        floor = units * torch.finfo(dtype).eps * math.sqrt(x[0].numel()) * right.abs().max().item()
        assert error <= 2 * plain_error + floor


@pytest.mark.parametrize("layout", ["strided", "contiguous"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_gradcheck(layout, unbiased, memory_format):
    x = sample((6, 4, 3, 2), memory_format=memory_format).requires_grad_()

    def function(x):
        return GF.minibatch_stddev(x, group_size=3, num_channels=2, layout=layout, unbiased=unbiased)

    assert gradcheck(function, x) and gradgradcheck(function, x)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_memory_format(memory_format):
    x = sample((4, 3, 5, 6), torch.float32, memory_format).requires_grad_()
    out = GF.minibatch_stddev(x)
    assert out.is_contiguous(memory_format=memory_format)
    assert grad(out.sum(), x)[0].is_contiguous(memory_format=memory_format)
    volume = torch.randn(4, 3, 2, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    assert GF.minibatch_stddev(volume).is_contiguous(memory_format=torch.channels_last_3d)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.data())
def test_any_strides(data):
    shape = [data.draw(st.sampled_from([2, 4, 6]))] + [data.draw(st.integers(1, 6)) for _ in range(3)]
    order = data.draw(st.permutations(range(4)))
    steps = [data.draw(st.integers(1, 2)) for _ in range(4)]
    base = torch.randn([shape[d] * steps[d] for d in order], dtype=torch.float64)
    base = base.permute([order.index(d) for d in range(4)])
    x = base[tuple(slice(None, None, step) for step in steps)]
    before = base.clone()
    for mine, right in zip(
        results(lambda x: GF.minibatch_stddev(x, group_size=2), x),
        results(lambda x: reference(x, 2, 1, True, False, 1e-8), x),
    ):
        torch.testing.assert_close(mine, right)
    assert torch.equal(base, before)


def test_on_indivisible():
    x = sample((6, 2))
    whole = GF.minibatch_stddev(x, group_size=4, on_indivisible="whole_batch")
    np.testing.assert_allclose(whole[:, 2:].numpy(), numpy_stddev(x.numpy(), 6, 1))
    divisor = GF.minibatch_stddev(x, group_size=4, on_indivisible="largest_divisor")
    np.testing.assert_allclose(divisor[:, 2:].numpy(), numpy_stddev(x.numpy(), 3, 1))
    smaller = GF.minibatch_stddev(x, group_size=16)
    assert torch.equal(smaller, whole)


@pytest.mark.parametrize("value", [1e30, 1e-30])
def test_extreme_values(value):
    x = value * sample((4, 2, 3), torch.float32)
    torch.testing.assert_close(GF.minibatch_stddev(x), reference(x, 4, 1, True, False, 1e-8))


def test_half_precision_does_not_overflow():
    x = torch.tensor([-300.0, 300.0], dtype=torch.float16).view(2, 1).repeat(2, 5)
    assert torch.equal(GF.minibatch_stddev(x)[:, 5], torch.full((4,), 300.0, dtype=torch.float16))


def test_nan_stays_in_its_group():
    x = sample((8, 2, 3), torch.float32)
    x[1, 0, 0] = float("nan")
    out = GF.minibatch_stddev(x)[:, 2, 0]
    assert out[1::2].isnan().all() and out[0::2].isfinite().all()


def test_equal_samples_have_gradient_zero():
    x = torch.ones(4, 3, 2, requires_grad=True)
    out = GF.minibatch_stddev(x)
    torch.testing.assert_close(out[:, 3], torch.full((4, 2), 1e-4))
    assert not grad(out[:, 3].sum(), x)[0].any()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4, 3, 0, 4), (0, 2)])
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    out = GF.minibatch_stddev(x)
    assert out.shape == (shape[0], shape[1] + 1, *shape[2:])
    assert grad(out.sum(), x)[0].shape == shape


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_threads_do_not_change_bits(memory_format, same_bits):
    x = sample((8, 24, 65, 63), torch.float32, memory_format)
    same_bits(lambda: results(GF.minibatch_stddev, x))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_opcheck(memory_format):
    if COMPILED == "reference":
        pytest.skip("there are no CPU kernels")
    x = sample((4, 6, 3, 2), torch.float32, memory_format)
    options = (2, 2, True, False, 1e-8)
    grad_out = torch.randn(4, 8, 3, 2).contiguous(memory_format=memory_format)
    ops, utils = torch.ops.gankern, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.minibatch_stddev.default, (x, *options), test_utils=utils)
    torch.library.opcheck(ops.minibatch_stddev_backward.default, (grad_out, x, *options), test_utils=utils)
    torch.library.opcheck(ops.minibatch_stddev_double_backward.default, (x, grad_out, x, *options), test_utils=utils)


def test_compile():
    x = sample((4, 3, 5, 5), torch.float32, torch.channels_last).requires_grad_()

    def step(x):
        return GF.minibatch_stddev(x).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(grad(compiled(x), x), grad(step(x), x))


def test_third_order_raises():
    if COMPILED == "reference":
        pytest.skip("the reference has every order")
    x = sample((4, 2)).requires_grad_()
    first = grad(GF.minibatch_stddev(x).pow(3).sum(), x, create_graph=True)[0]
    second = grad(first.pow(3).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="gradient order 2"):
        grad(second.sum(), x)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (torch.ones(6, 2),),
            {"group_size": 4},
            "batch of 6 is not divisible by group_size 4; .*largest_divisor.*whole_batch",
        ),
        ((torch.ones(4, 6),), {"num_channels": 4}, "num_channels is 4; it must divide the 6 channels"),
        ((torch.ones(4, 6),), {"group_size": 0}, "group_size is 0"),
        ((torch.ones(4),), {}, "x has shape"),
        ((torch.ones(4, 2),), {"eps": -1.0}, "eps is -1.0"),
        ((torch.ones(4, 2),), {"eps": float("nan")}, "eps is nan"),
        ((torch.ones(4, 2),), {"layout": "other"}, "accepted are 'strided', 'contiguous'"),
        ((torch.ones(4, 2),), {"on_indivisible": "ignore"}, "accepted are 'raise', 'largest_divisor', 'whole_batch'"),
        ((torch.ones(4, 2),), {"group_size": 1, "unbiased": True}, "unbiased variance needs groups of 2"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=f"minibatch_stddev: .*{message}"):
        GF.minibatch_stddev(*arguments, **options)


@pytest.mark.parametrize("x", [torch.ones(4, 2, dtype=torch.int64), [1.0]])
def test_wrong_type(x):
    with pytest.raises(TypeError, match="minibatch_stddev: x is"):
        GF.minibatch_stddev(x)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("group_size", [2, 4])
def test_second_order_of_samples_that_are_close(group_size, unbiased):
    """What the mean loses in single precision is of the differences' size there: it is taken off them again."""
    x = (1 + 0.05 * torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))).float()
    h = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(1))

    def gradients(x, h, implementation):
        x = x.clone().requires_grad_()
        y = GF.minibatch_stddev(x, group_size=group_size, unbiased=unbiased, implementation=implementation)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return first.detach().double(), torch.autograd.grad((first * h).sum(), x)[0].double()

    right = gradients(x.double(), h.double(), "reference")
    for ours, plain, exact in zip(gradients(x, h, None), gradients(x, h, "reference"), right):
        error, theirs = ((g - exact).abs().max().item() for g in (ours, plain))
        assert error <= 2 * theirs + 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
