"""Gradient penalties of whole critics, against a double backward written by hand in fp64 and against closed forms."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gankern
import gankern.nn as gnn
from gankern import fast_double_backward, penalties
from gankern.core import native
from gankern.core.torch_internals import unwrapped
from gankern.models import layers
from gankern.nn import coupling

METHODS = ["double_backward", "auto"]


def critic(seed=0, smooth=False):
    torch.manual_seed(seed)
    activation = nn.Softplus() if smooth else nn.LeakyReLU(0.2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        activation,
        nn.Conv2d(8, 16, 4, 2, 1),
        activation,
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 1),
    ).double()


def images(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=generator, dtype=torch.float64)


def by_hand(net, points, function, args=()):
    """(penalty, gradients of the parameters) by torch's own double backward; `function` is of the list of norms, each
    over a whole sample."""
    points = [p.detach().requires_grad_() for p in points]
    gradients = torch.autograd.grad(net(*points, *args).sum(), points, create_graph=True)
    norms = torch.cat([g.flatten(1) for g in gradients], 1).norm(dim=1)
    value = function(norms)
    return value, torch.autograd.grad(value, list(net.parameters()), allow_unused=True)


def handed_out(value, net):
    """The gradients that a penalty gives the parameters."""
    net.zero_grad()
    value.backward()
    return [p.grad for p in net.parameters()]


def same(ours, theirs, rtol=1e-9):
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert (a is None or not a.any()) and (b is None or not b.any())
        else:
            torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=rtol * b.abs().max().item())


def mix(real, fake, alpha):
    return real + alpha.view(-1, 1, 1, 1) * (fake - real)


ALPHA = torch.tensor([0.1, 0.5, 0.9, 0.3], dtype=torch.float64)
REAL, FAKE = images(seed=1), images(seed=2)


# ---- values and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "function"),
    [
        ({}, lambda n: 10 * (n - 1).square().mean()),
        ({"weight": 0.3, "target": 0.1}, lambda n: 0.3 * (n - 0.1).square().mean()),
        ({"one_sided": True}, lambda n: 10 * (n - 1).clamp_min(0).square().mean()),
        ({"one_sided": True, "target": 0.02}, lambda n: 10 * (n - 0.02).clamp_min(0).square().mean()),
        ({"reduction": "sum"}, lambda n: 10 * (n - 1).square().sum()),
        ({"target": 0}, lambda n: 10 * n.square().mean()),
    ],
)
def test_gradient_penalty(options, function, method, smooth):
    net = critic(smooth=smooth)
    value, gradients = by_hand(net, [mix(REAL, FAKE, ALPHA)], function)
    ours = penalties.gradient_penalty(net, REAL, FAKE, alpha=ALPHA, method=method, **options)
    torch.testing.assert_close(ours, value)
    same(handed_out(ours, net), gradients)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("penalty", "points", "function"),
    [
        (lambda net, **o: penalties.r1_penalty(net, REAL, weight=3, **o), REAL, lambda n: 1.5 * n.square().mean()),
        (
            lambda net, **o: penalties.r1_penalty(net, REAL, weight=3, half=False, **o),
            REAL,
            lambda n: 3 * n.square().mean(),
        ),
        (lambda net, **o: penalties.r2_penalty(net, FAKE, weight=3, **o), FAKE, lambda n: 1.5 * n.square().mean()),
        (
            lambda net, **o: penalties.zero_centered(net, REAL, FAKE, alpha=ALPHA, **o),
            mix(REAL, FAKE, ALPHA),
            lambda n: 10 * n.square().mean(),
        ),
        (
            lambda net, **o: penalties.lipschitz(net, REAL, FAKE, alpha=ALPHA, **o),
            mix(REAL, FAKE, ALPHA),
            lambda n: 10 * (n - 1).clamp_min(0).square().mean(),
        ),
        (
            lambda net, **o: penalties.dragan(net, REAL, alpha=ALPHA, generator=torch.Generator().manual_seed(5), **o),
            mix(
                REAL,
                REAL
                + 0.5
                * REAL.std()
                * torch.rand(REAL.shape, generator=torch.Generator().manual_seed(5), dtype=REAL.dtype),
                ALPHA,
            ),
            lambda n: 10 * (n - 1).square().mean(),
        ),
    ],
)
def test_variants(penalty, points, function, method):
    net = critic()
    with torch.no_grad():
        net[-1].weight *= 20  # some norms above 1
    value, gradients = by_hand(net, [points], function)
    ours = penalty(net, method=method)
    torch.testing.assert_close(ours, value)
    same(handed_out(ours, net), gradients)


def test_drift():
    outputs = torch.tensor([[1.0], [3.0]], requires_grad=True)
    value = penalties.drift(outputs, weight=0.5)
    value.backward()
    assert value == 2.5 and torch.equal(outputs.grad, torch.tensor([[0.5], [1.5]]))
    assert penalties.drift(outputs, weight=0.5, reduction="sum") == 5


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_critic(method):
    """D(x) = <w, x> + b: the gradient is w everywhere, P = 10 (|w| - 1)^2, dP/dw = 20 (|w| - 1) w/|w|."""
    net = nn.Linear(5, 1).double()
    value = penalties.gradient_penalty(net, *torch.randn(2, 7, 5, dtype=torch.float64), method=method)
    norm = net.weight.norm()
    torch.testing.assert_close(value, 10 * (norm - 1) ** 2)
    weight, bias = handed_out(value, net)
    torch.testing.assert_close(weight, 20 * (norm - 1) * net.weight / norm)
    assert bias is None


@pytest.mark.parametrize("method", METHODS)
def test_a_quadratic_critic(method):
    """D(x) = a |x|^2/2: the gradient is a x, and the curvature counts. P = mean (a |x| - 1)^2."""

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x):
            return self.a * x.square().sum(1) / 2

    net, x = Quadratic(), torch.randn(6, 3, dtype=torch.float64)
    value = penalties.gradient_penalty(net, x, x, weight=1, method=method)
    norms = x.norm(dim=1)
    torch.testing.assert_close(value, (net.a * norms - 1).square().mean())
    torch.testing.assert_close(handed_out(value, net)[0], (2 * (net.a * norms - 1) * norms).mean())


@pytest.mark.parametrize("method", METHODS)
def test_a_critic_of_zeros(method):
    net = critic()
    for p in net.parameters():
        nn.init.zeros_(p)
    value = penalties.gradient_penalty(net, REAL, FAKE, method=method)
    assert value == 10
    assert all(g is None or not g.any() for g in handed_out(value, net))


def test_alpha_is_one_number_a_sample():
    seen = []

    def net(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    zeros, ones = torch.zeros(50, 3, 4, 4), torch.ones(50, 3, 4, 4)
    for seed in (3, 3, 4):
        penalties.gradient_penalty(
            net, zeros, ones, generator=torch.Generator().manual_seed(seed), method="double_backward"
        )
    x = seen[0]
    assert torch.equal(x, x[:, :1, :1, :1].expand_as(x)), "one number for all elements of a sample"
    assert len(x[:, 0, 0, 0].unique()) > 40 and x.min() >= 0 and x.max() < 1
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_points_between_samples():
    real, fake = REAL, 1e4 * FAKE
    points = penalties.interpolate_samples(real, fake, ALPHA)
    torch.testing.assert_close(points, mix(real, fake, ALPHA))
    assert torch.equal(points, penalties.interpolate_samples(real, fake, ALPHA.view(-1, 1, 1, 1)))
    ends = penalties.interpolate_samples(real[:2], fake[:2], torch.tensor([0.0, 1.0]))
    assert torch.equal(ends, torch.stack([real[0], fake[1]])), "exact at both ends"
    assert penalties.interpolate_samples(real.half(), fake.float(), ALPHA).dtype == torch.float32
    last = real.to(memory_format=torch.channels_last)
    assert penalties.interpolate_samples(last, fake, ALPHA).stride() == last.stride()
    with pytest.raises(ValueError, match=r"interpolate_samples: alpha has shape \(4, 3\)"):
        penalties.interpolate_samples(real, fake, torch.rand(4, 3))
    with pytest.raises(ValueError, match=r"real has shape \(4, 3, 16, 16\) and fake has \(2, 3, 16, 16\)"):
        penalties.interpolate_samples(real, fake[:2], ALPHA)


def test_norm_dims():
    net = critic()
    points = mix(REAL, FAKE, ALPHA).requires_grad_()
    (g,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
    for dims, norms in (
        (1, g.norm(dim=1)),
        ((2, -1), g.flatten(2).norm(dim=2)),
        ([1, 3], g.transpose(2, 3).flatten(1, 2).norm(dim=1)),
        ((1, 2, 3), g.flatten(1).norm(dim=1)),
    ):
        value = 10 * (norms - 1).square().mean()
        expected = torch.autograd.grad(value, list(net.parameters()), allow_unused=True, retain_graph=True)
        ours = penalties.gradient_penalty(net, REAL, FAKE, alpha=ALPHA, norm_dims=dims)
        torch.testing.assert_close(ours, value)
        same(handed_out(ours, net), expected)


# ---- critics of all kinds -----------------------------------------------------------------------------------


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 8)
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x, label, scale=1.0):
        h = F.leaky_relu(self.first(x) * self.embed(label), 0.2)
        return {"features": h, "score": scale * self.last(h)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("select", ["score", lambda out: out["score"]])
def test_conditions_and_selectors(select, method):
    torch.manual_seed(0)
    net, x, label = Conditional().double(), torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 1, 2])
    value, gradients = by_hand(
        lambda_module(net, lambda x: net(x, label, scale=2.0)["score"]), [x], lambda n: 10 * (n - 1).square().mean()
    )
    ours = penalties.gradient_penalty(
        net, x, x, critic_args=[label], critic_kwargs={"scale": 2.0}, select=select, method=method
    )
    torch.testing.assert_close(ours, value)
    same(handed_out(ours, net), gradients)
    pair = penalties.gradient_penalty(lambda x: (0, net(x, label)["score"]), x, x, select=1, method=method)
    assert pair.isfinite()


class lambda_module:
    """A function with the parameters of a module."""

    def __init__(self, net, function):
        self.parameters, self.function = net.parameters, function

    def __call__(self, *args):
        return self.function(*args)


@pytest.mark.parametrize("method", METHODS)
def test_several_inputs(method):
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(3, 4)

        def forward(self, x, y):
            return F.relu(self.a(x.flatten(1)) * self.b(y)).sum(1)

    net = Two().double()
    reals = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    fakes = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    alpha = torch.rand(5, dtype=torch.float64)
    points = [r + alpha.view(-1, *[1] * (r.ndim - 1)) * (f - r) for r, f in zip(reals, fakes)]
    value, gradients = by_hand(net, points, lambda n: 10 * (n - 1).square().mean())
    ours = penalties.gradient_penalty(net, reals, fakes, alpha=alpha, method=method)
    torch.testing.assert_close(ours, value)
    same(handed_out(ours, net), gradients)
    assert penalties.r1_penalty(net, reals, method=method).isfinite()


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 1, 1, 1)])
def test_shapes_of_outputs(shape):
    net = nn.Linear(4, 1).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    value = penalties.gradient_penalty(lambda x: net(x).view(shape), x, x)
    torch.testing.assert_close(value, 10 * (net.weight.norm() - 1) ** 2)


def test_any_callable_gives_gradients_to_what_it_uses():
    first, last = nn.Linear(4, 3).double(), nn.Linear(3, 1).double()
    loose = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def net(x):
        return last(F.relu(first(x)) * loose)

    x = torch.randn(5, 4, dtype=torch.float64)
    penalties.gradient_penalty(net, x, x, method="double_backward").backward()
    assert first.weight.grad is not None and last.weight.grad is not None and loose.grad is not None


def test_frozen_parameters_get_nothing():
    net = critic()
    net[0].weight.requires_grad_(False)
    gradients = handed_out(penalties.gradient_penalty(net, REAL, FAKE, method="double_backward"), net)
    assert gradients[0] is None and gradients[2] is not None


def test_samples_and_conditions_that_require_a_gradient_get_one():
    net, scale = critic(smooth=True), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    sources = [REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()]

    def run(penalty):
        fake, factor = sources[1] * 2, scale * 3  # not leaves: their graph is the caller's
        value = penalty(fake, factor)
        other = fake.square().sum() * factor  # which goes through the same graph
        return torch.autograd.grad(value + 1e-3 * other, [*sources, scale, *net.parameters()], allow_unused=True)

    def by_torch(fake, factor):
        x = mix(sources[0], fake, ALPHA)
        (g,) = torch.autograd.grad((net(x) * factor).sum(), x, create_graph=True)
        return 10 * (g.flatten(1).norm(dim=1) - 1).square().mean()

    def ours(fake, factor):
        return penalties.gradient_penalty(
            lambda x, factor: net(x) * factor, sources[0], fake, alpha=ALPHA, critic_args=[factor]
        )

    same(run(ours), run(by_torch))
    value = penalties.gradient_penalty(lambda x, factor: net(x) * factor, REAL, FAKE, critic_kwargs={"factor": scale})
    assert torch.autograd.grad(value, scale)[0] != 0


# ---- how it is used -----------------------------------------------------------------------------------------


def test_added_to_a_loss_and_scaled():
    net = critic()
    _, gradients = by_hand(net, [mix(REAL, FAKE, ALPHA)], lambda n: 10 * (n - 1).square().mean())
    loss = net(FAKE).mean() - net(REAL).mean()
    plain = torch.autograd.grad(loss, list(net.parameters()))
    expected = [3 * (a + (0 if b is None else b)) for a, b in zip(plain, gradients)]
    loss = net(FAKE).mean() - net(REAL).mean() + penalties.gradient_penalty(net, REAL, FAKE, alpha=ALPHA)
    same(handed_out(3 * loss, net), expected)


def test_gradients_accumulate():
    net = critic()
    whole = handed_out(penalties.gradient_penalty(net, REAL, FAKE, alpha=ALPHA), net)
    whole = [None if g is None else g.clone() for g in whole]
    net.zero_grad()
    for i in (0, 2):
        part = slice(i, i + 2)
        (penalties.gradient_penalty(net, REAL[part], FAKE[part], alpha=ALPHA[part]) / 2).backward()
    same([p.grad for p in net.parameters()], whole)


def test_a_second_backward_and_hooks():
    net = critic()
    calls = []
    hook = net[0].weight.register_hook(lambda g: calls.append(g))
    value = penalties.gradient_penalty(net, REAL, FAKE, alpha=ALPHA, method="double_backward")
    value.backward(retain_graph=True)
    first = net[0].weight.grad.clone()
    value.backward()
    torch.testing.assert_close(net[0].weight.grad, 2 * first)
    assert len(calls) == 2
    hook.remove()
    penalties.gradient_penalty(net, REAL, FAKE, method="double_backward").backward()
    assert len(calls) == 2


def test_hooks_of_parameters_run_in_backwards_of_other_threads():
    """While a penalty is computed, in whose own backward they do not run; and afterwards they are what they were."""
    net, elsewhere, calls = critic(), [], []
    weight = net[0].weight

    def double(grad):
        calls.append(grad)
        return 2 * grad

    weight.register_hook(double)
    known = dict(weight._backward_hooks)

    def meanwhile(grad):  # called in the critic's backwards
        before = len(calls)
        thread = threading.Thread(target=lambda: elsewhere.append(torch.autograd.grad(weight.sum(), weight)[0]))
        thread.start()
        thread.join()
        assert len(calls) == before + 1
        del calls[before:]
        with torch.enable_grad():
            inside = penalties.gradient_penalty(net, REAL, FAKE, method="double_backward")
        assert not calls and inside.requires_grad

    def watched(x):
        features = net[0](x)
        features.register_hook(meanwhile)
        return net[1:](features)

    value = penalties.gradient_penalty(watched, REAL, FAKE, method="double_backward")
    assert len(elsewhere) > 1 and not calls
    assert all(torch.equal(g, torch.full_like(g, 2.0)) for g in elsewhere)
    assert dict(weight._backward_hooks) == known
    value.backward()
    assert len(calls) == 1 and torch.equal(weight.grad, 2 * calls[0])


def test_a_third_derivative_is_refused():
    net = critic(smooth=True)
    value = penalties.gradient_penalty(net, REAL, FAKE)
    (g,) = torch.autograd.grad(value, net[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice a penalty"):
        g.sum().backward()


def test_the_switch_is_restored():
    penalties.gradient_penalty(critic(), REAL, FAKE, method="double_backward")
    assert not fast_double_backward.is_enabled()
    with pytest.raises(ValueError):
        penalties.gradient_penalty(lambda x: x, REAL, FAKE, method="double_backward")
    assert not fast_double_backward.is_enabled()


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("method", ["tangent", "double_backward"])
def test_four_convolutions_a_layer(method, implementation, count_convolutions):
    net = critic()
    with count_convolutions as count, gankern.use_implementation(implementation):
        value = penalties.gradient_penalty(net, REAL, FAKE, method=method)
        # Forward, data gradient and tangent of both layers; their weight gradients.
        assert (count.maps, count.weights) == (2 * 3, 2)
        value.backward()
    assert (count.maps, count.weights) == (2 * 3, 2), "the backward only hands gradients out"


@pytest.mark.parametrize("method", ["tangent", "double_backward"])
def test_ten_passes_a_step(method, count_convolutions):
    """Four for the penalty; for D(real) and D(fake), which share a batch, forward, data and weight gradient."""
    net = critic()
    with count_convolutions as count:
        penalties.critic_step(net, REAL, FAKE, penalty=penalties.GradientPenalty(method=method)).loss.backward()
    assert (count.maps, count.weights) == (2 * 3 + 2 + 1, 2 + 2)  # no data gradient of the samples


@pytest.mark.skipif(native.NATIVE_MISSING is not None, reason="the native library was not built")
def test_a_step_convolves_by_the_engine():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 32, 3, 1, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(32 * 16 * 16, 1))
    real, fake = torch.randn(2, 4, 16, 16, 16)

    def run():
        net.zero_grad()
        penalties.critic_step(net, real, fake, penalty=None).loss.backward()
        return [p.grad.clone() for p in net.parameters()], gankern.last_implementation("convolution")

    ours, ran = run()
    with gankern.use_implementation("reference"):
        theirs, _ = run()
    assert ran == "cpu"
    net, real, fake = net.double(), real.double(), fake.double()
    exact, _ = run()
    for a, b, c in zip(ours, theirs, exact):
        # Of a convolution in tiles of 2 x 2 the error is at most four times that of a direct one.
        assert (a - c).abs().max() <= 4 * (b - c).abs().max() + 1e-6 * c.abs().max()


def test_a_step_leaves_checkpoints_and_compiled_critics_to_torch():
    """What a checkpoint runs again must be what it ran; and a mode would compile a critic anew."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = critic()

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    net, plain = Checkpointed(), critic()
    penalties.critic_step(net, REAL, FAKE, penalty=None).loss.backward()
    expected = handed_out(plain(FAKE).mean() - plain(REAL).mean(), plain)
    same([p.grad for p in net.parameters()], expected)

    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    for compiled in (torch.compile(plain, backend=backend), critic()):
        if compiled is not plain and not hasattr(compiled, "_orig_mod"):
            compiled.compile(backend=backend)
        compiled(torch.cat([REAL, FAKE]))
        before = len(compilations)
        same(handed_out(penalties.critic_step(compiled, REAL, FAKE, penalty=None).loss, compiled), expected)
        assert len(compilations) == before > 0


