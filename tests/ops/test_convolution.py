"""The convolution engine against torch's direct convolution in fp64, and its own rows against each other never."""

import contextlib
import itertools
import json
import math
from functools import partial

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import gankern
import gankern.functional as GF
from gankern.core import devices
from gankern.core.native import NATIVE_MISSING, python_gradients
from gankern.ops import convolution as ops
from gankern.ops import convolution_choice as choice

native = pytest.mark.skipif(bool(NATIVE_MISSING), reason="needs the native library")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def upsample(x, w, b=None):
    return F.conv2d(F.interpolate(x, scale_factor=2), w, b, padding=1)


def downsample(x, w, b=None):
    return F.avg_pool2d(F.conv2d(x, w, b, padding=1), 2)


# kind: (ours, torch's, taps, weight is [in, out], least height and width, precisions with a row of their own)
KINDS = {
    "upsample": (GF.upsample_conv2d, upsample, 3, False, 1, ["highest"]),
    "downsample": (GF.conv2d_downsample, downsample, 3, False, 2, ["highest"]),
    "same": (
        lambda x, w, b=None, **options: GF.conv2d(x, w, b, padding=1, **options),
        lambda x, w, b=None: F.conv2d(x, w, b, padding=1),
        3,
        False,
        1,
        ["highest", "high"],
    ),
    **{
        name: (
            lambda x, w, b=None, p=padding, **options: GF.conv2d(x, w, b, padding=p, **options),
            lambda x, w, b=None, p=padding: F.conv2d(x, w, b, padding=p),
            taps,
            False,
            2,
            precisions,
        )
        for name, taps, padding, precisions in (
            ("pointwise", 1, 0, ["highest"]),
            ("same_of_four", 4, 1, ["highest", "high"]),
            ("same_of_five", 5, 2, ["highest"]),
            ("same_of_seven", 7, 3, ["highest"]),
            ("same_of_nine", 9, 4, ["highest"]),
        )
    },
    "strided": (
        lambda x, w, b=None, **options: GF.conv2d(x, w, b, 2, 1, **options),
        lambda x, w, b=None: F.conv2d(x, w, b, 2, 1),
        4,
        False,
        2,
        ["highest", "medium"],
    ),
    "transposed": (
        lambda x, w, b=None, **options: GF.conv_transpose2d(x, w, b, 2, 1, **options),
        lambda x, w, b=None: F.conv_transpose2d(x, w, b, 2, 1),
        4,
        True,
        1,
        ["highest", "medium"],
    ),
    "strided_of_three": (
        lambda x, w, b=None, **options: GF.conv2d(x, w, b, 2, 1, **options),
        lambda x, w, b=None: F.conv2d(x, w, b, 2, 1),
        3,
        False,
        1,
        ["highest"],
    ),
    "transposed_of_three": (
        lambda x, w, b=None, **options: GF.conv_transpose2d(x, w, b, 2, 1, 1, **options),
        lambda x, w, b=None: F.conv_transpose2d(x, w, b, 2, 1, 1),
        3,
        True,
        1,
        ["highest"],
    ),
    **{
        mode: (
            lambda x, w, b=None, mode=mode, **options: GF.conv2d(x, w, b, padding=1, padding_mode=mode, **options),
            lambda x, w, b=None, mode=mode: F.conv2d(F.pad(x, (1, 1, 1, 1), mode), w, b),
            3,
            False,
            2,
            ["highest", "high"],
        )
        for mode in ("reflect", "replicate")
    },
}
BORDERED = {"reflect": ("same", 1), "replicate": ("same", 2)}  # the engine's kind, and what stands around the image
# How often the error of direct convolution a precision may make, in the forward and in gradients.
ALLOWED = {"highest": 4, "high": 16, "medium": 32}


