"""A parameter has a gradient of a penalty, one of zeros, or none, exactly where it has with torch's double backward."""

import contextlib
import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from common import Applied, needs_nodes, with_gradient
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gankern
import gankern.functional as GF
import gankern.nn as gnn
from gankern import penalties
from gankern.core import native


def conv(channels_in=3, channels_out=4, kernel=3, stride=1, padding=1):
    return nn.Conv2d(channels_in, channels_out, kernel, stride, padding)


class Projection(nn.Module):
    """Two heads, one of them unused, frozen weights, an embedding that the gradient depends on."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv(), conv(4, 4, stride=2)
        self.head, self.embedding = nn.Linear(4, 1), nn.Embedding(5, 4)
        self.unused, self.classes = nn.Linear(2, 2), nn.Linear(4, 3)
        self.classes.weight.requires_grad_(False)

    def forward(self, x):
        h = torch.relu(self.first(x))
        h = torch.relu(self.second(h) + h[:, :, ::2, ::2]).sum((2, 3))
        self.classes(h)
        labels = torch.arange(len(x)) % 5
        return self.head(h) + (self.embedding(labels) * h).sum(1, keepdim=True)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = conv(), nn.Linear(4, 1)
        self.query, self.key, self.value = conv(4, 2, 1, 1, 0), conv(4, 2, 1, 1, 0), conv(4, 4, 1, 1, 0)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        h = torch.relu(self.first(x))
        query, key, value = (f(h).flatten(2) for f in (self.query, self.key, self.value))
        weights = (query.transpose(1, 2) @ key).softmax(-1)
        attended = (value @ weights.transpose(1, 2)).view_as(h)
        return self.head((self.gain * attended + h).mean((2, 3)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = conv(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(torch.relu(self.layer(torch.relu(self.layer(x)))).mean((2, 3)))


class EndsInReLU(nn.Module):
    """The first operator of the backward takes a constant gradient: its result depends on the input by zeros alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 1))

    def forward(self, x):
        return torch.relu(self.layers(x) + 3)


