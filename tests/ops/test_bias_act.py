"""Bias, activation, gain and clamp: the reference against closed forms, the kernels against plain PyTorch in fp64."""

import math

import hypothesis
import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from common import compiles_to_one_graph, every_order, needs_nodes
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import gankern
import gankern.functional as GF
from gankern.core import native

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPILED = "reference" if native.NATIVE_MISSING else "cpu"
STRAIGHT = ("linear", "relu", "leaky_relu")
OPTIONS = [{}, {"gain": 1.7, "clamp": 0.8}, {"gain": -1.5, "clamp": 0.5, "negative_slope": -0.3}, {"gain": 0.0}]

# Both ways through memory, whole vectors and rests of all lengths, patterns that are cut into blocks, segments of rows.
SHAPES = [
    (1, 1),
    (4, 3),
    (7, 1, 5),
    (3, 17),
    (1, 40),
    (2, 9000),
    (33, 5, 2, 2),
    (3, 700, 4, 4),
    (2, 3, 8, 8),
    (5, 2, 9, 11),
    (2, 2, 3, 5, 7),
    (1, 1, 40000),
    (2, 3, 20000),
    (300, 130),
]


def values(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def textbook(x, bias, dim=1, activation="linear", negative_slope=0.2, gain=1.0, clamp=None):
    """The definition, in the dtype of the arguments."""
    z = x if bias is None else x + bias.view([-1 if d == dim else 1 for d in range(x.ndim)])
    f = {"linear": lambda z: z, "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "elu": F.elu,
         "selu": F.selu, "softplus": lambda z: F.softplus(z, threshold=40), "silu": F.silu,
         "leaky_relu": lambda z: F.leaky_relu(z, negative_slope)}[activation]  # fmt: skip
    y = f(z) * gain
    return y if clamp is None else y.clamp(-clamp, clamp)


def assert_as_good_as_torch(x, bias, **options):
    ours = every_order(lambda x, b: GF.bias_act(x, b, **options), (x, bias))
    assert gankern.last_implementation("bias_act") == COMPILED
    theirs = every_order(lambda x, b: textbook(x, b, **options), (x, bias))
    exact = every_order(lambda x, b: textbook(x, b, **options), (x.double(), None if bias is None else bias.double()))
    accumulation = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    for mine, plain, right in zip(ours, theirs, exact):
        assert mine.dtype == x.dtype and mine.shape == right.shape
        if not right.numel():
            continue
        largest = max(right.abs().max().item(), 1.0)  # derivatives are differences of values around 1
        floor = (torch.finfo(x.dtype).eps + accumulation * math.sqrt(x.numel())) * largest
        if right.ndim == 1 and x.ndim > 1:  # of a bias: a sum
            floor += torch.finfo(x.dtype).eps * math.sqrt(x.numel() / x.shape[options.get("dim", 1)])
        # In fp64 plain PyTorch is the exact result itself, with an error that cannot be seen: once more the floor.
        allowed = 2 * (plain.double() - right).abs().max().item() + (3 if x.dtype == torch.float64 else 1) * floor
        assert (mine.double() - right).abs().max().item() <= allowed


# ---- the reference --------------------------------------------------------------------------------------------


def test_the_reference_is_the_closed_form():
    z = np.concatenate([np.linspace(-45, 45, 181), [-800.0, 800.0, 1e-9, -1e-9]])
    exact = {
        "linear": z,
        "relu": np.maximum(z, 0),
        "leaky_relu": np.where(z > 0, z, 0.2 * z),
        "tanh": np.tanh(z),
        "sigmoid": scipy.special.expit(z),
        "elu": np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
        "selu": 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * np.expm1(np.minimum(z, 0))),
        "softplus": np.logaddexp(z, 0),
        "silu": z * scipy.special.expit(z),
    }
    assert set(exact) == set(GF.ACTIVATIONS)
    for activation, right in exact.items():
        for implementation in ("reference", None):
            for clamp in (None, 3.0):
                options = {"activation": activation, "gain": -1.5, "clamp": clamp, "implementation": implementation}
                y = GF.bias_act(torch.tensor(z - 0.5)[None], torch.full((len(z),), 0.5).double(), **options)[0]
                expected = -1.5 * right if clamp is None else np.clip(-1.5 * right, -3, 3)
                np.testing.assert_allclose(y.numpy(), expected, rtol=4e-15, atol=2e-16, err_msg=activation)


