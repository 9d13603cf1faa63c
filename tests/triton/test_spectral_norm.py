"""The Triton kernels of spectral norm against plain PyTorch in fp64, on their own and through the front door.

A result may differ from fp64 by twice what plain PyTorch differs in the same dtype, plus one unit in the last
place times the square root of the reduction's length.
"""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import gankern
import gankern.functional as GF
from gankern.triton import launch, spectral_norm, spectral_norm_tables

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-12

# NumPy's, about the interpreter: loops whose bound is known at run time, and division by a sigma of zero.

# Shapes and the dimension of the rows. The interpreter takes about 10 ms a program: most are small.
SHAPES = [
    ((1, 1), 0),
    ((1, 40), 0),
    ((20, 1), 0),
    ((7, 13), 0),
    ((7, 13), 1),
    ((9, 520), 0),
    ((6, 5, 3), 0),
    ((6, 5, 4), 1),
    ((8, 6, 3, 3), 0),
    ((6, 8, 4, 4), 1),
    ((4, 3, 2, 3, 2), 0),
    ((4, 3, 2, 3, 2), 1),
]
# These have more blocks of rows, of columns, and of partial sums than a program takes at a time.
LARGE_SHAPES = [((33, 1000), 0), ((9, 1104), 0), ((140, 72), 1), ((1, 8200), 0)]


def sum_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def split(state, weights, dims):
    """sigma [L], the list of u, the list of v."""
    sigma, *vectors = state.split(spectral_norm._state_sizes(weights, dims))
    return sigma, vectors[::2], vectors[1::2]


def join(sigma, us, vs):
    """The state that a forward which ended with these would have left."""
    return torch.cat([sigma, *(x.to(sigma.dtype) for pair in zip(us, vs) for x in pair)])


def naive(weight, u, v, dim, n_power_iterations, eps, u_first, add_eps):
    """The definition, one layer, in the dtype of the arguments."""
    matrix = weight.movedim(dim, 0).flatten(1)

    def normalize(x):
        norm = x.norm()
        return x / (norm + eps if add_eps else norm.clamp_min(eps))

    with torch.no_grad():
        for _ in range(n_power_iterations):
            if u_first:
                u = normalize(matrix @ v)
                v = normalize(matrix.T @ u)
            else:
                v = normalize(matrix.T @ u)
                u = normalize(matrix @ v)
    sigma = u @ (matrix @ v)
    return weight / sigma, u, v, sigma