class Spectrum(nn.Module):
    """The real parts of what a function of the features gives."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x).real.flatten(1)


class Back(nn.Module):
    """Through complex numbers, linear in each step: no parameter before it has a gradient of second order."""

    def forward(self, x):
        spectrum = torch.fft.fft2(x)
        return torch.fft.irfft2(torch.complex(spectrum.real, 2 * spectrum.imag)[..., :5], s=(8, 8)).flatten(1)


Turned = with_gradient("Turned", lambda grad: -grad)  # a gradient reversal
Shifted = with_gradient("Shifted", lambda grad: grad + 0.25)  # as noise is added for privacy


def hooked(layer, register=nn.Module.register_full_backward_hook):
    """Twice the gradient, by a hook of the module."""
    register(layer, lambda module, grads, *_: tuple(2 * g for g in grads))
    return layer


def with_hook(hook):
    """Of the tensor that comes."""

    def registered(x):
        x = x * 1
        x.register_hook(hook)
        return x

    return Applied(registered)


def keeps_gradient(x):
    x.retain_grad()
    return x


def flat(*layers):
    return nn.Sequential(*layers, nn.Flatten())


def mlp(*activations):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), activations[0], nn.Linear(8, 8), activations[1], nn.Linear(8, 1)
    )


CRITICS = {
    "mlp": lambda: mlp(nn.LeakyReLU(0.2), nn.ReLU()),
    "mlp, tanh below relu": lambda: mlp(nn.Tanh(), nn.ReLU()),
    "mlp, relu below tanh": lambda: mlp(nn.ReLU(), nn.Tanh()),
    "linear": lambda: mlp(nn.Identity(), nn.Identity()),
    "convolutions": lambda: flat(conv(), nn.LeakyReLU(0.2), conv(4, 4, 4, 2), nn.LeakyReLU(0.2), conv(4, 1, 4, 1, 0)),
    "convolutions alone": lambda: flat(conv(), conv(4, 1, 8, 1, 0)),
    "pooling": lambda: flat(conv(), nn.AvgPool2d(2), nn.MaxPool2d(2), conv(4, 1, 2, 1, 0)),
    "padding": lambda: flat(nn.ReflectionPad2d(1), conv(3, 4, 3, 1, 0), nn.ReplicationPad2d(1), conv(4, 1, 10, 1, 0)),
    "upsampling": lambda: flat(conv(), nn.Upsample(scale_factor=2), conv(4, 1, 16, 1, 0)),
    "transposed": lambda: flat(nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.ReLU6(), conv(4, 1, 16, 1, 0)),
    "one dimension": lambda: flat(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(4, 1, 31)),
    "batch norm, training": lambda: flat(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 1, 8, 1, 0)),
    "batch norm, evaluation": lambda: flat(
        conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4), conv(4, 1, 8, 1, 0)
    ).eval(),
    "instance norm": lambda: flat(
        conv(), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), conv(4, 4), nn.InstanceNorm2d(4, affine=True),
        conv(4, 1, 8, 1, 0),
    ),
    "layer norm": lambda: flat(conv(), nn.LayerNorm([4, 8, 8]), nn.ReLU(), conv(4, 1, 8, 1, 0)),
    "group norm": lambda: flat(conv(), nn.GroupNorm(2, 4), nn.LeakyReLU(), conv(4, 1, 8, 1, 0)),
    "spectral norm": lambda: flat(
        nn.utils.parametrizations.spectral_norm(conv()), nn.ReLU(), nn.utils.spectral_norm(conv(4, 1, 8, 1, 0))
    ),
    "prelu": lambda: flat(conv(), nn.PReLU(), conv(4, 1, 8, 1, 0)),
    "sigmoid at the end": lambda: flat(conv(), nn.ReLU(), conv(4, 1, 8, 1, 0), nn.Sigmoid()),
    "relu at the end": EndsInReLU,
    "projection": Projection,
    "attention": Attention,
    "shared weights": Shared,
    "mirrored border": lambda: flat(
        conv(), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), conv(4, 1, 8, 1, 0)
    ),
    "repeated border": lambda: flat(
        conv(), nn.Conv2d(4, 4, 3, padding="same", padding_mode="replicate"), conv(4, 1, 8, 1, 0)
    ),
    "border around": lambda: flat(
        conv(), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), conv(4, 1, 8, 1, 0)
    ),
    **{
        f"{name} {place}": lambda make=make, below=below, above=above: flat(
            conv(), *below(), make(), above(), conv(4, 4), nn.ReLU(), conv(4, 1, 8, 1, 0)
        )
        for name, make in {
            "hook of a batch norm": lambda: hooked(nn.BatchNorm2d(4)),
            "hook of a tanh": lambda: hooked(nn.Tanh()),
            "hook of a convolution": lambda: hooked(conv(4, 4)),
            "hook before a tanh": lambda: hooked(nn.Tanh(), nn.Module.register_full_backward_pre_hook),
            "hook of a tensor": lambda: with_hook(lambda g: 0.5 * g),
            "hook that adds": lambda: with_hook(lambda g: g + 0.25),
            "retain_grad": lambda: Applied(keeps_gradient),
            "a reversal": lambda: Applied(Turned.apply),
            "noise": lambda: Applied(Shifted.apply),
        }.items()
        for place, below, above in (
            ("below a LeakyReLU", lambda: [], lambda: nn.LeakyReLU(0.2)),
            ("below a pooling", lambda: [nn.Softplus()], lambda: nn.AvgPool2d(3, 1, 1)),
            ("below a convolution", lambda: [nn.Softplus()], lambda: conv(4, 4)),
            ("below two convolutions", lambda: [nn.BatchNorm2d(4)], lambda: nn.Sequential(conv(4, 4), conv(4, 4))),
            ("below a border", lambda: [], lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
            ("between upsampling and mean", lambda: [nn.Upsample(scale_factor=2)],
             lambda: nn.Sequential(conv(4, 4), nn.AvgPool2d(2))),
        )
    },
    "a spectrum": lambda: flat(conv(), Spectrum(torch.fft.rfft2), nn.Linear(160, 1)),
    "a spectrum and back": lambda: flat(conv(), Back(), nn.Linear(256, 1)),
    "a spectrum's size": lambda: flat(conv(), Spectrum(lambda x: torch.fft.rfft2(x).abs()), nn.Linear(160, 1)),
}  # fmt: skip
X = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def build(name):
    torch.manual_seed(0)
    return CRITICS[name]().double()


def by_hand(critic, norm=lambda g: g.square().flatten(1).sum(1).mean()):
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return norm(g)


def two_sided(g):
    return (g.flatten(1).norm(dim=1) - 1).square().mean()


def gradients(penalty, critic):
    parameters = [p for p in critic.parameters() if p.requires_grad]
    penalty.backward()
    return [p.grad for p in parameters]


def equal(ours, theirs):
    assert [g is None for g in ours] == [g is None for g in theirs]
    assert [g is not None and bool(g.any()) for g in ours] == [g is not None and bool(g.any()) for g in theirs]
    for a, b in zip(ours, theirs):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CRITICS)
def test_penalties(name):
    for method in ("auto", "double_backward"):
        critic, twin = build(name), build(name)
        ours = gradients(penalties.r1_penalty(critic, X, weight=2.0, method=method), critic)
        equal(ours, gradients(by_hand(twin), twin))


@pytest.mark.parametrize("norm", [None, two_sided])
@pytest.mark.parametrize("way", ["fast_double_backward", "accelerate"])
@pytest.mark.parametrize("name", CRITICS)
def test_handwritten(name, way, norm):
    arguments = () if norm is None else (norm,)

    def penalty(critic):
        if way == "accelerate":
            gankern.accelerate(critic)
        return by_hand(critic, *arguments)

    with gankern.fast_double_backward() if way == "fast_double_backward" else torch.enable_grad():
        critic, twin = build(name), build(name)
        ours = gradients(penalty(critic), critic)
        # autograd.grad raises where torch's does, and nowhere else.
        critic = build(name)
        used = [p for p, g in zip((p for p in critic.parameters() if p.requires_grad), ours) if g is not None]
        unused = [p for p, g in zip((p for p in critic.parameters() if p.requires_grad), ours) if g is None]
        value = penalty(critic)
        torch.autograd.grad(value, used, retain_graph=True)
        for p in unused:
            with pytest.raises(RuntimeError, match="not have been used|not been used"):
                torch.autograd.grad(value, p, retain_graph=True)
    equal(ours, gradients(by_hand(twin, *arguments), twin))


@pytest.mark.parametrize("name", CRITICS)
def test_without_the_library(name):
    """Python sees no hooks of tensors, and has torch's zeros go torch's way."""
    critic, accelerated, twin = build(name), build(name), build(name)
    with native.python_gradients(), gankern.fast_double_backward():
        ours = [gradients(by_hand(critic), critic)]
        gankern.accelerate(accelerated)
        ours.append(gradients(by_hand(accelerated), accelerated))
    theirs = gradients(by_hand(twin), twin)
    for found in ours:
        equal(found, theirs)


GNN = {
    "convolutions": lambda i: flat(
        *(m(3, 8, 3, padding=1) for m in [nn.Conv2d if i else gnn.Conv2d]), nn.LeakyReLU(0.2), conv(8, 1, 8, 1, 0)
    ),
    "batch norm, evaluation": lambda i: flat(
        conv(), gnn.BatchNormAct2d(4, negative_slope=0.2, implementation=i), conv(4, 4),
        gnn.BatchNormAct2d(4, activation=None, implementation=i), conv(4, 1, 8, 1, 0),
    ).eval(),
    "batch norm, training": lambda i: flat(
        conv(), gnn.BatchNormAct2d(4, negative_slope=0.2, implementation=i), conv(4, 1, 8, 1, 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GNN)
def test_layers(name, way):
    torch.manual_seed(0)
    critic = GNN[name](None).double()
    twin = GNN[name]("reference").double()
    twin.load_state_dict(critic.state_dict())
    equal(gradients(by_hand(critic), critic), gradients(by_hand(twin), twin))


WATCHED = {
    "bias_act": (lambda: Applied(lambda x: GF.bias_act(x, activation="leaky_relu")), lambda: nn.LeakyReLU(0.2)),
    "batch norm": (
        lambda: gnn.BatchNormAct2d(4, activation="relu").eval(),
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).eval(),
    ),
    "convolution and mean": (
        lambda: gnn.ConvDownsample2d(4, 4, 3), lambda: nn.Sequential(conv(4, 4), nn.AvgPool2d(2))
    ),
    "border": (
        lambda: gnn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    ),
}  # fmt: skip


def _watched_pair(name, watched):
    """A critic of this library's layers, and torch's."""
    critics = []
    for layer in WATCHED[name]:
        torch.manual_seed(0)
        critic = flat(conv(), watched(), layer(), nn.Tanh(), nn.LazyConv2d(1, 4), nn.AdaptiveAvgPool2d(1))
        critic.double()(X)
        critics.append(critic)
    ours, theirs = critics
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.data.copy_(q.data)
    return ours, theirs


@pytest.mark.parametrize("name", WATCHED)
def test_layers_above_what_is_watched(name, way):
    for watched in (
        lambda: hooked(nn.Softplus()), lambda: with_hook(lambda g: g + 0.25), lambda: Applied(Shifted.apply),
        lambda: Applied(Turned.apply),
    ):  # fmt: skip
        critic, twin = _watched_pair(name, watched)
        equal(gradients(by_hand(critic), critic), gradients(by_hand(twin), twin))


class _Operators(TorchDispatchMode):
    """As one that logs them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Operators, _Functions])
