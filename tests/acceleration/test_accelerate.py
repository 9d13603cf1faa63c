"""gankern.accelerate: the same numbers, the same everything else, and what it refuses."""

import copy
import functools
import io
import json
import pickle
import types

import common
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gankern
from gankern.acceleration import _convolutions, _norms, _scope


def penalty(critic, x, *others):
    x = x.detach().requires_grad_()
    out = outputs_of(critic, x, *others)[0].flatten(1).sum(1)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def outputs_of(module, *inputs):
    result = module(*inputs)
    return list(result.values()) if isinstance(result, dict) else [*result] if isinstance(result, tuple) else [result]


def train(module, inputs, steps=3, with_penalty=True):
    """Everything that can be seen of a few training steps: results, strides, gradients, parameters, buffers."""
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        xs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        outs = outputs_of(module, *xs)
        loss = sum((out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outs)
        if with_penalty:
            loss = loss + penalty(module, *xs)
        loss.backward()
        seen += [(out.detach().clone(), out.stride()) for out in outs]
        seen += [(x.grad, ()) for x in xs if x.grad is not None]
        seen += [(None if p.grad is None else p.grad.clone(), ()) for p in module.parameters()]
        optimizer.step()
    return seen + [(value.clone(), value.stride()) for value in module.state_dict().values()]


def check_same(module, *inputs, with_penalty=True, tolerance=1e-10, **options):
    """Trains a module and its accelerated copy in double precision; returns the report and the copy."""
    module = module.double()
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    accelerated = copy.deepcopy(module)
    report = gankern.accelerate(accelerated, **options)
    expected, found = (
        train(module, inputs, with_penalty=with_penalty),
        train(accelerated, inputs, with_penalty=with_penalty),
    )
    assert len(expected) == len(found)
    for (a, a_strides), (b, b_strides) in zip(expected, found):
        if a is None or b is None:
            assert a is None or not a.any()
            assert b is None or not b.any()
            continue
        assert a.shape == b.shape
        assert a_strides == b_strides
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return report, accelerated


class Residual(nn.Module):
    """In-place activations at the head of the branch, which the shortcut sees; functional means."""

    def __init__(self, channels=16, inplace=True, norm=lambda layer: layer):
        super().__init__()
        self.conv1 = norm(nn.Conv2d(channels, channels, 3, padding=1))
        self.conv2 = norm(nn.Conv2d(channels, channels, 3, padding=1))
        self.shortcut = norm(nn.Conv2d(channels, channels, 1))
        self.act = nn.ReLU(inplace)

    def forward(self, x):
        h = self.act(x)
        h = self.conv1(h)
        h = self.act(h)
        h = F.avg_pool2d(self.conv2(h), 2)
        return h + F.avg_pool2d(self.shortcut(x), 2)


def critic(norm=lambda layer: layer):
    return nn.Sequential(
        norm(nn.Conv2d(3, 16, 3, padding=1)),
        Residual(norm=norm),
        Residual(norm=norm),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        norm(nn.Linear(16 * 16, 1)),
    )


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# ---- the same numbers -----------------------------------------------------------------------------------------

NORMS = {
    "none": lambda layer: layer,
    "hook": nn.utils.spectral_norm,
    "parametrization": nn.utils.parametrizations.spectral_norm,
    "gankern": gankern.__name__ and (lambda layer: __import__("gankern.nn").nn.utils.spectral_norm(layer)),
}


@pytest.mark.parametrize("norm", NORMS)
def test_critic(norm):
    torch.manual_seed(0)
    report, accelerated = check_same(critic(NORMS[norm]), IMAGES)
    assert report.module is accelerated
    normalised = [row for row in report.replaced if "spectral norm" in row.before]
    assert len(normalised) == (0 if norm == "none" else 8)


def test_channels_last():
    torch.manual_seed(0)
    check_same(critic().to(memory_format=torch.channels_last), IMAGES)
    check_same(critic(), IMAGES.to(memory_format=torch.channels_last))


class Generator(nn.Module):
    def __init__(self, functional):
        super().__init__()
        self.functional = functional
        self.up = nn.Upsample(scale_factor=2)
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.shortcut = nn.Conv2d(8, 16, 1)
        self.rgb = nn.ConvTranspose2d(16, 3, 4, 2, 1)

    def forward(self, x):
        h = F.interpolate(x, scale_factor=2) if self.functional else self.up(x)
        s = self.shortcut(h)  # the same enlarged image twice
        h = self.conv1(h)
        h = F.relu(self.bn(h), inplace=True)
        h = F.leaky_relu(self.conv2(h), 0.2)
        return torch.tanh(self.rgb(h + s))


@pytest.mark.parametrize("functional", [False, True])
def test_generator(functional):
    torch.manual_seed(0)
    check_same(Generator(functional), torch.randn(2, 8, 8, 8), with_penalty=False)


class Normalised(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case
        self.bn = nn.BatchNorm2d(16, momentum=None if case == "no momentum" else 0.1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x):
        h = self.bn(self.conv(x))
        match self.case:
            case "module, in place" | "no momentum":
                y = self.act(h)
                return y + h  # of in-place activations: activated both
            case "function":
                return F.relu(h) + h
            case "method":
                return h.relu_() + h
            case "twice":
                return F.relu(h) + F.leaky_relu(h, 0.3) + h
            case "none":
                return h * 2 + F.relu(x)


@pytest.mark.parametrize("large", [1, 10**9])
@pytest.mark.parametrize("case", ["module, in place", "function", "method", "twice", "none", "no momentum"])
def test_batch_norm(case, large, monkeypatch):
    monkeypatch.setattr(_norms, "LARGE", large)
    torch.manual_seed(0)
    net = Normalised(case)
    x = torch.randn(4, 16, 8, 8)
    _, accelerated = check_same(net, x, with_penalty=case != "method", tolerance=1e-8)
    assert accelerated.bn.num_batches_tracked == (6 if case != "method" else 3)
    net.eval()
    check_same(net, x, tolerance=1e-8)


def test_sequential_batch_norm(monkeypatch):
    monkeypatch.setattr(_norms, "LARGE", 1)
    calls = []
    normalize = _norms._normalize
    monkeypatch.setattr(_norms, "_normalize", lambda *args: (calls.append(args[6:]), normalize(*args))[1])
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    check_same(net, torch.randn(4, 4, 6, 6), tolerance=1e-8)
    # The first forward finds out whether somebody keeps what is between, and runs the halves by themselves.
    assert calls.count(("relu", 0.0)) == len(calls) / 3 - 1


def test_layers_of_their_own():
    from gankern.models import layers

    torch.manual_seed(0)
    net = nn.Sequential(
        layers.MinibatchStdDev(), layers.PixelNorm(), nn.Flatten(), layers.MinibatchDiscrimination(80, 4, 3)
    )
    report, accelerated = check_same(net, torch.randn(8, 4, 4, 4))
    assert [row.after for row in report.replaced] == [
        "gankern's minibatch_stddev",
        "gankern's pixel_norm",
        "gankern's minibatch_discrimination",
    ]
    for module in (net, accelerated):  # torch.nn.Module's own errors
        with pytest.raises(ValueError, match="MinibatchStdDev"):
            module(torch.randn(6, 4, 4, 4).double())


class ScaledConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


class OddTransposed(nn.ConvTranspose2d):
    def _output_padding(self, *args, **kwargs):
        return [1, 1]


class OddTransposed1d(nn.ConvTranspose1d):
    def _output_padding(self, *args, **kwargs):
        return [1]


class CheckedNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        self.checked = input.shape


class ScaledInstanceNorm(nn.InstanceNorm2d):
    def _apply_instance_norm(self, input):
        return super()._apply_instance_norm(input) * 2


def rescaled(self, input, weight, bias):
    return F.conv2d(input, weight * 3, bias, padding=1)


# What a subclass changes of a layer of torch's, beside its forward.
SUBCLASSES = {
    "_conv_forward": (lambda: ScaledConv(16, 16, 3, padding=1), "_conv_forward"),
    "_output_padding": (lambda: OddTransposed(16, 16, 4, 2, 1), "_output_padding"),
    "_apply_instance_norm": (lambda: ScaledInstanceNorm(16), "_apply_instance_norm"),
    "_check_input_dim": (lambda: CheckedNorm(16), None),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_methods_that_a_subclass_changes(name):
    torch.manual_seed(0)
    make, own = SUBCLASSES[name]
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), make(), nn.AvgPool2d(2))
    report, _ = check_same(net, torch.randn(4, 16, 8, 8), tolerance=1e-8)
    assert [row.note for row in report.left] == ([] if own is None else [f"its {own} is its own"])
    net = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), OddTransposed1d(16, 4, 4, 2, 1))
    check_same(net, torch.randn(4, 16, 8))