def test_small_arguments_keep_their_digits():
    for dtype, tolerance in ((torch.float32, 4e-7), (torch.float64, 1e-15)):
        z = torch.logspace(-30, 0, 400, dtype=dtype)
        z = torch.cat([z, -z])
        for activation in ("tanh", "elu", "selu", "silu"):
            exact = textbook(z.double()[None], None, activation=activation)
            y = GF.bias_act(z[None], activation=activation)
            torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=0)


# ---- the kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", GF.ACTIVATIONS)
def test_every_activation(activation, dtype):
    for shape in ((3, 5, 4, 7), (2, 3, 9, 8), (9, 33)):
        x, bias = values(*shape, dtype=dtype), values(shape[1], dtype=dtype, seed=1)
        assert_as_good_as_torch(x, bias, activation=activation)
        assert_as_good_as_torch(x, None, activation=activation, gain=-0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype):
    x, bias = values(*shape, dtype=dtype), values(shape[1], dtype=dtype, seed=1)
    # Of a single value plain PyTorch may be right by chance.
    for activation in ("leaky_relu", "silu") if x.numel() > 1 else ("leaky_relu",):
        assert_as_good_as_torch(x, bias, activation=activation)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 16, 37])
def test_channels_last(memory_format, channels):
    spatial = (3, 5) if memory_format == torch.channels_last else (2, 3, 5)
    x = values(4, channels, *spatial, dtype=torch.float32).to(memory_format=memory_format)
    bias = values(channels, dtype=torch.float32, seed=1)
    for activation in ("leaky_relu", "silu"):
        assert_as_good_as_torch(x, bias, activation=activation)
        leaf = x.detach().requires_grad_()
        y = GF.bias_act(leaf, bias, activation=activation)
        (dx,) = grad(y.sum(), leaf)
        assert y.stride() == x.stride() and dx.stride() == x.stride()


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
    st.data(),
    st.sampled_from(GF.ACTIVATIONS),
    st.booleans(),
)
def test_any_shape_and_strides(shape, data, activation, with_bias):
    dim = data.draw(st.integers(0, len(shape) - 1))
    order = data.draw(st.permutations(range(len(shape))))
    steps = data.draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)))
    base = values(*(shape[d] * steps[d] for d in order))
    x = base.permute([order.index(d) for d in range(len(shape))])[tuple(slice(None, None, s) for s in steps)]
    assert list(x.shape) == shape
    bias = values(shape[dim], seed=1) if with_bias else None
    assert_as_good_as_torch(x, bias, dim=dim, activation=activation)
    y = GF.bias_act(x, bias, dim=dim, activation=activation)
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("activation", GF.ACTIVATIONS)
def test_gradients_are_exact(activation, implementation):
    x, bias = values(2, 2, 3).requires_grad_(), values(2, seed=1).requires_grad_()
    for options in OPTIONS if implementation is None else OPTIONS[:2]:

        def function(x, bias, options=options):
            return GF.bias_act(x, bias, activation=activation, implementation=implementation, **options)

        assert gradcheck(function, (x, bias))
        assert gradgradcheck(function, (x, bias))
    assert gradgradcheck(lambda x: GF.bias_act(x, dim=-1, activation=activation, implementation=implementation), (x,))


@needs_nodes
@pytest.mark.parametrize("activation", STRAIGHT)
@pytest.mark.parametrize("slope", [0.2, -0.2])
def test_a_second_derivative_that_does_not_exist_is_none(activation, slope):
    x, bias, g = (v.requires_grad_() for v in (values(2, 3, 4), values(3, seed=1), values(2, 3, 4, seed=2)))
    inner, inner_bias = x * 1, bias * 1  # within a graph; a leaf has zeros, as torch's
    y = GF.bias_act(inner, inner_bias, activation=activation, negative_slope=slope)
    dx, db = grad(y, (inner, inner_bias), g, create_graph=True)
    product = dx.square().sum() + db.square().sum()
    second = grad(product, (inner, inner_bias, g), allow_unused=True, retain_graph=True)
    assert second[0] is None and second[1] is None and second[2] is not None
    at_leaves = grad(product, (x, bias), allow_unused=True)
    assert all(z is None if activation == "linear" else not z.any() for z in at_leaves)


