"""Up, FIR filter, down: the reference against SciPy, and the kernels against plain PyTorch in fp64.

A result may differ from fp64 by twice what plain PyTorch differs in the same dtype, plus one unit in the last place of
the result, plus one of the accumulation dtype times the square root of the number of taps of its largest terms.
"""

import math

import hypothesis
import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

import gankern
import gankern.functional as GF
from gankern import filters
from gankern.core import native

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
COMPILED = "reference" if native.NATIVE_MISSING else "cpu"
compiled_only = pytest.mark.skipif(COMPILED != "cpu", reason="the native library was not built")


def values(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# ---- the reference against SciPy ----------------------------------------------------------------------------


def with_scipy(x, filter, up, down, padding, flip_filter, gain):
    """Axis by axis with scipy.signal.upfirdn, whose first output is where the filter meets the first sample."""
    filters = [filter.numpy()] * 2 if filter.ndim == 1 else None
    left, right, top, bottom = padding
    x = x.numpy()
    if filters is None:  # zero-insertion, cropping and a 2-D convolution
        n, c, h, w = x.shape
        z = np.zeros((n, c, h * up[0], w * up[1]))
        z[:, :, :: up[0], :: up[1]] = x
        z = np.pad(z, [(0, 0), (0, 0), (max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))])
        z = z[:, :, max(-top, 0) : z.shape[2] - max(-bottom, 0), max(-left, 0) : z.shape[3] - max(-right, 0)]
        operation = scipy.signal.correlate2d if flip_filter else scipy.signal.convolve2d
        y = np.stack([[operation(plane, filter.numpy(), mode="valid") for plane in planes] for planes in z])
        return torch.from_numpy(gain * y[:, :, :: down[0], :: down[1]])
    for axis, (before, after) in ((2, (top, bottom)), (3, (left, right))):
        f = filters[0][::-1] if flip_filter else filters[0]
        size = x.shape[axis] * up[axis - 2]
        full = scipy.signal.upfirdn(f, x, up=up[axis - 2], axis=axis)  # at the high rate, without the trailing zeros
        full = np.moveaxis(full, axis, -1)
        # Output o of the operator is the full response at o * down + taps - 1 - before.
        count = (size + before + after - len(f)) // down[axis - 2] + 1
        places = np.arange(count) * down[axis - 2] + len(f) - 1 - before
        inside = (places >= 0) & (places < full.shape[-1])
        y = np.where(inside, full[..., np.clip(places, 0, full.shape[-1] - 1)], 0)
        x = np.moveaxis(y, -1, axis)
    return torch.from_numpy(gain * x)