@pytest.mark.parametrize("name", ["torch", *WATCHED])
def test_hooks_under_a_mode_of_torch(name, mode, way):
    """They are called with what torch calls them with, zeros among it, and what they add counts."""
    seen = []

    def hook(grad):
        seen.append(grad.detach().clone())
        return grad + 0.25

    def run(critic, penalty):
        seen.clear()
        return [*gradients(penalty(critic), critic), *seen]

    def pair():
        if name != "torch":
            return _watched_pair(name, lambda: with_hook(hook))
        torch.manual_seed(0)
        layers = nn.LeakyReLU(0.2), nn.MaxPool2d(2), conv(4, 1, 4, 1, 0)
        critic = flat(conv(), with_hook(hook), *layers).double()
        return critic, copy.deepcopy(critic)

    theirs = run(pair()[1], by_hand)
    assert len(seen) == 2  # of the gradient, and of its derivative
    assert name != "torch" or not seen[1].any()
    with mode():
        for penalty in (
            by_hand,
            lambda critic: penalties.r1_penalty(critic, X, weight=2.0),
            lambda critic: penalties.r1_penalty(critic, X, weight=2.0, method="double_backward"),
        ):
            equal(run(pair()[0], penalty), theirs)
        with gankern.fast_double_backward():
            equal(run(pair()[0], by_hand), theirs)