@pytest.mark.parametrize("kind", [ScaledConv, OddTransposed, ScaledInstanceNorm, "instance"])
def test_methods_that_change_afterwards(kind):
    torch.manual_seed(0)
    layer = {OddTransposed: nn.ConvTranspose2d(16, 16, 4, 2, 1), ScaledInstanceNorm: nn.InstanceNorm2d(16)}.get(
        kind, nn.Conv2d(16, 16, 3, padding=1)
    )
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), layer, nn.AvgPool2d(2)).double()
    fast = copy.deepcopy(net)
    gankern.accelerate(fast)
    x = torch.randn(4, 16, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fast(x), net(x))
    for module in (net, fast):
        if kind == "instance":
            module[1]._conv_forward = types.MethodType(rescaled, module[1])
        else:
            module[1].__class__ = kind
    torch.testing.assert_close(fast(x), net(x))


def test_sequential_pairs(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.AvgPool2d(2),
    )
    kinds = record_kinds(monkeypatch)
    check_same(net, torch.randn(2, 16, 16, 16))
    assert {"upsample", "downsample"} <= set(kinds)


def record_kinds(monkeypatch):
    kinds = []
    convolution = _convolutions.convolution

    def recorded(kind, *args):
        result = convolution(kind, *args)
        if result is not None:
            kinds.append(kind)
        return result

    monkeypatch.setattr(_convolutions, "convolution", recorded)
    return kinds


