"""Spectral norm on a real GPU, through the front door: `make gpu` runs this, and without a GPU it is skipped.

The Triton kernels on their own are tested in tests/triton, which runs on the GPU too where there is one. Here is
what the interpreter cannot show: streams, CUDA graphs, the same bits every time, and more than 2^31 elements.
"""

import math

import pytest
import torch

import gankern
import gankern.functional as GF

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]

DEVICE = "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Layers of a discriminator with a transposed convolution (rows in dimension 1) and one large matrix among them.
SHAPES = [((64, 3, 4, 4), 0), ((128, 64, 4, 4), 0), ((96, 64, 3, 3), 1), ((1, 4000), 0), ((515, 1031), 0), ((7, 1), 0)]


def make_group(dtype, seed=0):
    """Weights, u, v, dims. u and v are near the singular vectors: a sigma near zero would only test overflow."""
    generator = torch.Generator().manual_seed(seed)
    weights, us, vs = [], [], []
    for shape, dim in SHAPES:
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        matrix = weight.movedim(dim, 0).flatten(1)
        v = torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64)
        for _ in range(5):
            u = torch.nn.functional.normalize(matrix @ v, dim=0)
            v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
        weights.append(weight.to(DEVICE, dtype))
        us.append(u.to(DEVICE, dtype))
        vs.append(v.to(DEVICE, dtype))
    weights[1] = weights[1].contiguous(memory_format=torch.channels_last)
    return weights, us, vs, [dim for _, dim in SHAPES]


def random_like(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in tensors]


def all_orders(implementation, weights, us, vs, dims, cotangents, second_cotangents):
    """{name: list of results}: the forward, the buffers after it, and gradients of first and second order."""
    weights = [w.clone().requires_grad_() for w in weights]
    cotangents = [g.clone().requires_grad_() for g in cotangents]
    us, vs = ([x.clone() for x in xs] for xs in (us, vs))
    normalized = GF.spectral_norm_group(weights, us, vs, dims=dims, implementation=implementation)
    assert gankern.last_implementation("spectral_norm") == implementation
    grads = torch.autograd.grad(normalized, weights, cotangents, create_graph=True)
    second = torch.autograd.grad(grads, [*weights, *cotangents], second_cotangents)
    results = {"normalized": normalized, "u": us, "v": vs, "gradient": grads}
    results |= {"second by weight": second[: len(weights)], "second by gradient": second[len(weights) :]}
    return {name: [x.detach() for x in xs] for name, xs in results.items()}


def test_sigma_for_the_log_may_be_on_the_host():
    weights, us, vs, _ = make_group(torch.float32)
    sigma = torch.zeros(())
    for _ in range(2):
        normalized = GF.spectral_norm(weights[0], us[0], vs[0], sigma=sigma)
        torch.testing.assert_close(normalized * sigma.to(DEVICE), weights[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_against_fp64(dtype):
    weights, us, vs, dims = make_group(dtype)
    inputs = (weights, us, vs, dims, random_like(weights, 1), random_like(weights, 2))
    ours, plain = (all_orders(implementation, *inputs) for implementation in ("triton", "reference"))
    wide = [[x.double() for x in xs] if xs is not dims else xs for xs in inputs]
    exact = all_orders("reference", *wide)
    for name, rows in exact.items():
        for i, truth in enumerate(rows):
            unit = torch.finfo(dtype).eps * truth.abs().max().item()
            allowed = 2 * (plain[name][i] - truth).abs().max().item() + unit * math.sqrt(weights[i].numel())
            error = (ours[name][i].double() - truth).abs().max().item()
            assert error <= allowed, f"{name} of layer {i}: error {error:.3g}, allowed {allowed:.3g}"
            assert ours[name][i].dtype == dtype
    for weight, result in zip(weights, ours["normalized"]):
        assert result.stride() == weight.stride()


def training_step(weights, us, vs, dims, cotangents):
    """Iterates, and returns what a training step needs; updates us and vs."""
    normalized = GF.spectral_norm_group(weights, us, vs, dims=dims, implementation="triton")
    return [*normalized, *torch.autograd.grad(normalized, weights, cotangents)]


def step_inputs(dtype=torch.float32):
    weights, us, vs, dims = make_group(dtype)
    return [w.requires_grad_() for w in weights], us, vs, dims, random_like(weights, 1)


def clones(tensors):
    return [x.detach().clone() for x in tensors]


def assert_same_bits(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(dtype):
    weights, us, vs, dims, cotangents = step_inputs(dtype)
    first = None
    for _ in range(20):
        new_us, new_vs = clones(us), clones(vs)
        results = [*training_step(weights, new_us, new_vs, dims, cotangents), *new_us, *new_vs]
        first = first or results
        assert_same_bits(results, first)


def test_other_stream():
    """A stream of its own, while the default one is busy: kernels on the wrong stream would come too early or late."""
    weights, us, vs, dims, cotangents = step_inputs()
    expected_us, expected_vs = clones(us), clones(vs)
    expected = training_step(weights, expected_us, expected_vs, dims, cotangents)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.full_like(w, math.nan) for w in weights]
        torch.cuda._sleep(50_000_000)
        for target, weight in zip(late, weights):
            target.copy_(weight.detach())
        results = training_step([w.requires_grad_() for w in late], us, vs, dims, cotangents)
    stream.synchronize()
    assert_same_bits(results, expected)
    assert_same_bits([*us, *vs], [*expected_us, *expected_vs])


def test_cuda_graph():
    """Forward, updated buffers and backward in one graph: three replays are three steps."""
    weights, us, vs, dims, cotangents = step_inputs()
    eager_us, eager_vs = clones(us), clones(vs)
    eager = [clones(training_step(weights, eager_us, eager_vs, dims, cotangents)) for _ in range(3)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the warm-up that every capture wants; it must leave u and v alone
        training_step(weights, clones(us), clones(vs), dims, cotangents)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(weights, us, vs, dims, cotangents)
    for expected in eager:
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, expected)
    assert_same_bits([*us, *vs], [*eager_us, *eager_vs])
    with torch.no_grad():  # a graph reads the weights where they are: new values count
        for weight in weights:
            weight *= 2
    graph.replay()
    training_step(weights, eager_us, eager_vs, dims, cotangents)
    assert_same_bits([*us, *vs], [*eager_us, *eager_vs])


def test_compiled():
    weights, us, vs, dims, cotangents = step_inputs()

    def loss(weights):
        normalized = GF.spectral_norm_group(weights, us, vs, dims=dims, training=False)
        return sum((x * g).sum() for x, g in zip(normalized, cotangents))

    expected = torch.autograd.grad(loss(weights), weights)
    assert gankern.last_implementation("spectral_norm") == "triton"
    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True)(weights), weights)
    for x, y in zip(ours, expected):
        torch.testing.assert_close(x, y)


