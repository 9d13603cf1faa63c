"""Minibatch discrimination against plain PyTorch in fp64.

A result may differ from fp64 by twice what plain PyTorch differs in the same dtype, plus one unit in the last place
times the square root of the reduction's length.
"""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

import gankern
import gankern.functional as GF
from gankern.core import native

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPILED = "reference" if native.NATIVE_MISSING else "cpu"

# (N, B, C) and, for two sets, K. Vectors are of 2 to 16 lanes, blocks of 4 rows and 16 vectors; the last ones have so few
# kernels for so many pairs that they are done as tournaments.
ONE_SET = [
    (1, 1, 1),
    (2, 3, 1),
    (5, 2, 3),
    (16, 4, 5),
    (17, 33, 2),
    (33, 3, 8),
    (64, 2, 20),
    (131, 1, 5),
    (600, 1, 2),
    (530, 2, 3),
]
TWO_SETS = [((1, 2, 3), 1), ((5, 3, 2), 7), ((33, 2, 5), 17), ((16, 34, 1), 40), ((600, 1, 2), 531), ((3, 1, 2), 300)]


def textbook(m, other=None, include_self=False):
    """The definition, pair by pair, in the dtype of the arguments."""
    similarity = torch.exp(-(m[:, None] - (m if other is None else other)[None]).abs().sum(3))
    if other is None and not include_self:
        similarity = similarity * (1 - torch.eye(len(m), dtype=m.dtype))[:, :, None]
    return similarity.sum(1)


def points(*shape, dtype=torch.float64, seed=0):
    """Distances are around 2, as layers make them: exp(-d) has d times the relative error of d."""
    generator = torch.Generator().manual_seed(seed)
    scale = min(0.5, 2 / shape[-1]) if shape[-1] else 1
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def results(function, m, other):
    """The result, the first-order gradients, and the gradients of those: of m, other and the incoming gradient."""
    inputs = [x.detach().requires_grad_() for x in (m, other) if x is not None]
    out = function(*inputs)
    g = points(*out.shape, seed=3).to(out.dtype).requires_grad_()
    first = grad(out, inputs, g, create_graph=True)
    hs = [points(*x.shape, seed=4).to(x.dtype) for x in first]
    return [out, *first, *grad(first, [*inputs, g], hs)]


def assert_as_good_as_torch(m, other, function=GF.l1_similarity):
    ours = results(function, m, other)
    theirs = results(textbook, m, other)
    exact = results(textbook, m.double(), None if other is None else other.double())
    length = max(len(m), len(m if other is None else other)) * m.shape[2]
    for mine, plain, right in zip(ours, theirs, exact):
        assert mine.dtype == m.dtype and mine.shape == right.shape
        if not right.numel() or not exact[0].numel():
            continue
        # The terms of gradients cancel: a unit in the last place of the terms, which are as large as the sums are.
        largest = max(right.abs().max().item(), exact[0].abs().max().item())
        floor = torch.finfo(m.dtype).eps * math.sqrt(length) * largest
        plain_error = (plain.double() - right).abs().max().item()
        # In fp64 plain PyTorch is the exact result itself, with an error that cannot be seen: the floor, once for it as
        # "exact" and twice for it as the peer.
        allowed = 4 * floor if m.dtype == torch.float64 else 2 * plain_error + floor
        assert (mine.double() - right).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ONE_SET, ids=str)
def test_one_set(shape, dtype):
    assert_as_good_as_torch(points(*shape, dtype=dtype), None)
    assert gankern.last_implementation("minibatch_discrimination") == COMPILED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "count"), TWO_SETS, ids=str)
def test_two_sets(shape, count, dtype):
    assert_as_good_as_torch(points(*shape, dtype=dtype), points(count, *shape[1:], dtype=dtype, seed=1))
    assert gankern.last_implementation("minibatch_discrimination") == COMPILED


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    st.integers(0, 40), st.integers(1, 5), st.integers(1, 9), st.none() | st.integers(0, 40), st.booleans()
)
def test_any_shape(count, kernels, dims, other_count, float64):
    dtype = torch.float64 if float64 else torch.float32
    other = None if other_count is None else points(other_count, kernels, dims, dtype=dtype, seed=1)
    assert_as_good_as_torch(points(count, kernels, dims, dtype=dtype), other)


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("other_count", [None, 3])
def test_gradients_are_exact(other_count, implementation):
    inputs = [points(5, 2, 3).requires_grad_()]
    if other_count:
        inputs.append(points(other_count, 2, 3, seed=1).requires_grad_())

    def function(*inputs):
        return GF.l1_similarity(*inputs, implementation=implementation)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_gradients_of_the_whole_function_are_exact():
    inputs = points(5, 4).requires_grad_(), points(4, 3, 2, seed=1).requires_grad_()
    for options in ({}, {"reduction": "mean"}, {"include_self": True, "reduction": "mean"}):
        assert gradcheck(lambda x, t, o=options: GF.minibatch_discrimination(x, t, **o), inputs)
    assert gradgradcheck(GF.minibatch_discrimination, inputs)