# Shape, taps, up, down, padding, flip_filter, gain.
PROBLEMS = [
    ((2, 3, 6, 7), (4,), (1, 1), (1, 1), (2, 1, 2, 1), False, 1.0),
    ((2, 3, 6, 7), (4,), (2, 2), (1, 1), (2, 1, 2, 1), False, 4.0),
    ((2, 3, 6, 8), (4,), (1, 1), (2, 2), (1, 1, 1, 1), False, 1.0),
    ((1, 2, 5, 9), (5,), (3, 2), (2, 1), (0, 3, 4, 1), True, 0.5),
    ((1, 2, 7, 9), (6,), (2, 3), (3, 2), (3, 4, 5, 2), False, 1.0),
    ((2, 2, 6, 7), (3, 5), (1, 1), (1, 1), (2, 2, 1, 1), True, 1.0),
    ((2, 2, 6, 7), (3, 5), (2, 3), (3, 2), (2, 2, 1, 1), False, 2.0),
    ((2, 2, 8, 9), (3, 2), (1, 2), (2, 1), (-2, 3, 1, -3), False, 1.0),  # crops
    ((1, 1, 9, 40), (3,), (1, 1), (1, 1), (-5, -6, -1, 0), True, 1.0),
    ((1, 17, 5, 70), (4,), (2, 2), (1, 1), (2, 1, 2, 1), False, 4.0),  # more than a vector of columns, or of channels
    ((2, 33, 6, 67), (12,), (1, 1), (2, 2), (5, 5, 5, 5), False, 1.0),
    ((1, 5, 4, 5), (2,), (5, 4), (1, 1), (0, 1, 1, 0), False, 1.0),
    ((1, 5, 13, 40), (3,), (1, 1), (3, 5), (1, 1, 1, 1), False, 1.0),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_reference_is_scipys(problem):
    shape, taps, *options = problem
    x, filter = values(*shape), values(*taps, seed=1)
    ours = run(x, filter, options, "reference")
    padding = options[2]
    if filter.ndim == 2 or min(padding) >= 0:
        torch.testing.assert_close(ours, with_scipy(x, filter, *options))
    else:  # cropping between two axes' filters is not cropping before both: crop what reaches no output
        torch.testing.assert_close(ours, with_scipy(x, filter.outer(filter), *options))


@pytest.mark.parametrize("function", [GF.upsample2d, GF.downsample2d, GF.filter2d])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
def test_pictures_stay_in_place(function, taps):
    """The centre of mass of what becomes of one sample, in units of the input's samples, is the sample's centre; half a
    sample of the finer grid away where the filter cannot be centred. A filter of sum 1 keeps the mean."""
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    x[0, 0, 8, 6] = 1
    filter = torch.ones(taps, dtype=torch.float64) / taps
    y = function(x, filter)[0, 0]
    factor = {GF.upsample2d: 2, GF.downsample2d: 0.5, GF.filter2d: 1}[function]
    if factor < 1 and taps == 1:
        return  # decimation: some samples reach no output
    grid = (torch.arange(len(y), dtype=torch.float64) + 0.5) / factor
    centre = [(y.sum(1 - axis) * grid).sum() / y.sum() for axis in (0, 1)]
    for found, true in zip(centre, (8.5, 6.5)):
        assert abs(found - true) <= (0.5 / max(factor, 1) if factor != 0.5 else 1)
    if factor == 2 and taps % 2 == 0:
        assert torch.allclose(torch.stack(centre), torch.tensor([8.5, 6.5], dtype=torch.float64))
    if factor != 0.5 and (factor == 1 or taps % 2 == 0):
        torch.testing.assert_close(y.sum() / factor**2, x.sum())


def test_a_binomial_filter_interpolates_bilinearly():
    x = values(2, 3, 8, 9)
    ours = GF.upsample2d(x, filters.fir("1331", dtype=torch.float64))
    theirs = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(
        ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1]
    )  # it repeats its edge, ours is zero beyond
    box = filters.fir("box", dtype=torch.float64)
    torch.testing.assert_close(GF.upsample2d(x, box), torch.nn.functional.interpolate(x, scale_factor=2))
    torch.testing.assert_close(GF.downsample2d(x, box), torch.nn.functional.avg_pool2d(x, 2))


# ---- the kernels against the reference ----------------------------------------------------------------------


def run(x, filter, options, implementation=None):
    up, down, padding, flip_filter, gain = options
    return GF.upfirdn2d(
        x, filter, up=up, down=down, padding=padding, flip_filter=flip_filter, gain=gain, implementation=implementation
    )


def results(x, filter, options, implementation):
    """The result, its gradient, and the gradient of that."""
    x = x.detach().requires_grad_()
    out = run(x, filter, options, implementation)
    g = values(*out.shape, seed=3).to(out.dtype).requires_grad_()
    (first,) = grad(out, x, g, create_graph=True)
    (second,) = grad(first, g, values(*x.shape, seed=4).to(x.dtype))
    return [out, first, second]


def assert_as_good_as_torch(x, filter, options):
    ours = results(x, filter, options, None)
    assert gankern.last_implementation("upfirdn2d") == COMPILED
    plain = results(x, filter, options, "reference")
    exact = results(x.double(), filter.double(), options, "reference")
    terms = 5 * filter.abs().max().double().item() ** (2 if filter.ndim == 1 else 1) * options[-1]
    accumulation = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    for mine, theirs, right in zip(ours, plain, exact):
        assert mine.dtype == x.dtype and mine.shape == right.shape
        if not right.numel():
            continue
        floor = torch.finfo(x.dtype).eps * right.abs().max().item()
        floor += accumulation * math.sqrt(filter.numel() ** (3 - filter.ndim)) * terms
        plain_error = (theirs.double() - right).abs().max().item()
        assert (mine.double() - right).abs().max().item() <= 2 * plain_error + floor


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_dtype(problem, dtype, layout):
    shape, taps, *options = problem
    x = values(*shape, dtype=dtype).to(memory_format=layout)
    # A filter that every dtype holds exactly: what is compared is the operator.
    filter = (values(*taps, seed=1) * 16).round() / 16
    assert_as_good_as_torch(x, filter.to(dtype), options)


