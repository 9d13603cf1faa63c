"""Spectral norm: the reference against NumPy and torch, the compiled kernels against the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import iterated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import gankern
import gankern.functional as GF
from gankern.core import native
from gankern.measure import verification
from gankern.measure.cases import spectral_norm as cases
from gankern.reference.spectral_norm import spectral_norm as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((5, 7), 0), ((5, 7), 1), ((1, 1), 0), ((7, 1), 0), ((1, 9), 0), ((33, 1000), 0), ((33, 1000), 1),
          ((3, 4, 3, 3), 0), ((3, 4, 3, 3), 1), ((6, 5, 4, 4), 1), ((4, 6, 5), 2), ((2, 3, 2, 3, 2), 1),
          ((700, 600), 0), ((300, 20, 40), 1)]  # fmt: skip


def problem(shape, dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    matrix = weight.movedim(dim, 0).flatten(1)
    # Near the singular vectors, as in training: sigma is then well conditioned in every dtype.
    u = F.normalize(matrix @ torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64), dim=0)
    v = F.normalize(matrix.T @ u, dim=0)
    return weight.to(dtype), u.to(dtype), v.to(dtype)


# ---- the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", GF.SPECTRAL_NORM_DIALECTS)
def test_reference_is_the_formula(dialect):
    rules = GF.SPECTRAL_NORM_DIALECTS[dialect]
    weight, u, v = problem((6, 5, 3), 0)
    m, nu, nv = weight.flatten(1).numpy(), u.numpy(), v.numpy()

    def n(x):
        return x / (np.linalg.norm(x) + 1e-3 if rules.add_eps else max(np.linalg.norm(x), 1e-3))

    nu, nv = iterated(m, nu, nv, rules, n, 2)
    normalized, ru, rv, sigma = reference(weight, u, v, 0, 2, 1e-3, rules.u_first, rules.add_eps)
    np.testing.assert_allclose(ru, nu)
    np.testing.assert_allclose(rv, nv)
    np.testing.assert_allclose(sigma, nu @ m @ nv)
    np.testing.assert_allclose(normalized.flatten(1), m / (nu @ m @ nv))


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_sigma_converges_to_the_largest_singular_value(implementation):
    weight, u, v = problem((40, 60), 0)
    sigma = torch.zeros(1, dtype=torch.float64)
    GF.spectral_norm(weight, u, v, n_power_iterations=500, sigma=sigma, implementation=implementation)
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(sigma.item(), rel=1e-9)
    assert gankern.last_implementation("spectral_norm") == implementation


def test_gradient_is_the_closed_form():
    weight, u, v = problem((4, 6), 0)
    weight.requires_grad_()
    g = torch.randn(4, 6, dtype=torch.float64)
    for implementation in ("reference", "cpu"):
        (grad,) = torch.autograd.grad(
            GF.spectral_norm(weight, u, v, training=False, implementation=implementation), weight, g
        )
        sigma = u @ weight.detach() @ v
        expected = g / sigma - (g * weight.detach()).sum() / sigma**2 * torch.outer(u, v)
        torch.testing.assert_close(grad, expected)


# ---- the kernels against the reference ------------------------------------------------------------------------


def test_verify_sees_a_wrong_kernel(monkeypatch):
    from gankern.core import registry

    right = registry.kernel

    def wrong(implementation, primitive, launcher, device):
        kernel = right(implementation, primitive, launcher, device)
        if launcher != "backward":
            return kernel
        return lambda *args: [x * (1 + 1e-3) for x in kernel(*args)]

    monkeypatch.setattr(registry, "kernel", wrong)
    case = next(c for c in cases.CASES if c.verify)
    with native.python_gradients():  # which look their kernels up there
        failed = {c.mode for c in verification.check(case, "cpu", torch.float32, "cpu") if not c.passed}
    assert "backward" in failed


@pytest.mark.parametrize("dialect", GF.SPECTRAL_NORM_DIALECTS)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_kernel_equals_reference(shape, dim, n, dialect):
    for training in (True, False):
        results = []
        for implementation in ("reference", "cpu"):
            weight, u, v = problem(shape, dim)
            out = GF.spectral_norm(
                weight, u, v, dim=dim, n_power_iterations=n, training=training, dialect=dialect,
                implementation=implementation,
            )  # fmt: skip
            results.append((out, u, v))
        for ours, right in zip(*reversed(results)):
            torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("shape", "dim"), SHAPES[:11], ids=str)
def test_gradcheck(shape, dim):
    if np.prod(shape) > 1000:
        shape = tuple(min(s, 9) for s in shape)
    weight, u, v = problem(shape, dim)
    weight.requires_grad_()

    def f(w):
        return GF.spectral_norm(w, u.clone(), v.clone(), dim=dim, training=False, implementation="cpu")

    assert gradcheck(f, weight)
    assert gradgradcheck(f, weight)


LAYOUTS = {
    "channels_last": lambda w: w.to(memory_format=torch.channels_last) if w.ndim == 4 else w,
    "transposed": lambda w: w.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda w: torch.cat([w, w], -1)[..., : w.shape[-1]],
    "every second": lambda w: w.repeat_interleave(2, 0)[::2],
    "offset by one": lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 5, 4, 3), 0), ((6, 5, 4, 3), 1), ((17, 33), 0), ((17, 33), 1)], ids=str
)
def test_strides(shape, dim, layout):
    weight, u, v = problem(shape, dim)
    strided = LAYOUTS[layout](weight).requires_grad_()
    gradient = LAYOUTS["transposed"](torch.randn_like(weight))
    plain = weight.clone().requires_grad_()
    expected = plain / reference(plain, u, v, dim, 0, 1e-12, True, False)[3]
    ours = GF.spectral_norm(strided, u, v, dim=dim, training=False, implementation="cpu")
    torch.testing.assert_close(ours, expected)
    assert ours.stride() == (strided * 2).stride()
    (g_ours,) = torch.autograd.grad(ours, strided, gradient)
    (g_expected,) = torch.autograd.grad(expected, plain, gradient)
    torch.testing.assert_close(g_ours, g_expected)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    data=st.data(),
    dialect=st.sampled_from(sorted(GF.SPECTRAL_NORM_DIALECTS)),
    n=st.integers(1, 3),
)
def test_any_shape(shape, data, dialect, n):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    order = data.draw(st.permutations(range(len(shape))))
    results = []
    for implementation in ("reference", "cpu"):
        weight, u, v = problem(shape, dim)
        # Dense, in any order of its dimensions.
        weight = weight.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
        out = GF.spectral_norm(
            weight, u, v, dim=dim, dialect=dialect, n_power_iterations=n, implementation=implementation
        )
        results.append((out, u, v))
    for ours, right in zip(*results):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)


def test_same_as_torch_after_100_steps():
    """sigma, u and v follow torch's to rounding while the weight moves."""
    torch.manual_seed(0)
    weight, u, v = problem((64, 300), 0, torch.float32)
    tu, tv = u.clone(), v.clone()
    sigma = torch.zeros(1)
    for _ in range(100):
        GF.spectral_norm(weight, u, v, sigma=sigma, implementation="cpu")
        cases.torch_parametrization([weight, tu, tv])
        weight += 0.01 * torch.randn_like(weight)
    torch.testing.assert_close(u, tu, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(v, tv, rtol=1e-4, atol=1e-6)


def test_group_equals_layer_by_layer():
    problems = [problem(s, 0, torch.float32, seed) for seed, s in enumerate([(3, 5), (600, 700), (8, 4, 3, 3), (1, 9)])]
    weights, us, vs = (list(x) for x in zip(*problems))
    weights = [w.requires_grad_() for w in weights]
    us2, vs2 = [u.clone() for u in us], [v.clone() for v in vs]
    grouped = GF.spectral_norm_group(weights, us, vs, implementation="cpu")
    single = [GF.spectral_norm(w, u, v, implementation="cpu") for w, u, v in zip(weights, us2, vs2)]
    for a, b in zip([*grouped, *us, *vs], [*single, *us2, *vs2]):
        assert torch.equal(a, b)
    # A loss that reaches only some layers, and weights that are frozen.
    some = torch.autograd.grad(grouped[1].sum() + grouped[3].sum(), weights, allow_unused=True)
    assert [g is None for g in some] == [True, False, True, False]
    torch.testing.assert_close(some[1], torch.autograd.grad(single[1].sum(), weights[1])[0], rtol=0, atol=0)
    assert GF.spectral_norm_group([], [], []) == []


def test_two_forwards_before_one_backward():
    """Each backward uses the u and v of its own forward; a second backward gives the same gradient again."""
    weight, u, v = problem((6, 8), 0)
    weight.requires_grad_()
    results = {}
    for implementation in ("reference", "cpu"):
        uu, vv = torch.ones(6, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
        first = GF.spectral_norm(weight, uu, vv, implementation=implementation)
        second = GF.spectral_norm(weight, uu, vv, implementation=implementation)
        loss = (first**2).sum() - (second**3).sum()
        results[implementation] = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2)]
    for ours, right in zip(results["cpu"], results["reference"]):
        torch.testing.assert_close(ours, right)


