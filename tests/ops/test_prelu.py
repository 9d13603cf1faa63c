"""PReLU in bias_act, batch_norm_act and instance_norm_act, to second order, against torch's own in fp64."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad

import gankern
import gankern.functional as GF
import gankern.nn as gnn
from gankern.core import native
from gankern.penalties import r1_penalty

COMPILED = "reference" if native.NATIVE_MISSING else "cpu"
# Rows and patterns of bias_act, columns and planes of the norms, several segments.
SHAPES = [(2, 4, 2, 3), (3, 5, 7, 9), (4, 6), (2, 3, 20, 21), (70, 24, 3, 3), (2, 3, 2, 3, 4)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) + 0.1


def every_order(function, tensors):
    """Result, gradients, and gradients of each gradient apart and of all together."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    g = random(*y.shape, seed=9).to(y.dtype).requires_grad_()
    first = grad(y, leaves, g, create_graph=True)
    found = [y, *first]
    for chosen in [range(len(leaves)), *((i,) for i in range(len(leaves)))]:
        hs = [random(*first[i].shape, seed=10 + i).to(y.dtype) for i in chosen]
        second = grad([first[i] for i in chosen], [g, *leaves], hs, allow_unused=True, retain_graph=True)
        found += [torch.zeros_like(t) if s is None else s for s, t in zip(second, [g, *leaves])]
    return found


def same(ours, theirs, tensors, tolerance=1e-9):
    for mine, right in zip(every_order(ours, tensors), every_order(theirs, tensors), strict=True):
        assert (mine - right).abs().max() <= tolerance * max(1.0, right.abs().max().item())


def layouts(x):
    return [x, x.movedim(1, -1).contiguous().movedim(-1, 1)] if x.ndim > 2 else [x]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_python", [False, True])
def test_every_order_and_layout(shape, in_python):
    channels = shape[1]
    bias, weight = random(channels, seed=1), random(channels, seed=2)
    of_samples = random(*shape[:2], seed=3), random(*shape[:2], seed=4)
    mean, var = random(channels, seed=5), random(channels, seed=6).square() + 0.5
    over = (...,) + (None,) * (len(shape) - 2)
    with native.python_gradients() if in_python else contextlib.nullcontext():
        for x, slopes in itertools.product(layouts(random(*shape)), (1, channels)):
            a = random(slopes, seed=7)

            def act(x, *bias, gain=1.0, clamp=None):
                return GF.bias_act(x, *bias[:-1], activation="prelu", slope=bias[-1], gain=gain, clamp=clamp)

            same(act, lambda x, b, a: F.prelu(x + b[over], a), [x, bias, a])
            same(
                lambda x, b, a: act(x, b, a, gain=1.5, clamp=0.9),
                lambda x, b, a: (1.5 * F.prelu(x + b[over], a)).clamp(-0.9, 0.9),
                [x, bias, a],
            )
            same(GF.prelu, F.prelu, [x, a])
            assert gankern.last_implementation("bias_act") == COMPILED

            def norm(x, w, b, a, *running):
                given = running or (None, None)
                return GF.batch_norm_act(x, *given, w, b, not running, activation="prelu", slope=a)

            same(norm, lambda x, w, b, a: F.prelu(F.batch_norm(x, None, None, w, b, True), a), [x, weight, bias, a])
            same(
                lambda x, w, b, a: norm(x, w, b, a, mean, var),
                lambda x, w, b, a: F.prelu(F.batch_norm(x, mean, var, w, b), a),
                [x, weight, bias, a],
            )
            same(
                norm,
                lambda x, w, b, a: F.prelu(F.batch_norm(x, None, None, None, None, True) * w[over] + b[over], a),
                [x, *of_samples, a],
            )
            same(
                lambda x, a: norm(x, None, None, a),
                lambda x, a: F.prelu(F.batch_norm(x, None, None, None, None, True), a),
                [x, a],
            )
            assert gankern.last_implementation("batch_norm_act") == COMPILED
            if x.ndim < 3:
                continue

            def instance(x, w, b, a):
                return GF.instance_norm_act(x, None, None, w, b, activation="prelu", slope=a)

            same(instance, lambda x, w, b, a: F.prelu(F.instance_norm(x, weight=w, bias=b), a), [x, weight, bias, a])
            same(
                instance,
                lambda x, w, b, a: F.prelu(F.instance_norm(x) * w[over] + b[over], a),
                [x, *of_samples, a],
            )
            assert gankern.last_implementation("instance_norm_act") == COMPILED