def test_filters_of_another_dtype():
    x, filter = values(1, 2, 5, 6), values(4, seed=1)
    for dtype in DTYPES:
        rounded = filter.to(dtype)
        torch.testing.assert_close(
            GF.filter2d(x, rounded), GF.filter2d(x, rounded.double(), implementation="reference")
        )


factors = st.tuples(st.integers(1, 5), st.integers(1, 5))


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 12), st.integers(1, 70)),
    taps=st.tuples(st.integers(1, 9)) | st.tuples(st.integers(1, 6), st.integers(1, 6)),
    up=factors,
    down=factors,
    padding=st.tuples(*[st.integers(-4, 7)] * 4),
    flip_filter=st.booleans(),
    dtype=st.sampled_from(DTYPES[:2]),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_geometry(shape, taps, up, down, padding, flip_filter, dtype, layout):
    left, right, top, bottom = padding
    for n, u, k, before, after in (
        (shape[2], up[0], taps[0], top, bottom),
        (shape[3], up[1], taps[-1], left, right),
    ):
        hypothesis.assume(max(-before, 0) + max(-after, 0) < n * u and n * u + before + after >= k)
    x = values(*shape, dtype=dtype).to(memory_format=layout)
    assert_as_good_as_torch(x, values(*taps, dtype=dtype, seed=1), (up, down, padding, flip_filter, 1.5))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_wide_rows_are_cut_into_strips(layout):
    filter = values(4, seed=1, dtype=torch.float32)
    for shape in ((1, 2, 3, 9001), (1, 700, 3, 37)):
        x = values(*shape, dtype=torch.float32).to(memory_format=layout)
        for up, down in ((1, 1), (2, 1), (1, 2), (3, 2), (1, 3)):
            options = (up, up), (down, down), (2, 1, 2, 1), False, 1.0
            assert_as_good_as_torch(x, filter, options)
            assert_as_good_as_torch(x, filter.outer(filter), options)


@compiled_only
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_results_that_go_past_the_caches(layout):
    x = values(4, 16, 128, 128, dtype=torch.float32).to(memory_format=layout)
    filter = values(4, seed=1, dtype=torch.float32)
    for function in (GF.upsample2d, GF.filter2d):
        y = function(torch.cat([x] * 4), filter)
        assert y.nbytes >= 1 << 24
        # The same bits as of a quarter of it, which does not.
        assert torch.equal(y, torch.cat([function(x[:1], filter), function(x[1:], filter)] * 4))


# ---- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize(
    ("taps", "options"),
    [
        ((4,), ((2, 2), (1, 1), (2, 1, 2, 1), False, 4.0)),
        ((3, 2), ((1, 2), (2, 1), (-1, 3, 1, -1), True, 1.0)),
        ((3,), ((2, 3), (3, 2), (1, 2, 2, 1), False, 1.0)),
    ],
)
def test_gradients_are_exact(taps, options, implementation):
    x, filter = values(1, 1, 4, 5).requires_grad_(), values(*taps, seed=1)
    assert gradcheck(lambda x: run(x, filter, options, implementation), x)
    assert gradgradcheck(lambda x: run(x, filter, options, implementation), x)


def test_any_order_of_gradients():
    x, filter = values(1, 1, 5, 6).requires_grad_(), values(4, seed=1)
    answers = []
    for implementation in (None, "reference"):
        y = GF.upsample2d(x, filter, implementation=implementation)
        for _ in range(4):
            (y,) = grad(y.tanh().square().sum(), x, create_graph=True)
        answers.append(y)
    torch.testing.assert_close(*answers)


def test_the_gradient_is_the_transpose():
    x, filter = values(2, 3, 7, 8).requires_grad_(), values(4, seed=1)
    y = GF.downsample2d(x, filter)
    g = values(*y.shape, seed=2)
    (dx,) = grad(y, x, g)
    torch.testing.assert_close((y * g).sum(), (x * dx).sum())
    # Rows and columns before and after; the seventh row, of which no output is centred, is one more after.
    theirs = GF.upfirdn2d(g, filter, up=2, padding=(2, 1, 2, 2), flip_filter=True)
    torch.testing.assert_close(dx, theirs)