@pytest.mark.parametrize("activation", ["linear", "relu", "leaky_relu", "tanh", "silu"])
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_bias_act(activation, clamp, way):
    def run(implementation):
        weight = X[0].mean((1, 2)).clone().requires_grad_()
        bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        x = X.clone().requires_grad_()
        y = GF.bias_act(
            x * weight.view(3, 1, 1), bias, activation=activation, clamp=clamp, implementation=implementation
        )
        (g,) = torch.autograd.grad((y * X).sum(), x, create_graph=True)
        g.square().sum().backward()
        return [weight.grad, bias.grad, x.grad]

    equal(run(None), run("reference"))


def test_zeros_of_one_of_two_gradients(way):
    """A penalty on one of two gradients: zeros go where its own graph goes."""

    def run(fast):
        torch.manual_seed(0)
        a, b, last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1)
        x, y = torch.randn(2, 5, 3, requires_grad=True).unbind(0)
        with gankern.fast_double_backward() if fast else torch.enable_grad():
            out = last(torch.relu(a(x)) + torch.relu(b(y)))
            g, h = torch.autograd.grad(out.sum(), [x, y], create_graph=True)
            found = []
            for one in (g, h):
                one.square().sum().backward(retain_graph=True)
                found += [None if p.grad is None else p.grad.clone() for m in (a, b, last) for p in m.parameters()]
                for m in (a, b, last):
                    m.zero_grad()
        return found

    equal(run(True), run(False))