def make_layer(shape, dim, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    u = torch.randn(shape[dim], generator=generator, dtype=torch.float64)
    v = torch.randn(weight.numel() // shape[dim], generator=generator, dtype=torch.float64)
    return [x.to(device, dtype) for x in (weight, u / u.norm(), v / v.norm())]


def make_layers(shapes, dtype, device):
    layers = [make_layer(shape, dim, dtype, device, seed) for seed, (shape, dim) in enumerate(shapes)]
    return [list(xs) for xs in zip(*layers)], [dim for _, dim in shapes]


def make_small_layers(dtype, device):
    """SHAPES and their like in other memory formats."""
    (weights, us, vs), dims = make_layers([*SHAPES, *SHAPES[-4:]], dtype, device)
    formats = [torch.channels_last] * 2 + [torch.channels_last_3d] * 2
    weights[-4:] = [w.to(memory_format=memory_format) for w, memory_format in zip(weights[-4:], formats)]
    return (weights, us, vs), dims


def to64(xs):
    return [x.double() for x in xs]


def assert_close(ours, plain, exact, length, what, terms=None):
    """`terms` are what the result is a difference of, where it can be much smaller than they are."""
    assert ours.shape == exact.shape
    largest = max(x.abs().max().item() for x in (exact, exact if terms is None else terms))
    unit = torch.finfo(ours.dtype).eps * largest
    allowed = 2 * (plain.double() - exact).abs().max().item() + unit * math.sqrt(length)
    error = (ours.double() - exact).abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def check_forward(weights, us, vs, dims, n_power_iterations, eps, u_first, add_eps):
    options = (n_power_iterations, eps, u_first, add_eps)
    before = [x.clone() for x in (*weights, *us, *vs)]
    normalized, state = spectral_norm.forward(weights, us, vs, dims, *options)
    for x, was in zip((*weights, *us, *vs), before):
        assert torch.equal(x, was)
    assert state.dtype == sum_dtype(weights[0].dtype)
    sigma, new_us, new_vs = split(state, weights, dims)
    for i, (weight, u, v, dim) in enumerate(zip(weights, us, vs, dims)):
        assert normalized[i].stride() == torch.empty_like(weight).stride()
        exact = naive(*to64((weight, u, v)), dim, *options)
        plain = naive(weight, u, v, dim, *options)
        for ours, a, b, name in zip((normalized[i], new_us[i], new_vs[i], sigma[i]), plain, exact, "Wuvs"):
            assert_close(ours, a, b, weight.numel(), f"{name} of layer {i}, {tuple(weight.shape)}")


ORDERS = pytest.mark.parametrize("u_first", [True, False], ids=["u_first", "v_first"])


# Every dtype and, for the usual one, both orders: they differ in their kernels, not in how these load.
@pytest.mark.parametrize(
    ("dtype", "u_first"),
    [
        (torch.float64, True),
        (torch.float32, True),
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float16, True),
    ],
    ids=str,
)
def test_one_iteration(dtype, u_first, device):
    (weights, us, vs), dims = make_small_layers(dtype, device)
    check_forward(weights, us, vs, dims, 1, EPS, u_first, add_eps=not u_first)


@ORDERS
@pytest.mark.parametrize(("n_power_iterations", "dtype"), [(0, torch.bfloat16), (3, torch.float32)], ids=str)
def test_no_iteration_and_several(n_power_iterations, dtype, u_first, device):
    (weights, us, vs), dims = make_layers(SHAPES[::2], dtype, device)
    check_forward(weights, us, vs, dims, n_power_iterations, EPS, u_first, add_eps=u_first)


@ORDERS
def test_large_layers(u_first, device):
    (weights, us, vs), dims = make_layers(LARGE_SHAPES, torch.float32, device)
    check_forward(weights, us, vs, dims, 1, EPS, u_first, add_eps=False)


@ORDERS
@pytest.mark.parametrize("add_eps", [True, False], ids=["add_eps", "max_eps"])
def test_eps_where_it_matters(u_first, add_eps, device):
    layers = [make_layer((7, 13), 0, torch.float64, device), make_layer((7, 40), 1, torch.float64, device)]
    weights, us, vs = map(list, zip(*layers))
    weights[1] *= 1e-3  # this one's norms are below eps, the other one's are not
    check_forward(weights, us, vs, [0, 1], 2, 0.01, u_first, add_eps)


def gradients_of_naive(weight, u, v, grad, grad_grad_weight, dim):
    """grad_weight, and the gradients of <grad_weight, grad_grad_weight> by grad and weight."""
    weight, grad = weight.clone().requires_grad_(), grad.clone().requires_grad_()
    normalized, _, _, _ = naive(weight, u, v, dim, 0, EPS, True, False)
    (grad_weight,) = torch.autograd.grad(normalized, weight, grad, create_graph=True)
    return grad_weight.detach(), *torch.autograd.grad(grad_weight, (grad, weight), grad_grad_weight)


def noncontiguous_like(x, seed, expand):
    """A gradient of x that does not lie in memory as x does: reversed strides, or strides of zero."""
    generator = torch.Generator().manual_seed(seed)
    if expand:
        return torch.randn(x.shape[:1] + (1,) * (x.dim() - 1), generator=generator).to(x).expand(x.shape)
    return torch.randn(x.shape[::-1], generator=generator).to(x).permute(*range(x.dim() - 1, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_and_double_backward(dtype, device):
    (weights, us, vs), dims = make_small_layers(torch.float64, device)
    # To singular vectors: with a sigma near zero, the gradients of fp16 overflow.
    for i, dim in enumerate(dims):
        _, us[i], vs[i], _ = naive(weights[i], us[i], vs[i], dim, 5, EPS, True, False)
    weights, us, vs = ([x.to(dtype) for x in xs] for xs in (weights, us, vs))
    grads = [noncontiguous_like(w, seed, seed % 5 == 4) for seed, w in enumerate(weights)]
    grad_grad_weights = [noncontiguous_like(w, 100 + seed, False) for seed, w in enumerate(weights)]
    exact_sigma = [naive(*to64(x), d, 0, EPS, True, False)[3] for *x, d in zip(weights, us, vs, dims)]
    sigma = torch.stack(exact_sigma).to(sum_dtype(dtype))
    inputs = (weights, join(sigma, us, vs), dims)

    grad_weights = spectral_norm.backward(grads, *inputs)
    second_grad_grads, second_grad_weights = spectral_norm.double_backward(grad_grad_weights, grads, *inputs)
    for i, dim in enumerate(dims):
        layer = [xs[i] for xs in (weights, us, vs, grads, grad_grad_weights)]
        ours = (grad_weights[i], second_grad_grads[i], second_grad_weights[i])
        plain = gradients_of_naive(*layer, dim)
        exact = gradients_of_naive(*to64(layer), dim)
        _, u, v, grad, grad_grad_weight = to64(layer)
        bilinear = u @ grad_grad_weight.movedim(dim, 0).flatten(1) @ v
        terms = (grad / sigma[i], grad_grad_weight / sigma[i], bilinear * grad / sigma[i] ** 2)
        names = ("grad_weight", "second grad_grad", "second grad_weight")
        for x, a, b, t, name in zip(ours, plain, exact, terms, names):
            assert x.dtype == dtype
            assert x.stride() == weights[i].stride()
            assert_close(x, a, b, weights[i].numel(), f"{name} of layer {i}, {tuple(weights[i].shape)}", t)


def test_few_product_programs_take_many_tiles_each(device, monkeypatch):
    monkeypatch.setattr(spectral_norm_tables, "MAX_PRODUCT_PROGRAMS", 3)
    spectral_norm_tables.plan_of.cache_clear()
    weight, u, v = make_layer((60, 1030), 0, torch.float32, device)
    with launch._unplanned():
        check_forward([weight], [u], [v], [0], 0, EPS, True, False)
    spectral_norm_tables.plan_of.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_views(dtype, device):
    """Parameters that are views of one flat buffer start anywhere."""
    weight, u, v = make_layer((8, 64), 0, dtype, device)
    flat = torch.cat([weight.new_zeros(1), weight.flatten()])
    check_forward([flat[1:].view(8, 64)], [u], [v], [0], 1, EPS, True, False)


def test_weights_that_are_not_dense(device):
    weight, u, v = make_layer((8, 40), 0, torch.float32, device)
    sliced = torch.zeros(8, 80, device=device)[:, ::2].copy_(weight)
    transposed = torch.zeros(80, 8, device=device)[::2].T.copy_(weight)
    expanded = weight[:, :1].expand(8, 40)
    weights = [sliced, transposed, expanded]
    check_forward(weights, [u] * 3, [v] * 3, [0, 0, 0], 1, EPS, True, False)


def test_vectors_that_are_not_contiguous(device):
    weight, u, v = make_layer((8, 40), 0, torch.float32, device)
    strided_u, strided_v = (torch.stack([x, x], dim=1)[:, 0] for x in (u, v))
    check_forward([weight], [strided_u], [strided_v], [0], 1, EPS, False, False)


def test_vectors_in_higher_precision_than_the_weight(device):
    weight, u, v = make_layer((8, 40), 0, torch.float32, device)
    _, state = spectral_norm.forward([weight.bfloat16()], [u], [v], [0], 1, EPS, True, False)
    _, new_us, new_vs = split(state, [weight], [0])
    _, exact_u, exact_v, _ = naive(weight.bfloat16().double(), u.double(), v.double(), 0, 1, EPS, True, False)
    torch.testing.assert_close(new_us[0], exact_u.float())
    torch.testing.assert_close(new_vs[0], exact_v.float())


@hypothesis.settings(max_examples=20, deadline=None, database=None)
@hypothesis.given(data=st.data())
def test_any_order_of_strides(data, device):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    order = data.draw(st.permutations(range(len(shape))))
    dim = data.draw(st.integers(0, len(shape) - 1))
    u_first = data.draw(st.booleans())
    weight, u, v = make_layer(tuple(shape), dim, torch.float32, device)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    permuted = weight.permute(order).contiguous().permute(inverse)
    assert torch.equal(permuted, weight)
    check_forward([permuted], [u], [v], [dim], 1, EPS, u_first, False)


@ORDERS
@pytest.mark.parametrize("n_power_iterations", [0, 1])
def test_zeros_stay_zeros_and_nan_stays_nan(u_first, n_power_iterations, device):
    weight, u, v = make_layer((7, 20), 0, torch.float32, device)
    broken = weight.clone()
    broken[3, 4] = math.nan
    weights, dims = [torch.zeros_like(weight), broken, weight], [0, 0, 0]
    us, vs = [u] * 3, [v] * 3
    options = (n_power_iterations, EPS, u_first, False)
    normalized, state = spectral_norm.forward(weights, us, vs, dims, *options)
    sigma, us, vs = split(state, weights, dims)
    assert sigma[0] == 0 and not normalized[0].any()
    assert sigma[1].isnan() and normalized[1].isnan().all()
    assert normalized[2].isfinite().all()
    if n_power_iterations:
        assert not us[0].any() and not vs[0].any()
        assert us[1].isnan().all() and vs[1].isnan().all()

    grads = [torch.ones_like(weight)] * 3
    grad_weights = spectral_norm.backward(grads, weights, state, dims)
    grad_grads, second = spectral_norm.double_backward(grads, grads, weights, state, dims)
    for results in (grad_weights, grad_grads, second):
        assert not results[0].any()
        assert results[1].isnan().all()
        assert results[2].isfinite().all()


@ORDERS
def test_weights_without_elements(u_first, device):
    weights = [torch.ones(shape, device=device) for shape in ((0, 3), (3, 0, 2), (2, 2))]
    us = [torch.ones(n, device=device) for n in (0, 3, 2)]
    vs = [torch.ones(n, device=device) for n in (3, 0, 2)]
    dims = [0, 0, 0]
    normalized, state = spectral_norm.forward(weights, us, vs, dims, 1, EPS, u_first, False)
    sigma, us, vs = split(state, weights, dims)
    assert [x.shape for x in normalized] == [x.shape for x in weights]
    torch.testing.assert_close(sigma.cpu(), torch.tensor([0.0, 0.0, 2.0]))
    assert not us[1].any() and not vs[0].any()
    grad_weights = spectral_norm.backward(normalized, weights, state, dims)
    assert [x.shape for x in grad_weights] == [x.shape for x in weights]


def test_missing_gradients(device):
    """Layers without a gradient give empty tensors, and the others what they give on their own."""
    (weights, us, vs), dims = make_layers(SHAPES[3:7], torch.float32, device)
    _, state = spectral_norm.forward(weights, us, vs, dims, 1, EPS, True, False)
    generator = torch.Generator().manual_seed(1)
    grads, hs = ([torch.randn(w.shape, generator=generator).to(device) for w in weights] for _ in range(2))
    all_first = spectral_norm.backward(grads, weights, state, dims)
    all_second = spectral_norm.double_backward(hs, grads, weights, state, dims)
    for given in ([False, True, True, False], [True, False, False, False], [False] * 4):
        some_grads = [g if here else None for g, here in zip(grads, given)]
        some_hs = [None if i == 1 else h for i, h in enumerate(hs)]
        first = spectral_norm.backward(some_grads, weights, state, dims)
        second = spectral_norm.double_backward(some_hs, some_grads, weights, state, dims)
        for i, here in enumerate(given):
            assert torch.equal(first[i], all_first[i]) if here else first[i].numel() == 0
            for ours, full in zip(second, all_second):
                assert torch.equal(ours[i], full[i]) if here and i != 1 else ours[i].numel() == 0
    assert len({x.data_ptr() for x in (*all_first, *all_second[0], *all_second[1])}) == 3 * len(weights)


def test_more_layers_are_no_more_launches(device, monkeypatch):
    (weights, us, vs), dims = make_layers(SHAPES[3:6], torch.float32, device)
    launched = []
    launches = spectral_norm._Call.launch

    def count_and_launch(call, kernel, *arguments, **options):
        launched.append(kernel)
        launches(call, kernel, *arguments, **options)

    monkeypatch.setattr(spectral_norm._Call, "launch", count_and_launch)
    with launch._unplanned():
        for iterations in (0, 1):
            _, state = spectral_norm.forward(weights, us, vs, dims, iterations, EPS, True, False)
        assert len(launched) == 2 + 3
        spectral_norm.backward(weights, weights, state, dims)
        assert len(launched) == 2 + 3 + 2
        spectral_norm.double_backward(weights, weights, weights, state, dims)
        assert len(launched) == 2 + 3 + 2 + 2


def test_uploaded_pointers_are_exact_and_kept():
    matrix = spectral_norm_tables.matrix_of((8, 8), (8, 1), 0)
    tables = spectral_norm_tables.PointerTables([matrix, None, matrix], [0, 3], 4, torch.device("cpu"))
    aligned, unaligned = (2**62 + 16, 2**53 + 1, 3, 2**40), (2**40, 5, 7, 2**40 + 4)
    addresses = (*aligned, 0, 0, 0, 0, *unaligned)
    table = tables(addresses)
    assert table.view(3, -1).tolist() == [[1, *aligned, 0, 0, 0], [0] * 8, [0, *unaligned, 0, 0, 0]]
    assert tables(addresses) is table
    others = [tables((*addresses[:-1], n)) for n in range(spectral_norm_tables.POINTER_TABLES)]
    assert [other.view(3, -1)[2, 4].item() for other in others] == [*range(len(others))]
    again = tables(addresses)  # they are few: it went, and is uploaded in the oldest one's place
    assert again.view(3, -1)[2].tolist() == [0, *unaligned, 0, 0, 0] and again.data_ptr() == others[0].data_ptr()
    assert tables((*addresses[:-1], 0)).data_ptr() != again.data_ptr()


def test_two_sets_of_tensors_of_one_signature(device):
    """A plan is of shapes, a table of addresses: other tensors, the same with other values, and addresses that were
    another tensor's before."""
    (weights, us, vs), dims = make_layers(SHAPES[3:6], torch.float32, device)
    for turn in range(4):
        if turn == 1:  # elsewhere
            (weights, us, vs), _ = make_layers(SHAPES[3:6], torch.float32, device)
        if turn == 2:  # in the same place
            for x in (*weights, *us, *vs):
                x.copy_(torch.randn(x.shape).to(x))
        if turn == 3:  # one anew, one of its own memory's owner before
            old = weights[0]
            weights[0] = torch.randn_like(old)
            del old
            weights[1] = weights[1].clone()
        for iterations in (0, 1):
            arguments = dims, iterations, EPS, True, False
            normalized, state = spectral_norm.forward(weights, us, vs, *arguments)
            first = spectral_norm.backward(weights, normalized, state, dims)
            second = spectral_norm.double_backward(normalized, weights, weights, state, dims)
            with launch._unplanned():
                right, right_state = spectral_norm.forward(weights, us, vs, *arguments)
                right_first = spectral_norm.backward(weights, right, right_state, dims)
                right_second = spectral_norm.double_backward(right, weights, weights, right_state, dims)
            assert torch.equal(state, right_state)
            for x, y in zip((*normalized, *first, *second[0], *second[1]),
                            (*right, *right_first, *right_second[0], *right_second[1])):  # fmt: skip
                assert torch.equal(x, y)


# ---- through the front door --------------------------------------------------------------------------------


def group_inputs(device, dtype=torch.float64):
    (weights, us, vs), dims = make_layers([((7, 13), 0), ((6, 5, 3), 1), ((4, 3, 2, 2), 0)], dtype, device)
    weights[2] = weights[2].contiguous(memory_format=torch.channels_last)
    return [w.requires_grad_() for w in weights], us, vs, dims


@pytest.mark.parametrize("dialect", GF.SPECTRAL_NORM_DIALECTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_front_door_equals_reference(dialect, training, device):
    """Results, updated buffers, and gradients of first and second order of the whole call."""

    def run(implementation):
        weights, us, vs, dims = group_inputs(device)
        options = {"dims": dims, "training": training, "dialect": dialect, "implementation": implementation}
        normalized = GF.spectral_norm_group(weights, us, vs, n_power_iterations=2, **options)
        assert gankern.last_implementation("spectral_norm") == implementation
        loss = sum((x * x.sin()).sum() for x in normalized)
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        second = torch.autograd.grad(sum((g**3).sum() for g in grads), weights)
        return normalized, us, vs, grads, second

    for ours, exact in zip(run("triton"), run("reference")):
        for x, y in zip(ours, exact):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 0), ((3, 2, 2, 2), 1)])
def test_front_door_gradcheck(shape, dim, device):
    weight, u, v = make_layer(shape, dim, torch.float64, device)
    weight = 10 * weight  # away from a sigma of zero, where finite differences lose their digits

    def normalize(weight):  # in evaluation: u and v are given, and so constants of the finite differences too
        return GF.spectral_norm(weight, u, v, dim=dim, training=False, implementation="triton")

    weight.requires_grad_()
    # fast_mode: along random directions. The interpreter would take long over one direction an element.
    assert torch.autograd.gradcheck(normalize, (weight,), fast_mode=True)
    assert torch.autograd.gradgradcheck(normalize, (weight,), fast_mode=True)


def test_front_door_missing_gradients(device):
    """A loss that reaches one layer only, and a frozen layer."""

    def run(implementation):
        weights, us, vs, dims = group_inputs(device)
        weights[0].requires_grad_(False)
        normalized = GF.spectral_norm_group(weights, us, vs, dims=dims, implementation=implementation)
        (grad,) = torch.autograd.grad(normalized[2].pow(2).sum(), weights[2], create_graph=True)
        second = torch.autograd.grad(grad.pow(3).sum(), weights[1:], allow_unused=True)
        return grad, *second

    (first, none, second), (exact_first, no_exact, exact_second) = run("triton"), run("reference")
    assert none is None and no_exact is None
    torch.testing.assert_close(first, exact_first, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(second, exact_second, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("magnitude", [1e36, 1e30, 1e20, 1.9e19, 1e-10, 1e-15, 1e-19, 1e-30])
@pytest.mark.parametrize("u_first", [True, False])
@pytest.mark.parametrize("add_eps", [True, False])
def test_norms_far_from_one(magnitude, u_first, add_eps, device):
    """Whose squares fp32 does not hold: right wherever torch, which divides first, is."""
    shapes = [((20, 130), 0), ((6, 5, 3, 3), 1)]  # several blocks either way
    (weights, us, vs), dims = make_layers(shapes, torch.float64, device)
    weights = [(w * 10 * magnitude).float() for w in weights]
    weights[0][3:7] *= 1e-6  # blocks of other sizes than the whole
    us, vs = [u.float() for u in us], [v.float() for v in vs]
    eps = EPS if magnitude > 1e-12 else 1e-36
    for n in (1, 2):
        normalized, state = spectral_norm.forward(weights, us, vs, dims, n, eps, u_first, add_eps)
        sigma, new_us, new_vs = split(state, weights, dims)
        for i, dim in enumerate(dims):
            exact = naive(*to64((weights[i], us[i], vs[i])), dim, n, eps, u_first, add_eps)
            for ours, right in zip((normalized[i], new_us[i], new_vs[i], sigma[i]), exact):
                torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-5 * right.abs().max().item())