def test_a_filter_that_requires_grad():
    x, filter = values(1, 2, 5, 6).requires_grad_(), values(4, seed=1).requires_grad_()
    if COMPILED == "cpu":
        with pytest.raises(ValueError, match="filter requires grad.*implementation='reference'"):
            GF.filter2d(x, filter)
        with torch.no_grad():
            GF.filter2d(x, filter)
    assert gradcheck(lambda x, f: GF.filter2d(x, f, implementation="reference"), (x[:, :1, :3, :3], filter))


# ---- layouts, threads, special values -----------------------------------------------------------------------


@pytest.mark.parametrize("function", [GF.upsample2d, GF.downsample2d, GF.filter2d])
def test_any_strides(function):
    filter = values(4, seed=1)
    base = values(6, 9, 8, 10)
    for x in (
        base.permute(0, 2, 1, 3),
        base.permute(3, 1, 2, 0)[::2, :, ::3, 1:],
        base[:, :, ::2],  # rows apart
        base[:, :, :, 1:9],  # within rows
        base[:, :, :, ::2],
        base.to(memory_format=torch.channels_last)[:, :, 1:7],
        base.to(memory_format=torch.channels_last)[:, 1:7],
        base[:1].expand(3, -1, -1, -1),
        base[:, :1, :1, :1].expand(-1, 2, 6, 4),
    ):
        before = x.clone()
        torch.testing.assert_close(function(x, filter), function(x, filter, implementation="reference"))
        torch.testing.assert_close(function(x, filter), function(x.contiguous(), filter), rtol=0, atol=0)
        assert torch.equal(x, before)
        leaf = x.detach().requires_grad_()
        torch.testing.assert_close(
            grad(function(leaf, filter).sum(), leaf),
            grad(function(leaf, filter, implementation="reference").sum(), leaf),
        )


@pytest.mark.parametrize("function", [GF.upsample2d, GF.downsample2d, GF.filter2d])
@compiled_only
def test_memory_formats(function):
    filter = values(4, seed=1)
    x = values(2, 3, 6, 8)
    assert function(x, filter).is_contiguous()
    leaf = x.to(memory_format=torch.channels_last).requires_grad_()
    y = function(leaf, filter)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (g,) = grad(y, leaf, torch.ones_like(y))
    assert g.is_contiguous(memory_format=torch.channels_last)


def all_bits():
    bits = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for layout in LAYOUTS:
            for taps in ((4,), (3, 4)):
                filter = values(*taps, dtype=dtype, seed=1)
                x = values(3, 20, 37, 41, dtype=dtype).to(memory_format=layout)
                for up, down in ((1, 1), (2, 1), (1, 2), (3, 2)):
                    bits += results(x, filter, ((up, up), (down, down), (2, 1, 2, 1), False, 1.0), None)
    return bits


def test_every_instruction_set(tmp_path, on_instruction_set):
    on_instruction_set(
        __file__,
        "for shape, taps, *options in cases.PROBLEMS:",
        "    for dtype in cases.DTYPES:",
        "        for layout in cases.LAYOUTS:",
        "            filter = (cases.values(*taps, seed=1) * 16).round() / 16",
        "            x = cases.values(*shape, dtype=dtype).to(memory_format=layout)",
        "            cases.assert_as_good_as_torch(x, filter.to(dtype), options)",
        f"torch.save(cases.all_bits(), {str(tmp_path / 'bits')!r})",
    )
    for ours, theirs in zip(all_bits(), torch.load(tmp_path / "bits")):
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.02}[ours.dtype]
        torch.testing.assert_close(theirs, ours.detach(), rtol=tolerance, atol=tolerance * ours.abs().max().item())