def tensors(kind, n, c, d, h, w, dtype=torch.float64, memory_format=torch.contiguous_format, seed=0):
    """x, weight, bias."""
    taps, swap = KINDS[kind][2:4]
    generator = torch.Generator().manual_seed(seed)

    def values(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    x = values(n, c, h, w).contiguous(memory_format=memory_format)
    weight = values(*((c, d) if swap else (d, c)), taps, taps, scale=1 / (taps * math.sqrt(c)))
    return [t.requires_grad_() for t in (x, weight, values(d))]


def derivatives(function, inputs, dtype):
    """Result, gradients, and gradients of gradients."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    y = function(*inputs)
    generator = torch.Generator().manual_seed(5)

    def like(t):
        values = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        return values.to(inputs[0].dtype if dtype != torch.float64 else torch.float32).to(t.dtype)

    g = like(y).requires_grad_()
    first = grad(y, inputs, g, create_graph=True)
    second = grad(sum((a * like(a)).sum() for a in first[:2]), [*inputs[:2], g])
    return [t.detach() for t in (y, *first, *second)]


def assert_close(kind, inputs, precision="highest", **options):
    ours, theirs = KINDS[kind][:2]
    dtype = inputs[0].dtype
    with gankern.convolution_precision(precision):
        mine = derivatives(lambda *t: ours(*t, **options), inputs, dtype)
    plain = derivatives(theirs, inputs, dtype)
    exact = derivatives(theirs, inputs, torch.float64)
    length = inputs[0].numel() / max(1, min(inputs[0].shape[:2]))
    for a, b, right in zip(mine, plain, exact):
        assert a.shape == right.shape and a.dtype == dtype
        if right.numel() == 0:
            continue
        scale = max(1.0, right.abs().max().item())  # terms are around 1, also where they cancel
        accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        floor = scale * (torch.finfo(dtype).eps + ALLOWED[precision] * accumulation * math.sqrt(length))
        bound = ALLOWED[precision] * (b.double() - right).abs().max().item() + floor
        error = (a.double() - right).abs().max().item()
        assert error <= bound, (kind, precision, tuple(a.shape), error, bound)


SHAPES = [(1, 1, 1, 2, 2), (2, 3, 5, 5, 7), (2, 17, 33, 9, 6), (1, 40, 70, 4, 13), (5, 2, 3, 31, 2)]


@native
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_in_every_dtype(kind, dtype, memory_format):
    for shape, precision in itertools.product(SHAPES, KINDS[kind][5]):
        assert_close(kind, tensors(kind, *shape, dtype, memory_format), precision, implementation="cpu")
        assert gankern.last_implementation("convolution") == "cpu"


@native
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.sampled_from(list(KINDS)),
    st.integers(1, 4),
    st.integers(1, 35),
    st.integers(1, 35),
    st.integers(2, 19),
    st.integers(2, 19),
    st.sampled_from(FORMATS),
)
def test_any_shape(kind, n, c, d, h, w, memory_format):
    for precision in KINDS[kind][5]:
        assert_close(kind, tensors(kind, n, c, d, h, w, torch.float32, memory_format), precision, implementation="cpu")


@native
@pytest.mark.parametrize(
    ("kind", "padding"),
    [*(("same", p) for p in (0, 1, 2)), *(("same_of_four", p) for p in range(4)), ("same_of_five", 0),
     ("same_of_seven", 6), ("same_of_nine", 2)],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_paddings(kind, padding, precision):
    x, w, b = tensors(kind, 2, 5, 6, 6, 9, torch.float32)
    with gankern.convolution_precision(precision):
        ours = derivatives(lambda *t: GF.conv2d(*t, padding=padding, implementation="cpu"), (x, w, b), torch.float32)
    right = derivatives(lambda *t: F.conv2d(*t, padding=padding), (x, w, b), torch.float64)
    for a, r in zip(ours, right):
        torch.testing.assert_close(a.double(), r, rtol=0, atol=2e-5 * r.abs().max().item())


@native
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_three_orders(kind):
    # A check's cost is the square of the weight's: few channels around large kernels.
    inputs = tensors(kind, 2, *((2, 3) if KINDS[kind][2] < 5 else (1, 2)), 4, 3)

    def function(*t):
        return KINDS[kind][0](*t, weight_scale=0.7, implementation="cpu")

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)

    def gradient(x, w):
        return grad(function(x, w, None).square().sum(), (x, w), create_graph=True)

    assert gradgradcheck(gradient, inputs[:2])


@native
@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind):
    x, w, b = (t.detach() for t in tensors(kind, 2, 6, 4, 6, 8, torch.float32))
    right = KINDS[kind][1](x, w, b)
    wide = torch.zeros(4, 12, 12, 16)
    wide[::2, ::2, ::2, ::2] = x
    for variant in (
        wide[::2, ::2, ::2, ::2],
        wide.contiguous(memory_format=torch.channels_last)[::2, :, ::2, ::2][:, ::2],
        x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        x.contiguous(memory_format=torch.channels_last),
    ):
        y = KINDS[kind][0](variant, w, b, implementation="cpu")
        torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
    for weight in (
        w.contiguous(memory_format=torch.channels_last),
        w.flip(0).flip(0),
        w.transpose(2, 3).transpose(2, 3),
    ):
        y = KINDS[kind][0](x, weight, b, implementation="cpu")
        torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)


@native
@pytest.mark.parametrize("implementation", ["cpu", None])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_format(kind, implementation):
    for memory_format in FORMATS:
        x, w, b = tensors(kind, 2, 24, 32, 8, 8, torch.float32, memory_format)
        y = KINDS[kind][0](x, w, b, implementation=implementation)
        assert y.is_contiguous(memory_format=memory_format)
        assert grad(y, x, torch.ones_like(y))[0].is_contiguous(memory_format=memory_format)


@native
@pytest.mark.parametrize("kind", KINDS)
def test_does_not_depend_on_the_number_of_threads(kind):
    x, w, b = tensors(kind, 5, 33, 40, 12, 10, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(derivatives(lambda *t: KINDS[kind][0](*t, implementation="cpu"), (x, w, b), torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3]))


@native
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_to(kind):
    x, w, b = tensors(kind, 2, 5, 6, 6, 6, torch.float32)
    before = [t.detach().clone() for t in (x, w, b)]
    y = KINDS[kind][0](x, w, b, implementation="cpu")
    g = torch.randn_like(y)
    g_before = g.clone()
    grad(y, (x, w, b), g)
    assert torch.equal(g, g_before) and all(torch.equal(t, o) for t, o in zip((x, w, b), before))


@native
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_tiles(kind, value):
    """In the results of the tiles that direct convolution spreads it to, and in none beyond."""
    x, w, b = (t.detach() for t in tensors(kind, 2, 3, 4, 32, 32, torch.float32))
    x[1, 1, 13, 14] = value
    tiles_of_three = {"strided_of_three": [2], "transposed_of_three": [4], "same_of_four": [4, 3]}
    direct = {kind: [1] for kind in ("pointwise", "same_of_five", "same_of_seven", "same_of_nine")}
    tiles = {**direct, "upsample": [2], "downsample": [1], "strided": [2, 4], "transposed": [4, 8], **tiles_of_three}
    tile = tiles.get(kind, [2, 4])
    hit = ~KINDS[kind][1](x, w, b).isfinite()
    for size, precision in zip(tile, KINDS[kind][5]):
        with gankern.convolution_precision(precision):
            y = KINDS[kind][0](x, w, b, implementation="cpu")
        assert not (hit & y.isfinite()).any()
        # A tile reads at most the inputs around it: one tile more on each side.
        tiles = F.max_pool2d(F.max_pool2d(hit.float(), size, ceil_mode=True), 3, 1, 1)
        allowed = F.interpolate(tiles, scale_factor=size)[..., : hit.shape[2], : hit.shape[3]] > 0
        assert y.isfinite()[~allowed].all()


@native
@pytest.mark.parametrize("kind", KINDS)
def test_huge_values(kind):
    x, w, b = (t.detach() for t in tensors(kind, 1, 4, 4, 8, 8, torch.float32))
    y = KINDS[kind][0](x * 1e30, w, None, implementation="cpu")
    right = KINDS[kind][1](x.double() * 1e30, w.double())
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-5 * right.abs().max().item())


@pytest.mark.parametrize("implementation", ["cpu", "reference", None])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind, implementation):
    if implementation == "cpu" and NATIVE_MISSING:
        pytest.skip("needs the native library")
    x, w, b = tensors(kind, 0, 3, 4, 8, 8, torch.float32)
    y = KINDS[kind][0](x, w, b, implementation=implementation)
    assert y.shape == KINDS[kind][1](x, w, b).shape
    gx, gw, gb = grad(y.sum(), (x, w, b))
    assert gx.shape == x.shape and not gw.any() and not gb.any()


# ---- only what is asked for -----------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts convolutions by what they compute."""

    def __init__(self):
        super().__init__()
        self.images = self.weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.gankern.convolution_row.default or func is torch.ops.aten.convolution.default:
            self.images += 1
        if func is torch.ops.gankern.convolution_row_weight_gradient.default:
            self.weights += 1
        if func is torch.ops.aten.convolution_backward.default:
            mask = args[-1]
            self.images += mask[0]
            self.weights += mask[1]
        return func(*args, **(kwargs or {}))


@native
@pytest.mark.parametrize("implementation", ["cpu", None])
def test_no_weight_gradient_unless_asked_for(implementation):
    """A critic of three layers: its input's gradient, and a gradient penalty written by hand."""
    layers = [tensors("strided", 2, c, d, 8, 8, torch.float32, seed=c) for c, d in ((3, 24), (24, 32), (32, 48))]
    weights = [w for _, w, _ in layers]
    biases = [b for _, _, b in layers]
    x = torch.randn(2, 3, 32, 32, requires_grad=True)

    def critic(x):
        for w, b in zip(weights, biases):
            x = F.leaky_relu(GF.conv2d(x, w, b, 2, 1, implementation=implementation), 0.2)
        return x.mean((1, 2, 3))

    score = critic(x).sum()
    with Count() as count:
        grad(score, x)
    assert (count.images, count.weights) == (3, 0)

    with gankern.fast_double_backward():  # for the LeakyReLU's absent second derivative
        score = critic(x).sum()
        with Count() as count:
            (g,) = grad(score, x, create_graph=True)
        assert (count.images, count.weights) == (3, 0)
        penalty = (g.flatten(1).norm(dim=1) - 1).square().mean()
        with Count() as count:
            grad(penalty, weights)
    # Tangent forward through all layers but the last one's activation, and one weight gradient a layer.
    assert count.weights == 3
    assert count.images <= 3


@native
def test_frozen_weight_and_absent_gradients():
    x, w, b = tensors("same", 2, 4, 5, 6, 6, torch.float32)
    y = GF.conv2d(x, w.detach(), b.detach(), padding=1, implementation="cpu")
    with Count() as count:
        grad(y.sum(), x)
    assert (count.images, count.weights) == (1, 0)
    y = GF.conv2d(x.detach(), w, None, padding=1, implementation="cpu")
    with Count() as count:
        grad(y.sum(), w)
    assert (count.images, count.weights) == (0, 1)
    # The gradient of x does not depend on x.
    y = GF.conv2d(x, w, b, padding=1, implementation="cpu")
    (g,) = grad(y.square().sum() * 0 + y.sum(), x, create_graph=True)
    assert grad(g.sum(), w)[0] is not None
    (g,) = grad(GF.conv2d(x, w, b, padding=1, implementation="cpu").sum(), x, create_graph=True)
    assert grad(g.sum(), x, allow_unused=True)[0] is None


@pytest.mark.parametrize("kind", ["same", "same_of_nine", "strided", "transposed", "upsample", "downsample", "reflect"])
def test_activations_ride(kind):
    """Of the result: values and gradients of both orders are those of the convolution and then the activation, and
    nothing but bias_act comes between."""
    ours, plain = KINDS[kind][:2]
    inputs = tensors(kind, 2, 3, 4, 6, 7)
    for activation, options, right in (
        ("leaky_relu", {}, partial(F.leaky_relu, negative_slope=0.2)),
        ("leaky_relu", {"negative_slope": 0.1}, partial(F.leaky_relu, negative_slope=0.1)),
        ("relu", {}, F.relu),
        ("tanh", {}, torch.tanh),
        ("linear", {}, lambda y: y),
    ):
        mine = derivatives(lambda *t, a=activation, o=options: ours(*t, activation=a, **o), inputs, torch.float64)
        exact = derivatives(lambda *t, f=right: f(plain(*t)), inputs, torch.float64)
        for a, r in zip(mine, exact):
            torch.testing.assert_close(a, r, rtol=1e-10, atol=1e-10)
    x, w, b = (t.detach() for t in inputs)
    torch.testing.assert_close(ours(x, w, activation="relu"), plain(x, w).relu())
    names = {"transposed": "conv_transpose2d", "upsample": "upsample_conv2d", "downsample": "conv2d_downsample"}
    name = names.get(kind, "conv2d")
    for wrong in ("swish", "prelu"):
        with pytest.raises(ValueError, match=f"{name}: activation is '{wrong}'; accepted are 'linear', "):
            ours(x, w, b, activation=wrong)
    for wrong, error in ((float("inf"), ValueError), ("steep", TypeError)):
        with pytest.raises(error, match=f"{name}: negative_slope is "):
            ours(x, w, b, negative_slope=wrong)
    with pytest.raises(ValueError, match=f"{name}: bias has shape"):
        ours(x, w, b[1:], activation="relu")
    with pytest.raises(ValueError, match=f"{name}: .*bias .*float32"):
        ours(x, w, b.float(), activation="relu")


def test_activations_of_one_image_and_under_autocast():
    x, w, b = (t.detach() for t in tensors("same", 2, 3, 4, 6, 7, torch.float32))
    right = F.conv2d(x, w, b, padding=1).relu()
    torch.testing.assert_close(GF.conv2d(x[0], w, b, padding=1, activation="relu"), right[0], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        y = GF.conv2d(x, w, b, padding=1, activation="relu")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), right, rtol=0.05, atol=0.05)