class Forwarding(nn.Module):
    """A wrapper that gives what it does not have from the network in it, torch.compile's own attributes too."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)

    def forward(self, x):
        return 3.0 * self.net(x)


def _compiled(net):
    return torch.compile(net, backend="eager")


def _with(change):
    def wrap(net):
        wrapper = _compiled(net)
        change(wrapper)
        return wrapper

    return wrap


class Derived(torch.nn.parallel.DistributedDataParallel):
    """As a subclass may be, with no process group."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module

    def forward(self, x):
        return 3.0 * self.module(x)


# What is around a network makes three times of its output.
AROUND = {
    "a wrapper around what is compiled": lambda net: Forwarding(_compiled(net)),
    "a forward hook of what is compiled": _with(lambda w: w.register_forward_hook(lambda m, inputs, y: 3.0 * y)),
    "another forward of what is compiled": _with(lambda w: setattr(w, "forward", lambda x: 3.0 * w._orig_mod(x))),
    "a wrapper": Forwarding,
}


@pytest.mark.parametrize("around", AROUND)
def test_what_a_wrapper_does_is_part_of_the_critic(around):
    net, wrapped = critic(), AROUND[around](critic())
    x = torch.randn_like(REAL)
    torch.testing.assert_close(wrapped(x), 3.0 * net(x))
    expected = handed_out(penalties.gradient_penalty(lambda x: 3.0 * net(x), REAL, FAKE, alpha=ALPHA), net)
    same(handed_out(penalties.gradient_penalty(wrapped, REAL, FAKE, alpha=ALPHA), wrapped), expected)
    plain = handed_out(3.0 * (net(FAKE).mean() - net(REAL).mean()), net)
    same(handed_out(penalties.critic_step(wrapped, REAL, FAKE, penalty=None).loss, wrapped), plain)