class Count(TorchDispatchMode):
    """How many convolutions of any kind run."""

    def __init__(self):
        super().__init__()
        self.convolutions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.convolutions += "convolution" in function.overloadpacket.__name__
        return function(*args, **(kwargs or {}))


@needs_nodes
def test_a_penalty_convolves_no_zeros():
    """The layer before the activation gets its gradient through that of its input, and nothing through its result."""
    x, gradients, convolutions = values(2, 3, 6, 6).requires_grad_(), [], []
    for activation in (GF.leaky_relu, F.leaky_relu):
        weight = values(4, 3, 3, 3, seed=1).requires_grad_()
        (g,) = grad(activation(F.conv2d(x, weight), 0.2).sum(), x, create_graph=True)
        with Count() as count:
            gradients.append(grad(g.square().sum(), weight)[0])
        convolutions.append(count.convolutions)
    torch.testing.assert_close(*gradients)
    if COMPILED == "cpu":
        assert convolutions[0] < convolutions[1]


def test_third_order_is_refused():
    x = values(2, 3, 4).requires_grad_()
    (first,) = grad(GF.bias_act(x, activation="tanh").sum(), x, create_graph=True)
    (second,) = grad(first.square().sum(), x, create_graph=True)
    if COMPILED == "cpu":
        with pytest.raises(RuntimeError, match="gradient order 2"):
            second.sum().backward()


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("activation", ["leaky_relu", "softplus", "silu"])
def test_a_gradient_for_one_of_two(needs, activation):
    x, bias = values(3, 4, 5).requires_grad_(needs[0]), values(4, seed=1).requires_grad_(needs[1])
    wanted = x if needs[0] else bias
    g = values(3, 4, 5, seed=2).requires_grad_()
    out = [GF.bias_act(x, bias, activation=activation), textbook(x, bias, activation=activation)]
    first = [grad(y, wanted, g, create_graph=True)[0] for y in out]
    torch.testing.assert_close(*first)
    torch.testing.assert_close(*[grad(f.square().sum(), g, retain_graph=True)[0] for f in first])
    if activation not in STRAIGHT:
        torch.testing.assert_close(*[grad(f.square().sum(), wanted)[0] for f in first])


def test_what_is_kept():
    """The result, which is there anyway; and the input where the result does not tell."""
    x, bias = values(4, 5, 6).requires_grad_(), values(5).requires_grad_()
    for activation in GF.ACTIVATIONS:
        for slope in (0.2, -0.2):
            kept = []

            def keep(t, kept=kept):
                kept.append(t.data_ptr())
                return t

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                y = GF.bias_act(x, bias, activation=activation, negative_slope=slope)
            of_input = activation == "silu" or (activation == "leaky_relu" and slope < 0)
            if COMPILED == "cpu":
                assert kept == ([x.data_ptr(), bias.data_ptr()] if of_input else [y.data_ptr()])