def test_missing_gradients():
    """A layer that the loss does not reach, and a frozen one."""

    def run(implementation):
        weights, us, vs, dims = make_group(torch.float64)
        weights = [w.requires_grad_(i != 0) for i, w in enumerate(weights)]
        normalized = GF.spectral_norm_group(weights, us, vs, dims=dims, implementation=implementation)
        loss = normalized[0].sum() + normalized[2].pow(2).sum()
        grads = torch.autograd.grad(loss, weights[1:], allow_unused=True)
        assert [g is None for g in grads] == [i != 2 for i in range(1, len(weights))]
        return grads[1]

    torch.testing.assert_close(run("triton"), run("reference"), rtol=1e-10, atol=1e-12)


def test_more_than_2_31_elements():
    rows, columns = 65537, 32771
    assert rows * columns > 2**31
    needed = 24 << 30  # four bf16 tensors of 4 GiB, the partial sums, and the check's own blocks
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    blocks = [slice(i, min(i + 4096, rows)) for i in range(0, rows, 4096)]
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    for block in blocks:  # mostly of one sign: sigma stands out
        weight[block] = torch.rand(weight[block].shape, generator=generator, device=DEVICE) - 0.25
    weight.requires_grad_()
    u = torch.nn.functional.normalize(torch.rand(rows, generator=generator, device=DEVICE), dim=0)
    v = torch.nn.functional.normalize(torch.rand(columns, generator=generator, device=DEVICE), dim=0)

    with torch.no_grad():  # the definition, block by block
        exact_u = torch.cat([weight[block].double() @ v.double() for block in blocks])
        exact_u /= exact_u.norm()
        exact_v = sum(weight[block].double().T @ exact_u[block] for block in blocks)
        sigma = exact_v.norm()
        exact_v /= sigma
        squares = sum(weight[block].double().pow(2).sum() for block in blocks)

    normalized = GF.spectral_norm(weight, u, v, implementation="triton")
    torch.testing.assert_close(u.double(), exact_u, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(v.double(), exact_v, rtol=1e-4, atol=1e-8)
    (grad,) = torch.autograd.grad(normalized, weight, weight.detach())  # <g, W> is the sum of squares
    with torch.no_grad():
        for block in blocks:
            exact = weight[block].double() / sigma
            torch.testing.assert_close(normalized[block].double(), exact, rtol=1.05 * 2**-8, atol=1e-8)  # half a unit
            exact -= squares / sigma**2 * exact_u[block, None] * exact_v
            # A difference of two terms of the weights' size: its error is relative to those.
            torch.testing.assert_close(grad[block].double(), exact, rtol=2**-7, atol=2e-4 / sigma.item())