def test_only_wrappers_that_do_nothing_are_gone_past():
    net = critic()
    assert unwrapped(net) is net and unwrapped(len) is len
    for make in (*AROUND.values(), Derived):
        wrapper = make(net)
        assert unwrapped(wrapper) is wrapper
    lazy = nn.Sequential(nn.LazyLinear(2))
    assert unwrapped(_compiled(lazy)) is lazy
    compiled = _compiled(net)
    assert unwrapped(compiled) is net
    handle = nn.modules.module.register_module_forward_hook(lambda m, inputs, y: None)
    try:
        assert unwrapped(compiled) is compiled
    finally:
        handle.remove()


def test_the_graph_is_gone_when_it_returns():
    kept = []

    class Spy(nn.Module):
        def forward(self, x):
            y = x * 2
            kept.append(weakref.ref(y))
            return y

    net = nn.Sequential(nn.Linear(4, 4), Spy(), nn.ReLU(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    value = penalties.gradient_penalty(net, x, x, method="double_backward")
    assert kept and all(ref() is None for ref in kept)
    value.backward()


def test_parametrized_weights():
    net = critic().float()
    for i in (0, 2, 5):
        nn.utils.parametrizations.spectral_norm(net[i])
    net.eval()  # no iteration: the same weights at each access
    value, gradients = by_hand(net, [mix(REAL, FAKE, ALPHA).float()], lambda n: 10 * (n - 1).square().mean())
    ours = penalties.gradient_penalty(net, REAL.float(), FAKE.float(), alpha=ALPHA)
    torch.testing.assert_close(ours, value)
    same(handed_out(ours, net), gradients, 1e-4)


def test_activation_checkpointing():
    net = critic()
    value, gradients = by_hand(net, [mix(REAL, FAKE, ALPHA)], lambda n: 10 * (n - 1).square().mean())

    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.net, self.reentrant = net, reentrant

        def forward(self, x):
            x = checkpoint(self.net[:2], x, use_reentrant=self.reentrant)
            x = checkpoint(self.net[2:4], x, use_reentrant=self.reentrant)
            return self.net[4:](x)

    ours = penalties.gradient_penalty(Checkpointed(False), REAL, FAKE, alpha=ALPHA, method="double_backward")
    torch.testing.assert_close(ours, value)
    same(handed_out(ours, net), gradients)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):  # torch's own limit, also without this library
        penalties.gradient_penalty(Checkpointed(True), REAL, FAKE, method="double_backward")


# ---- mixed precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, method):
    net = critic().float()
    real, fake = REAL.float(), FAKE.to(dtype)  # as a generator under autocast gives them
    exact, gradients = by_hand(
        copy.deepcopy(net).double(), [mix(real.double(), fake.double(), ALPHA)], lambda n: 10 * (n - 1).square().mean()
    )
    with torch.autocast("cpu", dtype):
        value = penalties.gradient_penalty(net, real, fake, alpha=ALPHA, method=method)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=0.02, atol=0)
    with torch.autocast("cpu", dtype):
        _, plain = by_hand(net, [mix(real, fake, ALPHA.float())], lambda n: 10 * (n - 1).square().mean())
    for a, b, p in zip(handed_out(value, net), gradients, plain):
        if a is not None and b.any():
            assert a.dtype == torch.float32
            assert (a.double() - b).norm() <= 2 * (p.double() - b).norm() + 0.01 * b.norm()