@pytest.mark.parametrize("implementation", ["reference", None])
class TestSpecialValues:
    def test_empty(self, implementation):
        filter = values(4, seed=1, dtype=torch.float32)
        for shape in ((0, 3, 4, 5), (2, 0, 4, 5)):
            x = torch.zeros(shape, requires_grad=True)
            y = GF.upsample2d(x, filter, implementation=implementation)
            assert y.shape == (*shape[:2], 8, 10)
            assert grad(y.sum(), x)[0].shape == x.shape

    def test_one_pixel(self, implementation):
        filter = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        y = GF.upsample2d(torch.ones(1, 1, 1, 1), filter, implementation=implementation)
        torch.testing.assert_close(y, torch.full((1, 1, 2, 2), 0.75**2))

    def test_huge(self, implementation):
        x = torch.full((1, 2, 8, 9), 3e38)
        y = GF.filter2d(x, torch.tensor([0.25, 0.5, 0.25]), implementation=implementation)
        assert y.isfinite().all()
        torch.testing.assert_close(y[:, :, 1:-1, 1:-1], x[:, :, 1:-1, 1:-1])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_reaches_what_reads_it(self, implementation, bad):
        x = torch.zeros(1, 2, 20, 40)
        x[0, 0, 7, 33] = bad
        for function, taps in ((GF.upsample2d, 4), (GF.filter2d, 3), (GF.downsample2d, 4)):
            y = function(x, torch.ones(taps), implementation=implementation)
            mark = function((x != 0).float(), torch.ones(taps), implementation="reference") != 0
            assert torch.equal(~y.isfinite(), mark)


def test_inputs_are_not_written():
    x, filter = values(2, 3, 9, 10).requires_grad_(), values(4, seed=1)
    out = GF.upsample2d(x, filter)
    g = values(*out.shape, seed=2).requires_grad_()
    before = [t.clone() for t in (x, filter, g)]
    (first,) = grad(out, x, g, create_graph=True)
    grad(first, g, torch.ones_like(first))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, filter, g)))