# ---- which one runs -------------------------------------------------------------------------------------


def test_no_row_is_torch():
    x, w = torch.randn(2, 4, 9, 9), torch.randn(6, 4, 6, 6)
    for arguments, options in (
        ((x, w), {"padding": 2}),
        ((x, w), {"stride": 3}),
        ((x, torch.randn(6, 4, 3, 3)), {"padding": 0, "stride": 2}),
        ((x, torch.randn(6, 4, 3, 3)), {"padding": 2, "dilation": 2}),
        ((x, torch.randn(6, 2, 3, 3)), {"padding": 1, "groups": 2}),
        ((x, torch.randn(6, 4, 3, 3)), {"padding": (1, 0)}),
        ((x, torch.randn(6, 4, 4, 4)), {"padding": 0, "stride": 2}),
        ((x[0], torch.randn(6, 4, 3, 3)), {"padding": 1}),
        ((x[:, :, :1, :1], torch.randn(6, 4, 3, 3)), {"padding": 1}),
        ((x, torch.randn(6, 4, 3, 3)), {"padding": "same"}),
        ((x, torch.randn(6, 4, 3, 3)), {"padding": "valid"}),
    ):
        torch.testing.assert_close(
            GF.conv2d(*arguments, **options, weight_scale=0.5),
            F.conv2d(*arguments, **options) / 2,
            rtol=1e-4,
            atol=1e-4,
        )
    GF.conv2d(x, w)
    assert gankern.last_implementation("convolution") == "reference"
    with pytest.raises(ValueError, match="square kernels of 1, 3, 4, 5, 7 or 9 taps of stride 1"):
        GF.conv2d(x, w, implementation="cpu")
    with pytest.raises(ValueError, match="has no 'triton' implementation"):
        GF.conv2d(x, torch.randn(6, 4, 3, 3), padding=1, implementation="triton")


@pytest.mark.parametrize("function", [GF.conv2d, GF.conv_transpose2d, GF.upsample_conv2d], ids=lambda f: f.__name__)
def test_a_bias_beside_a_factor_is_checked_by_the_functions_name(function):
    x, weight = torch.ones(1, 2, 6, 6), torch.ones(2, 2, 3, 3)
    options = {"scale_factor": 3} if function is GF.upsample_conv2d else {"dilation": 2}
    with pytest.raises(ValueError, match=f"{function.__name__}: bias has shape \\(3,\\); it must be \\[2\\]"):
        function(x, weight, torch.ones(3), weight_scale=0.5, **options)


def test_no_row_of_the_others():
    x = torch.randn(2, 4, 6, 6)
    w = torch.randn(4, 3, 3, 3)
    y = GF.conv_transpose2d(x, w, stride=2, padding=1)
    torch.testing.assert_close(y, F.conv_transpose2d(x, w, stride=2, padding=1))
    w = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(GF.conv2d_downsample(x, w), F.avg_pool2d(F.conv2d(x, w, padding=2), 2))
    for scale, mode in ((3, "nearest"), (2, "bilinear"), (1.5, "nearest"), (1, "nearest")):
        y = GF.upsample_conv2d(x, w, scale_factor=scale, mode=mode)
        torch.testing.assert_close(y, F.conv2d(F.interpolate(x, scale_factor=scale, mode=mode), w, padding=2))
        assert gankern.last_implementation("convolution") == "reference"


PRODUCTS = {  # convolutions that are one matrix product: torch's function, of x and a weight, with these options
    "a generator's first layer": (F.conv_transpose2d, (3, 5, 1, 1), (5, 4, 4, 4), {}),
    "of another stride": (F.conv_transpose2d, (3, 5, 1, 1), (5, 4, 2, 3), {"stride": 2, "padding": (0, 0)}),
    "a discriminator's last layer": (F.conv2d, (3, 5, 4, 4), (2, 5, 4, 4), {}),
    "valid": (F.conv2d, (3, 5, 4, 6), (2, 5, 4, 6), {"padding": "valid", "stride": (2, 1)}),
    "of one pixel": (F.conv2d, (3, 5, 1, 1), (7, 5, 1, 1), {"padding": 0}),
}
NO_PRODUCTS = {
    "padded": (F.conv_transpose2d, (3, 5, 1, 1), (5, 4, 4, 4), {"padding": 1}),
    "of a larger result": (F.conv_transpose2d, (3, 5, 1, 1), (5, 4, 2, 2), {"stride": 2, "output_padding": 1}),
    "in groups": (F.conv2d, (3, 4, 4, 4), (2, 2, 4, 4), {"groups": 2}),
    "dilated": (F.conv2d, (3, 5, 7, 7), (2, 5, 4, 4), {"dilation": 2}),
    "of a larger image": (F.conv2d, (3, 5, 5, 4), (2, 5, 4, 4), {}),
    "unbatched": (F.conv2d, (5, 4, 4), (2, 5, 4, 4), {}),
    "no image": (F.conv2d, (0, 5, 4, 4), (2, 5, 4, 4), {}),
}