# ---- special values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", None])
class TestSpecialValues:
    @pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0,)], ids=str)
    def test_nothing(self, implementation, shape):
        dim = 1 if len(shape) > 1 else 0
        x, bias = torch.zeros(shape, requires_grad=True), torch.ones(shape[dim], requires_grad=True)
        for activation in GF.ACTIVATIONS:
            y = GF.bias_act(x, bias, dim=dim, activation=activation, implementation=implementation)
            dx, db = grad(y, (x, bias), torch.ones_like(y), create_graph=True)
            assert y.shape == dx.shape == x.shape and torch.equal(db, torch.zeros_like(bias))
            if dx.requires_grad:
                grad(dx.sum() + db.sum(), x, allow_unused=True)

    @pytest.mark.parametrize("activation", GF.ACTIVATIONS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_huge_values_and_nan(self, implementation, activation, dtype):
        largest = torch.finfo(dtype).max
        z = torch.tensor([-math.inf, -largest, -1e4, 0.0, 1e4, largest, math.inf, math.nan] * 9, dtype=dtype)
        x = z[None].clone().requires_grad_()
        y = GF.bias_act(x, activation=activation, implementation=implementation)
        right = textbook(z[None], None, activation=activation)
        torch.testing.assert_close(y, right, equal_nan=True)
        (dx,) = grad(y.sum(), x)
        expected = textbook(x, None, activation=activation)
        finite = z.isfinite()[None]
        # Far out on the flat side of selu the result is rounded, and its distance from the limit with it.
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
        torch.testing.assert_close(dx[finite], grad(expected.sum(), x)[0][finite], **tolerance)

    def test_clamp(self, implementation):
        x = torch.tensor([[-3.0, -1.0, -0.5, 0.5, 1.0, 3.0, math.inf, -math.inf, math.nan]], requires_grad=True)
        y = GF.bias_act(x, clamp=1.0, implementation=implementation)
        assert torch.equal(y[0, :8], x[0, :8].clamp(-1, 1)) and y[0, 8].isnan()
        assert grad(y.sum(), x)[0][0, :8].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]

    @pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
    @pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
    def test_the_clamp_is_that_of_the_dtype(self, implementation, dtype, activation):
        """What rounds to the clamp has a gradient of 0, of all activations alike."""
        x = torch.linspace(0.1, 2, 5000, dtype=dtype)[None].requires_grad_()
        options = {"activation": activation, "gain": 0.7, "implementation": implementation}
        y = GF.bias_act(x, clamp=0.3, **options)
        bound = torch.tensor(0.3, dtype=dtype)
        assert y.max() == bound
        (dx,) = grad(y.sum(), x)
        assert torch.equal(dx == 0, y == bound)

    def test_half_precision_overflows_late(self, implementation):
        x = torch.full((2, 3), 6e4, dtype=torch.float16)
        y = GF.bias_act(x, torch.full((3,), 6e4, dtype=torch.float16), gain=0.25, implementation=implementation)
        assert torch.equal(y, torch.full_like(y, 3e4))


# ---- what callers see ---------------------------------------------------------------------------------------------


def test_inputs_are_not_written():
    x, bias = values(5, 6, 7).requires_grad_(), values(6, seed=1).requires_grad_()
    g = values(5, 6, 7, seed=2).requires_grad_()
    before = [v.clone() for v in (x, bias, g)]
    for activation in GF.ACTIVATIONS:
        first = grad(GF.bias_act(x, bias, activation=activation), (x, bias), g, create_graph=True)
        hs = [torch.ones_like(v) for v in first]
        grad(first, (x, bias, g), hs, allow_unused=True)
        assert all(torch.equal(a, b) for a, b in zip(before, (x, bias, g)))
        assert all(torch.equal(h, torch.ones_like(h)) for h in hs)


def all_bits():
    """Every order's results, for both ways through memory, small and large."""
    bits = []
    for shape in ((40, 16, 33, 9), (64, 300, 3, 3), (2, 9000), (5, 3, 21000), (16, 64, 66, 66)):
        x, bias = values(*shape, dtype=torch.float32), values(shape[1], dtype=torch.float32, seed=1)
        for activation in ("leaky_relu",) if x.numel() > 2**22 else ("leaky_relu", "silu"):
            bits += every_order(lambda x, b, a=activation: GF.bias_act(x, b, activation=a), (x, bias))
    return bits


def test_every_instruction_set(on_instruction_set):
    on_instruction_set(
        __file__,
        "for dtype in cases.DTYPES:",
        "    for activation in cases.GF.ACTIVATIONS: cases.test_every_activation(activation, dtype)",
        "for shape in cases.SHAPES: cases.test_every_shape(shape, torch.float32)",
        "cases.test_small_arguments_keep_their_digits()",
        "cases.test_the_reference_is_the_closed_form()",
    )