DOWNSAMPLING = {
    "linear behind": lambda: flat(gnn.ConvDownsample2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 1)),
    "twice": lambda: flat(gnn.ConvDownsample2d(3, 8, 3), gnn.ConvDownsample2d(8, 8, 3), conv(8, 1, 2, 1, 0)),
    "convolutions around": lambda: flat(conv(3, 8), gnn.ConvDownsample2d(8, 8, 3), conv(8, 1, 4, 1, 0)),
    "activation behind": lambda: flat(gnn.ConvDownsample2d(3, 8, 3), gnn.LeakyReLU(), conv(8, 1, 4, 1, 0)),
    "equalized": lambda: flat(gnn.EqualizedConv2d(3, 8, 3, resample="downsample"), conv(8, 1, 4, 1, 0)),
    "upsampling": lambda: flat(gnn.UpsampleConv2d(3, 8, 3), conv(8, 1, 16, 1, 0)),  # none: torch's has no zeros either
}


@pytest.mark.parametrize("gradients_of", ["nodes", "python"])
@pytest.mark.parametrize("way", ["auto", "double_backward", "by hand"])
@pytest.mark.parametrize("name", DOWNSAMPLING)
def test_pooling_inside_of_a_convolution(name, way, gradients_of):
    torch.manual_seed(0)
    critic = DOWNSAMPLING[name]().double()
    twin = copy.deepcopy(critic)

    def penalty():
        return by_hand(critic) if way == "by hand" else penalties.r1_penalty(critic, X, weight=2.0, method=way)

    with native.python_gradients() if gradients_of == "python" else contextlib.nullcontext():
        ours = gradients(penalty(), critic)
    with gankern.use_implementation("reference"):
        equal(ours, gradients(by_hand(twin), twin))


@pytest.mark.parametrize("wanted", [["x"], ["weight"], ["bias"], ["x", "weight"]])
@pytest.mark.parametrize("gradients_of", ["nodes", "python"])
def test_each_gradient_of_a_convolution_with_a_pooling_has_zeros(wanted, gradients_of):
    """Whichever gradient it is that is differentiated again, of the convolution's input, weight or bias."""

    def run(implementation):
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 8, 3).double()
        x, scale = X.clone().requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True)
        tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
        y = GF.conv2d_downsample(x, layer.weight, layer.bias, implementation=implementation) * scale
        found = torch.autograd.grad(y.sum(), [tensors[name] for name in wanted], create_graph=True)
        sum(g.square().sum() for g in found).backward()
        return [x.grad, layer.weight.grad, layer.bias.grad, scale.grad]

    with native.python_gradients() if gradients_of == "python" else contextlib.nullcontext():
        ours = run(None)
    equal(ours, run("reference"))