@pytest.mark.parametrize("nodes", [True, False], ids=["C++", "Python"])
@pytest.mark.parametrize("name", PRODUCTS | NO_PRODUCTS)
def test_one_product(name, nodes, monkeypatch):
    function, image, kernel, options = (PRODUCTS | NO_PRODUCTS)[name]
    ours = getattr(GF, function.__name__)
    torch.manual_seed(0)
    x, w = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (image, kernel))
    transposed = function is F.conv_transpose2d
    b = torch.randn(kernel[1] if transposed else kernel[0], dtype=torch.float64, requires_grad=True)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with contextlib.nullcontext() if nodes else python_gradients():
        for bias in (b, None):
            with Watch():
                y = ours(x, w, bias, **options)
            right = function(x, w, bias, **options)
            torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
            assert y.stride() == right.stride()
        convolved = torch.ops.aten.convolution.default in seen
        assert convolved == (name in NO_PRODUCTS)
        if name in PRODUCTS:
            for bias in (b, None):  # an equalised layer's: tiles would compute sixteen pixels of which one is wanted
                with Watch():
                    seen.clear()
                    y = ours(x, w, bias, weight_scale=0.3, **options)
                assert torch.ops.aten.mm.default in seen and torch.ops.gankern.convolution_row.default not in seen
                right = function(x, w * 0.3, bias, **options)
                torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
                assert y.stride() == right.stride()
            assert gradcheck(lambda *t: ours(*t, weight_scale=0.3, **options), (x, w, b))
            assert gradcheck(lambda *t: ours(*t, **options), (x, w, b))
            assert gradgradcheck(lambda *t: ours(*t, **options), (x, w, b))
        for memory_format in FORMATS if len(image) == 4 else ():
            xs, ws = (t.detach().contiguous(memory_format=memory_format) for t in (x, w))
            y, right = ours(xs, ws, **options), function(xs, ws, **options)
            torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
            assert y.stride() == right.stride()
        for dtype in (torch.bfloat16, torch.float16):
            y, right = (f(x.to(dtype), w.to(dtype), **options) for f in (ours, function))
            assert torch.equal(y, right)  # torch's own
        with pytest.raises(RuntimeError):
            ours(x, w[:, :, :, :, None], **options)
        with gankern.use_implementation("reference"), Watch():
            seen.clear()
            ours(x, w, **options)
            assert torch.ops.aten.convolution.default in seen