class Overwrites(nn.Module):
    """Every way to get in between two operations that could be one."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        x = x * 1
        if self.case.endswith(("numpy", "before")):
            memory = x.detach().numpy() if self.case.endswith("numpy") else x.untyped_storage()
        h = self.conv(x)
        match self.case:
            case "input":
                x += 1
            case "input, by method":
                x.relu_()
            case "input, by function":
                F.relu(x, inplace=True)
            case "input, by assignment":
                x[0] = 0
            case "input, by data":
                x.data.mul_(2)
            case "input, by numpy":
                memory *= 2
            case "input, by its memory":
                x.untyped_storage().fill_(0)
            case "input, by memory that was got before":
                memory.fill_(0)
            case "result":
                h += 1
            case "result, in place":
                F.leaky_relu(h, 0.2, inplace=True)
            case "view":
                h = h.view(h.shape[0], -1).view_as(h)
            case "both":
                y = F.avg_pool2d(h, 2)
                x.mul_(2)
                return y + F.max_pool2d(h, 2) + F.avg_pool2d(x, 2)
            case "function":
                h = common.Twice.apply(h)
            case "shape":
                assert h.shape == x.shape
                assert h.size(1) == 16
            case "detached":
                return F.avg_pool2d(h, 2) + F.avg_pool2d(h.detach(), 2)
            case "no_grad":
                with torch.no_grad():
                    mean = h.mean()
                return F.avg_pool2d(h, 2) * mean
            case "kept":
                self.kept = h
            case "list":
                return F.avg_pool2d(torch.cat([h, x], 1), 2)
        return F.avg_pool2d(h, 2) + F.avg_pool2d(x, 2)


OVERWRITES = [
    "nothing",
    "input",
    "input, by method",
    "input, by function",
    "input, by assignment",
    "input, by data",
    "input, by numpy",
    "input, by its memory",
    "input, by memory that was got before",
    "result",
    "result, in place",
    "view",
    "both",
    "function",
    "shape",
    "detached",
    "no_grad",
    "kept",
    "list",
]


@pytest.mark.parametrize("case", OVERWRITES)
def test_what_comes_between(case):
    torch.manual_seed(0)
    net, x = Overwrites(case).double(), torch.randn(2, 16, 8, 8).double()
    if not case.startswith(("input", "both", "result, in place")):  # torch's own backward refuses these
        check_same(net, x)
    with torch.no_grad():
        expected = net(x)
        gankern.accelerate(net)
        for _ in range(2 * _scope.Followed.patience):
            torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)


class LayerChanges(nn.Module):
    """A batch norm whose settings change before its activation runs: they are those of its call."""

    def __init__(self, change):
        super().__init__()
        self.norm, self.act, self.change = nn.BatchNorm2d(16), nn.LeakyReLU(0.2), change

    def forward(self, x):
        norm = self.norm
        norm.train(self.change != "trained").momentum, norm.eps = 0.1, 1e-5
        norm.track_running_stats = True
        y = norm(x)
        match self.change:
            case "evaluated":
                norm.eval()
            case "trained":
                norm.train()
            case "momentum":
                norm.momentum = 0.7
            case "eps":
                norm.eps = 0.5
            case "statistics":
                norm.track_running_stats = False
            case "buffers":
                norm.running_mean, norm.running_var = norm.running_mean.new_zeros(16), norm.running_var.new_ones(16)
            case "count":
                norm.num_batches_tracked = torch.tensor(40)
        return self.act(y)


@pytest.mark.parametrize(
    "change", ["nothing", "evaluated", "trained", "momentum", "eps", "statistics", "buffers", "count"]
)
def test_a_layer_that_changes_before_its_activation(change, monkeypatch):
    monkeypatch.setattr(_norms, "LARGE", 1)
    right = LayerChanges(change).double()
    net = copy.deepcopy(right)
    gankern.accelerate(net)
    for seed in range(2):
        x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        results = []
        for module, leaf in zip((right, net), leaves):
            out = module(leaf)
            (out * out.detach().cos()).sum().backward()
            results.append([out, leaf.grad, *module.state_dict().values()])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attribute, value", [("eps", 0.0), ("eps", -0.1), ("eps", None), ("momentum", "0.1")])
@pytest.mark.parametrize("training", [True, False])
def test_settings_of_batch_norms_that_torch_refuses(attribute, value, training):
    """Set after the call: torch's own error, or its own result where it has one."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train(training)
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    came = []
    for net in (plain, fast):
        setattr(net[1], attribute, value)
        try:
            came.append(net(torch.linspace(-1, 1, 384).view(2, 3, 8, 8).requires_grad_()))
        except (TypeError, ValueError) as error:
            came.append((type(error), str(error)))
    want, got = came
    if isinstance(want, tuple):
        assert got == want
    else:
        torch.testing.assert_close(got, want)


