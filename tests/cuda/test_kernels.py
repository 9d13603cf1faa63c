"""The CUDA C++ kernels, emulated, against plain PyTorch: every dtype, every order, odd sizes, any strides.

A result may differ from fp64 by twice what plain PyTorch differs in the same dtype, plus one unit in the last place
times the square root of the length of its sums.
"""

import itertools
import math

import pytest
import torch
from common import small_cases
from torch.autograd import grad

import gankern
import gankern.functional as GF
from gankern.measure import verification

pytestmark = pytest.mark.usefixtures("emulated")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAST = torch.channels_last


def values(*shape, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def offset(x):
    """The same in memory that begins one element late: at no multiple of 16 bytes."""
    return torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape)


def compare(primitive, run, inputs, length):
    """run(implementation, inputs) -> results, compared for "cuda" with "reference" and with that in fp64."""
    ours = run("cuda", inputs)
    assert gankern.last_implementation(primitive) == "cuda"
    plain = run("reference", inputs)
    exact = run("reference", [x.double() if torch.is_tensor(x) else x for x in inputs])
    assert len(ours) == len(exact)
    for i, (mine, theirs, right) in enumerate(zip(ours, plain, exact)):
        assert mine.dtype == theirs.dtype and mine.shape == right.shape, i
        assert torch.equal(mine.isnan(), theirs.isnan()), i
        right = right.nan_to_num(0.0)
        unit = torch.finfo(mine.dtype).eps * max(right.abs().max().item(), 1e-30) if right.numel() else 0
        allowed = 2 * (theirs.double().nan_to_num(0.0) - right).abs().max().item() if right.numel() else 0
        error = (mine.double().nan_to_num(0.0) - right).abs().max().item() if right.numel() else 0
        assert error <= allowed + unit * math.sqrt(length), f"result {i}: error {error:.3g}, unit {unit:.3g}"
    return ours


# ---- upfirdn2d -----------------------------------------------------------------------------------------------

# Shape, filter's shape, options. The tiled kernel and its every number of taps; what goes to the direct one.
RESAMPLING = [
    ((1, 1, 1, 1), (1,), {}),
    ((2, 3, 5, 7), (4,), {"up": 2, "padding": (2, 1, 2, 1), "gain": 4}),
    ((2, 3, 8, 6), (4,), {"down": 2, "padding": 1}),
    ((1, 2, 33, 70), (4,), {"padding": (1, 2, 2, 1)}),
    ((1, 2, 17, 131), (3,), {"padding": 1, "flip_filter": True}),
    # Rows that begin at multiples of 16 bytes, of x and of the result, and threads with all that they read.
    ((1, 2, 21, 64), (4,), {"padding": (2, 1, 2, 1)}),
    ((1, 1, 13, 32), (4,), {"up": 2, "padding": (2, 1, 2, 1), "gain": 4}),
    ((1, 2, 29, 64), (4,), {"down": 2, "padding": 1}),
    ((1, 8, 9, 20), (3,), {"up": 2, "padding": (3, 0, -1, 2)}),
    ((2, 40, 6, 18), (5,), {"padding": 2}),
    ((1, 4, 19, 9), (7,), {"down": 2, "padding": (3, 2, 1, 4)}),
    ((1, 2, 16, 16), (12,), {"up": 2, "padding": (6, 5, 6, 5), "gain": 4}),
    ((1, 2, 24, 16), (11,), {"down": 2, "padding": 5}),
    ((1, 3, 12, 10), (9,), {"padding": (4, 4, 4, 4)}),
    ((1, 2, 9, 8), (13,), {"padding": 6}),
    ((2, 2, 6, 7), (3, 5), {"up": (3, 2), "down": (2, 3), "padding": (4, 1, -1, 2), "gain": 1 / 3}),
    ((1, 2, 9, 8), (2, 1), {"up": (1, 4), "down": (3, 1), "padding": (-2, 3, 5, -1), "flip_filter": True}),
    ((1, 2, 5, 6), (4,), {"up": 3, "down": 2, "padding": 3}),
    ((1, 2, 5, 6), (4,), {"up": (2, 1), "padding": 2}),
]