@needs_nodes
def test_no_convolution_of_zeros():
    """What makes the zeros costs no pass: the second backward has as many convolutions as without them."""

    class Zeros(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "convolution" in func.name():
                Zeros.seen += any(isinstance(x, torch.Tensor) and x.numel() and not x.any() for x in args[:2])
            return func(*args, **(kwargs or {}))

    critic = build("convolutions")
    with gankern.fast_double_backward(), Zeros():
        by_hand(critic).backward()
    assert Zeros.seen == 0
    assert not critic[0].bias.grad.any()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_lazy_r1_trains_as_torch(optimizer):
    def train(penalty):
        critic = build("convolutions")
        made = {
            "adam": lambda: torch.optim.Adam(critic.parameters(), 1e-3, (0.5, 0.99)),
            "sgd": lambda: torch.optim.SGD(critic.parameters(), 1e-2, momentum=0.9, weight_decay=0.1),
        }[optimizer]()
        for step in range(6):
            made.zero_grad()
            (penalty(critic) if step % 2 else critic(X).square().mean()).backward()
            made.step()
        return torch.cat([p.detach().flatten() for p in critic.parameters()])

    expected = train(by_hand)
    for method in ("auto", "double_backward"):
        ours = train(lambda critic, m=method: penalties.r1_penalty(critic, X, weight=2.0, method=m))
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept(way, fails):
    """After a penalty neither the critic nor its graph is held by what made the zeros, nor after one that failed."""
    critic = build("convolutions")
    with gankern.fast_double_backward():
        by_hand(copy.deepcopy(critic)).backward()
        if fails:
            x = X.clone().requires_grad_()
            y = critic(x).sum()
            x.register_hook(lambda g: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                torch.autograd.grad(y, x, create_graph=True)
            del x, y
        else:
            by_hand(critic).backward()
    gone = weakref.ref(critic[0].bias)
    del critic
    gc.collect()
    assert gone() is None


# ---- kept back: of a penalty, zeros that would be added to something ---------------------------------------------


def test_a_penalty_makes_zeros_for_leaves_alone_that_have_nothing_else():
    if native.NODES_MISSING:
        pytest.skip(native.NODES_MISSING)
    critic = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 6, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 1)),
    ).double()
    real, fake = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    alpha = torch.rand(4, dtype=torch.float64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        penalty = penalties.gradient_penalty(critic, real, fake, alpha=alpha, method="double_backward")
    counts = Counter(event.name for event in profile.events())
    # The first layer's two are right below its LeakyReLU, and have theirs from there.
    assert counts["GankernZerosCollector"] and counts["aten::zeros_like"] == 2 and counts["aten::zeros"] == 1
    penalty.backward()
    between = torch.lerp(real, fake, alpha.view(-1, 1, 1, 1)).requires_grad_()
    (g,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    right = torch.autograd.grad(
        10 * (g.flatten(1).norm(dim=1) - 1).square().mean(), list(critic.parameters()), allow_unused=True
    )
    for parameter, theirs in zip(critic.parameters(), right):
        assert (parameter.grad is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(parameter.grad, theirs)
            assert parameter.grad._base is None and parameter.grad.stride() == parameter.stride()


def test_a_penalty_leaves_the_zeros_of_its_callers_graph():
    """Weights that a gradient of another network makes, whose second derivative somebody else runs."""
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(6, 4), nn.LeakyReLU(0.2), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    samples = torch.randn(2, 3, 6, dtype=torch.float64)
    with gankern.fast_double_backward():
        (weight,) = torch.autograd.grad(other(x).sum(), x, create_graph=True)
        penalty = penalties.gradient_penalty(lambda z: (z @ weight.T).tanh().sum(1), *samples, method="double_backward")
        (penalty + weight.square().sum()).backward()
    got = [parameter.grad for parameter in other.parameters()]
    assert [g is None for g in got] == [False] * 5 + [True]
    for bias in (got[1], got[3]):
        assert not bias.any()