def test_shared_activation_sees_the_same_memory():
    torch.manual_seed(0)
    block = Residual()
    accelerated = copy.deepcopy(block)
    gankern.accelerate(accelerated)
    x = torch.randn(2, 16, 8, 8)
    mine = x.clone()
    with torch.no_grad():
        block(x), accelerated(mine)
    assert torch.equal(x, mine)  # both were activated in place
    assert (mine >= 0).all()


class Twice(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first = norm(nn.Conv2d(8, 8, 3, padding=1))
        self.second = norm(nn.Conv2d(8, 8, 3, padding=1))
        self.never = norm(nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x):
        return self.second(F.relu(self.first(F.relu(self.first(x)))))


@pytest.mark.parametrize("norm", ["hook", "parametrization"])
def test_layers_used_twice_and_never(norm):
    torch.manual_seed(0)
    check_same(Twice(NORMS[norm]), torch.randn(2, 8, 6, 6))


def test_tied_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3, padding=1))
    net[2].weight = net[0].weight
    _, accelerated = check_same(net, torch.randn(2, 8, 6, 6))
    assert accelerated[2].weight is accelerated[0].weight


@pytest.mark.parametrize("shared", ["weight", "vectors"])
def test_tied_spectral_norm(shared):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2)))
    net[1].weight_orig = net[0].weight_orig
    if shared == "vectors":
        net[1].weight_u, net[1].weight_v = net[0].weight_u, net[0].weight_v
    check_same(net, torch.randn(2, 8, 6, 6))


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.heads = nn.ModuleList([nn.Conv2d(8, 1, 3, padding=1), nn.Conv2d(8, 2, 1)])

    def forward(self, x):
        x = F.leaky_relu(self.body(x), 0.2)
        return {str(i): head(x).view(x.shape[0], -1) for i, head in enumerate(self.heads)}