def test_grad_scaler():
    net = critic().float()
    real, fake = REAL.float(), FAKE.float()
    expected = [
        g if g is None else g.clone() for g in handed_out(penalties.gradient_penalty(net, real, fake, alpha=ALPHA), net)
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(net.parameters(), lr=0)
    net.zero_grad()
    scaler.scale(penalties.gradient_penalty(net, real, fake, alpha=ALPHA)).backward()
    scaler.unscale_(optimizer)
    same([p.grad for p in net.parameters()], expected, 1e-6)
    scaler.step(optimizer)
    scaler.update()


def test_half_precision_critic():
    net = critic().bfloat16()
    value = penalties.gradient_penalty(net, REAL.bfloat16(), FAKE.bfloat16(), method="double_backward")
    assert value.dtype == torch.float32 and value.isfinite()
    assert all(g is None or g.isfinite().all() for g in handed_out(value, net))


# ---- several processes --------------------------------------------------------------------------------------

WORKER = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import gankern.nn as gnn
from gankern import penalties
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
real, fake, alpha, cases = torch.load(f"{folder}/in")
found = {}
for method, alone in cases:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 4, 2, 1), torch.nn.LeakyReLU(0.2), torch.nn.Flatten(), torch.nn.Linear(64, 1)
    ).double()
    model = DistributedDataParallel(net, find_unused_parameters=alone)  # the last bias: a penalty does not reach it
    for step in range(2):  # twice: the reducer must be ready again
        net.zero_grad()
        part = slice(2 * rank, 2 * rank + 2)
        loss = penalties.gradient_penalty(model, real[part], fake[part], alpha=alpha[part], method=method)
        if not alone:
            loss = loss + model(fake[part]).mean() - model(real[part]).mean()
        loss.backward()
    gradients = [p.grad for p in net.parameters()]
    net.zero_grad()
    loss = penalties.gradient_penalty(net, real, fake, alpha=alpha, method="double_backward")
    if not alone:
        loss = loss + net(fake).mean() - net(real).mean()
    loss.backward()
    found[method, alone] = gradients, [p.grad for p in net.parameters()]