def resampled(options):
    def run(implementation, inputs):
        x, filter = inputs[0].detach().requires_grad_(), inputs[1]
        y = GF.upfirdn2d(x, filter, **options, implementation=implementation)
        g = values(*y.shape, seed=2).to(y).requires_grad_()
        (first,) = grad(y, x, g, create_graph=True)
        (second,) = grad(first, g, values(*x.shape, seed=3).to(x))
        return [y, first, second]

    return run


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", RESAMPLING, ids=str)
def test_upfirdn2d(case, last):
    shape, taps, options = case
    for dtype in DTYPES:
        x = values(*shape, dtype=dtype).to(memory_format=LAST if last else torch.contiguous_format)
        ours = compare(
            "upfirdn2d", resampled(options), [x, values(*taps, seed=1, dtype=torch.float32)], math.prod(taps) ** 2
        )
        assert ours[0].is_contiguous(memory_format=LAST if last and shape[1] > 1 else torch.contiguous_format)


def test_upfirdn2d_of_any_strides():
    options = {"up": 2, "padding": (2, 1, 2, 1)}
    filter = values(4, seed=1)
    wide = values(2, 3, 9, 20)
    for x in (wide[:, :, :, 3:12], wide[:, ::2], wide[:, :, ::2], wide[..., ::3], offset(wide), wide.transpose(2, 3)):
        compare("upfirdn2d", resampled(options), [x, filter], 16)
    assert torch.equal(wide, values(2, 3, 9, 20))  # nothing was written to
    compare("upfirdn2d", resampled(options), [values(1, 1, 1, 9).expand(2, 3, 4, 9), filter], 16)
    for dtype in DTYPES:
        compare("upfirdn2d", resampled(options), [values(2, 3, 4, 5), values(4, seed=1).to(dtype)], 16)
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4)):
        y = GF.upfirdn2d(values(*shape), filter, **options, implementation="cuda")
        assert y.shape == (*shape[:2], 8, 8)


def test_upfirdn2d_of_what_is_not_finite():
    """A sample that is infinite or NaN reaches the outputs whose taps meet it, and no others."""
    cases = [((3,), {"up": 2, "padding": 2}), ((5,), {"padding": 2}), ((3,), {"down": 2, "padding": 1})]
    cases += [((4,), {"up": 2, "padding": (2, 1, 2, 1)}), ((4,), {"padding": (2, 1, 2, 1)})]
    for taps, options in cases:
        for last, value in itertools.product((False, True), (math.inf, math.nan)):
            x = values(1, 8, 12, 16, dtype=torch.float32)
            x[0, 3, 5, 7] = value
            x = x.to(memory_format=LAST) if last else x
            filter = torch.rand(taps) + 0.5
            ours, plain = (
                GF.upfirdn2d(x, filter, **options, implementation=implementation)
                for implementation in ("cuda", "reference")
            )
            assert torch.equal(ours.isfinite(), plain.isfinite())


# ---- batch normalisation -------------------------------------------------------------------------------------

# By three blocks, which keep 5, 2 and 2 rows of 512, 512 and 256 times 16 bytes (forward, backward, double backward):
# channels of less than a row, of a block each, of all blocks, and of more than these keep; where channels are
# neighbours, also 32 bytes of them of which the last are none.
NORMS = [
    ((1, 2, 2, 4), False, DTYPES),
    ((3, 3, 5, 8), False, DTYPES),
    ((5, 3, 24, 24), False, DTYPES[:1]),
    ((2, 2, 64, 64), False, DTYPES[1:2]),  # a block of the forward's team has nothing
    ((2, 2, 64, 136), False, DTYPES[1:3]),
    ((3, 8, 5, 7), True, DTYPES),
    ((2, 24, 16, 9), True, DTYPES[1:3]),
    ((2, 8, 64, 90), True, DTYPES[1:3]),
]


def normalized_map(affine, negative_slope):
    def run(implementation, inputs):
        x, *vectors = (v.detach().requires_grad_() for v in inputs)
        weight, bias = vectors if affine else (None, None)
        leaves = [x, *vectors] if affine else [x]
        y = GF.batch_norm_act(
            x, None, None, weight, bias, True, negative_slope=negative_slope, implementation=implementation
        )
        g = values(*y.shape, seed=2).to(y).contiguous(memory_format=LAST).requires_grad_()
        first = grad(y, leaves, g, create_graph=True)
        hs = [values(*t.shape, seed=3 + i).to(t) for i, t in enumerate(first)]
        return [y, *first, *grad(first, [g, *leaves[: 1 + affine]], hs)]

    return run