def test_dict_of_results():
    torch.manual_seed(0)
    check_same(Several(), IMAGES)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions(dimensions):
    torch.manual_seed(0)
    conv, transpose = (getattr(nn, f"{name}{dimensions}d") for name in ("Conv", "ConvTranspose"))
    net = nn.Sequential(conv(2, 4, 3, padding=1, groups=2), nn.LeakyReLU(0.2), transpose(4, 2, 4, 2, 1), nn.ReLU())
    check_same(net, torch.randn(2, 2, *[4] * dimensions))


def test_other_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"),
        nn.Conv2d(8, 8, (3, 1), padding="same", dilation=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 4, 2, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Conv2d(8, 4, 1, padding="valid", bias=False),
        nn.ConvTranspose2d(4, 4, 3, 2, 1, 1),
    )
    check_same(net, torch.randn(2, 4, 8, 8))


# ---- the same everything else ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_state_and_identity(norm):
    torch.manual_seed(0)
    net = critic(NORMS[norm])
    before = dict(net.named_parameters()), dict(net.named_buffers()), list(net.state_dict())
    types, text = [type(m) for m in net.modules()], repr(net)
    keys = [set(m.__dict__) for m in net.modules()]
    gankern.accelerate(net)
    net(IMAGES)
    assert all(p is before[0][n] for n, p in net.named_parameters())
    assert all(b is before[1][n] for n, b in net.named_buffers())
    assert list(net.state_dict()) == before[2]
    if norm != "parametrization":  # the parametrization itself is another one of the same name
        assert [type(m) for m in net.modules()] == types
        assert repr(net) == text
    gankern.restore(net)
    assert [type(m) for m in net.modules()] == types
    assert repr(net) == text
    assert [set(m.__dict__) for m in net.modules()] == keys
    fresh = critic(NORMS[norm])
    fresh.load_state_dict(net.state_dict())