torch.save(found, f"{folder}/{rank}.out")
dist.barrier()  # gloo's threads may end only when nobody talks to them
del model
dist.destroy_process_group()
"""
SHARED = [(method, alone) for method in ("double_backward", "tangent") for alone in (True, False)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Of each of two processes and each case: its gradients, and those of the joint batch."""
    folder = tmp_path_factory.mktemp("shared")
    real, fake = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    torch.save([real, fake, ALPHA, SHARED], folder / "in")
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(folder)]) for rank in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    return [torch.load(folder / f"{rank}.out") for rank in range(2)]


@pytest.mark.parametrize(("method", "alone"), SHARED, ids=[f"{m}-{'alone' if a else 'joint'}" for m, a in SHARED])
def test_two_processes_equal_one_with_the_joint_batch(shared, method, alone):
    for found in shared:
        same(*found[method, alone])


# ---- objects, and the whole step ----------------------------------------------------------------------------


def test_objects_remember_their_options():
    net = critic()
    penalty = penalties.GradientPenalty(weight=2, alpha=ALPHA)
    torch.testing.assert_close(
        penalty(net, REAL, FAKE), penalties.gradient_penalty(net, REAL, FAKE, weight=2, alpha=ALPHA)
    )
    torch.testing.assert_close(
        penalty(net, REAL, FAKE, weight=1), penalties.gradient_penalty(net, REAL, FAKE, weight=1, alpha=ALPHA)
    )
    torch.testing.assert_close(penalties.R1Penalty(half=False)(net, REAL), penalties.r1_penalty(net, REAL, half=False))
    torch.testing.assert_close(penalties.R2Penalty()(net, FAKE), penalties.r2_penalty(net, FAKE))
    torch.testing.assert_close(
        penalties.ZeroCentered(alpha=ALPHA)(net, REAL, FAKE), penalties.zero_centered(net, REAL, FAKE, alpha=ALPHA)
    )
    torch.testing.assert_close(
        penalties.Lipschitz(alpha=ALPHA)(net, REAL, FAKE), penalties.lipschitz(net, REAL, FAKE, alpha=ALPHA)
    )
    assert penalties.Dragan(noise=0.1, weight=1)(net, REAL).isfinite()
    assert penalties.Drift(weight=1)(torch.ones(3)) == 1
    assert repr(penalties.R1Penalty(weight=5)) == "R1Penalty(weight=5)"
    with pytest.raises(TypeError, match="GradientPenalty: no option is called 'wieght'; there are weight, target"):
        penalties.GradientPenalty(wieght=10)


def test_signatures_say_the_options_that_are_handed_on():
    shared = {"weight": 10.0, "reduction": "mean", "norm_dims": "sample", "method": "auto", "critic_args": (),
              "critic_kwargs": None, "select": None}  # fmt: skip
    between = {**shared, "target": 1.0, "one_sided": False, "alpha": None, "generator": None}
    for function, options in {
        penalties.gradient_penalty: between,
        penalties.lipschitz: between | {"one_sided": True},
        penalties.zero_centered: between | {"target": 0.0},
        penalties.dragan: between | {"noise": 0.5},
        penalties.r1_penalty: shared | {"half": True},
        penalties.r2_penalty: shared | {"half": True},
    }.items():
        parameters = inspect.signature(function).parameters.values()
        assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == options
        assert {p.kind for p in parameters if p.name not in options} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("joint", [None, True, False])
@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (
            penalties.GradientPenalty(weight=3, alpha=ALPHA),
            lambda net: penalties.gradient_penalty(net, REAL, FAKE, weight=3, alpha=ALPHA),
        ),
        (penalties.R1Penalty(weight=3), lambda net: penalties.r1_penalty(net, REAL, weight=3)),
        (penalties.R2Penalty(weight=3), lambda net: penalties.r2_penalty(net, FAKE, weight=3)),
        (functools.partial(penalties.r2_penalty, weight=3), lambda net: penalties.r2_penalty(net, FAKE, weight=3)),
        (None, lambda net: torch.zeros((), dtype=torch.float64)),
    ],
)
def test_critic_step(penalty, expected, joint):
    net = critic()
    fake = FAKE.clone().requires_grad_()
    step = penalties.critic_step(net, REAL, fake, penalty=penalty, drift_weight=0.1, joint=joint)
    real_output, fake_output, extra = net(REAL), net(FAKE), expected(net)
    loss = fake_output.mean() - real_output.mean()
    total = loss + extra + 0.1 * real_output.square().mean()
    torch.testing.assert_close(step.adversarial, loss.detach())
    torch.testing.assert_close(step.penalty, extra.detach())
    torch.testing.assert_close(step.real_output, real_output.detach())
    torch.testing.assert_close(step.fake_output, fake_output.detach())
    ours = [g if g is None else g.clone() for g in handed_out(step.loss, net)]
    same(ours, handed_out(total, net))
    assert fake.grad is None, "generated samples are detached"


@coupling.apart
class Counted(nn.Module):
    """Notes the sizes of the batches that a network is called with: a hook of the network could do more than that."""

    def __init__(self, net, seen):
        super().__init__()
        self.net, self.seen = net, seen

    def forward(self, x):
        self.seen.append(len(x))
        return self.net(x)


def test_critic_step_shares_a_batch_only_where_samples_are_apart():
    def batches(net):
        seen = []
        net = Counted(net, seen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            penalties.critic_step(net, REAL, FAKE, penalty=None)
        return seen

    assert batches(critic()) == [8]
    assert batches(nn.Sequential(nn.BatchNorm2d(3), critic()).double()) == [4, 4]
    assert batches(nn.Sequential(nn.BatchNorm2d(3), critic()).double().eval()) == [8]
    assert batches(nn.Sequential(gnn.BatchNormAct2d(3), critic()).double()) == [4, 4]
    assert batches(nn.Sequential(gnn.BatchNormAct2d(3), critic()).double().eval()) == [8]


@pytest.mark.parametrize("layout", ["strided", "contiguous"])
@pytest.mark.parametrize(("samples", "group"), [(4, 4), (8, 4), (12, 2), (6, 3), (5, 1)])
def test_a_shared_batch_keeps_the_groups_of_minibatch_stddev(samples, group, layout):
    torch.manual_seed(0)
    stddev = gnn.MinibatchStdDev(group, layout=layout)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), stddev, nn.Flatten(), nn.Linear(5 * 36, 1)).double()
    real, fake = torch.randn(2, samples, 3, 8, 8).double()
    real = real.contiguous(memory_format=torch.channels_last)
    shapes = []
    net = Counted(net, shapes)
    step = penalties.critic_step(net, real, fake, penalty=None, drift_weight=0.1)
    assert shapes == [2 * samples]
    apart = penalties.critic_step(net, real, fake, penalty=None, drift_weight=0.1, joint=False)
    assert shapes[1:] == [samples, samples]
    torch.testing.assert_close(step.real_output, apart.real_output)
    torch.testing.assert_close(step.fake_output, apart.fake_output)
    same(handed_out(step.loss, net), [g.clone() for g in handed_out(apart.loss, net)])