@pytest.mark.skipif(COMPILED != "cpu", reason="the native library was not built")
def test_operators_are_sound():
    x, bias = values(2, 3, 4, 5, dtype=torch.float32), values(3, dtype=torch.float32)
    x = x.to(memory_format=torch.channels_last)
    ops = torch.ops.gankern
    for index in (2, 3, 8):
        constants = (1, index, 0.2, 1.5, 0.7 if index == 3 else None)
        of_input = bias if index == 8 else None
        torch.library.opcheck(ops.bias_act.default, (x, bias, *constants))
        torch.library.opcheck(ops.bias_act_forward_.default, (x.clone(), bias, *constants))
        for sums in (True, False):
            torch.library.opcheck(ops.bias_act_backward.default, (x, x, of_input, *constants, sums))
        for needs in ((True, True, True), (True, False, False), (False, True, False)):
            arguments = (x, None, x, x, of_input, *constants, *needs)
            torch.library.opcheck(ops.bias_act_double_backward.default, arguments)
            torch.library.opcheck(ops.bias_act_double_backward.default, (None, bias, *arguments[2:]))


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_compiles_to_one_graph(activation):
    x = values(2, 3, 4, 5, dtype=torch.float32).requires_grad_()
    bias = values(3, dtype=torch.float32).requires_grad_()

    def step(x, bias):
        return GF.leaky_relu(GF.bias_act(x, bias, activation=activation, clamp=1.5)).square().sum()

    compiles_to_one_graph(step, x, bias)


def test_func_transforms():
    x = values(2, 3, 4)

    def penalty(x, function):
        return torch.func.grad(lambda x: function(x).square().sum())(x).square().sum()

    for ours, theirs in (
        (lambda x: GF.bias_act(x, activation="tanh"), torch.tanh),
        (lambda x: GF.leaky_relu(x + 0, 0.3, True), lambda x: F.leaky_relu(x, 0.3)),
    ):
        torch.testing.assert_close(penalty(x, ours), penalty(x, theirs))
        torch.testing.assert_close(torch.func.grad(penalty)(x, ours), torch.func.grad(penalty)(x, theirs))


def test_autocast_takes_a_bias_of_another_dtype():
    x, bias = values(2, 3, 4, dtype=torch.bfloat16), values(3, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = GF.bias_act(x, bias)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: GF.bias_act([1.0]), TypeError, "x is list; it must be a tensor"),
        (lambda: GF.bias_act(torch.zeros(2, 3, dtype=torch.int32)), TypeError, "x is int32; accepted are float64"),
        (lambda: GF.bias_act(torch.zeros(3)), ValueError, r"dim is 1; a tensor of shape \(3,\) accepts -1 to 0"),
        (lambda: GF.bias_act(torch.zeros(())), ValueError, "has no channels"),
        (
            lambda: GF.bias_act(torch.zeros(2, 3, 4), torch.zeros(4)),
            ValueError,
            r"bias has shape \(4,\); x has 3 channels in dimension 1 \(shape \(2, 3, 4\)\) and needs \(3,\)",
        ),
        (
            lambda: GF.bias_act(torch.zeros(2, 3), torch.zeros(3).double()),
            ValueError,
            "must share dtype and device, got float32 on cpu and float64 on cpu",
        ),
        (
            lambda: GF.bias_act(torch.zeros(2, 3), activation="gelu"),
            ValueError,
            "activation is 'gelu'; accepted are 'linear', 'relu', 'leaky_relu', 'tanh', 'sigmoid', 'elu'",
        ),
        (lambda: GF.bias_act(torch.zeros(2, 3), gain=math.nan), ValueError, "gain is nan; it must be finite"),
        (
            lambda: GF.bias_act(torch.zeros(2, 3), gain=torch.ones((), requires_grad=True)),
            TypeError,
            "gain is a tensor that requires a gradient, and would get none",
        ),
        (lambda: GF.bias_act(torch.zeros(2, 3), clamp=-1.0), ValueError, "clamp is -1.0; it must be greater than 0"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=f"bias_act: .*{says}"):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("span", [0.05, 3.0, 10.0])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "elu", "selu", "softplus", "silu"])
def test_half_gradients_are_as_right_as_torchs(activation, span, dtype):
    """Also where they are computed from the result, which is rounded: the error is at most twice that of torch's own
    function in the same dtype, plus one rounding."""
    plain = getattr(torch, activation, None) or getattr(torch.nn.functional, activation)
    x = torch.empty(50, 100).uniform_(-span, span, generator=torch.Generator().manual_seed(0)).to(dtype)

    def gradient(function, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0].double()

    right = gradient(plain, x.double())
    ours = (gradient(lambda x: GF.bias_act(x, None, activation=activation), x) - right).abs().max()
    theirs = (gradient(plain, x) - right).abs().max()
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * right.abs().max()