CALLS = [  # a call of torch's, and the kind and padding that it is
    (F.conv2d, (6, 5, 3, 3), {"padding": 1}, ("same", 1)),
    (F.conv2d, (6, 5, 3, 3), {"padding": "same"}, ("same", 1)),
    (F.conv2d, (6, 5, 3, 3), {"padding": "valid"}, ("same", 0)),
    (F.conv2d, (6, 5, 3, 3), {"padding": (2, 2), "stride": [1]}, ("same", 2)),
    (F.conv2d, (6, 5, 4, 4), {"padding": 1, "stride": (2, 2)}, ("strided", 1)),
    (F.conv_transpose2d, (5, 6, 4, 4), {"padding": 1, "stride": 2}, ("transposed", 1)),
    (F.conv_transpose2d, (5, 6, 4, 4), {"padding": 1, "stride": 2, "output_padding": 1}, (None, 0)),
    (F.conv_transpose2d, (5, 6, 3, 3), {"padding": 1}, (None, 0)),
    (F.conv2d, (6, 5, 4, 4), {"padding": "same"}, (None, 0)),
    (F.conv2d, (6, 5, 4, 4), {"padding": 1}, ("same_of_four", 1)),
    (F.conv2d, (6, 5, 4, 4), {"padding": 3}, ("same_of_four", 3)),
    (F.conv2d, (6, 5, 4, 4), {"padding": 4}, (None, 0)),
    (F.conv2d, (6, 5, 9, 9), {"padding": "same"}, ("same_of_nine", 4)),
    (F.conv2d, (6, 5, 7, 7), {}, ("same_of_seven", 0)),
    (F.conv2d, (6, 5, 5, 5), {"padding": "valid"}, ("same_of_five", 0)),
    (F.conv2d, (6, 5, 5, 5), {"padding": 2, "stride": 2}, (None, 0)),
    (F.conv2d, (6, 5, 5, 3), {"padding": (2, 1)}, (None, 0)),
    (F.conv2d, (6, 5, 1, 1), {"padding": "same"}, ("pointwise", 0)),
    (F.conv2d, (6, 5, 1, 1), {"padding": 1}, (None, 0)),
    (F.conv2d, (6, 5, 1, 1), {"stride": 2}, (None, 0)),
    (F.conv2d, (6, 5, 6, 6), {"padding": 2}, (None, 0)),
    (F.conv2d, (6, 5, 3, 3), {"padding": (1, 2)}, (None, 0)),
    (F.conv2d, (6, 5, 3, 3), {"padding": 3}, (None, 0)),
    (F.conv2d, (6, 5, 3, 3), {"padding": 1, "dilation": 2}, (None, 0)),
    (F.conv2d, (6, 5, 3, 3), {"padding": 1, "stride": 2}, ("strided_of_three", 1)),
    (F.conv2d, (6, 5, 3, 3), {"padding": 0, "stride": 2}, (None, 0)),
    (F.conv2d, (6, 5, 3, 3), {"padding": 1, "stride": (2, 1)}, (None, 0)),
    (F.conv_transpose2d, (5, 6, 3, 3), {"padding": 1, "stride": 2, "output_padding": 1}, ("transposed_of_three", 1)),
    (F.conv_transpose2d, (5, 6, 3, 3), {"padding": 1, "stride": 2}, (None, 0)),
    (F.conv2d, (5, 1, 3, 3), {"padding": 1, "groups": 5}, (None, 0)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of an even kernel: torch's
@pytest.mark.parametrize(("function", "shape", "options", "right"), CALLS)
def test_which_kind_a_call_is(function, shape, options, right):
    transposed = function is F.conv_transpose2d
    every = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **options}
    assert choice.kind_of(shape, **every, transposed=transposed) == right
    x, weight = torch.randn(2, 5, 8, 8, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    assert getattr(GF, function.__name__)(x, weight, **options).shape == function(x, weight, **options).shape
    if right[0]:
        size = tuple(function(x, weight, **options).shape[2:])
        assert choice.result_size(*right, 8, 8) == size


def test_measured_ways_are_a_file_a_machine(monkeypatch, tmp_path):
    """Kinds of this machine's where it has them, else of another one's; the file says whose it is."""
    files = sorted(choice.WAYS.glob("*.json"))
    assert {choice.WAYS / f"{name}.json" for names in choice.FALLBACKS.values() for name in names} == set(files)
    for file in files:
        assert json.loads(file.read_text())["machine"] == file.stem

    def write(name, **kinds):
        measured = {kind: {"forward": {"contiguous": [[1, 2, 3, {"torch": t}]]}} for kind, t in kinds.items()}
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": name, "measured": measured}))

    def times():
        return {kind: ways[1, 2, 3]["torch"] for (kind, *_), ways in choice.measured_ways.__wrapped__().items()}

    monkeypatch.setattr(choice, "WAYS", tmp_path)
    monkeypatch.setattr(choice, "FALLBACKS", {"AVX2": ("first", "narrow"), "": ("first", "second")})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    write("first", same=0.1, strided=0.1, pointwise=0.1)
    assert times() == {"same": 0.1, "strided": 0.1, "pointwise": 0.1}
    write("second", strided=0.2)
    write(choice.machine(), same=0.3)
    assert times() == {"same": 0.3, "strided": 0.2, "pointwise": 0.1}
    write("narrow", strided=0.4)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert times() == {"same": 0.1, "strided": 0.4, "pointwise": 0.1}  # of no processor of this name


@native
@pytest.mark.parametrize("which", ["forward", "transpose", "weight"])
def test_the_table_holds_for_all_kinds(which):
    measured = {kind for kind, *_ in choice.measured_ways()}
    assert {"upsample", "downsample", "same", "strided", "transposed"} <= measured <= set(choice.KINDS)
    later = {"pointwise": {"panels"}, "same_of_four": {"tiles4"}}  # than the table of AVX-512
    for kind in choice.KINDS.keys() - measured:  # what was not measured is torch's
        assert choice.way_for(kind, which, "highest", False, 64, 64, 4096) == "torch"
    for kind in measured:
        for layout in ("contiguous", "channels_last"):
            for shape, times in choice.measured_ways()[kind, which, layout].items():
                assert all(n > 0 for n in shape) and all(t > 0 for t in times.values())
                assert set(times) <= {*choice.OTHERS, *choice.KINDS[kind].rows}
                # Many channels are not measured for one, large maps for the other.
                rows = set(choice.KINDS[kind].rows) - {"direct", "streamed"} - later.get(kind, set())
                assert {"torch", *rows} <= set(times) and len(times) > 1


@pytest.mark.parametrize("which", choice.PASSES)
def test_a_cyclegan_of_256_pixels_was_measured_with_avx2(which):
    """Its last layer, which torch takes two to five times as long for."""
    measured = choice.read_ways(choice.WAYS / "amd-epyc-avx2.json")
    for layout in ("contiguous", "channels_last"):
        times = measured["same_of_seven", which, layout][64, 3, 256 * 256]
        assert min(times, key=times.get) != "torch"


def test_small_products_were_measured():
    """Near a single small image of few channels, and near a small batch of usual ones, of every kind."""
    for kind in choice.KINDS:
        for which, layout in itertools.product(choice.PASSES, ("contiguous", "channels_last")):
            known = choice.measured_ways()[kind, which, layout]
            for shape in ((16, 16, 4 * 8 * 8), (64, 128, 4 * 4 * 4), (64, 128, 4 * 4)):
                assert min(choice._distance(shape, measured) for measured in known) <= 3, (kind, which, shape)


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *DTYPES[:1]])
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("images", FORMATS)
def test_a_weight_that_streams_by(images, weights, dtype):
    """Rows 15 and 16 against fp64: maps of one to 80 pixels, odd sizes, channels that fill no tile, no image, and a
    weight that is large enough to be written past the caches."""
    row, row_weight = torch.ops.gankern.convolution_row, torch.ops.gankern.convolution_row_weight_gradient
    bound = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 1e-2)
    for n, c, d, h, w in (
        (1, 3, 5, 2, 2),
        (1, 1, 1, 3, 2),
        (2, 7, 9, 5, 7),
        (5, 40, 33, 8, 8),
        (0, 3, 4, 4, 4),
        (1, 520, 516, 2, 4),
    ):
        if c > 500 and (dtype != torch.float32 or images != weights):
            continue
        x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=images)
        weight = torch.randn(d, c, 4, 4).to(dtype).contiguous(memory_format=weights)
        bias = torch.randn(d).to(dtype)
        right = F.leaky_relu(F.conv2d(x.double(), weight.double(), bias.double(), 2, 1), 0.2)
        g = torch.randn(right.shape).to(dtype).contiguous(memory_format=images)
        options = [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        right_x, right_weight, _ = torch.ops.aten.convolution_backward(
            g.double(), x.double(), weight.double(), None, *options
        )
        for ours, reference in (
            (row(x, weight, bias, 15, h // 2, w // 2, 1, False, False, 1.0, 0.2, 0), right),
            (row(g, weight, None, 16, h, w, 1, False, True, 1.0, 1.0, 0), right_x),
            (row(g, weight, None, 16, h, w, 1, False, True, 0.5, 1.0, 0), right_x / 2),
            (row_weight(x, g, 15, 1, False, False, 1.0, 0), right_weight),
            (row_weight(g, x, 16, 1, False, True, 0.5, 0), right_weight / 2),
        ):
            assert ours.dtype == dtype
            largest = max(1.0, reference.abs().max().item()) if reference.numel() else 1.0
            torch.testing.assert_close(ours.double(), reference, rtol=0, atol=bound * largest)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradients", FORMATS)
@pytest.mark.parametrize("images", FORMATS)
def test_pixels_in_panels(images, gradients, dtype):
    """Row 17 against fp64: no image, one pixel, maps and channels that fill no panel, more than a block of either, and
    images and gradients that lie in different orders."""
    row, row_weight = torch.ops.gankern.convolution_row, torch.ops.gankern.convolution_row_weight_gradient
    bound = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 1e-2)
    for n, c, d, h, w in (
        (0, 3, 4, 4, 4),
        (1, 1, 1, 1, 1),
        (1, 3, 5, 1, 3),
        (3, 7, 9, 5, 7),
        (2, 33, 40, 3, 5),
        (1, 5, 3, 61, 53),
        (2, 150, 70, 20, 13),
        (1, 520, 12, 4, 4),
        (1, 12, 520, 4, 4),
    ):
        x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=images)
        g = torch.randn(n, d, h, w).to(dtype).contiguous(memory_format=gradients)
        weight, bias = torch.randn(d, c, 1, 1).to(dtype), torch.randn(d).to(dtype)
        right = F.leaky_relu(F.conv2d(x.double(), weight.double() / 2, bias.double()), 0.2)
        right_x = F.conv2d(g.double(), weight.double().transpose(0, 1))
        right_weight = torch.einsum("nchw,ndhw->dc", x.double(), g.double())[..., None, None]
        for ours, reference in (
            (row(x, weight, bias, 17, h, w, 0, False, False, 0.5, 0.2, 0), right),
            (row(g, weight, None, 17, h, w, 0, True, True, 1.0, 1.0, 0), right_x),
            (row_weight(x, g, 17, 0, False, False, 1.0, 0), right_weight),
            (row_weight(g, x, 17, 0, False, True, 0.5, 0), right_weight / 2),
        ):
            assert ours.dtype == dtype and ours.shape == reference.shape
            largest = max(1.0, reference.abs().max().item()) if reference.numel() else 1.0
            torch.testing.assert_close(ours.double(), reference, rtol=0, atol=bound * largest)


@native
def test_a_value_that_is_not_finite_stays_in_its_pixel():
    """The panel's other pixels, and what fills it up, are not touched: exactly torch's results are not finite."""
    x, w = torch.randn(2, 5, 7, 9), torch.randn(6, 5, 1, 1)
    x[1, 2, 3, 4], x[0, 0, 6, 8] = math.nan, math.inf
    ours, right = GF.conv2d(x, w, implementation="cpu"), F.conv2d(x, w)
    assert torch.equal(ours.isnan(), right.isnan()) and torch.equal(ours.isinf(), right.isinf())


@native
@pytest.mark.parametrize("recorded_by", [contextlib.nullcontext, python_gradients], ids=["C++", "Python"])
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("images", FORMATS)
def test_results_of_panels_lie_as_torchs_do(images, weights, recorded_by, monkeypatch):
    """Of a 1x1 kernel only the strides of dimensions of size 1 tell that it is channels_last."""
    monkeypatch.setattr(choice, "way_for", lambda *args: "panels")
    channels = 23 if recorded_by is python_gradients else 29  # nodes keep the ways of shapes that they have met
    x = torch.randn(3, channels, 7, 5).contiguous(memory_format=images).requires_grad_()
    weight = torch.randn(31, channels, 1, 1).to(memory_format=weights).requires_grad_()
    found = []
    for function in (GF.conv2d, F.conv2d):
        with recorded_by():
            y = function(x, weight)
            found.append((y, *grad(y, (x, weight), torch.ones_like(y))))
    for mine, other in zip(*found):
        assert mine.shape == weight.shape or mine.stride() == other.stride()
        torch.testing.assert_close(mine, other)


@native
def test_few_pixels_go_the_streamed_way():
    """The deep layers of a U-Net, where reading the weight is all there is."""
    for which, layout in itertools.product(choice.PASSES, (False, True)):
        for pixels in (1, 4):
            assert choice.way_for("strided", which, "highest", layout, 512, 512, pixels) == "streamed"
            assert choice.way_for("transposed", which, "highest", layout, 1024, 512, pixels) == "streamed"
        assert choice.way_for("strided", which, "highest", layout, 128, 256, 16 * 64) != "streamed"


def test_what_the_ways_save(monkeypatch):
    """Of the nearest shape; no more for more products, less for fewer; of what resamples against both steps."""
    measured = {("same", which, "contiguous"): {(8, 8, 64): {"torch": 0.5, "tiles2": 0.2}} for which in choice.PASSES}
    measured["upsample", "forward", "contiguous"] = {(8, 8, 64): {"torch": 0.1, "reference": 0.9, "nine": 0.4}}
    monkeypatch.setattr(choice, "measured_ways", lambda: measured)
    for function in (choice.saved, choice.way_for, choice.is_known):
        function.cache_clear()
    try:
        assert choice.saved("same", "highest", False, 8, 8, 64, False) == pytest.approx(300)
        assert choice.saved("same", "highest", False, 8, 8, 64, True) == pytest.approx(900)
        assert choice.saved("same", "highest", False, 16, 16, 640, False) == pytest.approx(300)
        assert choice.saved("same", "highest", False, 8, 8, 16, False) == pytest.approx(75)
        assert choice.saved("same", "highest", True, 8, 8, 64, True) == 0  # never measured: torch's
        assert choice.saved("same", "highest", False, 8, 8, 0, True) == 0  # no image
        assert choice.saved("upsample", "highest", False, 8, 8, 64, False) == pytest.approx(500)
        assert choice.saved("upsample", "high", False, 8, 8, 64, False) == pytest.approx(800)
    finally:
        for function in (choice.saved, choice.way_for, choice.is_known):
            function.cache_clear()


def test_the_nearest_shape_is_looked_for_once(monkeypatch):
    """Networks that are given ever new sizes ask for each of them, for all passes and memory formats."""
    asked, of_pixels = [], choice._of_pixels
    monkeypatch.setattr(choice, "_of_pixels", lambda *shapes: (asked.append(shapes), of_pixels(*shapes))[1])
    choice.rows_for("same", "highest", 17, 19, 123456)
    choice.saved("same", "highest", False, 17, 19, 123456, True)
    measured = choice.measured_ways()["same", "forward", "contiguous"]
    assert 0 < len(asked) < len(measured) / 2  # those whose channels alone are not farther


@pytest.mark.parametrize("kind", ["same", "pointwise", "strided"])
def test_the_nearest_shape_is_the_nearest(kind):
    measured = tuple(choice.measured_ways()[kind, "forward", "contiguous"])
    for shape in itertools.product((1, 3, 8, 48, 1024), (1, 8, 64, 100), (1, 60, 2048, 10**6)):
        assert choice._nearest(measured, shape) == min(measured, key=lambda each: choice._distance(shape, each))


def test_a_large_transposed_weight_gradient_by_torch():
    """oneDNN's kernel refuses a gradient of another size than the least that there can be, unless it is told."""
    x, w, g = torch.randn(1, 128, 4, 4), torch.randn(128, 64, 3, 3, requires_grad=True), torch.randn(1, 64, 8, 8)
    options = ("transposed_of_three", 1, 1.0, "highest", "torch", 0)
    (right,) = grad(F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1), w, g)
    torch.testing.assert_close(ops._weight_gradient(options, x, g), right, rtol=1e-4, atol=1e-4)