@pytest.mark.parametrize(
    "stddev",
    [
        gnn.MinibatchStdDev(4, on_indivisible="whole_batch"),
        nn.Sequential(gnn.MinibatchStdDev(2), gnn.MinibatchStdDev(3)),
        layers.MinibatchStdDev(2),
    ],
)
def test_other_groups_get_batches_of_their_own(stddev):
    batches = []
    net = nn.Sequential(stddev, nn.Flatten(), nn.LazyLinear(1)).double()
    net(torch.zeros(6, 3, 4, 4).double())
    net = Counted(net, batches)
    penalties.critic_step(net, *torch.randn(2, 6, 3, 4, 4).double(), penalty=None)
    assert batches == [6, 6]


def test_a_group_size_of_zero_is_the_layer_s_error():
    net = nn.Sequential(gnn.MinibatchStdDev(4), nn.Flatten(), nn.Linear(64, 1))
    net[0].group_size = 0  # its constructor refuses it
    with pytest.raises(ValueError, match="group_size is 0; it must be at least 1"):
        penalties.critic_step(net, *torch.randn(2, 4, 3, 4, 4), penalty=None)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="a critic cannot be passed into a region of one graph there")
def test_critic_step_compiles_to_one_graph():
    net, real, fake = critic(), REAL, FAKE

    def step(alpha):
        penalty = penalties.GradientPenalty(method="tangent", alpha=alpha)
        return penalties.critic_step(net, real, fake, penalty=penalty, drift_weight=0.1).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ALPHA), step(ALPHA))
    parameters = list(net.parameters())
    same(torch.autograd.grad(compiled(ALPHA), parameters), torch.autograd.grad(step(ALPHA), parameters))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="a critic cannot be passed into a region of one graph there")
@pytest.mark.parametrize("what", ["penalty", "step"])
def test_compiles_with_inductor(what):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8 * 64, 1))
    real, fake, alpha = REAL.float(), FAKE.float(), ALPHA.float()

    def penalty():
        return penalties.gradient_penalty(net, real, fake, alpha=alpha, method="tangent")

    def step():
        return penalties.critic_step(net, real, fake, penalty=lambda *_, **__: penalty(), drift_weight=0.1).loss

    function = {"penalty": penalty, "step": step}[what]
    compiled = torch.compile(function, fullgraph=True)
    value = compiled()
    torch.testing.assert_close(value, function())
    ours = [g if g is None else g.clone() for g in handed_out(value, net)]
    theirs = handed_out(function(), net)
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_both_methods_train_alike():
    """WGAN-GP on 8 Gaussians in fp64, where rounding has no time to grow."""

    def train(method):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)).double()
        net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)).double()
        optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.5, 0.9)) for m in (generator, net)]
        penalty, losses = penalties.GradientPenalty(weight=0.1, method=method), []
        for step in range(40):
            angle = torch.randint(8, (64,)) * (math.pi / 4)
            real = torch.stack([angle.cos(), angle.sin()], 1).double()
            fake = generator(torch.randn(64, 2, dtype=torch.float64))
            if step % 5 == 4:
                optimizers[0].zero_grad()
                (-net(fake).mean()).backward()
                optimizers[0].step()
            optimizers[1].zero_grad()
            parts = penalties.critic_step(net, real, fake, penalty=penalty)
            parts.loss.backward()
            optimizers[1].step()
            losses.append(parts.loss.item())
        return torch.tensor(losses)

    torch.testing.assert_close(train("tangent"), train("double_backward"), rtol=1e-8, atol=1e-9)


# ---- imports -------------------------------------------------------------------------------------------------


def test_imports_nothing_heavy():
    """torch._dynamo alone takes seconds: neither at import nor in the first penalty."""
    code = """
import sys, torch, gankern.nn, gankern.models
from gankern import penalties
critic = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 1))
penalties.critic_step(critic, *torch.randn(2, 4, 3, 8, 8)).loss.backward()
print([m for m in ("torch._dynamo", "torch._inductor", "sympy", "triton") if m in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


# ---- bad input, and small batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("samples", [0, 1])
def test_small_batches(samples, method):
    net = critic()
    real, fake = REAL[:samples], FAKE[:samples]
    for value in (
        penalties.gradient_penalty(net, real, fake, method=method),
        penalties.r1_penalty(net, real, method=method),
        penalties.dragan(net, real, method=method),
        penalties.critic_step(net, real, fake, penalty=penalties.GradientPenalty(method=method)).penalty,
    ):
        assert value.isfinite() and (samples or value == 0)
    value = penalties.gradient_penalty(net, real, fake, method=method)
    gradients = handed_out(value, net)
    if samples == 0:
        assert all(g is not None and not g.any() for g in gradients)


@pytest.mark.parametrize("method", METHODS)
def test_samples_made_in_inference_mode(method):
    """As a generator's may be."""
    net = critic()
    with torch.inference_mode():
        real, fake = REAL.clone(), FAKE.clone()
    value = penalties.r2_penalty(net, fake, method=method)
    torch.testing.assert_close(value, penalties.r2_penalty(net, FAKE, method=method))
    step = penalties.critic_step(net, real, fake, penalty=penalties.R1Penalty(method=method))
    step.loss.backward()
    torch.testing.assert_close(step.loss, penalties.critic_step(net, REAL, FAKE, penalty=penalties.r1_penalty).loss)


@pytest.mark.parametrize("make", [torch.jit.trace, lambda net, x: torch.jit.script(net)], ids=["traced", "scripted"])
def test_critics_of_torchscript(make):
    net = critic()
    made = make(net, REAL)
    expected = penalties.gradient_penalty(net, REAL, FAKE, alpha=ALPHA)
    value = penalties.gradient_penalty(made, REAL, FAKE, alpha=ALPHA)
    torch.testing.assert_close(value, expected)
    for a, b in zip(handed_out(value, made), handed_out(expected, net)):
        torch.testing.assert_close(a, b)
    assert penalties.critic_step(made, REAL, FAKE).loss.isfinite()


def test_batch_norm_warns_once():
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 1)).double()
    with pytest.warns(UserWarning, match=r"batch norm in training mode \(1: BatchNorm2d\).*layer norm"):
        penalties.gradient_penalty(net, REAL, FAKE, method="double_backward")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalties.gradient_penalty(net, REAL, FAKE, method="double_backward")
        penalties.r1_penalty(copy.deepcopy(net).eval(), REAL, method="double_backward")