def test_inputs_are_not_written():
    weight, u, v = problem((40, 30), 0)
    weight.requires_grad_()
    g, h = torch.randn(2, 40, 30, dtype=torch.float64).requires_grad_().unbind()
    before = [x.detach().clone() for x in (weight, u, v, g, h)]
    out = GF.spectral_norm(weight, u, v, training=False, implementation="cpu")
    (grad,) = torch.autograd.grad(out, weight, g, create_graph=True)
    torch.autograd.grad(grad, weight, h)
    for x, was in zip((weight, u, v, g, h), before):
        assert torch.equal(x, was)


def test_third_order_raises_and_the_reference_has_it():
    weight, u, v = problem((3, 4), 0)
    weight.requires_grad_()

    def second(implementation):
        out = GF.spectral_norm(weight, u, v, training=False, implementation=implementation)
        (first,) = torch.autograd.grad((out**3).sum(), weight, create_graph=True)
        (grad,) = torch.autograd.grad((first**2).sum(), weight, create_graph=True)
        return grad

    torch.autograd.grad(second("reference").sum(), weight)
    with pytest.raises(RuntimeError, match="gradient order 2.*reference"):
        torch.autograd.grad(second("cpu").sum(), weight)


# ---- special values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_zeros_nan_and_infinity(implementation):
    u, v = torch.ones(4) / 2, torch.ones(6)
    zero = torch.zeros(4, 6, requires_grad=True)
    out = GF.spectral_norm(zero, u.clone(), v.clone(), implementation=implementation)
    (grad,) = torch.autograd.grad(out, zero, torch.ones(4, 6))
    assert torch.equal(out, torch.zeros(4, 6))
    assert grad.isfinite().all()
    for bad in (float("nan"), float("inf")):
        weight = torch.ones(4, 6)
        weight[1, 2] = bad
        assert not GF.spectral_norm(weight, u.clone(), v.clone(), implementation=implementation).isfinite().all()