WAYS = [  # all that are not the last row, which "cpu" takes
    (kind, way)
    for kind, (name, _) in {**{k: (k, 0) for k in KINDS}, **BORDERED}.items()
    for way in ("torch", "exchanged", "product", "phases", "direct", "streamed", "panels")
    if (way not in ("direct", "streamed", "panels") or way in choice.KINDS[name].rows)
    and (way != "exchanged" or choice.KINDS[name].stride == 1)
    and (way != "product" or not choice.KINDS[name].collapsed)
    and (way != "phases" or choice.KINDS[name].collapsed)
]


def test_ways_on_a_device_are_those_that_were_measured(tmp_path, monkeypatch):
    """The fastest at the nearest shape of the kind, dtype and memory format; the collapsed form where there is none, and
    in place of a way that this version does not know."""
    shape = (64, 32, 1024)
    rows = [[64, 32, 1024, {"torch": 3.0, "phases": 2.0, "reference": 4.0, "gone": 1.0}],
            [512, 512, 256, {"torch": 3.0, "phases": 2.0, "reference": 1.0}]]  # fmt: skip
    file = {"device": "Some GPU", "convolutions": {"upsample": {"float32 contiguous": rows}}}
    caches = choice.way_on_device, devices.measured, devices.any_measured
    monkeypatch.setattr(devices, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    def way(kind="upsample", dtype=torch.float32, last=False, shape=shape):
        return choice.way_on_device(kind, dtype, 0, last, *shape)

    try:
        for cached in caches:
            cached.cache_clear()
        assert way() == "torch"  # there is no file
        (tmp_path / "Some_GPU.json").write_text(json.dumps(file))
        for cached in caches:
            cached.cache_clear()
        assert way() == way(shape=(60, 32, 900)) == "phases" and way(shape=(256, 512, 100)) == "reference"
        assert way(last=True) == way(dtype=torch.bfloat16) == way(kind="downsample") == "torch"
        assert choice.ways_on_device("upsample", torch.float32, 0, *shape) == [[-5, -1]] * 3
        for shape, last, names in (((64, 32, 1024), False, "phases"), ((512, 512, 256), False, "reference")):
            found = ops._way_elsewhere(
                "upsample", _OnDevice(shape[0], last), torch.empty(shape[1], shape[0], 3, 3), 64, 64
            )
            assert found == names
    finally:
        for cached in caches:
            cached.cache_clear()


class _OnDevice:
    """What is asked of an image on a GPU, one of 32 by 32 pixels."""

    def __init__(self, channels, last):
        self.shape, self.dtype, self.device = (1, channels, 32, 32), torch.float32, torch.device("cuda", 0)
        self.last = last

    def get_device(self):
        return 0

    def stride(self, dim):
        return 1 if self.last else 1024

    def is_contiguous(self):
        return not self.last


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_other_ways(kind, way, monkeypatch):
    """What runs where a row is not the fastest, and on devices without the engine."""
    if way in ("direct", "streamed", "panels") and NATIVE_MISSING:
        pytest.skip("needs the native library")
    monkeypatch.setattr(ops, "_way", lambda *args: way)
    for h, w in ((6, 8), (7, 5)):
        for memory_format, dtype in ((FORMATS[0], torch.float32), (FORMATS[1], torch.float32), (FORMATS[0], DTYPES[0])):
            inputs = tensors(kind, 2, 5, 6, h, w, dtype, memory_format)
            name, border = BORDERED.get(kind, (kind, 0))
            padding = (choice.KINDS[name].taps - 1) // 2
            head = ((name, padding, 1.0, "highest", way, border), False, *choice.result_size(name, padding, h, w))
            ours = derivatives(partial(ops._Convolve.apply, *head), inputs, dtype)
            right = derivatives(KINDS[kind][1], inputs, torch.float64)
            for a, r in zip(ours, right):
                bound = 1e-5 if dtype == torch.float32 else 1e-13
                torch.testing.assert_close(a.double(), r, rtol=0, atol=bound * max(1, r.abs().max().item()))


@native
def test_rounding_of_the_highest_precision():
    """Of the 4x4 convolution's rows: points of evaluation far apart had lost five times what torch's convolution does."""
    x, w, g = (torch.randn(1, 64, 16, 16), torch.randn(64, 64, 4, 4), torch.randn(1, 64, 15, 15))

    def passes(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, g.to(dtype))]

    def errors(function):
        return [(a.double() - b).norm().item() for a, b in zip(passes(function, torch.float32), right)]

    right = passes(partial(F.conv2d, padding=1), torch.float64)
    of_torch = errors(partial(F.conv2d, padding=1))
    for way in choice.ALLOWED["same_of_four", "highest"]:
        options = ("same_of_four", 1, 1.0, "highest", way, 0)
        ours = errors(lambda x, w, o=options: ops._Convolve.apply(o, False, 15, 15, x, w, None))
        allowed = 1.5 if way == "tiles4" else 3
        assert all(a <= allowed * b for a, b in zip(ours, of_torch)), (way, ours, of_torch)