@pytest.mark.parametrize(("shape", "last", "dtypes"), NORMS, ids=str)
def test_batch_norm_act(shape, last, dtypes):
    for dtype, affine, slope in zip(dtypes, (True, True, True, False), (0.2, 0.0, 0.2, 1.0)):
        x = values(*shape, dtype=dtype, scale=2.0) + 5
        x = x.to(memory_format=LAST) if last else x
        vectors = [values(shape[1], seed=5).to(torch.promote_types(dtype, torch.float32)) for _ in range(2)]
        ours = compare("batch_norm_act", normalized_map(affine, slope), [x, *vectors], x.numel() / shape[1])
        assert ours[0].stride() == x.stride()


def test_batch_norm_act_of_any_strides():
    vectors = [values(8, seed=i) for i in (5, 6)]
    wide = values(2, 8, 9, 16)
    for x in (wide[:, :, ::2], wide.transpose(2, 3), offset(wide), wide[:, :, :1].expand(2, 8, 4, 16)):
        compare("batch_norm_act", normalized_map(True, 0.2), [x, *vectors], 288)
    assert torch.equal(wide, values(2, 8, 9, 16))  # nothing was written to


def test_batch_norm_act_of_large_means_and_what_is_not_finite():
    def first_order(implementation, inputs):
        return normalized_map(False, 0.2)(implementation, inputs)[:2]

    x = values(4, 4, 16, 16, dtype=torch.float32)
    x[:, 1] += 1e4
    x[:, 2] *= 1e-20
    x[0, 3, 0, 0] = 1e4  # the first value of its thread
    compare("batch_norm_act", first_order, [x], 1024)
    for value in (math.inf, math.nan):
        x = values(4, 4, 16, 16, dtype=torch.float32)
        x[2, 1, 3, 5] = value
        compare("batch_norm_act", first_order, [x], 1024)


def test_what_batch_norm_act_in_cuda_does_not_take():
    x, vector = values(2, 4, 4, 4), values(4)
    kinds = {
        "is for training": lambda **o: GF.batch_norm_act(x, vector, vector.exp(), **o),
        "no slopes of PReLU": lambda **o: GF.batch_norm_act(
            x, None, None, training=True, activation="prelu", slope=vector, **o
        ),
        r"got \[N, C\]": lambda **o: GF.batch_norm_act(x, None, None, values(2, 4), values(2, 4), True, **o),
        "got 3 values of a plane": lambda **o: GF.batch_norm_act(x[..., 0, :3], None, None, training=True, **o),
        "got 3 channels of a pixel": lambda **o: GF.batch_norm_act(
            x[:, :3].contiguous(memory_format=LAST), None, None, training=True, **o
        ),
    }
    for reason, run in kinds.items():
        with pytest.raises(ValueError, match=reason):
            run(implementation="cuda")
        run()
        assert gankern.last_implementation("batch_norm_act") != "cuda"
    for shape in ((0, 4, 4, 4), (2, 4, 0, 4)):
        x = values(*shape).requires_grad_()
        ours, plain = (GF.batch_norm_act(x, None, None, training=True, implementation=i) for i in ("cuda", "reference"))
        assert torch.equal(ours, plain) and grad(ours.sum(), x)[0].shape == x.shape


# ---- minibatch discrimination --------------------------------------------------------------------------------


def similarities(include_self):
    def run(implementation, inputs):
        m = inputs[0].detach().requires_grad_()
        other = None if inputs[1] is None else inputs[1].detach().requires_grad_()
        leaves = [m] if other is None else [m, other]
        o = GF.l1_similarity(m, other, include_self=include_self, implementation=implementation)
        g = values(*o.shape, seed=2).to(o).requires_grad_()
        first = grad(o, leaves, g, create_graph=True)
        hs = [values(*x.shape, seed=3 + i).to(x) for i, x in enumerate(first)]
        return [o, *first, *grad(first, [g, *leaves], hs)]

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("points", "others", "kernels", "dims"),
    [(1, None, 1, 1), (5, None, 3, 5), (64, None, 2, 3), (65, None, 1, 2), (130, None, 1, 17), (3, 70, 2, 5)],
)
def test_minibatch_discrimination(dtype, points, others, kernels, dims):
    m = values(points, kernels, dims, dtype=dtype, scale=0.5)
    other = None if others is None else values(others, kernels, dims, dtype=dtype, seed=1, scale=0.5)
    length = (points + (others or 0)) * dims
    compare("minibatch_discrimination", similarities(False), [m, other], length)
    if other is None and points < 100:
        compare("minibatch_discrimination", similarities(True), [m, other], length)