def test_huge_and_tiny_values():
    for scale in (1e15, 1e-9):
        weight, u, v = problem((20, 30), 0, torch.float32)
        expected = GF.spectral_norm(weight, u.clone(), v.clone(), implementation="cpu")
        ours = GF.spectral_norm(weight * scale, u.clone(), v.clone(), implementation="cpu")
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


# ---- torch's machinery ----------------------------------------------------------------------------------------


def test_opcheck():
    weight, u, v = problem((4, 6), 0, torch.float32)
    args = ([weight], [u], [v], [0], 1, 1e-12, True, False)
    torch.library.opcheck(torch.ops.gankern.spectral_norm.default, args)
    _, state = torch.ops.gankern.spectral_norm(*args)
    torch.library.opcheck(torch.ops.gankern.spectral_norm_backward.default, ([weight], [weight], state, [0]))
    torch.library.opcheck(
        torch.ops.gankern.spectral_norm_double_backward.default, ([weight], [None], [weight], state, [0])
    )


def test_compiles_without_a_graph_break():
    weight, u, v = problem((5, 6), 0, torch.float32)
    weight.requires_grad_()

    def step(weight, u, v):
        return GF.spectral_norm(weight, u, v).square().sum()

    pairs = []
    for f in (step, torch.compile(step, fullgraph=True)):
        uu, vv = u.clone(), v.clone()
        loss = f(weight, uu, vv)
        pairs.append((loss, *torch.autograd.grad(loss, weight), uu, vv))
    for eager, compiled in zip(*pairs):
        torch.testing.assert_close(eager, compiled)


def test_func_transforms():
    weight, u, v = problem((5, 6), 0)

    def f(w, implementation):
        return (GF.spectral_norm(w, u, v, training=False, implementation=implementation) ** 3).sum()

    first = torch.func.grad(f)(weight, "cpu")
    torch.testing.assert_close(first, torch.func.grad(f)(weight, "reference"))

    def penalty(w, implementation):
        return (torch.func.grad(f)(w, implementation) ** 2).sum()

    torch.testing.assert_close(torch.func.grad(penalty)(weight, "cpu"), torch.func.grad(penalty)(weight, "reference"))
    with pytest.raises(ValueError, match="jvp"):  # never zeros without a word
        torch.func.jvp(lambda w: GF.spectral_norm(w, u, v, training=False, implementation="cpu"), (weight,), (weight,))