def test_the_whole_function():
    x, kernel = points(6, 4), points(4, 3, 2, seed=1)
    m = torch.einsum("na,abc->nbc", x, kernel)
    sums = textbook(m)
    close = torch.testing.assert_close
    close(GF.minibatch_discrimination(x, kernel), sums)
    close(GF.minibatch_discrimination(x, kernel, reduction="mean"), sums / 5)
    close(GF.minibatch_discrimination(x, kernel, include_self=True), sums + 1)
    close(GF.minibatch_discrimination(x, kernel, include_self=True, reduction="mean"), (sums + 1) / 6)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_a_gradient_for_one_of_two_sets(needs):
    m, other = points(5, 2, 3).requires_grad_(needs[0]), points(4, 2, 3, seed=1).requires_grad_(needs[1])
    wanted = m if needs[0] else other
    out = [f(m, other) for f in (GF.l1_similarity, textbook)]
    first = [grad(y.square().sum(), wanted, create_graph=True)[0] for y in out]
    torch.testing.assert_close(*first)
    torch.testing.assert_close(*[grad(g.square().sum(), wanted)[0] for g in first])


def test_third_order_is_refused():
    m = points(4, 2, 3).requires_grad_()
    first = grad(GF.l1_similarity(m).sum(), m, create_graph=True)[0]
    second = grad(first.square().sum(), m, create_graph=True)[0]
    if COMPILED == "cpu":
        with pytest.raises(RuntimeError, match="gradient order 2"):
            second.sum().backward()


# ---- special values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", None])
class TestSpecialValues:
    def test_one_point(self, implementation):
        m = points(1, 3, 2).requires_grad_()
        out = GF.l1_similarity(m, implementation=implementation)
        assert torch.equal(out, torch.zeros(1, 3, dtype=m.dtype))
        assert torch.equal(grad(out.sum(), m)[0], torch.zeros_like(m))
        assert torch.equal(GF.l1_similarity(m, include_self=True, implementation=implementation), out + 1)
        assert torch.equal(
            GF.minibatch_discrimination(m[:, :, 0], m[0, :, :, None], reduction="mean", implementation=implementation),
            torch.zeros(1, 2, dtype=m.dtype),
        )

    def test_no_points(self, implementation):
        empty = torch.zeros(0, 3, 2, requires_grad=True)
        some = points(4, 3, 2, dtype=torch.float32).requires_grad_()
        assert GF.l1_similarity(empty, implementation=implementation).shape == (0, 3)
        assert GF.l1_similarity(empty, some, implementation=implementation).shape == (0, 3)
        out = GF.l1_similarity(some, empty, implementation=implementation)
        assert torch.equal(out, torch.zeros(4, 3))
        assert [g.shape for g in grad(out.sum(), [some, empty])] == [some.shape, empty.shape]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_duplicates(self, implementation, dtype):
        m = points(1, 3, 2).repeat(20, 1, 1).to(dtype).requires_grad_()
        out = GF.l1_similarity(m, implementation=implementation)
        assert torch.equal(out, torch.full((20, 3), 19, dtype=dtype))
        (first,) = grad(out.sum(), m, create_graph=True)
        assert torch.equal(first, torch.zeros_like(m))
        assert torch.equal(grad(first.sum(), m)[0], torch.zeros_like(m))

    @pytest.mark.parametrize("far", [200.0, 3e4, 3e38])
    def test_far_points(self, implementation, far):
        m = torch.tensor([-far, 0.0, far])[:, None, None].repeat(7, 2, 3).requires_grad_()
        out = GF.l1_similarity(m, implementation=implementation)
        assert torch.equal(out, torch.full((21, 2), 6.0))
        assert torch.equal(grad(out.sum(), m)[0], torch.zeros_like(m))

    def test_one_infinite_point(self, implementation):
        m = points(20, 2, 3, dtype=torch.float32)
        m[4, 0, 1] = float("inf")
        m.requires_grad_()
        out = GF.l1_similarity(m, implementation=implementation)
        assert out.isfinite().all() and out[4, 0] == 0
        (first,) = grad(out.sum(), m)
        assert first.isfinite().all() and not first[4, 0].any()
        assert GF.l1_similarity(m, include_self=True, implementation=implementation)[4, 0].isnan()

    def test_equal_infinities_are_nan(self, implementation):
        m = points(20, 2, 3, dtype=torch.float32)
        m[4, 0, 1] = m[9, 0, 1] = float("inf")
        m[3, 0, 1] = -float("inf")
        out = GF.l1_similarity(m, implementation=implementation)
        nan = torch.zeros(20, 2, dtype=torch.bool)
        nan[4, 0] = nan[9, 0] = True
        assert torch.equal(out.isnan(), nan) and out[3, 0] == 0

    @pytest.mark.parametrize("place", [0, 7, 19])
    def test_nan_stays_nan(self, implementation, place):
        m = points(20, 2, 3, dtype=torch.float32)
        m[place, 0, 1] = float("nan")
        m.requires_grad_()
        out = GF.l1_similarity(m, implementation=implementation)
        assert out[:, 0].isnan().all() and out[:, 1].isfinite().all()
        (first,) = grad(out.sum(), m)
        assert first[:, 0].isnan().all() and first[:, 1].isfinite().all()


