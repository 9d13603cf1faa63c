"""A gradient at a value between two operations that may run as one: what the original gives, or an error, never another."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gankern
from gankern.acceleration import _chains, _convolutions, _norms

PAIRS = {
    "batch norm, activation": (lambda m, x: m.norm(x), lambda m, h: F.leaky_relu(h, 0.2)),
    "instance norm, activation": (lambda m, x: m.instances(x), lambda m, h: m.relu(h)),
    "group norm, PReLU": (lambda m, x: m.groups(x), lambda m, h: m.prelu(h)),
    "convolution, mean": (lambda m, x: m.conv(x), lambda m, h: F.avg_pool2d(h, 2)),
    "upsampling, convolution": (lambda m, x: F.interpolate(m.other(x), scale_factor=2), lambda m, h: m.conv(h)),
    "padding, convolution": (lambda m, x: F.pad(m.other(x), (1, 1, 1, 1), "reflect"), lambda m, h: m.inner(h)),
}


class Model(nn.Module):
    def __init__(self, pair, between=None):
        super().__init__()
        self.norm, self.instances = nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True)
        self.groups, self.relu, self.prelu = nn.GroupNorm(2, 4), nn.ReLU(), nn.PReLU(4)
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.inner, self.last = nn.Conv2d(4, 4, 3), nn.Linear(4, 1)
        self.pair, self.between, self.kept, self.keeps = pair, between, None, True

    def forward(self, x, keep=True):
        first, second = PAIRS[self.pair]
        h = first(self, x)
        y = second(self, h)
        if keep and self.keeps:
            self.kept = h
        if self.between is not None:
            y = y * self.between(y, h).mean()
        return self.last(y.square().mean((2, 3)))


@pytest.fixture(autouse=True)
def everything_is_taken(monkeypatch):
    monkeypatch.setattr(_norms, "LARGE", 1)
    monkeypatch.setattr(_norms, "WIDE", 1)
    monkeypatch.setattr(_norms, "SMALL", 1)
    monkeypatch.setattr(_convolutions, "CALL", -float("inf"))


X = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def models(pair, between=None):
    torch.manual_seed(0)
    plain = Model(pair, between).double()
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    return plain, fast


def retained(model, y, h):
    h.retain_grad()
    y.sum().backward()
    return h.grad


def hooked(model, y, h):
    h.register_hook(lambda grad: 3 * grad)
    y.sum().backward()
    return h * 1


def asked(model, y, h):
    (grad,) = torch.autograd.grad(y.sum(), h, create_graph=True)
    grad.square().sum().backward()
    return grad


def accumulated(model, y, h):
    torch.autograd.backward(y.sum(), inputs=[h, model.last.weight])
    return h.grad


@pytest.mark.parametrize("use", [retained, hooked, asked, accumulated])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_value_that_the_model_keeps(pair, use):
    plain, fast = models(pair)
    for _ in range(3):
        seen = []
        for model in (plain, fast):
            model.zero_grad()
            y = model(X)
            seen.append([y, use(model, y, model.kept), *(p.grad for p in model.parameters()), *model.buffers()])
        for a, b in zip(*seen):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("use", [retained, hooked, accumulated])
def test_kept_only_later_is_an_error(use):
    _, fast = models("batch norm, activation")
    fast.keeps = False  # which no argument says
    for _ in range(3):
        fast(X)
    fast.keeps = True
    y = fast(X)
    with pytest.raises(RuntimeError, match=r"gradient is asked for, or a hook registered.*exclude="):
        use(fast, y, fast.kept)


def with_graph(y, h):
    return torch.autograd.grad(y.square().sum(), h, create_graph=True)[0]


def twice(y, h):
    return torch.autograd.grad(with_graph(y, h).square().sum(), h, create_graph=True, materialize_grads=True)[0]


def of_both(y, h):
    """The value is used beside what follows it, too."""
    return torch.autograd.grad([(y.sum() * h.sum()), h.square().sum()], (h, y), create_graph=True, allow_unused=True)[0]


@pytest.mark.parametrize("between", [with_graph, twice, of_both])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_gradient_inside_of_the_forward(pair, between):
    plain, fast = models(pair, between)
    for _ in range(3):  # the first one runs the halves by themselves
        seen = []
        for model in (plain, fast):
            model.zero_grad()
            x = X.clone().requires_grad_()
            y = model(x, keep=False)
            y.sum().backward()
            seen.append([y, x.grad, *(p.grad for p in model.parameters())])
        for a, b in zip(*seen):
            if a is not None or b is not None:
                zeros = torch.zeros(())
                torch.testing.assert_close(
                    *((zeros if t is None else t).expand_as(b if a is None else a) for t in (b, a)),
                    rtol=1e-9, atol=1e-9, check_dtype=False,
                )  # fmt: skip


def test_unused_is_torchs_error():
    _, fast = models("convolution, mean", lambda y, h: torch.autograd.grad(X.sum() + y.detach().sum() * 0, h)[0])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"does not require grad|appears to not have been used"):
            fast(X)


def test_the_middle_of_a_chain_is_refused(monkeypatch):
    monkeypatch.setattr(_chains, "FROM", dict.fromkeys(_chains.FROM, 0))

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x):
            h = F.leaky_relu(x + self.bias.view(1, -1, 1, 1), 0.2)
            y = h * 2**0.5
            y = y + 0
            h.register_hook(lambda grad: 2 * grad)
            return y

    fast = Scaled()
    gankern.accelerate(fast)
    with pytest.raises(RuntimeError, match=r"hook registered.*exclude="):
        fast(X)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("before", ["without a gradient", "not keeping it", "evaluating"])
def test_what_is_kept_in_another_kind_of_call_only(pair, before):
    plain, fast = models(pair)
    found = []
    for model in (plain, fast):
        model.train(before != "evaluating")
        for _ in range(2):
            with torch.set_grad_enabled(before != "without a gradient"):
                model(X, keep=before == "evaluating")
            model.kept = None
        y = model.train()(X)
        found.append(retained(model, y, model.kept))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