def test_transforms_inside_compile_raise_or_are_right():
    """Dynamo loses a Function's gradient under torch.func.grad: never a wrong number without a word."""
    weight, u, v = problem((5, 6), 0)

    def f(w, implementation):
        return (GF.spectral_norm(w, u, v, training=False, implementation=implementation) ** 3).sum()

    with pytest.raises(torch._dynamo.exc.Unsupported, match="implementation='reference'"):
        torch.compile(lambda w: torch.func.grad(f)(w, "cpu"), fullgraph=True, backend="eager")(weight)
    compiled = torch.compile(lambda w: torch.func.grad(f)(w, "reference"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(weight), torch.func.grad(f)(weight, "reference"))


def test_autocast_iterates_in_fp32():
    weight, u, v = problem((16, 24), 0, torch.float32)
    expected = GF.spectral_norm(weight, u.clone(), v.clone(), implementation="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = GF.spectral_norm(weight, u.clone(), v.clone(), implementation="cpu")
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dialect", ["parametrization", "hook"])
def test_results_do_not_depend_on_the_number_of_threads(dialect):
    def run(threads):
        torch.set_num_threads(threads)
        torch.default_generator.manual_seed(0)
        shapes = [(512, 2048), (700, 600), (64, 3, 4, 4), (5, 7), (300, 40, 40)]
        ws, dims = [torch.randn(s, requires_grad=True) for s in shapes], [0, 0, 0, 1, 1]
        us = [torch.randn(w.shape[d]) for w, d in zip(ws, dims)]
        vs = [torch.randn(w.numel() // w.shape[d]) for w, d in zip(ws, dims)]
        outs = GF.spectral_norm_group(ws, us, vs, dims=dims, dialect=dialect, implementation="cpu")
        grads = torch.autograd.grad(outs, ws, [o.detach().cos() for o in outs])
        return [*outs, *grads, *us, *vs]

    before = torch.get_num_threads()
    try:
        one, *others = map(run, (1, 2, 3, 7))
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- bad input ------------------------------------------------------------------------------------------------

BAD = {
    "u": (dict(u=torch.ones(5)), ValueError, r"u has shape \(5,\).*needs \(4,\)"),
    "v": (dict(v=torch.ones(2, 3)), ValueError, r"v has shape \(2, 3\).*needs \(6,\)"),
    "integer u": (dict(u=torch.ones(4, dtype=torch.int64)), ValueError, "u is int64"),
    "integer weight": (dict(weight=torch.ones(4, 6, dtype=torch.int32)), TypeError, "weight is int32; accepted are"),
    "complex weight": (dict(weight=torch.ones(4, 6, dtype=torch.complex64)), TypeError, "weight is complex64"),
    "1-D weight": (dict(weight=torch.ones(4)), ValueError, r"shape \(4,\); it needs 2 dimensions"),
    "empty weight": (dict(weight=torch.ones(0, 6)), ValueError, "must not be empty"),
    "iterations": (dict(n_power_iterations=0), ValueError, "n_power_iterations is 0"),
    "eps": (dict(eps=0.0), ValueError, "eps is 0.0"),
    "NaN eps": (dict(eps=float("nan")), ValueError, "eps is nan"),
    "dim": (dict(dim=2), ValueError, "dim is 2; a 2-D weight accepts -2 to 1"),
    "dialect": (dict(dialect="pytorch"), ValueError, "'pytorch'; accepted are 'parametrization', 'hook'"),
    "implementation": (dict(implementation="gpu"), ValueError, "no implementation is called 'gpu'"),
    "unavailable": (dict(implementation="cuda"), ValueError, "implementation 'cuda' cannot take"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, error, message = BAD[name]
    given = dict(weight=torch.ones(4, 6), u=torch.ones(4), v=torch.ones(6)) | arguments
    with pytest.raises(error, match=message):
        GF.spectral_norm(**given)


def test_bad_groups():
    w, u, v = torch.ones(4, 6), torch.ones(4), torch.ones(6)
    with pytest.raises(ValueError, match="different lengths: 2 weights, 1 u"):
        GF.spectral_norm_group([w, w], [u], [v, v])
    with pytest.raises(ValueError, match="must share dtype and device, got float64 on cpu beside float32"):
        GF.spectral_norm_group([w, w.double()], [u, u], [v, v])


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_a_sparse_gradient(implementation, way):
    """That of a lookup, of which the formula takes the dense form."""
    w, u, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4), (6,), (4,)))
    weight = w.clone().requires_grad_()
    rows = torch.tensor([1, 2, 2])
    y = GF.spectral_norm(weight, u, v, training=False, implementation=implementation)
    F.embedding(rows, y, sparse=True).square().sum().backward()
    sigma = u @ w @ v
    g = torch.zeros_like(w).index_add(0, rows, 2 * (w / sigma)[rows])
    torch.testing.assert_close(weight.grad.to_dense(), g / sigma - (g * w).sum() / sigma**2 * torch.outer(u, v))
