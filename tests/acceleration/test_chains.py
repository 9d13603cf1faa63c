"""Operations in the middle of a forward that together are one of ours: taken by what ran, equal to the original in double
precision; anything that is more or other runs as it is written."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from common import Twice
from test_pairs import Calls, check
from torch import nn

import gankern
from gankern.acceleration import _chains


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """The names of the functions of ours that ran for chains, in order."""
    seen = []
    original = _chains._ran

    def recorded(found, link, x):
        seen.append(found.name)
        return original(found, link, x)

    monkeypatch.setattr(_chains, "_ran", recorded)
    monkeypatch.setattr(_chains, "FROM", dict.fromkeys(_chains.FROM, 0))
    return seen


def of_forward(net, x, ran):
    """What ran in one forward, after the first ones."""
    net = copy.deepcopy(net).double()
    gankern.accelerate(net)
    for _ in range(6):
        ran.clear()
        net(x.double()).sum().backward()
    return list(ran)


def body(inline, channels=9, **parts):
    """The forward of a critic with this in its middle."""
    parts = {"first": nn.Conv2d(3, 8, 3, padding=1), "last": nn.Conv2d(channels, 4, 3, padding=1), **parts}
    return Calls(lambda m, x: m.last(inline(m, F.leaky_relu(m.first(x), 0.2))), **parts)


# ---- minibatch standard deviation ---------------------------------------------------------------------------------


def rosinality(m, out, groups=4, features=1):
    batch, channel, height, width = out.shape
    group = min(batch, groups)
    stddev = out.view(group, -1, features, channel // features, height, width)
    stddev = torch.sqrt(stddev.var(0, unbiased=False) + 1e-8)
    stddev = stddev.mean([2, 3, 4], keepdims=True).squeeze(2)
    stddev = stddev.repeat(group, 1, height, width)
    return torch.cat([out, stddev], 1)


def nvidia(m, x, groups=4, features=1):
    N, C, H, W = x.shape
    G = groups if N % groups == 0 else N
    c = C // features
    y = x.reshape(G, -1, features, c, H, W)
    y = y - y.mean(dim=0)
    y = y.square().mean(dim=0)
    y = (y + 1e-8).sqrt()
    y = y.mean(dim=[2, 3, 4])
    y = y.reshape(-1, features, 1, 1)
    y = y.repeat(G, 1, H, W)
    return torch.cat([x, y], dim=1)


def whole_batch(m, x):
    y = x - x.mean(0, keepdim=True)
    y = torch.sqrt(torch.mean(y**2, dim=0, keepdim=True) + 1e-8)
    y = torch.mean(y, dim=[1, 2, 3], keepdim=True)
    return torch.cat((x, y.expand(x.size(0), 1, x.size(2), x.size(3))), 1)


def watched(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with torch.autograd.profiler.record_function(function.__name__):
            return function(*args, **kwargs)

    return call


def kept(m, out):
    """Under other names, of which one is used again."""
    grouped = out.view(4, -1, 1, 8, *out.shape[2:])
    variance = torch.var(grouped, 0, unbiased=False)
    deviation = (variance + 1e-8).sqrt()
    mean = torch.mean(deviation, dim=(2, 3, 4), keepdim=True).squeeze(2)
    repeated = mean.repeat(4, 1, out.shape[2], out.shape[3])
    return torch.cat([out, repeated], 1) + variance.sum() + repeated


def overwritten(m, out):
    """What was appended to it is overwritten, the deviation and the features are used after that."""
    repeated = out.view(2, -1, 1, 8, *out.shape[2:]).var(0, unbiased=False).add(1e-8).sqrt().mean([2, 3, 4])
    repeated = repeated.view(-1, 1, 1, 1).repeat(2, 1, *out.shape[2:])
    joined = torch.cat([out, repeated], 1)
    joined.mul_(2)
    return joined + repeated


STDDEV = {
    "rosinality's": rosinality,
    "two features": (functools.partial(rosinality, features=2), 10),
    "NVIDIA's reference": nvidia,
    "of the whole batch": whole_batch,
    "in a decorated function": lambda m, x: watched(nvidia)(m, x),
    "in a closure": lambda m, x: (lambda: rosinality(m, x, groups=2))(),
    "under other names": kept,
    "overwritten behind it": overwritten,
}


@pytest.mark.parametrize("name", STDDEV)
def test_minibatch_stddev(name, ran):
    torch.manual_seed(0)
    inline, channels = STDDEV[name] if isinstance(STDDEV[name], tuple) else (STDDEV[name], 9)
    net, x = body(inline, channels), torch.randn(8, 3, 6, 5)
    check(net, x, 1e-9)
    assert of_forward(net, x, ran) == ["minibatch_stddev"]


# ---- a bias, an activation, a factor ------------------------------------------------------------------------------


def fused_leaky_relu(x, bias, slope=0.2, scale=2**0.5):
    rest = [1] * (x.ndim - bias.ndim - 1)
    return F.leaky_relu(x + bias.view(1, bias.shape[0], *rest), negative_slope=slope) * scale


def bias(*shape):
    return nn.Parameter(torch.linspace(-1, 1, 8).view(*shape))


BIAS_ACT = {
    "a function in a layer": lambda m, x: fused_leaky_relu(x, m.bias),
    "a scaled bias": lambda m, x: fused_leaky_relu(x, m.bias * 0.5),
    "module for the activation": lambda m, x: m.act(x + m.bias.view(1, -1, 1, 1)) * 1.5,
    "clamped": lambda m, x: torch.relu(x + m.bias.view(-1, 1, 1)).mul(math.sqrt(2)).clamp(-1.5, 1.5),
    "the sum is used again": lambda m, x: (lambda h: F.leaky_relu(h, 0.2) * 1.5 + h)(x + m.bias.view(1, -1, 1, 1)),
}


@pytest.mark.parametrize("name", BIAS_ACT)
def test_bias_act(name, ran):
    torch.manual_seed(0)
    net = body(BIAS_ACT[name], 8, bias=bias(8), act=nn.LeakyReLU(0.1))
    x = torch.randn(4, 3, 6, 5)
    check(net, x, 1e-9)
    assert of_forward(net, x, ran) == ["bias_act"]


def test_bias_act_of_vectors(ran):
    torch.manual_seed(0)
    net = Calls(lambda m, x: m.last(fused_leaky_relu(F.linear(x, m.first.weight), m.first.bias)),
                first=nn.Linear(3, 8), last=nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 2, 1)))  # fmt: skip
    check(net, torch.randn(4, 3), 1e-9)
    assert of_forward(net, torch.randn(4, 3), ran) == ["bias_act"]


# ---- pixel norm ---------------------------------------------------------------------------------------------------

PIXEL_NORM = {
    "rsqrt": lambda m, x: x * torch.rsqrt(torch.mean(x**2, dim=1, keepdim=True) + 1e-8),
    "divided": lambda m, x: x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt(),
    "multiplied by itself": lambda m, x: x / torch.sqrt(torch.mean(x * x, 1, keepdim=True) + 1e-6),
}


@pytest.mark.parametrize("name", PIXEL_NORM)
def test_pixel_norm(name, ran):
    torch.manual_seed(0)
    net, x = body(PIXEL_NORM[name], 8), torch.randn(4, 3, 6, 5)
    check(net, x, 1e-9)
    assert of_forward(net, x, ran) == ["pixel_norm"]


# ---- what is left -------------------------------------------------------------------------------------------------


def other_statistic(m, out):
    y = out.view(4, -1, 1, 8, *out.shape[2:])
    y = torch.sqrt(y.var(0, unbiased=False) + 1e-8)
    y = y.amax([2, 3, 4], keepdim=True).squeeze(2)
    return torch.cat([out, y.repeat(4, 1, *out.shape[2:])], 1)


def of_something_else(m, out):
    """The deviation of other features is appended."""
    y = nvidia(m, out * 2)
    return torch.cat([out, y[:, 8:]], 1)


def unseen(m, out):
    """A Function of its own, which announces itself to nobody, takes what waits."""
    return F.pad(Twice.apply(out + m.bias.view(1, -1, 1, 1)), (0, 0, 0, 0))


def without_gradient(m, out):
    y = (out + m.bias.view(1, -1, 1, 1)).detach()
    with torch.no_grad():
        z = F.leaky_relu(out + m.bias.view(1, -1, 1, 1), 0.2) * 3
    return out + F.leaky_relu(y, 0.2) * z


LEFT = {
    "the largest deviation": (other_statistic, 9, []),
    "of other features": (of_something_else, 9, ["minibatch_stddev"]),
    "a Function takes it": (unseen, 8, []),
    "without a gradient": (without_gradient, 8, []),
    "activation in place": (lambda m, x: F.leaky_relu_(x + m.bias.view(1, -1, 1, 1), 0.2) * 2, 8, []),
    "another activation": (lambda m, x: torch.tanh(x + m.bias.view(1, -1, 1, 1)) * 2, 8, []),
    "a sum along the width": (lambda m, x: F.relu(x + m.width) * 2, 8, []),
    "a factor that is a tensor": (lambda m, x: F.relu(x + m.bias.view(1, -1, 1, 1)) * m.width.mean(), 8, None),
    "a norm of pixels along the width": (
        lambda m, x: x * torch.rsqrt((x**2).mean(3, keepdim=True) + 1e-8), 8, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_other_runs_as_it_is_written(name, ran):
    torch.manual_seed(0)
    inline, channels, expected = LEFT[name]
    net, x = body(inline, channels, bias=bias(8), width=nn.Parameter(torch.linspace(-1, 1, 8))), torch.randn(8, 3, 6, 8)
    check(net, x, 1e-9)
    if expected is not None:
        assert of_forward(net, x, ran) == expected


@torch.no_grad()
def test_what_is_overwritten_while_it_waits(ran):
    """The features, between the variance of them and the rest."""

    def inline(m, out):
        y = out.view(4, -1, 1, 8, *out.shape[2:]).var(0, unbiased=False)
        out = out.mul_(0.5)
        y = (y + 1e-8).sqrt().mean([2, 3, 4]).view(-1, 1, 1, 1).repeat(4, 1, *out.shape[2:])
        return torch.cat([out, y], 1)

    torch.manual_seed(0)
    net, x = body(inline).double(), torch.randn(8, 3, 6, 5, dtype=torch.float64)
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    for _ in range(6):
        torch.testing.assert_close(twin(x), net(x), rtol=1e-12, atol=1e-12)
    assert ran == []


def test_chains_that_are_none_of_ours_are_not_begun_any_more(monkeypatch):
    torch.manual_seed(0)
    deferred = []
    original = _chains.defer
    monkeypatch.setattr(_chains, "defer", lambda *args: deferred.append(args[0]) or original(*args))
    net = body(lambda m, x: torch.tanh(x + m.bias.view(1, -1, 1, 1)), 8, bias=bias(8))
    gankern.accelerate(net)
    for _ in range(8):
        net(torch.randn(2, 3, 6, 5))
    assert len(deferred) == _chains.Chains.patience
    # A size that was not met yet is another chain.
    net(torch.randn(3, 3, 6, 5))
    assert len(deferred) == _chains.Chains.patience + 1


def test_what_changes_later_is_obeyed(ran):
    """A schedule turns up the factor and the number of groups: each call is what it computes."""
    torch.manual_seed(0)
    net = body(lambda m, x: rosinality(m, fused_leaky_relu(x, m.bias, scale=m.scale), groups=m.groups), bias=bias(8))
    net.scale, net.groups = 1.5, 4
    net = net.double()
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    x = torch.randn(8, 3, 6, 5, dtype=torch.float64)
    for scale, groups in ((1.5, 4), (2, 4), (1.5, 2), (3, 8), (1.5, 4)):
        for each in (net, twin):
            each.scale, each.groups = scale, groups
        torch.testing.assert_close(twin(x), net(x), rtol=1e-11, atol=1e-11)
    assert ran.count("minibatch_stddev") == ran.count("bias_act") == 5


def test_the_report_says_what_ran():
    net = body(rosinality)
    report = gankern.accelerate(net, example_inputs=(torch.randn(8, 3, 6, 5),))
    calls = {call.operation: call for call in report.calls}
    assert calls["torch.cat"].now.startswith("gankern: minibatch_stddev (") and "8 operations" in calls["torch.cat"].now
    assert calls["Tensor.var"].now == "in one with what follows" and calls["Tensor.var"].count == 1


def test_small_ones_are_left_alone(ran, monkeypatch):
    monkeypatch.setattr(_chains, "FROM", {"add": 2**16, "pow": 2**16, "view": 0, "var": 0, "mean": 0})
    net = body(lambda m, x: fused_leaky_relu(x, m.bias), 8, bias=bias(8))
    assert of_forward(net, torch.randn(2, 3, 4, 4), ran) == []


def test_third_order_is_refused_and_there_by_reference():
    torch.manual_seed(0)
    net = body(PIXEL_NORM["rsqrt"], 8).double()
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def third(model):
        leaf = x.clone().requires_grad_()
        value = model(leaf).tanh().sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = grad.square().sum()
        return torch.autograd.grad(value, leaf)[0]

    with pytest.raises(RuntimeError, match="exact to gradient order 2"):
        third(twin)
    with gankern.use_implementation("reference"):
        torch.testing.assert_close(third(twin), third(net), rtol=1e-8, atol=1e-8)
