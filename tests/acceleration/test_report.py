"""The report says what runs: every layer and every call that a forward meets, and what was left and why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gankern
from gankern.acceleration import _norms
from gankern.core.native import python_gradients


class Own(nn.Module):
    """Layers, functions and a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.conv, self.never = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.short, self.last = nn.Conv2d(8, 8, 1, groups=2), nn.Linear(8, 2)

    def forward(self, x):
        h = F.avg_pool2d(self.conv(F.interpolate(x, scale_factor=2)), 2)
        h = h + F.max_pool2d(self.short(torch.tanh(x)), 1)
        return self.last(F.relu(F.relu(h)).mean((2, 3)))


X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def test_every_layer_and_call_is_listed_with_what_ran():
    torch.manual_seed(0)
    net = Own()
    before = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    report = gankern.accelerate(net, example_inputs=X)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    calls = {(c.layer, c.operation): c for c in report.calls}
    # Each layer with parameters that ran, and each function in its order, as often as it was called.
    assert [(c.layer, c.operation, c.count) for c in report.calls] == [
        ("", "F.interpolate", 1),
        ("conv", "Conv2d 3x3", 1),
        ("", "F.avg_pool2d", 1),
        ("", "torch.tanh", 1),
        ("short", "Conv2d 1x1", 1),
        ("", "F.max_pool2d", 1),
        ("", "Tensor.add", 1),
        ("", "F.relu", 2),
        ("", "Tensor.mean", 1),
        ("last", "Linear", 1),
    ]
    assert calls["", "F.interpolate"].now == "in one with what follows"
    assert calls["conv", "Conv2d 3x3"].now.startswith("gankern: upsample (cpu: forward ")
    assert calls["short", "Conv2d 1x1"].now == "torch" and calls["short", "Conv2d 1x1"].why
    assert "second derivative of gankern's" in calls["short", "Conv2d 1x1"].in_penalty
    assert calls["", "torch.tanh"].now == "torch" and "nothing of ours" in calls["", "torch.tanh"].why
    assert {row.layer for row in report.rows if "did not run" in row.note} == {"never"}
    text = str(report)
    assert "of them ran" in text and "F.interpolate" in text
    assert len(report.to_dict()["calls"]) == len(report.calls)


def test_what_ran_is_what_was_counted():
    """The implementation that the report names is the one that runs: asked for plain PyTorch, it says so."""
    torch.manual_seed(0)
    with gankern.use_implementation("reference"):
        report = gankern.accelerate(Own(), example_inputs=X)
    assert not any(c.now.startswith("gankern") for c in report.calls)


@pytest.mark.parametrize(
    ("norm", "enough"),
    [
        (nn.BatchNorm2d(8), f"in training from {_norms.LARGE} values on"),
        (nn.InstanceNorm2d(8), f"faster from {_norms.SMALL} values on"),
        (nn.GroupNorm(2, 8), f"in training on maps of {_norms.WIDE} positions on"),
    ],
)
def test_why_a_norm_is_torchs_names_what_would_be_enough(norm, enough):
    call, *_ = gankern.accelerate(nn.Sequential(norm, nn.ReLU()), example_inputs=X[:, :, :4, :4]).calls
    assert call.now == "torch" and enough in call.why


def test_batch_norm_and_activation(monkeypatch):
    net = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8), nn.ReLU())
    small = gankern.accelerate(copy.deepcopy(net), example_inputs=X)
    assert [c.now for c in small.calls] == ["torch"] * 3
    assert "131072" in small.calls[1].why
    assert small.calls[2].in_penalty == "gankern: batch norm + relu (cpu)"
    monkeypatch.setattr(_norms, "LARGE", 1)
    large = gankern.accelerate(net, example_inputs=X)
    assert [c.now for c in large.calls] == ["torch", "in one with what follows", "gankern: batch norm + relu (cpu)"]


def test_an_error_of_the_example_leaves_the_module_as_it_was():
    net = Own()
    with pytest.raises(RuntimeError, match="channels"):
        gankern.accelerate(net, example_inputs=X[:, :4])
    assert not any("forward" in m.__dict__ for m in net.modules())


class ConvSN(nn.Conv2d):
    """A spectral norm that nobody knows, and F.conv2d behind it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("left", torch.randn(1, self.out_channels))

    def forward(self, x):
        w = self.weight.view(self.weight.shape[0], -1)
        v = F.normalize(self.left @ w, eps=1e-12)
        self.left = F.normalize(v @ w.t(), eps=1e-12).detach()
        return F.conv2d(x, self.weight / (v @ w.t() @ self.left.t()), self.bias, padding=1)


class Through:
    """A hook that normalises spectrally, with a gradient through its vectors."""

    def __init__(self, detaches=False):
        self.name, self.detaches = "weight", detaches

    def compute(self, layer):
        weight, u = getattr(layer, self.name + "_orig"), getattr(layer, self.name + "_u")
        size = weight.size()
        flat = weight.contiguous().view(size[0], -1)
        if flat.is_cuda:
            u = u.cuda()
        v = flat.t() @ u
        v = v / v.norm()
        u = flat @ v
        u = u / u.norm()
        normalised = flat / (u.t() @ flat @ v)
        return normalised.view(*size), torch.autograd.Variable(u.data)

    def __call__(self, layer, inputs):
        weight, u = self.compute(layer)
        setattr(layer, self.name, weight)
        setattr(layer, self.name + "_u", u)

    @classmethod
    def on(cls, layer):
        weight = layer._parameters.pop("weight")
        layer.weight_orig, layer.weight_u = nn.Parameter(weight.detach()), torch.randn(weight.shape[0], 1)
        hook = cls()
        layer.weight = hook.compute(layer)[0].detach()
        layer.register_forward_pre_hook(hook)
        return layer


def test_an_unknown_spectral_norm_is_shown_beside_its_convolution():
    report = gankern.accelerate(nn.Sequential(ConvSN(8, 8, 3, padding=1)))
    assert any("spectral norm of its own" in row.note for row in report.left if row.layer == "0")
    assert any("conv2d" in row.before for row in report.replaced if row.layer == "0")


def test_gradients_through_the_vectors_are_the_reason():
    torch.manual_seed(0)
    plain = nn.Sequential(Through.on(nn.Conv2d(8, 8, 3, padding=1)), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    plain[0].weight_u = plain[0].weight_u.double()
    fast = copy.deepcopy(plain)
    report = gankern.accelerate(fast)
    (row,) = [row for row in report.left if row.layer == "0"]
    assert "gradient goes through its vectors" in row.note
    for net in (plain, fast):
        for _ in range(3):
            net.zero_grad()
            net(X.double()).square().sum().backward()
    for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast[0].weight_u, plain[0].weight_u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_pair_with_a_spectral_norm_between_is_listed_as_it_runs(norm):
    """Also where gradients go through Python, whose operations the mode that watches a model's does not see as its."""
    torch.manual_seed(0)

    def net():
        return nn.Sequential(nn.Upsample(scale_factor=2), norm(nn.Conv2d(8, 8, 3, padding=1)), nn.ReLU())

    calls = {c.layer: c.now for c in gankern.accelerate(net(), example_inputs=X).calls}
    assert calls["0"] == "in one with what follows" and calls["1"].startswith("gankern: upsample")
    plain = net().double()
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    with python_gradients():
        for _ in range(3):
            torch.testing.assert_close(fast(X.double()), plain(X.double()), rtol=1e-12, atol=1e-12)
    for a, b in zip(fast.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
