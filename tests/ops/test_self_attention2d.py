"""Self-attention: against the formula written out in fp64, first and second order."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradcheck, gradgradcheck

import gankern
import gankern.functional as GF
import gankern.nn as gnn
from gankern.core import native
from gankern.core.dispatch import Primitive
from gankern.ops import self_attention2d as ops
from gankern.reference.self_attention2d import self_attention2d as reference

needs_native = pytest.mark.skipif(native.NATIVE_MISSING is not None, reason=str(native.NATIVE_MISSING))


def tensors(n=2, c=16, h=6, w=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((n, c, h, w), (c // 8, c), (c // 8, c, 1, 1), (c // 2, c), (c, c // 2), ())
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]


def by_hand(x, theta, phi, g, out, gamma):
    """Position by position: the sum over keys is that of a softmax over the keys."""
    theta, phi, g, out = (w.flatten(1) for w in (theta, phi, g, out))
    q = torch.einsum("dc,nchw->ndhw", theta, x).flatten(2)
    k = F.max_pool2d(torch.einsum("dc,nchw->ndhw", phi, x), 2).flatten(2)
    v = F.max_pool2d(torch.einsum("ec,nchw->nehw", g, x), 2).flatten(2)
    table = torch.einsum("ndi,ndj->nij", q, k)
    weights = table.exp() / table.exp().sum(2, keepdim=True)
    found = torch.einsum("nij,nej->nei", weights, v)
    return x + gamma * torch.einsum("ce,nei->nci", out, found).view_as(x)


def every_order(function, inputs):
    inputs = [v.detach().requires_grad_() for v in inputs]
    y = function(*inputs)
    g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).requires_grad_()
    first = grad(y, inputs, g, create_graph=True)
    hs = [torch.linspace(0.5, 2, f.numel(), dtype=f.dtype).view_as(f) for f in first]
    return [y, *first, *grad(first, [*inputs, g], hs)]


# The last has more positions than a tile of queries, and more keys than a tile.
@pytest.mark.parametrize("size", [(2, 16, 6, 8), (3, 8, 2, 2), (1, 16, 5, 7), (2, 24, 14, 13)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_every_order_is_the_formulas(size, last):
    right = every_order(by_hand, tensors(*size))
    x, *weights = tensors(*size)
    if last:
        x = x.detach().contiguous(memory_format=torch.channels_last)
    for function in (GF.self_attention2d, lambda *v: GF.self_attention2d(*v, implementation="reference")):
        found = every_order(function, [x, *weights])
        assert not last or found[0].is_contiguous(memory_format=torch.channels_last)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_no_samples():
    x, *weights = tensors(0, 8, 4, 4)
    y = GF.self_attention2d(x, *weights)
    assert y.shape == x.shape and grad(y.sum(), x, allow_unused=True)[0].shape == x.shape


@needs_native
def test_what_runs():
    x, *weights = tensors()
    GF.self_attention2d(x, *weights)
    assert gankern.last_implementation("self_attention2d") == "cpu"
    GF.self_attention2d(x, *weights, implementation="reference")
    assert gankern.last_implementation("self_attention2d") == "reference"


def test_scores_without_a_number():
    """Of a query whose scores are all -infinity, or one of them infinity, the softmax is NaN; a score of -infinity
    beside others counts nothing."""
    q = torch.ones(1, 1, 3, dtype=torch.float64)
    kv = torch.tensor([[[-torch.inf, -torch.inf, 2.0], [3.0, 5.0, 7.0]]], dtype=torch.float64)
    assert torch.equal(ops.attention(q, kv, None), torch.full((1, 1, 3), 7.0, dtype=torch.float64))
    for scores in ([-torch.inf] * 3, [torch.inf, 0.0, 1.0], [torch.nan, 0.0, 1.0]):
        kv[0, 0] = torch.tensor(scores)
        assert ops.attention(q, kv, None).isnan().all() and reference(q, kv).isnan().all()


@needs_native
@pytest.mark.parametrize("samples", [1, 17])
def test_the_number_of_threads_does_not_matter(samples):
    """Of one sample, whose queries are shared out in parts, and of more samples than parts."""
    q, kv = torch.randn(samples, 3, 500), torch.randn(samples, 8, 40)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(every_order(lambda q, kv: ops.attention(q, kv, "cpu"), [q, kv]))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision_are_of_float32_means(dtype):
    """The mean of B is not taken from the result, whose places are the dtype's: beside large values that would show."""
    generator = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((2, 4, 70), (2, 12, 40)))
    kv[:, 4:] += 8
    q, kv = q.requires_grad_(), kv.requires_grad_()
    g = torch.linspace(-1, 1, 2 * 8 * 70, dtype=torch.float64).view(2, 8, 70).to(dtype)
    found = grad(ops.attention(q, kv, "cpu"), (q, kv), g)
    wide = [t.detach().double().requires_grad_() for t in (q, kv)]
    right = grad(reference(*wide), wide, g.double())
    for ours, exact in zip(found, right):
        assert (ours - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_channels_too_wide_for_a_gpu_are_left_to_torch(monkeypatch):
    q, kv = torch.randn(1, 1, 4), torch.randn(1, 301, 1)
    chosen = Primitive.registry["self_attention2d"]
    monkeypatch.setattr(type(chosen), "select", lambda *arguments: "triton")
    assert torch.equal(ops.attention(q, kv, None), reference(q, kv))
    assert gankern.last_implementation("self_attention2d") == "reference"
    with pytest.raises(ValueError, match="256 channels of keys or of values at most, and these are 300"):
        ops.attention(q, kv, "triton")


def test_gradients_by_differences():
    assert gradcheck(GF.self_attention2d, tensors(1, 8, 4, 4), fast_mode=True)
    assert gradgradcheck(GF.self_attention2d, tensors(1, 8, 4, 4), fast_mode=True)


@needs_native
def test_no_table_is_stored():
    """Of 32x32 positions a table has 262,144 numbers; the largest tensor that is made is a map."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(r.numel() for r in (result if isinstance(result, tuple | list) else [result])
                         if isinstance(r, torch.Tensor))  # fmt: skip
            return result

    inputs = tensors(1, 8, 32, 32, torch.float32)
    with Watch():
        every_order(GF.self_attention2d, inputs)
    assert max(sizes) <= 1024 * 8


def test_a_penalty_through_it_trains_its_weights():
    torch.manual_seed(0)
    layer = gnn.SelfAttention2d(16).double()
    layer.gamma.data.fill_(0.7)
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64, requires_grad=True)

    def penalty(function):
        (g,) = grad(function(x).square().sum(), x, create_graph=True)
        return grad(g.square().sum(), list(layer.parameters()))

    weights = lambda: (layer.theta.weight, layer.phi.weight, layer.g.weight, layer.out.weight, layer.gamma)  # noqa: E731
    torch.testing.assert_close(penalty(layer), penalty(lambda x: by_hand(x, *weights())), rtol=1e-8, atol=1e-8)
    with pytest.raises(RuntimeError, match="order 2"):
        (a,) = grad(layer(x).square().sum(), x, create_graph=True)
        (b,) = grad(a.square().sum(), x, create_graph=True)
        grad(b.square().sum(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    inputs = [0.3 * v.detach() for v in tensors(dtype=dtype)]
    right = by_hand(*(v.double() for v in inputs))
    y = GF.self_attention2d(*inputs)
    assert y.dtype == dtype and (y - right).abs().max() <= 16 * torch.finfo(dtype).eps * right.abs().max()


def test_the_module_has_the_papers_parameters_and_takes_spectral_norm():
    for channels, count in ((64, 5_121), (128, 20_481), (256, 81_921), (512, 327_681)):
        with torch.device("meta"):
            assert sum(p.numel() for p in gnn.SelfAttention2d(channels).parameters()) == count
    layer = gnn.SelfAttention2d(16)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(layer(x), x)  # gamma is 0
    for child in (layer.theta, layer.phi, layer.g, layer.out):
        torch.nn.utils.parametrizations.spectral_norm(child)
    layer.gamma.data.fill_(1.0)
    assert not torch.equal(layer(x), x)


X = torch.ones(1, 8, 4, 4)
W = {"theta": torch.ones(1, 8), "phi": torch.ones(1, 8), "g": torch.ones(4, 8), "out": torch.ones(8, 4)}
BAD = [
    ({"x": torch.ones(1, 8, 1, 4)}, "x has shape .*height and width of 2 or more"),
    ({"x": torch.ones(8, 4, 4)}, "x has shape"),
    ({"theta": torch.ones(1, 7)}, r"theta has shape \(1, 7\); .*\[1, 8\]"),
    ({"phi": torch.ones(2, 8)}, r"phi has shape \(2, 8\); .*\[1, 8\]"),
    ({"g": torch.ones(4, 8, 3, 3)}, "g has shape"),
    ({"out": torch.ones(8, 5)}, r"out has shape \(8, 5\); .*\[8, 4\]"),
    ({"g": torch.ones(4, 8, dtype=torch.float64)}, "g is torch.float64"),
    ({"gamma": torch.ones(2)}, "gamma has shape"),
    ({"implementation": "cuda"}, "'cuda'"),
]


@pytest.mark.parametrize(("wrong", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_input_is_named(wrong, says):
    with pytest.raises((ValueError, TypeError), match=f"self_attention2d: .*{says}"):
        GF.self_attention2d(**{"x": X, **W, "gamma": torch.ones(()), **wrong})