@native
@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_other_ways_in_cpp(kind, way, monkeypatch):
    """The same by the C++ nodes, which ask for ways once a shape: no other test has these channels."""
    monkeypatch.setattr(choice, "way_for", lambda *args: way)
    channels = 11 + 2 * WAYS.index((kind, way))
    inputs = tensors(kind, 2, channels, 10, 6, 7, torch.float64)
    for scale in (1.0, 0.5):
        ours = derivatives(partial(KINDS[kind][0], weight_scale=scale), inputs, torch.float64)
        right = derivatives(lambda x, w, b, s=scale: KINDS[kind][1](x, w * s, b), inputs, torch.float64)
        for a, r in zip(ours, right):
            torch.testing.assert_close(a, r, rtol=0, atol=1e-12 * max(1, r.abs().max().item()))


@pytest.mark.parametrize("nodes", [True, False], ids=["C++", "Python"])
def test_half_precision_is_no_product(nodes, monkeypatch):
    """Its taps would be rounded before they are added up."""
    monkeypatch.setattr(choice, "way_for", lambda *args: "product")
    x, w = torch.randn(2, 29 + nodes, 5, 5).bfloat16(), torch.randn(6, 29 + nodes, 4, 4).bfloat16()
    with contextlib.nullcontext() if nodes else python_gradients():
        assert torch.equal(GF.conv2d(x, w, padding=1), F.conv2d(x, w, padding=1))


@native
@pytest.mark.parametrize("nodes", [True, False], ids=["C++", "Python"])
def test_a_kernel_as_large_as_the_image_has_no_tiles(nodes, monkeypatch):
    """They would compute sixteen pixels, and round them, where one is wanted: ten times the error of torch's gradient."""
    monkeypatch.setattr(choice, "way_for", lambda *args: "tiles2")
    x, w, b = tensors("same_of_four", 2, 31 + nodes, 6, 4, 4, memory_format=torch.channels_last)
    with contextlib.nullcontext() if nodes else python_gradients(), Count() as count:
        ours = derivatives(GF.conv2d, (x, w, b), torch.float64)
    assert count.images == count.weights == 0
    for a, r in zip(ours, derivatives(F.conv2d, (x, w, b), torch.float64)):
        torch.testing.assert_close(a, r, rtol=0, atol=1e-12 * max(1, r.abs().max().item()))


@native
def test_a_border_copies_no_image():
    """Neither the forward nor the weight's gradient sees a padded image; that of the input is folded."""
    for mode in ("reflect", "replicate"):
        x, w, b = tensors(mode, 2, 5, 6, 7, 6, torch.float32)
        with _Sizes() as seen:
            y = GF.conv2d(x, w, b, padding=1, padding_mode=mode, implementation="cpu")
            grad(y, (w, b), torch.ones_like(y))
        assert (2, 5, 9, 8) not in seen.sizes and (2, 6, 9, 8) not in seen.sizes


