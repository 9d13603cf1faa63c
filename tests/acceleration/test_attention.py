"""Attention between positions that a model writes out runs as gankern.functional.self_attention2d, however its operations
are spelt, equal to the original in double precision to the second order and beyond; what is none runs as it came."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import gankern
from gankern.acceleration import _attention


@pytest.fixture
def ran(monkeypatch):
    """The sizes of queries for which ours ran; of scores however few."""
    seen = []
    attention = _attention.attention

    def recorded(q, kv, *args, **kwargs):
        seen.append(tuple(q.shape))
        return attention(q, kv, *args, **kwargs)

    monkeypatch.setattr(_attention, "attention", recorded)
    monkeypatch.setattr(_attention, "FROM", ((1, 96),))
    return seen


class Block(nn.Module):
    """1x1 convolutions around ``attend(self, queries, keys, values)``, each of these [N, channels, positions]."""

    def __init__(self, attend, pooled=True, wrap=lambda conv: conv):
        super().__init__()
        self.theta, self.phi = wrap(nn.Conv2d(8, 3, 1)), wrap(nn.Conv2d(8, 3, 1))
        self.g, self.out = wrap(nn.Conv2d(8, 5, 1)), wrap(nn.Conv2d(5, 8, 1))
        self.gamma = nn.Parameter(torch.tensor(0.7))
        self.softmax = nn.Softmax(dim=-1)
        self.attend, self.pooled = attend, pooled

    def forward(self, x):
        n, _, height, width = x.shape
        queries, keys, values = self.theta(x), self.phi(x), self.g(x)
        if self.pooled:
            keys, values = F.max_pool2d(keys, [2, 2]), F.max_pool2d(values, 2)
        found = self.attend(self, queries.flatten(2), keys.flatten(2), values.flatten(2))
        maps = ()
        if type(found) is tuple:
            found, *maps = found
        return (self.gamma * self.out(found.view(n, 5, height, width)) + x, *maps)


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.first, self.block, self.last = nn.Conv2d(3, 8, 3, padding=1), block, nn.Conv2d(8, 4, 3)

    def forward(self, x):
        x, *maps = self.block(F.leaky_relu(self.first(x), 0.2))
        return (self.last(x), *maps)


def released(self, q, k, v):
    beta = F.softmax(torch.bmm(q.transpose(1, 2), k), -1)
    return torch.bmm(v, beta.transpose(1, 2))


def of_modules(self, q, k, v):
    energy = torch.bmm(q.permute(0, 2, 1), k)
    attention = self.softmax(energy)
    return torch.bmm(v, attention.permute(0, 2, 1))


def with_its_map(self, q, k, v):
    attention = self.softmax(torch.bmm(q.permute(0, 2, 1), k))
    return torch.bmm(v, attention.permute(0, 2, 1)), attention


def by_operators(self, q, k, v):
    return v @ (q.mT @ k).softmax(2).mT


def weights_first(self, q, k, v):
    return (torch.softmax(torch.matmul(q.mT, k), dim=2) @ v.mT).transpose(1, 2).contiguous()


def weights_first_seen_as_rows(self, q, k, v):
    rows = torch.matmul(F.softmax(q.swapaxes(-1, -2).matmul(k), dim=-1), v.permute((0, 2, 1)))
    return rows.view(-1, 5).view(q.shape[0], -1, 5).transpose(-1, -2).contiguous()


def keys_written_over(self, q, k, v):
    scores = torch.bmm(q.transpose(1, 2), k)
    k.mul_(0.5)  # after the product: it must not be seen there
    return torch.bmm(v, torch.softmax(scores, -1).transpose(1, 2)) + k.mean()


FORMS = {f.__name__: f for f in (released, of_modules, by_operators, weights_first, weights_first_seen_as_rows)}


def over_queries(self, q, k, v):
    return torch.bmm(v, torch.softmax(torch.bmm(q.mT, k), 1).mT)


def with_a_factor(self, q, k, v):
    return torch.bmm(v, torch.softmax(torch.bmm(q.mT, k) / 3**0.5, -1).mT)


def in_another_type(self, q, k, v):
    return torch.bmm(v, torch.softmax(torch.bmm(q.mT, k), -1, torch.float32).to(v.dtype).mT)


def with_dropout(self, q, k, v):
    return torch.bmm(v, F.dropout(torch.softmax(torch.bmm(q.mT, k), -1), 0.0).mT)


def in_heads(self, q, k, v):
    q, k, v = (t[:, None] for t in (q, k, v))
    return (v @ torch.softmax(q.mT @ k, -1).mT)[:, 0]


def without_softmax(self, q, k, v):
    return torch.bmm(v, (torch.bmm(q.mT, k) / k.shape[2]).mT)


def of_a_written_table(self, q, k, v):
    scores = torch.bmm(q.mT, k)
    scores.mul_(2.0)
    return torch.bmm(v, torch.softmax(scores, -1).mT)


def not_turned(self, q, k, v):  # a square table
    return torch.bmm(v, torch.softmax(torch.bmm(q.mT, k), -1))


def turned_twice(self, q, k, v):
    return torch.bmm(v, torch.softmax(torch.bmm(q.mT, k), -1).mT.mT)


OTHERS = {
    f.__name__: f
    for f in (over_queries, with_a_factor, in_another_type, with_dropout, in_heads, without_softmax, of_a_written_table)
}  # fmt: skip
SQUARE = {f.__name__: f for f in (not_turned, turned_twice)}


def results(net, x):
    """Results, gradients, gradients of a penalty and a third order."""
    x = x.clone().requires_grad_()
    parameters = list(net.parameters())
    y, *maps = net(x)
    (grad,) = torch.autograd.grad((y.square() * torch.linspace(0.5, 1, y[0].numel()).view(y.shape[1:])).sum(), x,
                                  create_graph=True)  # fmt: skip
    second = torch.autograd.grad(grad.square().sum(), [x, *parameters], create_graph=True, allow_unused=True)
    third = torch.autograd.grad(second[0].square().sum(), parameters, retain_graph=True, allow_unused=True)
    first = torch.autograd.grad(y.cos().sum() + sum(m.square().sum() for m in maps), parameters, allow_unused=True)
    return [y, *maps, grad, *second, *third, *first]


def check(block, x, times=2):
    torch.manual_seed(0)
    net = Net(block).double()
    fast = copy.deepcopy(net)
    report = gankern.accelerate(fast)
    for _ in range(times):
        for a, b in zip(results(net, x), results(fast, x), strict=True):
            if a is None or b is None:
                assert (a is None or not a.any()) and (b is None or not b.any())
                continue
            torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)
        with torch.no_grad():
            for a, b in zip(net(x), fast(x), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
                assert a.stride() == b.stride()
    gankern.restore(fast)
    assert "forward" not in fast.block.__dict__
    return report


X = torch.linspace(-1, 1, 2 * 3 * 6 * 8, dtype=torch.double).sin().mul(9).cos().view(2, 3, 6, 8)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_is_met(name, pooled, ran):
    report = check(Block(FORMS[name], pooled), X)
    assert set(ran) == {(2, 3, 48)}
    assert len(ran) == 2  # the second forward of its kind, with a gradient and without
    assert any(row.layer == "block" and "softmax" in row.before and row.after for row in report.rows)


@pytest.mark.parametrize("name", OTHERS)
def test_others_run_as_they_came(name, ran):
    check(Block(OTHERS[name]), X)
    assert not ran


@pytest.mark.parametrize("name", SQUARE)
def test_others_of_a_square_table(name, ran):
    check(Block(SQUARE[name], pooled=False), X)
    assert not ran


def test_a_map_that_is_returned_too(ran):
    check(Block(with_its_map), X)
    assert not ran  # whoever has the map may ask for the gradient there


def test_with_spectral_norm(ran):
    report = check(Block(released, wrap=spectral_norm), X)
    assert len(ran) == 2
    assert any("spectral norm" in str(row.after) for row in report.rows)


def test_channels_last_input_and_an_empty_batch(ran):
    check(Block(released), X.contiguous(memory_format=torch.channels_last))
    check(Block(by_operators), X[:1])
    assert len(ran) == 4
    net = Net(Block(by_operators)).double()
    gankern.accelerate(net)
    assert net(X[:0])[0].shape == (0, 4, 4, 6)


def test_numbers_that_are_none(ran):
    x = X.clone()
    x[0, 1, 2, 3] = torch.nan
    net = Net(Block(released)).double()
    fast = copy.deepcopy(net)
    gankern.accelerate(fast)
    for _ in range(2):
        assert torch.equal(net(x)[0].isnan(), fast(x)[0].isnan())
    assert ran


def test_keys_that_are_written_over_meanwhile(ran):
    net = Net(Block(keys_written_over)).double()
    fast = copy.deepcopy(net)
    gankern.accelerate(fast)
    with torch.no_grad():
        torch.testing.assert_close(fast(X)[0], net(X)[0], rtol=1e-12, atol=1e-12)
    for each in (net, fast):  # the product keeps them for its gradient
        with pytest.raises(RuntimeError, match="inplace"):
            each(X)[0].sum().backward()
    assert not ran


def test_small_tables_and_wide_values_are_left_to_torch(ran, monkeypatch):
    monkeypatch.setattr(_attention, "FROM", ((2 * 48 * 12 + 1, 96),))
    check(Block(released), X, times=1)
    monkeypatch.setattr(_attention, "FROM", ((1, 7),))  # of 3 and 5 channels together
    check(Block(released), X, times=1)
    assert not ran


def test_a_product_that_is_no_attention_waits_a_few_times_only(ran, monkeypatch):
    begun = []
    defer = _attention.defer
    monkeypatch.setattr(_attention, "defer", lambda *args: (begun.append(args[0]), defer(*args))[1])
    net = Net(Block(without_softmax)).double()
    gankern.accelerate(net)
    for _ in range(8):
        net(X)
    assert len(begun) == 2 * _attention.PATIENCE  # both of its products


def test_the_report_says_what_ran(ran):
    net = Net(Block(released)).double()
    report = gankern.accelerate(net, example_inputs=X)
    ours = [call for call in report.calls if "self_attention2d" in call.now]
    assert [call.layer for call in ours] == ["block"] and ours[0].count == 1
    joined = [call for call in report.calls if call.now == "in one with what follows"]
    assert {call.operation for call in joined if call.layer == "block"} >= {"torch.bmm", "F.softmax"}


def test_under_autocast_and_functional_transforms(ran):
    net = Net(Block(released))
    fast = copy.deepcopy(net)
    gankern.accelerate(fast)
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x)[0], net(x)[0])
    net, fast = net.double(), fast.double()
    a, b = (torch.func.jvp(lambda z, n=n: n(z)[0], (X,), (X.cos(),)) for n in (net, fast))
    torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    assert not ran