def test_minibatch_discrimination_at_its_edges():
    same = values(1, 2, 3).expand(6, 2, 3)  # all points are one: the distance's kink
    compare("minibatch_discrimination", similarities(False), [same, None], 6)
    for value in (math.inf, math.nan):
        m = values(6, 2, 3, dtype=torch.float32)
        m[2, 1, 0] = m[4, 1, 0] = value
        for include_self in (False, True):
            ours, plain = (
                GF.l1_similarity(m, include_self=include_self, implementation=i) for i in ("cuda", "reference")
            )
            torch.testing.assert_close(ours, plain, equal_nan=True)
    m, empty = values(4, 2, 3), values(0, 2, 3)
    for points, others in ((empty, None), (empty, m), (m, empty)):
        ours, plain = (GF.l1_similarity(points, others, implementation=i) for i in ("cuda", "reference"))
        assert torch.equal(ours, plain)
    x = values(7, 4, 6).transpose(1, 2)[:, ::2]
    compare("minibatch_discrimination", similarities(False), [x, None], 30)


def test_a_part_of_the_gradients_of_two_sets():
    """Only one set's gradient is differentiated again: the other one's direction does not exist."""
    m, other = values(5, 2, 3).requires_grad_(), values(4, 2, 3, seed=1).requires_grad_()
    results = []
    for implementation in ("cuda", "reference"):
        o = GF.l1_similarity(m, other, implementation=implementation)
        (first,) = grad(o.square().sum(), other, create_graph=True)
        results.append(grad(first.square().sum(), [m, other]))
    torch.testing.assert_close(*results)


# ---- spectral norm -------------------------------------------------------------------------------------------

SHAPES = [((64, 3, 4, 4), 0), ((24, 16, 4, 4), 0), ((12, 20, 3, 3), 1), ((1, 1500), 0), ((51, 103), 0), ((7, 1), 0),
          ((1500, 3), 0), ((20, 8, 4, 4), 1), ((5, 3, 2, 3, 2), 2)]  # fmt: skip


def make_group(dtype, shapes=SHAPES):
    """Weights, u and v near the singular vectors, dims: a sigma near zero would only test overflow."""
    weights, us, vs = [], [], []
    for i, (shape, dim) in enumerate(shapes):
        weight = values(*shape, seed=i)
        matrix = weight.movedim(dim, 0).flatten(1)
        v = values(matrix.shape[1], seed=100 + i)
        for _ in range(5):
            u = torch.nn.functional.normalize(matrix @ v, dim=0)
            v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
        weights.append(weight.to(dtype))
        us.append(u.to(dtype))
        vs.append(v.to(dtype))
    return weights, us, vs, [dim for _, dim in shapes]


def normalized(shapes, dims, seconds=True, **options):
    def run(implementation, inputs):
        n = len(shapes)
        weights = [w.detach().requires_grad_() for w in inputs[:n]]
        us, vs = ([x.clone() for x in xs] for xs in (inputs[n : 2 * n], inputs[2 * n :]))
        results = GF.spectral_norm_group(weights, us, vs, dims=dims, implementation=implementation, **options)
        gs = [values(*w.shape, seed=7 + i).to(w).requires_grad_() for i, w in enumerate(weights)]
        first = grad(results, weights, gs, create_graph=True)
        second = grad(first, [*weights, *gs], [values(*w.shape, seed=70 + i).to(w) for i, w in enumerate(weights)])
        return [*results, *us, *vs, *first, *(second if seconds else [])]

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spectral_norm(dtype):
    weights, us, vs, dims = make_group(dtype)
    weights[1], weights[7] = (w.contiguous(memory_format=LAST) for w in (weights[1], weights[7]))
    weights[4] = weights[4].T.contiguous().T  # rows innermost
    compare("spectral_norm", normalized(SHAPES, dims), [*weights, *us, *vs], 1500)


@pytest.mark.parametrize(
    "options",
    [
        {"n_power_iterations": 3},
        {"training": False},
        {"dialect": "hook", "n_power_iterations": 2},
        {"dialect": "wrapper"},
        {"dialect": "biggan"},
    ],
    ids=str,
)
def test_spectral_norm_in_every_dialect(options):
    weights, us, vs, dims = make_group(torch.float64, SHAPES[:5])
    weights[1] = weights[1].contiguous(memory_format=LAST)
    weights[4] = weights[4].T.contiguous().T
    compare("spectral_norm", normalized(SHAPES[:5], dims, **options), [*weights, *us, *vs], 1500)