@pytest.mark.parametrize("norm", ["none", "hook", "gankern"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_apart(norm, how):
    torch.manual_seed(0)
    net = critic(NORMS[norm])
    gankern.accelerate(net)
    twin = copied(net, how)
    with torch.no_grad():
        assert torch.equal(net(IMAGES), twin(IMAGES))
        before = twin(IMAGES) if norm == "none" else None
        for p in net.parameters():
            p.zero_()
        if norm == "none":
            assert torch.equal(twin(IMAGES), before)
    assert not {id(t) for t in net.state_dict(keep_vars=True).values()} & {
        id(t) for t in twin.state_dict(keep_vars=True).values()
    }
    gankern.restore(twin)
    with pytest.raises(ValueError, match="never accelerated"):
        gankern.restore(twin)
    gankern.restore(net)


def copied(module, how):
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_deepcopy_of_a_parametrized_one():
    torch.manual_seed(0)
    net = critic(NORMS["parametrization"])
    gankern.accelerate(net)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(net(IMAGES), twin(IMAGES))
        assert torch.equal(net(IMAGES), twin(IMAGES))  # each its own vectors


@pytest.mark.parametrize("norm", ["hook", "parametrization"])
def test_spectral_norm_taken_off_later(norm):
    torch.manual_seed(0)
    net = critic(NORMS[norm])
    gankern.accelerate(net)
    net(IMAGES)
    if norm == "hook":
        nn.utils.remove_spectral_norm(net[0])
    else:
        nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    net(IMAGES)
    gankern.restore(net)
    net(IMAGES)


def test_modes_and_hooks():
    torch.manual_seed(0)
    net = critic(NORMS["hook"])
    net(IMAGES)
    twin = critic(NORMS["hook"])
    twin.load_state_dict(net.state_dict())
    gankern.accelerate(twin)
    seen = {id(net): [], id(twin): []}
    for module in (net, twin):
        note = functools.partial(lambda s, m, i, o: s.append((type(i[0]), type(o), o.sum().item())), seen[id(module)])
        for inner in module.modules():
            inner.register_forward_hook(note)
        module.eval()
        module(IMAGES)
        module.train()
        module(IMAGES)
    assert [s[:2] for s in seen[id(net)]] == [s[:2] for s in seen[id(twin)]]
    assert [s[2] for s in seen[id(twin)]] == pytest.approx([s[2] for s in seen[id(net)]], rel=1e-4, abs=1e-4)


def test_backward_hooks():
    torch.manual_seed(0)
    net = Residual(inplace=False)
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    seen = []
    for module in (net, twin):
        module.conv2.register_full_backward_hook(lambda m, i, o: seen.append(i[0].abs().sum().item()))
        module(torch.ones(2, 16, 8, 8, requires_grad=True)).sum().backward()
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_forward_called_directly_and_parts_called_alone():
    torch.manual_seed(0)
    net = critic(NORMS["hook"])
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    for module in (net, twin):
        module.results = [module.forward(IMAGES), module[0](IMAGES), module[1](module[0](IMAGES))]
    for a, b in zip(net.results, twin.results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_under_torch_compile():
    torch.manual_seed(0)
    net = critic(NORMS["parametrization"])
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        a, b = net(IMAGES), compiled(IMAGES)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    b.sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_traced_and_exported():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 4, 2, 1),
        nn.AvgPool2d(2),
    ).eval()
    expected = net(IMAGES)
    gankern.accelerate(net)
    torch.testing.assert_close(torch.jit.trace(net, IMAGES)(IMAGES), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(net, (IMAGES,)).module()(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_under_autocast():
    torch.manual_seed(0)
    net = critic()
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = net(IMAGES), twin(IMAGES)
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_torch_func():
    torch.manual_seed(0)
    net = critic().double()
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    x = IMAGES.double()
    results = []
    for module in (net, twin):
        module.requires_grad_(False)
        module[1].act.inplace = module[2].act.inplace = False
        results.append(torch.func.grad(lambda y, module=module: module(y).sum())(x))
    torch.testing.assert_close(*results)


def test_distributed(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        nets = [critic(NORMS["hook"]) for _ in range(3)]
        for net in nets[1:]:
            net.load_state_dict(nets[0].state_dict())
        gankern.accelerate(nets[1])  # before
        wrapped = [nn.parallel.DistributedDataParallel(net) for net in nets]
        gankern.accelerate(wrapped[2])  # after
        for net in wrapped:
            net(IMAGES).sum().backward()
        for net in nets[1:]:
            for p, q in zip(net.parameters(), nets[0].parameters()):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


# ---- what is asked of it --------------------------------------------------------------------------------------


def test_only_and_exclude():
    net = critic()
    report = gankern.accelerate(net, only="1.*", exclude=["1.conv1", "1.act"])
    assert {row.layer for row in report.replaced} == {"1.conv2", "1.shortcut", "1"} - {"1"} | set()
    gankern.restore(net)
    with pytest.raises(ValueError, match="no submodule is called"):
        gankern.accelerate(net, only="conv9")
    with pytest.raises(TypeError, match="names of submodules"):
        gankern.accelerate(net, exclude=[nn.Conv2d])
    for one in (3, nn.ReLU()):
        with pytest.raises(TypeError, match=r"exclude is a .*; it takes names of submodules"):
            gankern.accelerate(net, exclude=one)
    assert not changed(net)


@pytest.mark.parametrize("code", [False, True])
def test_what_is_excluded_runs_as_it_is(code, monkeypatch):
    """Though functions are met by whomever they are called; and it is given no value that waits."""

    class Upsampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, x):
            assert type(x) is torch.Tensor
            return F.relu(self.conv(F.interpolate(x, scale_factor=2)))

    def modules():
        return [Upsampled()] if code else [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]

    def gradients(module):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(module(leaf).square().mean(), [leaf, *module.parameters()])

    torch.manual_seed(0)
    net = nn.Sequential(*modules(), nn.Conv2d(64, 64, 1), *modules())
    original = copy.deepcopy(net)
    fused, resampled = [], _convolutions._resampled
    monkeypatch.setattr(_convolutions, "_resampled", lambda *args: fused.append(args) or resampled(*args))
    x = torch.randn(4, 64, 16, 16)
    names = [str(len(modules()) + 1 + i) for i in range(len(modules()))]
    for exclude, pairs in ((None, 2), (names, 1), (names[:1], 1), (names[:2][-1], 1)):
        report = gankern.accelerate(net, exclude=exclude)
        assert {row.layer for row in report.replaced}.isdisjoint([] if exclude is None else exclude)
        net(x)  # nothing runs in one where it is met first
        fused.clear()
        torch.testing.assert_close(net(x), original(x))
        assert len(fused) == pairs
        torch.testing.assert_close(gradients(net), gradients(original))
        torch.testing.assert_close(copy.deepcopy(net)(x), original(x))
        gankern.restore(net)
        assert not changed(net)


def changed(module):
    return any("_gankern_changes" in m.__dict__ or "forward" in m.__dict__ for m in module.modules())


def test_not_in_place():
    net = critic()
    report = gankern.accelerate(net, inplace=False)
    assert not changed(net)
    assert changed(report.module)


def test_twice_and_inside():
    net = critic()
    gankern.accelerate(net[1])
    report = gankern.accelerate(net)
    assert report.replaced
    again = gankern.accelerate(net)
    assert not again.rows
    assert "already" in again.notes[0]
    gankern.restore(net)
    assert not changed(net)


def test_without_fast_double_backward():
    torch.manual_seed(0)
    report, _ = check_same(critic(), IMAGES, fast_double_backward=False)
    assert not any("double backward" in row.after for row in report.replaced)


def test_nothing_to_do():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    report = gankern.accelerate(net)
    assert not report.replaced
    assert "left alone" in report.notes[0]
    assert not changed(net)


def test_report(capsys):
    torch.manual_seed(0)
    net = critic(NORMS["hook"])
    report = gankern.accelerate(net, verify=(IMAGES,))
    assert [m.mode for m in report.measured] == ["forward", "forward + backward", "double backward"]
    assert all(m.error < 0.1 and m.error_in_double < 1e-6 for m in report.measured)
    text = str(report)
    assert "1.conv2" in text
    assert "double backward" in text
    json.dumps(report.to_dict())


def test_verify_leaves_no_trace():
    torch.manual_seed(0)
    net = critic(NORMS["hook"])
    net(IMAGES).sum().backward()  # the weights are no leaves now
    net.zero_grad()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    gankern.accelerate(net, verify=IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert all(p.grad is None for p in net.parameters())


def test_a_wrong_result_is_undone(monkeypatch):
    net = critic()
    monkeypatch.setattr(_convolutions, "_conv2d", lambda *args: 2 * F.conv2d(*args[2:]))
    with pytest.raises(RuntimeError, match="left as it was"):
        gankern.accelerate(net, verify=IMAGES)
    assert not changed(net)


def test_a_failure_leaves_it_as_it_was(monkeypatch):
    net = critic(NORMS["hook"])
    monkeypatch.setattr("gankern.acceleration._accelerate._Work._root", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gankern.accelerate(net)
    assert not changed(net)
    assert all(type(h).__module__.startswith("torch") for m in net.modules() for h in m._forward_pre_hooks.values())


BAD = {
    "a class": (nn.Linear, TypeError, "not an instance"),
    "no module": (3, TypeError, "must be a torch.nn.Module"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3))), TypeError, "scripted"),
    "compiled": (lambda: torch.compile(nn.Conv2d(3, 3, 3)), ValueError, "compiled already"),
    "on meta": (lambda: nn.Conv2d(3, 3, 3, device="meta"), ValueError, "meta device"),
    "lazy": (lambda: nn.LazyConv2d(3, 3), ValueError, "not initialized"),
    "exported": (lambda: torch.export.export(nn.Conv2d(3, 3, 3), (IMAGES,)), TypeError, "exported"),
    "exported's module": (lambda: torch.export.export(nn.Conv2d(3, 3, 3), (IMAGES,)).module(), TypeError, "exported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, match = BAD[case]
    module = make() if callable(make) and not isinstance(make, type) else make
    with pytest.raises(error, match=match):
        gankern.accelerate(module)


@pytest.mark.parametrize("argument", ["verify", "example_inputs"])
def test_inputs_that_are_a_flag(argument):
    with pytest.raises(
        TypeError, match=rf"{argument} is True; it takes the inputs of a forward: {argument}=\(images,\)"
    ):
        gankern.accelerate(critic(), **{argument: True})


def test_compiled_in_place():
    net = nn.Sequential(nn.Conv2d(3, 3, 3))
    net.compile()
    with pytest.raises(ValueError, match="compiled already"):
        gankern.accelerate(net)


def test_restore_of_what_never_was():
    with pytest.raises(ValueError, match="never accelerated"):
        gankern.restore(critic())
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        gankern.restore(3)


def test_names_stay_functions():
    import gankern.acceleration

    assert callable(gankern.accelerate)
    assert gankern.accelerate is gankern.acceleration.accelerate


# ---- deferred values --------------------------------------------------------------------------------------------


def test_no_trace_of_a_deferred_value_outside():
    torch.manual_seed(0)
    net = Overwrites("kept")
    gankern.accelerate(net)
    x = torch.randn(2, 16, 8, 8)
    y = net(x)
    assert type(y) is torch.Tensor
    assert not _scope.state.waiting
    assert not _scope.state.fused
    assert not _scope.state.intercepting
    torch.testing.assert_close(
        net.kept + 0, F.conv2d(x, net.conv.weight, net.conv.bias, padding=1), rtol=1e-4, atol=1e-5
    )


class Checkpointed(nn.Module):
    """Activation checkpointing by an autograd.Function, which runs layers without gradients and hides what it got."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        h = checkpoint(self.conv1, x, use_reentrant=True)
        h = checkpoint(self.conv2, F.interpolate(h, scale_factor=2), use_reentrant=True)
        return F.avg_pool2d(h, 2)


def test_reentrant_checkpoints():
    torch.manual_seed(0)
    check_same(Checkpointed(), torch.randn(2, 8, 8, 8), with_penalty=False)


def test_errors_come_from_where_they_came():
    net = Overwrites("nothing")
    gankern.accelerate(net)
    with pytest.raises(RuntimeError, match="channels"):
        net(torch.randn(2, 8, 8, 8))
    assert not _scope.state.intercepting


def _scaled_replica(net):
    """As nn.DataParallel makes them of a network on several GPUs, with other parameters."""
    modules = list(net.modules())
    replicas = {id(m): m._replicate_for_data_parallel() for m in modules}
    for module in modules:
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            replica._modules[name] = replicas[id(child)]
        for name, parameter in module._parameters.items():
            setattr(replica, name, 2 * parameter.detach())
    return replicas[id(net)]


def test_shallow_copies_compute_with_what_they_have():
    """copy.copy shares a module's attributes, those of nn.DataParallel's replicas too: what one changes in the copy
    holds for it, and for it alone."""

    def edited(net):
        twin = copy.copy(net)
        twin._modules = {name: copy.copy(m) for name, m in net._modules.items()}
        for m in twin._modules.values():
            m._parameters = {name: nn.Parameter(2 * p.detach()) for name, p in m._parameters.items()}
        twin[0].stride, twin[2].negative_slope = (2, 2), 0.7
        twin[1].training = False
        return twin

    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 4, 3, padding=1)
    ).double()
    fast = copy.deepcopy(plain)
    before = [set(m.__dict__) for m in fast.modules()]
    gankern.accelerate(fast)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):  # also after it has found out what it gains
        for change in (edited, _scaled_replica):
            torch.testing.assert_close(change(fast)(x), change(plain)(x), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-12, atol=1e-12)
        for _ in range(6):
            fast(x), plain(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):  # these are accelerated
        assert "_gankern_changes" in twin[0].__dict__ and twin.__dict__["forward"].args[0] is twin
        other = copy.deepcopy(plain)
        torch.testing.assert_close(twin(x), other(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(edited(twin)(x), edited(other)(x), rtol=1e-12, atol=1e-12)
    gankern.restore(fast)
    assert [set(m.__dict__) for m in fast.modules()] == before