# ---- what callers see ---------------------------------------------------------------------------------------


def test_any_strides():
    base = points(2, 7, 10, 3)
    m = base[0].transpose(0, 2)[:, ::2]  # [3, 5, 7]
    assert torch.equal(GF.l1_similarity(m), GF.l1_similarity(m.contiguous()))
    g = torch.ones(1, 1, dtype=m.dtype).expand(3, 5)
    leaf = m.detach().requires_grad_()
    torch.testing.assert_close(grad(GF.l1_similarity(leaf), leaf, g)[0], grad(textbook(leaf), leaf, g)[0])


def test_inputs_are_not_written():
    m, other = points(20, 3, 5).requires_grad_(), points(9, 3, 5, seed=1).requires_grad_()
    g = points(20, 3, seed=2).requires_grad_()
    before = [x.clone() for x in (m, other, g)]
    first = grad(GF.l1_similarity(m, other), [m, other], g, create_graph=True)
    hs = [torch.ones_like(x) for x in first]
    grad(first, [m, other, g], hs)
    assert all(torch.equal(a, b) for a, b in zip(before, (m, other, g)))
    assert all(torch.equal(h, torch.ones_like(h)) for h in hs)


def all_bits():
    """Every order's results, for shapes of both ways to share out the work."""
    bits = []
    for dtype in (torch.float32, torch.float64):
        for shape, count in (((70, 40, 5), None), ((600, 2, 3), None), ((600, 2, 3), 530), ((9, 33, 2), 20)):
            other = None if count is None else points(count, *shape[1:], dtype=dtype, seed=1)
            bits += results(GF.l1_similarity, points(*shape, dtype=dtype), other)
    return bits


def test_every_instruction_set(bits_elsewhere):
    there = bits_elsewhere(
        __file__,
        "for shape in cases.ONE_SET: cases.assert_as_good_as_torch(cases.points(*shape, dtype=torch.float32), None)",
    )
    for ours, theirs in zip(all_bits(), there):
        tolerance = 1e-12 if ours.dtype == torch.float64 else 2e-5
        torch.testing.assert_close(theirs, ours.detach(), rtol=tolerance, atol=tolerance * ours.abs().max().item())


@pytest.mark.skipif(COMPILED != "cpu", reason="the native library was not built")
@pytest.mark.parametrize("count", [None, 4])
def test_operators_are_sound(count):
    m = points(5, 2, 3, dtype=torch.float32)
    other = None if count is None else points(count, 2, 3, dtype=torch.float32, seed=1)
    g, h, h_other = points(5, 2, dtype=torch.float32), m.clone(), None if other is None else other.clone()
    ops = torch.ops.gankern
    torch.library.opcheck(ops.minibatch_discrimination.default, (m, other, False))
    torch.library.opcheck(ops.minibatch_discrimination_backward.default, (g, m, other))
    torch.library.opcheck(ops.minibatch_discrimination_double_backward.default, (h, h_other, g, m, other))
    torch.library.opcheck(ops.minibatch_discrimination_double_backward.default, (None, h_other, g, m, other))