def test_spectral_norm_of_more_layers_than_a_launch_takes():
    shapes = [((1 + i % 5, 3 + i), 0) for i in range(30)]
    weights, us, vs, dims = make_group(torch.float32, shapes)
    compare("spectral_norm", normalized(shapes, dims), [*weights, *us, *vs], 200)


def test_spectral_norm_of_any_strides_and_many_dimensions():
    shapes = [((6, 8), 0), ((6, 8), 0), ((6, 8), 1), ((2, 3, 2, 3, 2, 2), 1), ((2, 3, 2, 3, 2, 2), 0)]
    weights, us, vs, dims = make_group(torch.float32, shapes)
    weights[0] = offset(weights[0])
    weights[1] = values(6, 24, dtype=torch.float32)[:, ::3]
    # More runs of dimensions than the kernels know.
    weights[4] = weights[4].permute(5, 1, 3, 0, 2, 4).contiguous().permute(3, 1, 4, 2, 5, 0)
    copies = [w.clone() for w in weights]
    compare("spectral_norm", normalized(shapes, dims), [*weights, *us, *vs], 80)
    assert all(map(torch.equal, weights, copies))


def test_spectral_norm_of_zeros_nan_and_without_some_gradients():
    weights = [torch.zeros(4, 6), values(4, 6, dtype=torch.float32), torch.full((4, 6), math.nan)]
    weights = [w.requires_grad_() for w in weights]
    us, vs = [torch.ones(4) for _ in weights], [torch.ones(6) for _ in weights]
    y = GF.spectral_norm_group(weights, us, vs, implementation="cuda")
    assert torch.equal(y[0], torch.zeros(4, 6)) and y[2].isnan().all()
    zero, wanted, absent = grad(y[0].sum() + y[1].square().sum(), weights, allow_unused=True)
    assert torch.equal(zero, torch.zeros(4, 6)) and absent is None
    u, v = torch.ones(4), torch.ones(6)
    right = GF.spectral_norm(weights[1], u, v, implementation="reference").square().sum()
    torch.testing.assert_close(wanted, grad(right, weights[1])[0])


@pytest.mark.parametrize("case", small_cases("cuda"), ids=lambda case: f"{case.primitive}-{case.name}")
def test_cases_say_what_does_not_take_them(case):
    inputs = case.make(torch.float32, "cpu")
    if "cuda" in case.without:
        with pytest.raises(ValueError, match="implementation 'cuda' cannot take these inputs"):
            case.run("cuda", inputs)
    else:
        assert all(check.passed for check in verification.check(case, "cuda", torch.float32, "cpu"))


def test_operators_are_right_by_torchs_own_check():
    x, filter = values(1, 2, 6, 5, dtype=torch.float32), torch.rand(4)
    options = ([2, 2], [1, 1], [2, 2], [12, 10], False, 1.0)
    m, g = values(5, 2, 3, dtype=torch.float32), values(5, 2, dtype=torch.float32)
    c = torch.ones(2)
    y, stats = torch.ops.gankern_cuda.batch_norm_act(x[..., :4], c, c, None, None, True, 1e-5, 0.2)
    w, u, v = [values(4, 6, dtype=torch.float32)], [torch.ones(4)], [torch.ones(6)]
    _, state = torch.ops.gankern_cuda.spectral_norm(w, u, v, [0], 1, 1e-12, True, False)
    for operator, arguments in (
        ("upfirdn2d", (x, filter, *options)),
        ("batch_norm_act", (x[..., :4], c, c, None, None, True, 1e-5, 0.2)),
        ("batch_norm_act_backward", (y, x[..., :4], c, c, stats, True, 0.2, True)),
        ("batch_norm_act_double_backward", (y, c, None, y, x[..., :4], c, c, stats, True, 0.2, True)),
        ("minibatch_discrimination", (m, None, False)),
        ("minibatch_discrimination_backward", (g, m, None)),
        ("minibatch_discrimination_double_backward", (m, None, g, m, None)),
        ("spectral_norm", (w, u, v, [0], 1, 1e-12, True, False)),
        ("spectral_norm_backward", ([w[0]], w, state, [0])),
        ("spectral_norm_double_backward", ([w[0]], [w[0]], w, state, [0])),
    ):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.gankern_cuda, operator).default, arguments, test_utils=checks)