NET = critic()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE[:2]), ValueError, r"real has shape \(4, 3, 16, 16\) and fake has \(2, 3"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE.to("meta")), ValueError, "real is on cpu and fake on meta"),
        (lambda: penalties.gradient_penalty(NET, [REAL, REAL], [FAKE]), ValueError, "real has 2 tensors and fake has 1"),
        (lambda: penalties.gradient_penalty(NET, [], []), ValueError, "real is empty"),
        (lambda: penalties.gradient_penalty(NET, REAL.int(), FAKE), TypeError, "real holds int32"),
        (lambda: penalties.gradient_penalty(NET, [REAL, REAL[:2]], [FAKE, FAKE[:2]]), ValueError, "one batch size"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, alpha=torch.rand(3)), ValueError, r"alpha has shape \(3,\)"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, alpha=torch.rand(4, 3, 16, 16)), ValueError, "one number a sample"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, alpha=0.5), ValueError, "alpha has float"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, alpha=ALPHA.to("meta")), ValueError, "alpha is float64 on meta"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, reduction="none"), ValueError, "reduction is 'none'"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, method="fast"), ValueError, "method is 'fast'; accepted"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, target=-1), ValueError, "target is -1"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, norm_dims=0), ValueError, "dimension 0 is the batch"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, norm_dims=4), ValueError, "norm_dims is 4"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, norm_dims="all"), ValueError, "norm_dims is 'all'"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, norm_dims=True), ValueError, "norm_dims is True"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, select=1.5), TypeError, "select is float"),
        (lambda: penalties.gradient_penalty(lambda x: (x, x), REAL, FAKE), TypeError, r"returned a tuple of 2; pass select="),
        (lambda: penalties.gradient_penalty(lambda x: {"a": x}, REAL, FAKE), TypeError, "a dict with the keys 'a'"),
        (lambda: penalties.gradient_penalty(NET[:2], REAL, FAKE), ValueError, r"one number a sample.*gave float64 of shape \(4, 8, 8, 8\)"),
        (lambda: penalties.gradient_penalty(lambda x: NET(x).mean(), REAL, FAKE), ValueError, r"of shape \(\)"),
        (lambda: penalties.gradient_penalty(lambda x: NET(x.detach()), REAL, FAKE, method="double_backward"), ValueError, "does not depend on its input"),
        (lambda: penalties.gradient_penalty(lambda x: x.new_zeros(4), REAL, FAKE, method="double_backward"), ValueError, "does not depend on its input"),
        (lambda: penalties.gradient_penalty(NET, REAL.clone().requires_grad_(), FAKE, method="tangent"), ValueError, "detach it"),
        (lambda: penalties.r1_penalty(NET, REAL[0, 0, 0, 0]), ValueError, "real has shapes"),
        (lambda: penalties.r1_penalty(NET, REAL, target=0.0), TypeError, r"r1_penalty\(\) got an unexpected .* 'target'"),
        (lambda: penalties.r2_penalty(NET, REAL, wieght=1.0), TypeError, r"r2_penalty\(\) got an unexpected .* 'wieght'"),
        (lambda: penalties.r2_penalty(NET, REAL, weight="1"), TypeError, "r2_penalty: weight"),
        (lambda: penalties.gradient_penalty(None, REAL, FAKE), TypeError, "critic is None; it must be a module or a function"),
        (lambda: penalties.gradient_penalty(nn.Linear, REAL, FAKE), TypeError, "critic is the class Linear, not an instance"),
        (lambda: penalties.r1_penalty(NET, None), TypeError, "r1_penalty: real is None"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, critic_args=torch.ones(1)), TypeError, r"critic_args is a tensor \(1,\).*\(x,\) for one"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, critic_args=3), TypeError, "critic_args is 3"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, critic_kwargs=[1]), TypeError, "critic_kwargs is a list; it must be a dict"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, select=7), ValueError, "select is 7.*a Tensor of 4"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, select="a"), TypeError, "select is 'a', and the critic returned a tensor"),
        (lambda: penalties.gradient_penalty(lambda x: {"b": x}, REAL, FAKE, select="a"), ValueError, "select is 'a'.*a dict of the keys 'b'"),
        (lambda: penalties.gradient_penalty(lambda x: (x,), REAL, FAKE, select=1), ValueError, "select is 1.*a tuple of 1"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, generator=3), TypeError, "generator is 3; it must be a torch.Generator"),
        (lambda: penalties.dragan(NET, REAL, generator=3), TypeError, "dragan: generator is 3"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, weight=torch.ones(2)), TypeError, "weight is tensor.*must be a number"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, one_sided="yes"), TypeError, "one_sided is 'yes'"),
        (lambda: penalties.path_length(NET, torch.ones(4, 3), weight="a"), TypeError, "path_length: weight is 'a'"),
        (lambda: penalties.path_length(NET, torch.ones(4, 3), weight=float("nan")), ValueError, "weight is nan"),
        (lambda: penalties.path_length(NET, torch.ones(4, 3), noise=3), TypeError, "noise is 3; it must be a tensor"),
        (lambda: penalties.path_length(NET, torch.ones(4, 3), random=3), TypeError, "random is 3; it must be a torch.Generator"),
        (lambda: penalties.critic_step(None, REAL, FAKE), TypeError, "critic_step: critic is None"),
        (lambda: penalties.critic_step(NET, REAL, FAKE, loss="hinge"), TypeError, "critic_step: loss is 'hinge'"),
        (lambda: penalties.critic_step(NET, REAL, FAKE, loss=lambda a, b: (a, b)), ValueError, "loss returned a tuple; it must be a tensor of one number"),
        (lambda: penalties.critic_step(NET, REAL, FAKE, loss=lambda a, b: a + b), ValueError, r"loss returned a tensor \(4, 1\)"),
        (lambda: penalties.critic_step(NET, REAL, FAKE, penalty=3), TypeError, "critic_step: penalty is 3"),
        (lambda: penalties.critic_step(NET, REAL, FAKE, penalty=penalties.R1Penalty), TypeError, "penalty is the class R1Penalty, not an instance"),
        (lambda: penalties.critic_step(NET, REAL, FAKE, penalty=lambda *args, **options: None), ValueError, "penalty returned None; it must be a tensor"),
        (lambda: penalties.critic_step(NET, REAL, FAKE, penalty=lambda *args, **options: 1.0), ValueError, "penalty returned 1.0"),
        (lambda: penalties.critic_step(NET, REAL, FAKE, penalty=lambda *args, **options: REAL), ValueError, r"penalty returned a tensor \(4,"),
        (lambda: penalties.critic_step(NET, {"image": REAL}, {"image": FAKE}), TypeError, "real is a dict; it must be a floating-point tensor"),
        (lambda: penalties.gradient_penalty(NET, REAL, FAKE, weight=nn.Parameter(torch.ones(()))), TypeError, "weight is a tensor that requires a gradient, and would get none"),
        (lambda: penalties.critic_step(NET, REAL, FAKE, joint=1), TypeError, "joint is 1; accepted are True, False and None"),
        (lambda: penalties.critic_step(NET, REAL, FAKE, fake_args=torch.ones(4)), TypeError, "fake_args is a tensor"),
        (lambda: penalties.critic_step(NET, REAL, FAKE, fake_kwargs=3), TypeError, "fake_kwargs is 3"),
        (lambda: penalties.path_length(None, torch.ones(4, 3)), TypeError, "path_length: generator is None"),
        (lambda: penalties.path_length(NET, torch.ones(4, 3), generator_args=torch.ones(4)), TypeError, "generator_args is a tensor"),
        (lambda: penalties.drift(torch.ones(3), reduction="max"), ValueError, "drift: reduction is 'max'"),
        (lambda: penalties.drift(3), TypeError, "drift: outputs is int; it must be a floating-point tensor"),
        (lambda: penalties.drift(torch.ones(3, dtype=torch.int64)), TypeError, "drift: outputs is int64"),
    ],
)  # fmt: skip
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_without_grad_mode():
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"gradient_penalty: called inside torch.no_grad\(\)"):
        penalties.gradient_penalty(NET, REAL, FAKE)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"called inside torch.inference_mode\(\)"):
        penalties.r1_penalty(NET, REAL)