def test_compiles_to_one_graph():
    x, kernel = points(9, 6, dtype=torch.float32), points(6, 3, 2, dtype=torch.float32).requires_grad_()

    def step(x, kernel):
        return GF.minibatch_discrimination(x, kernel, reduction="mean").square().sum()

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(x, kernel), step(x, kernel))
    torch.testing.assert_close(grad(compiled(x, kernel), kernel), grad(step(x, kernel), kernel))


def test_func_transforms():
    m = points(5, 2, 3)

    def penalty(m):
        return torch.func.grad(lambda m: GF.l1_similarity(m).square().sum())(m).square().sum()

    def same(m):
        return torch.func.grad(lambda m: textbook(m).square().sum())(m).square().sum()

    torch.testing.assert_close(torch.func.grad(penalty)(m), torch.func.grad(same)(m))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_in_float32(dtype):
    # 4000 terms of 2^-4 or so: a sum in half precision stops growing long before.
    m = torch.zeros(4000, 1, 1, dtype=dtype)
    m[0] = 2.75
    out = GF.l1_similarity(m)
    assert abs(out[0].item() / (3999 * math.exp(-2.75)) - 1) < torch.finfo(dtype).eps


def test_autocast():
    x, kernel = points(9, 6, dtype=torch.float32), points(6, 3, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = GF.minibatch_discrimination(x.bfloat16(), kernel)
    torch.testing.assert_close(out.float(), GF.minibatch_discrimination(x, kernel), rtol=0.05, atol=0.05)


# ---- bad input ----------------------------------------------------------------------------------------------

X, KERNEL, M = torch.zeros(4, 6), torch.zeros(6, 3, 2), torch.zeros(4, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((X.int(), KERNEL), TypeError, "x is int32; accepted are float64"),
        ((X, KERNEL.long()), TypeError, "kernel is int64; accepted are float64"),
        ((X, None), TypeError, "kernel is NoneType"),
        ((X[0], KERNEL), ValueError, r"x has shape \(6,\)"),
        ((X, KERNEL[:, :, 0]), ValueError, r"kernel has shape \(6, 3\); it must be \[features, kernels, kernel_dim\]"),
        ((X, KERNEL[:, :0]), ValueError, r"kernel has shape \(6, 0, 2\)"),
        ((X, KERNEL[:, :, :0]), ValueError, r"kernel has shape \(6, 3, 0\)"),
        ((X, KERNEL[:5]), ValueError, r"x has 6 features .* kernel takes 5"),
        ((X, KERNEL.double()), ValueError, ".* float32 on cpu and float64 on cpu"),
        ((X, KERNEL.to("meta")), ValueError, ".* float32 on cpu and float32 on meta"),
    ],
)
def test_bad_input_of_minibatch_discrimination(arguments, error, says):
    with pytest.raises(error, match=f"minibatch_discrimination: {says}"):
        GF.minibatch_discrimination(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((M.int(),), TypeError, "m is int32"),
        ((M, M.int()), TypeError, "other is int32"),
        ((M[0],), ValueError, r"m has shape \(3, 2\)"),
        ((M[:, :0],), ValueError, r"m has shape \(4, 0, 2\)"),
        ((M, M[:, :, :0]), ValueError, r"other has shape \(4, 3, 0\)"),
        ((M, M[:, :2]), ValueError, r"m has shape \(4, 3, 2\) and other \(4, 2, 2\)"),
        ((M, M.double()), ValueError, ".* float32 on cpu and float64 on cpu"),
        ((M, M.to("meta")), ValueError, ".* float32 on cpu and float32 on meta"),
    ],
)
def test_bad_input_of_l1_similarity(arguments, error, says):
    with pytest.raises(error, match=f"l1_similarity: {says}"):
        GF.l1_similarity(*arguments)


def test_bad_options():
    with pytest.raises(ValueError, match="reduction is 'max'; accepted are 'sum' and 'mean'"):
        GF.minibatch_discrimination(X, KERNEL, reduction="max")
    with pytest.raises(ValueError, match="include_self is for one set"):
        GF.l1_similarity(M, M, include_self=True)
    with pytest.raises(
        ValueError, match="(?s)implementation 'cuda' cannot take.*cpu: .*triton: .*cuda: .*reference: can"
    ):
        GF.l1_similarity(M, implementation="cuda")