class _Sizes(TorchDispatchMode):
    """The sizes of all results."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes |= {
            tuple(t.shape) for t in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(t)
        }
        return result


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("taps", "padding", "stride", "dilation"),
    [(7, 3, 1, 1), (3, 2, 1, 1), (3, 1, 2, 1), ((3, 5), (1, 2), 1, 1), (3, "same", 1, 2), (4, 1, 2, 1), (3, 1, 1, 1)],
)
def test_every_padding_mode_is_torchs(mode, taps, padding, stride, dilation):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(5, 6, taps, stride, padding, dilation, padding_mode=mode).double()
    x = torch.randn(2, 5, 9, 10, dtype=torch.float64, requires_grad=True)
    mine = GF.conv2d(x, layer.weight, layer.bias, stride, padding, dilation, padding_mode=mode)
    right = layer(x)
    torch.testing.assert_close(mine, right)
    inputs = (x, layer.weight, layer.bias)
    for a, r in zip(grad(mine.square().sum(), inputs), grad(right.square().sum(), inputs)):
        torch.testing.assert_close(a, r)
    torch.testing.assert_close(GF.conv2d(x[0], layer.weight, None, stride, padding, dilation, padding_mode=mode),
                               layer(x[0]) - layer.bias[:, None, None])  # fmt: skip


def test_paddings_that_no_image_has():
    w = torch.randn(6, 5, 3, 3)
    with pytest.raises(ValueError, match="padding is 1; padding_mode 'reflect' takes at most"):
        GF.conv2d(torch.randn(2, 5, 1, 8), w, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match="padding is .2, 9.; padding_mode 'circular'"):
        GF.conv2d(torch.randn(2, 5, 8, 8), w, padding=(2, 9), padding_mode="circular")
    with pytest.raises(ValueError, match="padding_mode is 'mirror'; accepted are 'zeros', 'reflect', 'replicate'"):
        GF.conv2d(torch.randn(2, 5, 8, 8), w, padding=1, padding_mode="mirror")
    x = torch.randn(2, 5, 1, 1)  # of one pixel, which may be repeated
    torch.testing.assert_close(
        GF.conv2d(x, w, padding=1, padding_mode="replicate"), F.conv2d(x.expand(2, 5, 3, 3), w), rtol=1e-4, atol=1e-4
    )


@native
def test_precision():
    x, w, b = tensors("same", 1, 8, 8, 16, 16, torch.float32)
    right = F.conv2d(x.double(), w.double(), b.double(), padding=1)

    def error(**options):
        return (GF.conv2d(x, w, b, padding=1, **options) - right).abs().max().item()

    default = error(implementation="cpu")
    with gankern.convolution_precision("high"):
        assert gankern.get_convolution_precision() == "high"
        assert error(implementation="cpu") > default
        exact = GF.conv2d(x.double(), w.double(), b.double(), padding=1, implementation="cpu")
        assert (exact - right).abs().max() < 1e-13
    assert gankern.get_convolution_precision() == "highest"
    assert choice.ALLOWED["same", "highest"] == ("direct", "tiles2")
    with pytest.raises(ValueError, match="'highest', 'high', 'medium'"):
        gankern.set_convolution_precision("low")


# ---- torch's machinery ----------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    torch._dynamo.reset()
    x, w, b = tensors(kind, 2, 24, 40, 8, 8, torch.float32)
    for implementation in ("cpu", None):

        def function(x, w, b, implementation=implementation):
            return KINDS[kind][0](x, w, b, implementation=implementation)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        y, right = compiled(x, w, b), function(x, w, b)
        torch.testing.assert_close(y, right)
        for a, c in zip(grad(y.sum(), (x, w, b)), grad(right.sum(), (x, w, b))):
            torch.testing.assert_close(a, c)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, w, b), right)


# Without an engine kinds that differ in their taps alone run the same code.
COMPILED = [
    *((kind, None) for kind in KINDS),
    *((kind, "reference") for kind in ("upsample", "downsample", "same", "strided", "transposed", *BORDERED)),
]


@pytest.mark.parametrize(("kind", "implementation"), COMPILED)
def test_a_compiled_program_is_for_batches_of_any_size(kind, implementation):
    """One graph for the first size, one for all others, one for a batch of one; torch's own convolution has one more, for
    large batches."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    def function(x, w, b):
        return KINDS[kind][0](x, w, b, implementation=implementation)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 64, 33, 1, 7):
        x, w, b = (t.detach() for t in tensors(kind, batch, 16, 16, 8, 8, torch.float32))
        torch.testing.assert_close(compiled(x, w, b), function(x, w, b), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= (3 if gankern.last_implementation("convolution") == "cpu" else 4)


@native
def test_opcheck():
    x, w, b = (t.detach() for t in tensors("same", 2, 5, 6, 6, 6, torch.float32))
    for memory_format in FORMATS:
        y = x.contiguous(memory_format=memory_format)
        arguments = (y, w, b, 2, 6, 6, 1, False, False, 1.0, 1.0)
        torch.library.opcheck(torch.ops.gankern.convolution_row.default, arguments)
        arguments = (y, torch.randn(2, 6, 6, 6), 2, 1, False, False, 1.0)
        torch.library.opcheck(torch.ops.gankern.convolution_row_weight_gradient.default, arguments)


@native
def test_leaky_relu_in_the_output_transform():
    x, w, b = (t.detach() for t in tensors("same", 2, 5, 6, 7, 6, torch.float32))
    y = torch.ops.gankern.convolution_row(x, w, b, 2, 7, 6, 1, False, False, 0.5, 0.2)
    torch.testing.assert_close(y, F.leaky_relu(F.conv2d(x, w / 2, b, padding=1), 0.2), rtol=1e-5, atol=1e-5)


@native
def test_functional_transforms():
    x, w, b = tensors("same", 2, 3, 4, 5, 5)

    def loss(x, w):
        return GF.conv2d(x, w, padding=1, implementation="cpu").square().sum()

    ours = torch.func.grad(loss, (0, 1))(x.detach(), w.detach())
    right = grad(F.conv2d(x, w, padding=1).square().sum(), (x, w))
    for a, r in zip(ours, right):
        torch.testing.assert_close(a, r)


@native
def test_autocast():
    x, w, b = tensors("upsample", 2, 24, 32, 8, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert GF.upsample_conv2d(x, w, b).dtype == torch.bfloat16
        assert GF.conv2d(x, w, b, padding=1).dtype == torch.bfloat16


@pytest.mark.parametrize("by_python", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_autocast_as_torchs(by_python, double):
    """Results and gradients, the weight's in its own dtype; float64 stays what it is. By C++ a weight is cast once within
    autocast, and its gradients come together there."""
    torch.manual_seed(0)
    dtype = torch.float64 if double else torch.float32
    x, w, b = (torch.randn(*size, dtype=dtype, requires_grad=True) for size in ((2, 8, 8, 8), (8, 8, 4, 4), (8,)))
    calls = [
        (lambda *a: GF.conv2d(*a, 2, 1), lambda *a: F.conv2d(*a, 2, 1)),
        (lambda *a: GF.conv_transpose2d(*a, 2, 1), lambda *a: F.conv_transpose2d(*a, 2, 1)),
        (lambda *a: GF.conv2d(*a, 1, 1), lambda *a: F.conv2d(*a, 1, 1)),
    ]
    with python_gradients() if by_python else contextlib.nullcontext():
        for ours, theirs in calls:
            found = []
            for function in (ours, theirs):
                with torch.autocast("cpu", torch.bfloat16):
                    y = function(x, w, b) + function(x, w, b)
                found.append([y, *torch.autograd.grad(y.float().square().sum(), (x, w, b))])
            for own, right in zip(*found):
                assert own.dtype == right.dtype
                torch.testing.assert_close(
                    own.double(), right.double(), rtol=0.03, atol=0.03 * right.abs().max().item()
                )


# ---- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, w: GF.upsample_conv2d(x, w, scale_factor=0.5), "scale_factor is 0.5"),
        (lambda x, w: GF.upsample_conv2d(x, w, mode="cubic"), "mode is 'cubic'"),
        (lambda x, w: GF.upsample_conv2d(x, w[:, :2]), "weight has shape .* it must be"),
        (lambda x, w: GF.upsample_conv2d(x[0], w), "x has shape"),
        (lambda x, w: GF.upsample_conv2d(x, w[..., :2, :2]), "must be odd"),
        (lambda x, w: GF.upsample_conv2d(x, w, torch.zeros(3)), "bias has shape"),
        (lambda x, w: GF.upsample_conv2d(x, w.double()), "share dtype"),
        (lambda x, w: GF.conv2d_downsample(x[..., :1], w), "at least 2 by 2"),
    ],
)
def test_bad_input(function, message):
    with pytest.raises(ValueError, match=message):
        function(torch.randn(2, 4, 6, 6), torch.randn(5, 4, 3, 3))


def test_bad_types():
    x, w = torch.randn(2, 4, 6, 6), torch.randn(5, 4, 3, 3)
    with pytest.raises(TypeError, match="scale_factor"):
        GF.upsample_conv2d(x, w, scale_factor="2")
    with pytest.raises(TypeError, match="accepted are float64"):
        GF.upsample_conv2d(x.long(), w)


def test_bad_input_of_torchs_two_raises_torchs_errors():
    x = torch.randn(2, 4, 6, 6)
    for bad in (
        lambda: GF.conv2d(x, torch.randn(5, 3, 3, 3), padding=1),
        lambda: GF.conv2d(x, torch.randn(5, 4, 3, 3), torch.zeros(4), padding=1),
        lambda: GF.conv2d(x, torch.randn(5, 2, 3, 3), padding=1, groups=3),
        lambda: GF.conv2d(x[..., :2, :2], torch.randn(5, 4, 3, 3)),
        lambda: GF.conv_transpose2d(x, torch.randn(5, 4, 4, 4), stride=2, padding=1),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            bad()