# ---- what callers see ---------------------------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_operators_are_sound(layout):
    x, filter = values(2, 3, 5, 6, dtype=torch.float32).to(memory_format=layout), values(4, dtype=torch.float32, seed=1)
    op = torch.ops.gankern.upfirdn2d.default
    torch.library.opcheck(op, (x, filter, [2, 2], [1, 1], [2, 2], [10, 12], False, 4.0))
    torch.library.opcheck(op, (x, filter.outer(filter), [1, 1], [2, 1], [1, -1], [2, 3], True, 1.0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_compiles_to_one_graph(layout):
    x = values(2, 3, 9, 6, dtype=torch.float32).to(memory_format=layout).requires_grad_()
    filter = values(4, dtype=torch.float32, seed=1)

    def step(x):
        return GF.downsample2d(GF.upsample2d(x, filter).tanh(), filter).square().sum()

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    torch.testing.assert_close(grad(compiled(x), x), grad(step(x), x))


def test_func_transforms():
    x, filter = values(2, 3, 4, 5), values(3, seed=1)

    def penalty(x, implementation=None):
        first = torch.func.grad(lambda x: GF.upsample2d(x, filter, implementation=implementation).tanh().sum())(x)
        return first.square().sum()

    torch.testing.assert_close(torch.func.grad(penalty)(x), torch.func.grad(penalty)(x, "reference"))


def test_a_backward_makes_no_more_than_it_needs():
    """The double backward is one more forward: nothing is computed for x, on which nothing depends."""
    x, filter = values(2, 3, 8, 8, dtype=torch.float32).requires_grad_(), values(4, dtype=torch.float32, seed=1)
    out = GF.upsample2d(x, filter)
    g = torch.ones_like(out).requires_grad_()
    (first,) = grad(out, x, g, create_graph=True)
    with torch.profiler.profile() as profiler:
        second = grad(first, [g, x], torch.ones_like(first), allow_unused=True)
    assert second[1] is None
    counts = {event.key: event.count for event in profiler.key_averages()}
    if COMPILED == "cpu":
        assert counts["gankern::upfirdn2d"] == 1


@pytest.mark.parametrize(("taps", "kernel", "factor"), [(4, 3, 2), (3, 3, 2), (4, 1, 2), (6, 4, 3), (5, 5, 1)])
def test_convolutions_in_the_cheaper_order(taps, kernel, factor):
    """Against the operators one after the other, on images with so many zeros around that no edge is near."""
    x = values(2, 3, 9, 10)
    weight, bias = values(4, 3, kernel, kernel, seed=1), values(4, seed=2)
    filter = values(taps, seed=3)
    border = 6 * factor
    wide = torch.nn.functional.pad(x, [border] * 4)
    same = [(kernel - 1) // 2, kernel // 2]  # after and before
    edges = [same[1], same[0], same[1], same[0]]

    up = torch.nn.functional.pad(GF.upsample2d(wide, filter, up=factor), edges)
    up = torch.nn.functional.conv2d(up, weight, bias)
    up = up[:, :, border * factor :, border * factor :][:, :, : 9 * factor, : 10 * factor]
    torch.testing.assert_close(GF.fir_upsample_conv2d(x, weight, bias, filter, up=factor), up)

    down = torch.nn.functional.conv2d(torch.nn.functional.pad(wide, edges), weight)
    down = GF.downsample2d(down, filter, down=factor)[:, :, border // factor :, border // factor :]
    down = down[:, :, : 9 // factor, : 10 // factor] + bias[:, None, None]
    torch.testing.assert_close(GF.fir_downsample_conv2d(x, weight, bias, filter, down=factor), down)


# ---- bad input ----------------------------------------------------------------------------------------------

X, F4 = torch.zeros(1, 2, 5, 6), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((X.int(), F4), {}, TypeError, "x is int32; accepted are float64"),
        ((None, F4), {}, TypeError, "x is NoneType"),
        ((X, [1.0, 2.0]), {}, TypeError, "filter is list"),
        ((X, F4.int()), {}, TypeError, "filter is int32"),
        ((X[0], F4), {}, ValueError, r"x has shape \(2, 5, 6\); it must be \[N, C, H, W\]"),
        ((X[:, :, :0], F4), {}, ValueError, r"x has shape \(1, 2, 0, 6\)"),
        ((X, F4[0]), {}, ValueError, r"filter has shape \(\)"),
        (
            (X, torch.ones(2, 2, 2)),
            {},
            ValueError,
            r"filter has shape \(2, 2, 2\); it must be \[taps\] or \[rows, columns\]",
        ),
        ((X, F4[:0]), {}, ValueError, r"filter has shape \(0,\); it must not be empty"),
        ((X, torch.ones(3, 0)), {}, ValueError, r"filter has shape \(3, 0\); it must not be empty"),
        ((X, F4.to("meta")), {}, ValueError, "filter is on meta, x on cpu"),
        ((X, F4), {"up": 0}, ValueError, "up is 0; accepted are an integer of at least 1, or two of them"),
        ((X, F4), {"down": (1, -2)}, ValueError, r"down is \(1, -2\)"),
        ((X, F4), {"up": 1.5}, ValueError, "up is 1.5"),
        ((X, F4), {"up": (1, 2, 3)}, ValueError, r"up is \(1, 2, 3\)"),
        ((X, F4), {"up": True}, ValueError, "up is True"),
        ((X, F4), {"padding": (1, 2, 3)}, ValueError, r"padding is \(1, 2, 3\); accepted are an integer, "),
        ((X, F4), {"padding": 0.5}, ValueError, "padding is 0.5"),
        (
            (X, F4),
            {"padding": -1},
            ValueError,
            r"padding of \(-1, -1\) leaves nothing of 5 rows for a filter of 4 taps",
        ),
        ((X, F4), {"padding": (-6, 20, 0, 0)}, ValueError, r"padding of \(-6, 20\) leaves nothing of 6 columns"),
    ],
)
def test_bad_input(arguments, options, error, says):
    with pytest.raises(error, match=f"upfirdn2d: {says}"):
        GF.upfirdn2d(*arguments, **options)


def test_bad_input_of_the_others():
    with pytest.raises(ValueError, match="upsample2d: up is 0"):
        GF.upsample2d(X, F4, up=0)
    with pytest.raises(ValueError, match=r"downsample2d: x has shape \(5, 6\)"):
        GF.downsample2d(X[0, 0], F4)
    with pytest.raises(ValueError, match="fir_upsample_conv2d: x has 2 channels .* weight takes 3"):
        GF.fir_upsample_conv2d(X, torch.ones(4, 3, 3, 3), None, F4)
    with pytest.raises(ValueError, match=r"fir_downsample_conv2d: down is \(2, 1\); it must be one integer"):
        GF.fir_downsample_conv2d(X, torch.ones(4, 2, 3, 3), None, F4, down=(2, 1))
    with pytest.raises(
        ValueError, match="(?s)implementation 'cuda' cannot take.*cpu: .*triton: .*cuda: .*reference: can"
    ):
        GF.filter2d(X, F4, implementation="cuda")
