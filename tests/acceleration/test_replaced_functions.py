"""Who puts a function of his own in the place of one of torch's, for all that runs, is obeyed by accelerated models."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.acceleration import _scope
from gankern.core import native, torch_internals


class Everything(nn.Module):
    """Layers and calls of all that accelerate takes, and what runs in one with them."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.spectral_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(8), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1)),
            *(nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(2), nn.InstanceNorm2d(8), nn.PReLU()),
            *(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2, padding=1)),
            *(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(8, 8, 4, 2, 1)),
        )
        self.last = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 1, 3))

    def forward(self, x):
        h = self.layers(self.first(x))
        h = F.leaky_relu(F.batch_norm(h, None, None, training=True), 0.2)
        h = F.dropout(h, 0.0)
        h = F.avg_pool2d(F.conv2d(F.interpolate(h, scale_factor=2), self.first.weight.mean(1, True), groups=8), 2)
        std = h.var(0, unbiased=False).add(1e-8).sqrt().mean().view(1, 1, 1, 1).expand(len(h), 1, *h.shape[2:])
        q = h.flatten(2)
        h = h + torch.bmm(q, torch.softmax(torch.bmm(q.mT, q), -1).mT).view_as(h)
        return F.adaptive_avg_pool2d(self.last(h) + torch.cat([h, std], 1).mean(1, True)[..., 1:-1, 1:-1], 2)


def seen(net, x):
    """What a forward, a backward and a penalty leave behind, and what evaluation gives."""
    x = x.clone().requires_grad_()
    out = net(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    net.zero_grad()
    (out.sum() + grad.square().sum()).backward()
    found = [out, grad, *(p.grad for p in net.parameters()), *net.buffers()]
    found = [None if x is None else x.detach().clone() for x in found] + [net.eval()(x).detach()]
    net.train()
    return found


def check(plain, fast, x):
    for a, b in zip(seen(plain, x), seen(fast, x)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture
def nets():
    """A model and its accelerated copy, which has run a few times."""
    torch.manual_seed(0)
    plain, x = Everything().double(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    for _ in range(2):
        check(plain, fast, x)
    return plain, fast, x


FUNCTIONS = (
    *((F, name) for name in ("conv2d", "interpolate", "pad", "batch_norm", "instance_norm", "relu", "leaky_relu")),
    *((F, name) for name in ("avg_pool2d", "max_pool2d", "normalize", "dropout")),
    *((torch, name) for name in ("relu", "batch_norm", "bmm", "cat")),
    (Tensor, "var"),
)


def altered(monkeypatch, place, name):
    """Puts a function in its place that gives other numbers."""
    function, calls = getattr(place, name), []

    @functools.wraps(function)
    def other(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs) * 1.25

    monkeypatch.setattr(place, name, other)
    return calls


@pytest.mark.parametrize(("place", "name"), FUNCTIONS, ids=lambda value: getattr(value, "__name__", value))
def test_it_is_called(nets, monkeypatch, place, name):
    plain, fast, x = nets
    calls = altered(monkeypatch, place, name)
    assert torch_internals.functions_replaced() or name == "dropout"  # which is taken by nothing
    seen(plain, x)
    expected, calls[:] = list(calls), []
    seen(fast, x)
    assert calls == expected
    check(plain, fast, x)
    monkeypatch.undo()
    assert not torch_internals.functions_replaced()
    check(plain, fast, x)


@pytest.mark.parametrize("name", ["conv2d", "batch_norm", "interpolate"])
def test_in_the_middle_of_a_forward(nets, monkeypatch, name):
    plain, fast, x = nets

    def put(*_):
        altered(monkeypatch, F, name)

    for net in (plain, fast):
        net.layers[2].register_forward_pre_hook(put)
        net.register_forward_hook(lambda *_: monkeypatch.undo())
    check(plain, fast, x)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Waiting(nn.Module):
    """Calls that may wait for what is next, which comes ``later``."""

    def __init__(self, following):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.following, self.later = following, contextlib.nullcontext

    def forward(self, x):
        found = []
        for call in (
            lambda: F.interpolate(x, scale_factor=2),
            lambda: F.pad(x, (1, 1, 1, 1), "reflect"),
            lambda: self.conv(x),
            lambda: F.conv2d(x, self.conv.weight, padding=1),
            lambda: self.norm(x),
            lambda: F.batch_norm(x, None, None, training=True),
            lambda: F.instance_norm(x),
        ):
            h = call()
            with self.later():
                found.append(self.following(h).flatten())
        return torch.cat(found)


@pytest.mark.parametrize("following", [torch.exp, Twice.apply], ids=["function", "Function"])
def test_what_was_called_before_is_what_was_there(monkeypatch, following):
    torch.manual_seed(0)
    plain, waited = Waiting(following).double(), []
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)

    @contextlib.contextmanager
    def replaced():
        waited.append(len(_scope.state.waiting))
        with monkeypatch.context() as patch:
            for place, name in FUNCTIONS:
                altered(patch, place, name)
            there = F.conv2d
            yield
            assert F.conv2d is there

    results = []
    for net in (plain, fast):
        net.later = replaced
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = net(x)
        with replaced():
            y.backward(y.detach().cos())
        results.append((y, x.grad, [p.grad for p in net.parameters()]))
    assert sum(waited) == 7
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_without_the_native_library(monkeypatch):
    monkeypatch.setattr(torch_internals, "nodes", native._Declines())
    assert not torch_internals.functions_replaced()
    altered(monkeypatch, F, "conv2d")
    assert torch_internals.functions_replaced()


def test_one_that_was_replaced_before_is_obeyed(monkeypatch):
    altered(monkeypatch, F, "conv2d")
    with monkeypatch.context() as patch:
        patch.setattr(torch_internals, "nodes", native._Declines())
        patch.setattr(torch_internals, "_watched", [])
        torch_internals.watch_functions(F, ["relu"])
        assert not torch_internals.functions_replaced()
        torch_internals.watch_functions(F, ["conv2d"])  # as at import: what is there now is not torch's
        assert torch_internals.functions_replaced()


def test_the_report_says_so(monkeypatch):
    altered(monkeypatch, F, "relu")
    report = gankern.accelerate(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()))
    assert "replaced by another one" in report.notes[-1]