@pytest.mark.parametrize("implementation", ["reference", COMPILED])
def test_the_derivative_at_zero_is_the_slope(implementation):
    x, a = torch.tensor([[0.0, -0.0, 1.0, -2.0]], requires_grad=True), torch.tensor([0.25], requires_grad=True)
    y = GF.bias_act(x, activation="prelu", slope=a, implementation=implementation)
    of_x, of_a = grad(y.sum(), (x, a))
    assert of_x.tolist() == [[0.25, 0.25, 1.0, 0.25]] and of_a.tolist() == [-2.0]


def test_slopes_of_any_sign_and_of_one_above():
    x, a = random(3, 4, 5, 6), torch.tensor([-0.5, 0.0, 1.0, 2.0], dtype=torch.float64)
    same(lambda x, a: GF.bias_act(x, activation="prelu", slope=a), F.prelu, [x, a])
    same(
        lambda x, a: GF.batch_norm_act(x, None, None, training=True, activation="prelu", slope=a),
        lambda x, a: F.prelu(F.batch_norm(x, None, None, training=True), a),
        [x, a],
    )


def test_other_places_of_the_channels_and_gaps():
    x, a = random(5, 4, 6), random(6, seed=1)
    same(
        lambda x, a: GF.bias_act(x, activation="prelu", slope=a, dim=-1),
        lambda x, a: F.prelu(x.movedim(-1, 1), a).movedim(1, -1),
        [x, a],
    )
    wide = random(5, 8, 12)[:, ::2, ::2]
    same(lambda x, a: GF.prelu(x, a), F.prelu, [wide, random(4, seed=1)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x, a = random(8, 16, 9, 9, dtype=dtype), random(16, seed=1, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (x, a)]
    right = [t.double().requires_grad_() for t in (x, a)]
    y, z = GF.prelu(*leaves), F.prelu(*right)
    for mine, theirs in zip((y, *grad(y.sum(), leaves)), (z, *grad(z.sum(), right))):
        assert mine.dtype == dtype
        unit = torch.finfo(dtype).eps * theirs.abs().max()
        assert (mine - theirs).abs().max() <= unit
    wide = a.float().requires_grad_()  # beside half-precision maps, as under AMP
    y = GF.batch_norm_act(x, None, None, training=True, activation="prelu", slope=wide)
    assert y.dtype == dtype and grad(y.sum(), wide)[0].dtype == torch.float32


def test_a_slope_that_needs_no_gradient_gets_none_and_empty_batches_zeros():
    x, a = random(2, 3, 4, 4).requires_grad_(), random(3, seed=1)
    for y in (
        GF.prelu(x, a),
        GF.batch_norm_act(x, None, None, training=True, activation="prelu", slope=a),
        GF.instance_norm_act(x, activation="prelu", slope=a),
    ):
        assert grad(y.sum(), x)[0].shape == x.shape
    empty, a = torch.zeros(0, 3, 4, 4), torch.ones(3, requires_grad=True)
    for y in (
        GF.prelu(empty, a),
        GF.batch_norm_act(empty, None, None, training=True, activation="prelu", slope=a),
        GF.instance_norm_act(empty, activation="prelu", slope=a),
    ):
        assert torch.equal(grad(y.sum(), a)[0], torch.zeros(3))


def test_layers_have_torchs_keys_and_a_slope():
    torch.manual_seed(0)
    norm, prelu = nn.BatchNorm2d(6), nn.PReLU()
    ours = gnn.BatchNormAct2d(6, activation="prelu")
    assert set(ours.state_dict()) == {*norm.state_dict(), "slope"} and ours.slope.tolist() == [0.25]
    x = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(ours(x), prelu(norm(x)))
    for layer in (gnn.InstanceNormAct2d(6, activation="prelu"), gnn.BiasAct(6, "prelu")):
        assert "slope" in dict(layer.named_parameters()) and layer(x).shape == x.shape
        layer(x).sum().backward()
        assert layer.slope.grad is not None
    assert dict(gnn.PReLU(6).named_parameters()).keys() == {"weight"}
    per_channel = gnn.BatchNormAct2d(6, activation="prelu")
    per_channel.slope = nn.Parameter(torch.linspace(0, 1, 6))
    torch.testing.assert_close(per_channel(x), F.prelu(nn.BatchNorm2d(6)(x), per_channel.slope))


def test_before_and_behind_a_pixel_shuffle():
    """One slope commutes with the shuffle; slopes of the channels become those of the shuffle's groups."""
    x, one, many = random(2, 12, 3, 3), random(1, seed=1), random(3, seed=2)
    assert torch.equal(F.pixel_shuffle(GF.prelu(x, one), 2), GF.prelu(F.pixel_shuffle(x, 2), one))
    same(
        lambda x, a: F.pixel_shuffle(GF.prelu(x, a.repeat_interleave(4)), 2),
        lambda x, a: F.prelu(F.pixel_shuffle(x, 2), a),
        [x, many],
    )


def test_a_penalty_through_it_is_torchs():
    torch.manual_seed(0)

    def critic(library, norm):
        torch.manual_seed(1)
        return nn.Sequential(
            library.Conv2d(3, 4, 3, padding=1), library.PReLU(4), norm(4), library.PReLU(), library.Conv2d(4, 1, 8)
        ).double()

    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    found = []
    for library, norm in ((nn, nn.InstanceNorm2d), (gnn, gnn.InstanceNorm2d)):
        net = critic(library, norm)
        penalty = r1_penalty(net, x)
        penalty.backward()
        zero = [torch.zeros_like(p) for p in net.parameters()]
        found.append([penalty, *(z if p.grad is None else p.grad for p, z in zip(net.parameters(), zero))])
    for mine, right in zip(*found):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


def test_compiles_whole():
    x, a = torch.randn(2, 8, 6, 6, requires_grad=True), torch.rand(8, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, a):
        y = GF.batch_norm_act(x, None, None, training=True, activation="prelu", slope=a)
        return GF.bias_act(
            GF.prelu(GF.instance_norm_act(y, activation="prelu", slope=a), a), activation="prelu", slope=a
        )

    def plain(x, a):
        y = F.prelu(F.batch_norm(x, None, None, training=True), a)
        return F.prelu(F.prelu(F.prelu(F.instance_norm(y), a), a), a)

    mine, right = run(x, a), plain(x, a)
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad(mine.sum(), (x, a)), grad(right.sum(), (x, a)), rtol=1e-3, atol=1e-4)


def test_per_sample_gradients():
    x, a = torch.randn(3, 4, 5), torch.rand(4)

    def one(x, a):
        return GF.prelu(x[None], a).square().sum()

    found = torch.func.vmap(torch.func.grad(one, argnums=(0, 1)), in_dims=(0, None))(x, a)
    for i in range(3):
        given = [x[i].requires_grad_(), a.detach().requires_grad_()]
        torch.testing.assert_close(
            [f[i] for f in found], list(grad(F.prelu(given[0][None], given[1]).square().sum(), given))
        )


@pytest.mark.parametrize("x", [[1.0, 2.0], None, "a"])
def test_what_is_no_tensor_is_refused_by_name(x):
    with pytest.raises(TypeError, match="prelu: input is .*; it must be a tensor"):
        GF.prelu(x, torch.ones(1))
    with pytest.raises(TypeError, match="prelu: weight is .*; it must be a tensor"):
        GF.prelu(torch.ones(2), x)