def test_a_value_is_what_it_says():
    """No NaN at a zero gradient, whatever the dtype, and none from large or small norms."""
    for scale in (0.0, 1e-30, 1e-3, 1e10):
        net = nn.Linear(3, 1, bias=False)
        nn.init.constant_(net.weight, scale)
        value = penalties.gradient_penalty(net, torch.zeros(2, 3), torch.ones(2, 3), method="double_backward")
        assert math.isclose(value.item(), 10 * (scale * 3**0.5 - 1) ** 2, rel_tol=1e-5)
        assert all(g.isfinite().all() for g in handed_out(value, net))


class Hyper(nn.Module):
    """Weights of another network's making."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 6)

    def forward(self):
        return self.linear(torch.ones(3, dtype=self.linear.weight.dtype)).tanh()


@pytest.mark.parametrize("method", ["auto", "double_backward"])
def test_a_graph_of_the_caller_s_stays(method):
    """A critic of weights that were computed before, whose graph the loss goes through too."""
    torch.manual_seed(0)
    ours, (real, fake), alpha = Hyper().double(), torch.randn(2, 5, 6, dtype=torch.float64), torch.rand(5).double()
    theirs = copy.deepcopy(ours)

    def loss(hyper, penalty_of):
        weights = hyper()
        return penalty_of(lambda x: (x @ weights).tanh()) + (fake @ weights).mean() + weights.square().sum()

    def by_hand(critic):
        x = torch.lerp(real, fake, alpha[:, None]).requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return 10 * (g.norm(dim=1) - 1).square().mean()

    loss(ours, lambda critic: penalties.gradient_penalty(critic, real, fake, alpha=alpha, method=method)).backward()
    loss(theirs, by_hand).backward()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


def test_the_gradient_goes_by_the_caller_s_weights():
    """Fast weights of an inner step, or a network's that computes weights: their own gradient, and their hooks, which
    are called once with all that comes."""
    torch.manual_seed(0)
    ours, (real, fake), alpha = Hyper().double(), torch.randn(2, 5, 6, dtype=torch.float64), torch.rand(5).double()
    first = torch.randn(5, 3, dtype=torch.float64)
    results = []
    for of_ours in (True, False):
        hyper, latents, seen = copy.deepcopy(ours), first.clone().requires_grad_(), []
        weights = hyper()
        weights.register_hook(lambda grad, seen=seen: seen.append(grad) or grad.clamp(-0.1, 0.1))
        weights.retain_grad()
        made = fake + latents.repeat(1, 2)

        def critic(x, weights=weights):
            return nn.functional.leaky_relu(x * weights, 0.2).tanh().sum(1)

        if of_ours:
            penalty = penalties.gradient_penalty(critic, real, made, alpha=alpha)
        else:
            x = torch.lerp(real, made, alpha[:, None])
            (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
            penalty = 10 * (g.norm(dim=1) - 1).square().mean()
        alone = torch.autograd.grad(penalty, weights, retain_graph=True)[0]
        (3 * penalty + weights.sum()).backward()
        results.append([penalty, alone, weights.grad, latents.grad, *seen, *(p.grad for p in hyper.parameters())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("normalises", [True, False], ids=["double backward", "auto"])
def test_weights_that_parametrize_caches(normalises):
    """Their graph serves the passes behind the penalty too; and they are made once, where an attempt was given up."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6) if normalises else nn.Identity()  # of which the tangent form is not
    ours = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), norm, nn.Tanh(), nn.Linear(6, 1))
    theirs = copy.deepcopy(ours.double())
    (real, fake), alpha = torch.randn(2, 5, 6, dtype=torch.float64), torch.rand(5).double()
    with nn.utils.parametrize.cached(), warnings.catch_warnings(action="ignore"):
        penalty = penalties.gradient_penalty(ours, real, fake, alpha=alpha)
        (penalty + ours(real).mean() - ours(fake).square().mean()).backward()
    with nn.utils.parametrize.cached():
        x = torch.lerp(real, fake, alpha[:, None]).requires_grad_()
        (g,) = torch.autograd.grad(theirs(x).sum(), x, create_graph=True)
        right = 10 * (g.norm(dim=1) - 1).square().mean()
        (right + theirs(real).mean() - theirs(fake).square().mean()).backward()
    torch.testing.assert_close(penalty, right)
    for p, q in zip([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()]):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    for p, q in zip(ours.buffers(), theirs.buffers()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_a_step_gives_a_penalty_of_ones_own_what_it_was_given():
    def own(critic, real, fake, *, critic_args, critic_kwargs, select):
        return critic(real[:1]).sum().square() + critic(fake[:1]).sum().square()

    net = nn.Linear(3, 1)
    x, y = torch.ones(2, 3), torch.zeros(2, 3)
    step = penalties.critic_step(net, x, y, penalty=own)
    torch.testing.assert_close(step.penalty, own(net, x, y, critic_args=(), critic_kwargs={}, select=None).detach())
    both = nn.Bilinear(3, 3, 1)
    kinds = []
    penalties.critic_step(both, (x, x), (y, y), penalty=lambda c, r, f, **k: kinds.append((type(r), len(r))) or x.sum())
    assert kinds == [(tuple, 2)]
