"""The tangent form of gradient penalties, against double backward by autograd in fp64."""

import copy
import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import Twice
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import gankern.functional as GF
import gankern.nn as gnn
from gankern.penalties import gradient_penalty, r1_penalty
from gankern.tangent import method as tangent
from gankern.tangent.method import NotCovered, penalty_gradients


class Net(nn.Module):
    """A critic from a function of its modules and inputs."""

    def __init__(self, function, *modules, **parameters):
        super().__init__()
        self.function = function
        self.m = nn.ModuleList(modules)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x, *args, **kwargs):
        return self.function(self, x, *args, **kwargs)


def two_sided(gradients):
    """The WGAN-GP penalty and its derivative."""
    norms = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()
    scale = torch.where(norms > 0, 20 * (norms - 1) / norms / len(norms), 0)
    return 10 * (norms - 1).square().mean(), [scale.view(-1, *[1] * (g.dim() - 1)) * g for g in gradients]


tangent.MAKERS["two_sided"] = lambda: two_sided


def by_double_backward(critic, inputs, args=(), kwargs=None, dtype=torch.float64):
    xs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = critic(*xs, *args, **(kwargs or {}))
    gradients = torch.autograd.grad(out.sum(), xs, create_graph=True)
    norms = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()
    penalty = 10 * (norms - 1).square().mean()
    parameters = [p for p in critic.parameters() if p.requires_grad]
    return penalty.detach(), torch.autograd.grad(penalty, parameters, allow_unused=True)


def agree(critic, inputs, args=(), kwargs=None, penalty=("two_sided",), double_dtype=torch.float64, rtol=1e-10):
    """The tangent form in fp64 against autograd, from one state of the buffers and of the random numbers."""
    if isinstance(inputs, torch.Tensor):
        inputs = [inputs]
    critic = critic.double()
    inputs = [x.double() for x in inputs]
    twin = copy.deepcopy(critic)
    torch.manual_seed(3)
    value, parameters, gradients = penalty_gradients(critic, inputs, penalty, None, args, kwargs)
    torch.manual_seed(3)
    expected_value, expected = by_double_backward(twin, inputs, args, kwargs)
    torch.testing.assert_close(value, expected_value, rtol=rtol, atol=0)
    found = dict(zip(parameters, gradients))
    scale = max(g.abs().max() for g in expected if g is not None)
    assert scale > 0
    trained = [(name, p) for name, p in critic.named_parameters() if p.requires_grad]
    assert len(trained) == len(expected)
    for (name, p), e in zip(trained, expected):
        g = found.pop(p, None)
        if e is None:
            e = torch.zeros_like(p)
        if g is None:  # no gradient, or one of zeros
            assert e.abs().max() <= rtol * scale, name
        else:
            assert g.stride() == p.stride(), name
            torch.testing.assert_close(
                g, e, rtol=rtol, atol=rtol * scale.item(), msg=lambda m, name=name: f"{name}: {m}"
            )
    assert not found
    for (name, b), c in zip(critic.named_buffers(), twin.buffers()):
        torch.testing.assert_close(b, c, msg=lambda m, name=name: f"{name}: {m}")


IMAGE = (4, 3, 8, 8)


def head(channels, size):
    return [nn.Flatten(), nn.Linear(channels * size * size, 1)]


def on_images(*modules, channels, size):
    return nn.Sequential(*modules, *head(channels, size)), IMAGE


def function(f, *modules, shape=IMAGE, **parameters):
    return Net(f, *modules, **parameters), shape


def conv(i=3, o=6, k=3, s=1, p=1, **options):
    return nn.Conv2d(i, o, k, s, p, **options)


def stddev(x, group=2):
    y = x.view(group, -1, *x.shape[1:])
    y = (y - y.mean(0, keepdim=True)).square().mean(0).add(1e-8).sqrt().mean([1, 2, 3], keepdim=True)
    return torch.cat([x, y.repeat(group, 1, *x.shape[2:])], 1)


def stddev_by_var(x):
    y = torch.var(x, 0, unbiased=False).add(1e-8).sqrt().mean()
    return torch.cat([x, y.expand(x.shape[0], 1, *x.shape[2:])], 1)


class Equalized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 0.3, self.bias, self.stride, self.padding)


class Block(nn.Module):
    """A residual block with everything in place that can be."""

    def __init__(self, down=False):
        super().__init__()
        self.first, self.second, self.down = conv(6, 6), conv(6, 6), down

    def forward(self, x):
        h = self.second(F.relu(self.first(F.relu(x)), inplace=True))
        h += x
        return F.avg_pool2d(h, 2) if self.down else h


def attention(net, x):
    h = net.m[0](x).flatten(2)
    query, key, value = net.m[1](h), net.m[2](h), net.m[3](h)
    weights = torch.softmax(query.transpose(1, 2) @ key / 2, -1)
    return (net.gamma * (value @ weights.transpose(1, 2)) + h).flatten(1).tanh().sum(1)


def tied(net, x):
    h = F.leaky_relu(F.linear(x, net.w))
    return F.linear(F.leaky_relu(F.linear(h, net.w.t())), net.w).sum(1)


def minibatch_standard_deviation(net, x):
    return net.m[1](F.leaky_relu(stddev(F.leaky_relu(net.m[0](x), 0.2)), 0.2)).flatten(1).sum(1)


torch.manual_seed(0)  # the same critics whatever was imported before
CASES = {
    # convolutions
    "conv1d": (nn.Sequential(nn.Conv1d(3, 4, 5, 2, 2), nn.ReLU(), nn.Conv1d(4, 1, 4)), (5, 3, 8)),
    "conv2d": on_images(conv(s=2), nn.LeakyReLU(0.2, True), channels=6, size=4),
    "conv2d unpadded, dilated": on_images(conv(3, 4, 3, 1, 0, dilation=2), nn.ReLU(True), channels=4, size=4),
    "conv2d in groups": on_images(conv(), nn.ReLU(True), conv(6, 4, groups=2), nn.ReLU(), channels=4, size=8),
    "conv2d reflected": on_images(conv(padding_mode="reflect"), nn.ReLU(), channels=6, size=8),
    "conv3d": (nn.Sequential(nn.Conv3d(2, 3, 3, 2, 1), nn.LeakyReLU(), nn.Conv3d(3, 1, 2)), (3, 2, 4, 4, 4)),
    "transposed 1d": (nn.Sequential(nn.ConvTranspose1d(3, 4, 4, 2, 1), nn.ReLU(), nn.Conv1d(4, 1, 16)), (4, 3, 8)),
    "transposed 2d": on_images(nn.ConvTranspose2d(3, 6, 3, 2, 1, 1, groups=3), nn.ReLU(), channels=6, size=16),
    "transposed 3d": (nn.Sequential(nn.ConvTranspose3d(2, 3, 2, 2), nn.ReLU(), nn.Conv3d(3, 1, 4)), (3, 2, 2, 2, 2)),
    # matrix products
    "linear": (nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 7, False), nn.ReLU(), nn.Linear(7, 1)), (6, 5)),
    "linear on 3-D": (Net(lambda n, x: n.m[1](F.relu(n.m[0](x))).sum(1), nn.Linear(5, 6), nn.Linear(6, 1)), (4, 3, 5)),
    "matmul from the left": function(
        lambda n, x: (n.a @ torch.relu(n.a @ x)).sum([1, 2]), a=torch.randn(4, 4), shape=(3, 4, 5)
    ),
    "bmm": function(lambda n, x: torch.bmm(x, torch.relu(n.a * x)).sum([1, 2]), a=torch.randn(4), shape=(3, 4, 4)),
    "einsum": function(lambda n, x: torch.einsum("nij,jk->nik", x, n.a).relu().sum([1, 2]), a=torch.randn(4, 5), shape=(3, 2, 4)),
    "bilinear form": function(lambda n, x: ((x @ n.a) * x).sum(1), a=torch.randn(5, 5), shape=(4, 5)),
    # pooling and resampling
    "average pooling": on_images(conv(), nn.ReLU(), nn.AvgPool2d(2), channels=6, size=4),
    "average pooling, odd": on_images(conv(), nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False), channels=6, size=4),
    "global pooling": on_images(conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), channels=6, size=1),
    "adaptive pooling": on_images(conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(2), channels=6, size=2),
    "max pooling": on_images(conv(), nn.MaxPool2d(3, 2, 1), channels=6, size=4),
    "max pooling 1d": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.MaxPool1d(2), nn.Conv1d(4, 1, 3)), (4, 3, 8)),
    "max pooling 3d": (nn.Sequential(nn.Conv3d(2, 3, 1), nn.MaxPool3d(2), nn.Conv3d(3, 1, 2)), (3, 2, 4, 4, 4)),
    "pooling 1d": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(4, 1, 3)), (4, 3, 8)),
    "nearest upsampling": on_images(conv(), nn.ReLU(), nn.Upsample(scale_factor=2), conv(6, 2), nn.ReLU(), channels=2, size=16),
    "nearest downsampling": function(
        lambda n, x: n.m[1](F.interpolate(F.relu(n.m[0](x)), scale_factor=0.5)).sum([1, 2, 3]), conv(), conv(6, 1)
    ),
    "bilinear": on_images(conv(), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"), channels=6, size=16),
    "pixel shuffle": on_images(conv(3, 8), nn.ReLU(), nn.PixelShuffle(2), nn.PixelUnshuffle(4), nn.ReLU(), channels=32, size=4),
    "unfold": function(lambda n, x: n.m[0](F.unfold(x, 3)).relu().sum([1, 2]), nn.Conv1d(27, 4, 1)),
    # shapes
    "shapes": function(
        lambda n, x: n.m[0](
            torch.cat([x[:, :2].flip(3), F.pad(x[..., ::2], (1, 3, 0, 0)), x.transpose(2, 3)[:, 1:2]], 1)
        ).relu().permute(0, 2, 3, 1).reshape(len(x), -1).unsqueeze(1).squeeze().mean(1),
        conv(6, 4),
    ),
    "split, stack, unbind": function(
        lambda n, x: torch.stack([a * c for a, c in zip(n.m[0](x).relu().chunk(3, 1), (1.0, 2.0, -3.0))], 1).unbind(1)[2].sum([1, 2, 3]),
        conv(),
    ),
    "index and select": function(lambda n, x: n.m[0](x).relu()[:, 1].mean(2)[:, [0, 2, 2]].sum(1), conv()),
    "repeat, expand, roll": function(lambda n, x: n.m[0](x.repeat(1, 2, 1, 1).roll(1, 2)).relu().mean([2, 3]).sum(1), conv(6)),
    "view of a view": function(lambda n, x: n.m[0](x).relu().view(4, -1).view(4, 2, -1).sum([1, 2]), conv()),
    # sums and products
    "residual": (nn.Sequential(conv(), Block(True), Block(), nn.ReLU(), *head(6, 4)), IMAGE),
    "fade-in": function(
        lambda n, x: n.m[2](torch.lerp(n.m[0](F.avg_pool2d(x, 2)), F.avg_pool2d(F.relu(n.m[1](x)), 2), 0.3)).sum([1, 2, 3]),
        conv(), conv(), conv(6, 1),
    ),
    "scaled by constants": function(lambda n, x: (3 - F.relu(n.m[0](x) * 2 / 5 + 1) * torch.linspace(0, 1, 8, dtype=x.dtype)).sum([1, 2, 3]), conv()),
    "scaled by a parameter": function(lambda n, x: (F.relu(x * n.a + n.b) * n.a).sum([1, 2, 3]), a=torch.randn(3, 1, 1), b=torch.randn(8)),
    "divided by a parameter": function(lambda n, x: F.relu(n.m[0](x) / n.a).sum([1, 2, 3]), conv(), a=torch.rand(6, 1, 1) + 1),
    "squares": function(lambda n, x: n.m[0](x).square().sum([1, 2, 3]) + (n.m[0](x) ** 3).mean([1, 2, 3]), conv()),
    "quotient": function(lambda n, x: (n.m[0](x) / (1 + n.m[1](x).exp())).sum([1, 2, 3]), conv(), conv()),
    "in place by view": function(lambda n, x: F.relu_(n.m[0](x).view(4, -1)).sum(1), conv()),
    # weights
    "equalised learning rate": (nn.Sequential(Equalized(3, 4, 3, 2, 1), nn.ReLU(), Equalized(4, 1, 4)), IMAGE),
    "spectral norm, hook": on_images(nn.utils.spectral_norm(conv()), nn.ReLU(), nn.utils.spectral_norm(conv(6, 4)), nn.ReLU(), channels=4, size=8),
    "spectral norm, parametrization": on_images(parametrizations.spectral_norm(conv()), nn.ReLU(), channels=6, size=8),
    "spectral norm, evaluation": (on_images(nn.utils.spectral_norm(conv()), nn.ReLU(), channels=6, size=8)[0].eval(), IMAGE),
    "spectral norm, gankern": on_images(gnn.utils.parametrizations.spectral_norm(conv()), nn.ReLU(), channels=6, size=8),
    "spectral norm, gankern's group": (
        gnn.utils.group_spectral_norm(
            on_images(
                gnn.utils.parametrizations.spectral_norm(conv()), nn.ReLU(),
                gnn.utils.parametrizations.spectral_norm(conv(6, 4)), nn.ReLU(), channels=4, size=8,
            )[0]
        ),
        IMAGE,
    ),
    "weight norm": on_images(parametrizations.weight_norm(conv()), nn.ReLU(), channels=6, size=8),
    "orthogonal": (nn.Sequential(nn.Linear(5, 5), nn.ReLU(), parametrizations.weight_norm(nn.Linear(5, 1))), (4, 5)),
    "standardised weight": function(
        lambda n, x: F.conv2d(x, (n.w - n.w.mean([1, 2, 3], True)) / n.w.std([1, 2, 3], keepdim=True)).relu().sum([1, 2, 3]),
        w=torch.randn(4, 3, 3, 3),
    ),
    "a module used twice": (lambda m: (nn.Sequential(conv(3, 6), m, nn.ReLU(), m, nn.ReLU(), *head(6, 8)), IMAGE))(conv(6, 6)),
    "tied weights": function(tied, w=torch.randn(4, 5), shape=(6, 5)),
    # curvature
    "minibatch stddev": function(minibatch_standard_deviation, conv(), conv(7, 1)),
    "minibatch stddev by var": function(lambda n, x: n.m[1](stddev_by_var(n.m[0](x).relu())).sum([1, 2, 3]), conv(), conv(7, 1)),
    "minibatch discrimination": (nn.Sequential(conv(3, 2, 3, 2), nn.Flatten(), gnn.MinibatchDiscrimination(32, 4, 3), nn.Linear(36, 1)), IMAGE),
    "pixel norm": function(
        lambda n, x: (lambda h: n.m[1](h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-8)).sum([1, 2, 3]))(F.relu(n.m[0](x))),
        conv(), conv(6, 1),
    ),
    "instance norm": on_images(conv(), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), channels=6, size=8),
    "layer norm": (nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 1)), (4, 5)),
    "group norm": on_images(conv(), nn.GroupNorm(2, 6), nn.ReLU(), channels=6, size=8),
    "batch norm in evaluation": (on_images(conv(), nn.BatchNorm2d(6), nn.ReLU(), channels=6, size=8)[0].eval(), IMAGE),
    "attention": function(
        attention, conv(3, 6, 3, 2), nn.Conv1d(6, 2, 1), nn.Conv1d(6, 2, 1), nn.Conv1d(6, 6, 1), gamma=torch.tensor(0.7)
    ),
    # this library's layers
    "gankern's convolutions": (
        nn.Sequential(gnn.Conv2d(3, 4, 3, 1, 1), gnn.LeakyReLU(0.2, True), gnn.Conv2d(4, 4, 4, 2, 1), gnn.ReLU(), *head(4, 4)), IMAGE,
    ),
    "gankern's bias and activation": function(lambda n, x: n.m[1](GF.bias_act(n.m[0](x), n.b, activation="leaky_relu")).sum([1, 2, 3]), conv(bias=False), conv(6, 1), b=torch.randn(6)),
    "gankern's curved activation": function(lambda n, x: n.m[1](GF.bias_act(n.m[0](x), n.b, activation="silu")).sum([1, 2, 3]), conv(bias=False), conv(6, 1), b=torch.randn(6)),
    "gankern's minibatch stddev": (nn.Sequential(conv(), nn.LeakyReLU(0.2), gnn.MinibatchStdDev(2), conv(7, 4), nn.ReLU(), *head(4, 8)), IMAGE),
    "gankern's pixel norm": (nn.Sequential(conv(), nn.LeakyReLU(0.2), gnn.PixelNorm(), conv(6, 4), nn.ReLU(), *head(4, 8)), IMAGE),
    "gankern's filtered downsampling": function(lambda n, x: n.m[0](GF.downsample2d(F.relu(n.m[1](x)), torch.tensor([1.0, 3, 3, 1], dtype=x.dtype))).relu().sum([1, 2, 3]), conv(6, 4), conv()),
    "dropout": on_images(conv(), nn.Dropout2d(0.5), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Unflatten(1, (6, 8, 8)), channels=6, size=8),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_double_backward(name):
    torch.manual_seed(0)
    critic, shape = CASES[name]
    agree(copy.deepcopy(critic), torch.randn(shape))


ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU(True), nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, True), nn.LeakyReLU(-0.5), nn.PReLU(5)),
    *(nn.PReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.5), nn.Threshold(0.1, 2.0), nn.Hardshrink(), nn.Softshrink()),
    *(
        nn.Tanh(),
        nn.Sigmoid(),
        nn.SiLU(),
        nn.SiLU(True),
        nn.GELU(),
        nn.ELU(),
        nn.ELU(inplace=True),
        nn.SELU(),
        nn.CELU(),
    ),
    *(
        nn.Softplus(),
        nn.Softsign(),
        nn.Mish(),
        nn.LogSigmoid(),
        nn.Softmax(1),
        nn.LogSoftmax(1),
        nn.GLU(),
        nn.Hardswish(),
    ),
    *(nn.RReLU().eval(), nn.Identity()),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activation(activation):
    torch.manual_seed(0)
    first = nn.Linear(5, 6 if isinstance(activation, nn.GLU) else 5)
    critic = nn.Sequential(
        first,
        copy.deepcopy(activation),
        nn.Linear(3 if isinstance(activation, nn.GLU) else 5, 4),
        nn.ReLU(),
        nn.Linear(4, 1),
    )
    if isinstance(activation, nn.Identity):  # no curvature, but at the norm
        critic = nn.Sequential(*[m for m in critic if not isinstance(m, nn.ReLU)])
    agree(critic, torch.randn(6, 5))


@pytest.mark.parametrize(
    "function",
    [
        torch.abs,
        torch.amax,
        torch.maximum,
        torch.clamp,
        torch.where,
        torch.max,
        torch.norm,
        torch.logsumexp,
        torch.topk,
    ],
)
def test_function(function):
    def forward(net, x):
        h = net.m[0](x)
        if function in (torch.amax, torch.norm, torch.logsumexp):
            return function(h, dim=1)
        if function is torch.max:
            return h.max(1).values * 2 + h.max(1).indices * 0.5
        if function is torch.topk:
            return h.topk(2, 1).values.sum(1)
        if function is torch.maximum:
            h = function(h, -2 * h)
        elif function is torch.clamp:
            h = function(h, -1.0, 0.9)
        elif function is torch.where:
            h = function(h > 0.1, h * 3, h)
        else:
            h = function(h)
        return net.m[1](h).sum(1)

    torch.manual_seed(0)
    agree(Net(forward, nn.Linear(5, 6), nn.Linear(6, 2)), torch.randn(7, 5))


def test_conditions_are_constants():
    def forward(net, x, label, *, scale, nothing=None):
        assert nothing is None
        h = F.relu(net.m[0](x)).sum([2, 3])
        return net.m[1](h).squeeze(1) * scale + (net.m[2](label) * h).sum(1)

    critic = Net(forward, conv(), nn.Linear(6, 1), parametrizations.spectral_norm(nn.Embedding(5, 6)))
    scale = torch.rand(4, dtype=torch.float64)
    agree(critic, torch.randn(IMAGE), (torch.tensor([0, 3, 1, 3]),), {"scale": scale, "nothing": None})


def test_several_inputs():
    critic = Net(lambda n, x, y: torch.tanh(n.m[0](x) * n.m[1](y)).sum(1), nn.Linear(5, 4), nn.Linear(3, 4))
    agree(critic, [torch.randn(6, 5), torch.randn(6, 3)])


def test_an_input_that_the_critic_ignores():
    critic = Net(lambda n, x, y: F.relu(n.m[0](x)).sum(1), nn.Linear(5, 4)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    value, _, gradients = penalty_gradients(critic, [x, y], ("two_sided",))
    expected, expected_gradients = by_double_backward(Net(lambda n, x: F.relu(n.m[0](x)).sum(1), critic.m[0]), [x])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients[0], expected_gradients[0])


def test_frozen_parameters_get_nothing():
    critic = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    critic[2].weight.requires_grad_(False)
    _, parameters, gradients = penalty_gradients(critic, [torch.randn(6, 5).double()], ("two_sided",))
    assert all(p is not critic[2].weight for p in parameters) and not critic[2].weight.requires_grad
    agree(critic, torch.randn(6, 5))


def test_a_function_instead_of_a_module():
    w = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 5, dtype=torch.float64)
    value, (parameter,), (gradient,) = penalty_gradients(lambda x: F.leaky_relu(x @ w).sum(1), [x], ("two_sided",))
    assert parameter is w
    net = Net(lambda n, x: F.leaky_relu(x @ n.w).sum(1), w=w.detach())
    expected, (expected_gradient,) = by_double_backward(net, [x])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_what_the_critic_did_not_make():
    """Such as weights of torch.nn.utils.parametrize.cached(): they would be constants, and lose their gradients."""
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    factor = scale * 3
    critic = Net(lambda n, x: n.m[0](x) * factor, nn.Linear(5, 1)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(NotCovered, match=r"a tensor of shape \(\) that the critic did not make requires a gradient"):
        penalty_gradients(critic, [x], ("two_sided",))
    gradient_penalty(critic, x, x).backward()
    norm = 6 * critic.m[0].weight.detach().norm()
    torch.testing.assert_close(scale.grad, 20 * (norm - 1) * norm / 2)


def test_select():
    critic = Net(lambda n, x: {"features": x, "logit": [x, F.relu(n.m[0](x)).sum(1)]}, nn.Linear(5, 4)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    value, _, _ = penalty_gradients(critic, [x], ("two_sided",), lambda out: out["logit"][1])
    plain = Net(lambda n, x: F.relu(n.m[0](x)).sum(1), critic.m[0])
    torch.testing.assert_close(value, by_double_backward(plain, [x])[0])


# ---- random compositions -------------------------------------------------------------------------------------

PIECES = {
    "conv": lambda: conv(4, 4),
    "grouped": lambda: conv(4, 4, groups=2, bias=False),
    "spectral": lambda: nn.utils.spectral_norm(conv(4, 4)),
    "equalized": lambda: Equalized(4, 4, 3, 1, 1),
    "leaky": lambda: nn.Sequential(conv(4, 4), nn.LeakyReLU(0.2, True)),
    "relu": lambda: nn.ReLU(),
    "tanh": lambda: nn.Tanh(),
    "silu": lambda: nn.SiLU(),
    "instance": lambda: nn.InstanceNorm2d(4),
    "group": lambda: nn.GroupNorm(2, 4),
    "up down": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(4, 4), nn.AvgPool2d(2)),
    "max": lambda: nn.MaxPool2d(3, 1, 1),
    "stddev": lambda: Net(lambda n, x: n.m[0](stddev(x)), conv(5, 4)),
    "residual": lambda: Net(lambda n, x: x + n.m[1](F.relu(n.m[0](x))), conv(4, 4), conv(4, 4)),
    "product": lambda: Net(lambda n, x: n.m[0](x) * torch.sigmoid(n.m[1](x)), conv(4, 4), conv(4, 4)),
    "shuffle": lambda: Net(lambda n, x: torch.cat(x.chunk(2, 1)[::-1], 1).transpose(2, 3)),
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=7), st.integers(0, 2**31))
def test_random_critics(names, seed):
    torch.manual_seed(seed)
    critic = nn.Sequential(conv(3, 4), *(PIECES[name]() for name in names), *head(4, 6))
    x = torch.randn(4, 3, 6, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(copy.deepcopy(critic)(x).sum(), x)
    assume(gradient.flatten(1).any(1).all())  # double backward by hand gives NaN at zero: a critic of dead units
    agree(critic, x.detach(), rtol=1e-7)


# ---- refusals --------------------------------------------------------------------------------------------------


def overwrite_through_a_view(net, x):
    h = net.m[0](x)
    h.view(-1).relu_()
    return h.sum([1, 2, 3])


def overwrite_a_saved_tensor(net, x):
    h = F.relu(net.m[0](x))
    y = h * 2
    h.mul_(3)
    return y.sum([1, 2, 3])


def write_into_a_constant(net, x):
    out = torch.zeros(4, 6, 8, 8, dtype=x.dtype)
    out[:, :] = net.m[0](x)
    return out.sum([1, 2, 3])


def detached(net, x):
    with torch.no_grad():
        return net.m[0](x).sum([1, 2, 3])


REFUSED = {
    "circular padding": (
        on_images(conv(padding_mode="circular"), channels=6, size=8)[0],
        "into a constant.*Conv2d '0'",
    ),
    "batch norm": (nn.Sequential(conv(), nn.BatchNorm2d(6), *head(6, 8)), "training mode.*BatchNorm2d '1'"),
    "a custom Function": (Net(lambda n, x: Twice.apply(n.m[0](x)).sum([1, 2, 3]), conv()), "Function Twice.*in Net"),
    "a custom Function of a weight": (
        Net(lambda n, x: F.linear(x.flatten(1), Twice.apply(n.w)), w=torch.randn(1, 192)),
        "Function Twice",
    ),
    "overwriting through a view": (Net(overwrite_through_a_view, conv()), "in place through a view"),
    "overwriting a saved tensor": (Net(overwrite_a_saved_tensor, conv()), "written in place after its use"),
    "writing into a constant": (Net(write_into_a_constant, conv()), "into a constant"),
    "no dependence": (Net(lambda n, x: n.w.sum() + 0 * x.detach().sum([1, 2, 3]), w=torch.randn(3)), "does not depend"),
    "no grad": (Net(detached, conv()), "does not depend"),
    "random numbers": (Net(lambda n, x: torch.bernoulli(n.m[0](x).sigmoid()).sum([1, 2, 3]), conv()), "random"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    critic, reason = REFUSED[name]
    critic = copy.deepcopy(critic).double()
    with pytest.raises(NotCovered, match=reason):
        penalty_gradients(critic, [torch.randn(IMAGE, dtype=torch.float64)], ("two_sided",))
    assert all(p.requires_grad for p in critic.parameters())
    assert tangent.refusal(critic) is not None


def test_a_scripted_critic_is_refused():
    critic = torch.jit.trace(nn.Linear(3, 1), torch.randn(2, 3))
    with pytest.raises(NotCovered, match="ScriptModule"):
        penalty_gradients(critic, [torch.randn(2, 3)], ("two_sided",))


def test_the_first_refusal_leaves_no_trace():
    critic = nn.Sequential(nn.utils.spectral_norm(conv()), nn.Dropout(), nn.BatchNorm2d(6), *head(6, 8))
    before = [b.clone() for b in critic.buffers()]
    torch.manual_seed(5)
    with pytest.raises(NotCovered):
        penalty_gradients(critic, [torch.randn(IMAGE)], ("two_sided",))
    torch.manual_seed(5)
    torch.randn(IMAGE)
    expected = torch.rand(3)
    torch.manual_seed(5)
    x = torch.randn(IMAGE)
    fresh = copy.deepcopy(critic)
    with pytest.raises(NotCovered):
        penalty_gradients(fresh, [x], ("two_sided",))
    torch.testing.assert_close(torch.rand(3), expected)
    for b, old in zip(critic.buffers(), before):
        torch.testing.assert_close(b, old)


def test_auto_falls_back():
    critic = Net(lambda n, x: Twice.apply(F.relu(n.m[0](x))).sum([1, 2, 3]), conv())
    real, fake = torch.randn(2, *IMAGE)
    gradient_penalty(critic, real, fake).backward()
    assert critic.m[0].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="Function Twice"):
        gradient_penalty(critic, real, fake, method="tangent")


def test_what_the_critic_keeps_is_what_it_would_be_without_a_tape():
    kept = []
    critic = Net(lambda n, x: (kept.append(n.m[0](x)), F.relu(kept[-1]).sum([1, 2, 3]))[1], conv())
    for _ in range(2):
        penalty_gradients(critic, [torch.randn(IMAGE)], ("two_sided",))
    kept[0].sum().backward()
    torch.testing.assert_close(critic.m[0].bias.grad, torch.full((6,), 256.0))


def test_the_passes_run_without_autograd_s_graph():
    """Nodes of this library's Functions are Python objects, which can be counted."""

    def nodes():
        gc.collect()
        return sum(type(x).__name__ == "_ForwardBackward" for x in gc.get_objects())

    critic = nn.Sequential(conv(), nn.LeakyReLU(0.2), nn.Tanh(), gnn.PixelNorm(), gnn.Conv2d(6, 6, 3), *head(6, 6))
    before, during, within = nodes(), [], []
    critic[-1].register_forward_pre_hook(lambda *_: during.append(nodes()))

    def penalty(gradients):
        within.append(nodes())
        return two_sided(gradients)

    penalty_gradients(critic, [torch.randn(IMAGE)], penalty)
    assert during == [before + 1] and within == [before]


# ---- what runs -------------------------------------------------------------------------------------------------


def test_four_passes_and_no_more(count_convolutions):
    critic = nn.Sequential(
        conv(3, 4), nn.LeakyReLU(0.2, True), conv(4, 5), nn.LeakyReLU(0.2, True), conv(5, 1, 8, 1, 0)
    )
    with count_convolutions as count:
        penalty_gradients(critic, [torch.randn(IMAGE)], ("two_sided",))
    # Forward, data gradient and tangent of three layers; their weight gradients.
    assert (count.maps, count.weights) == (3 * 3, 3)


def test_curvature_costs_the_layers_below_it(count_convolutions):
    critic = Net(
        lambda n, x: n.m[3](stddev(n.m[2](n.m[1](n.m[0](x))))).sum([1, 2, 3]),
        conv(3, 4),
        nn.ReLU(),
        conv(4, 4),
        conv(5, 1),
    )
    with count_convolutions as count:
        penalty_gradients(critic, [torch.randn(IMAGE)], ("two_sided",))
    # two layers below the stddev: one more data gradient (none of the input) and two more weight gradients
    assert (count.maps, count.weights) == (3 * 3 + 1, 3 + 2)


def test_equalised_learning_rates_by_the_engine():
    """Which scales the weight as it reads it; a weight with two uses has both its gradients."""
    torch.manual_seed(0)

    def forward(n, x):
        h = F.leaky_relu(F.conv2d(x, n.w * 0.3, padding=1), 0.2)
        h = F.leaky_relu(F.conv2d(h, (n.w * 0.3) * 2, padding=1), 0.2) + F.conv2d(h, n.w, padding=1)
        return n.m[0](stddev(h)).sum([1, 2, 3])

    critic = Net(forward, conv(33, 1), w=torch.randn(32, 32, 3, 3) / 10)
    agree(critic, torch.randn(4, 32, 16, 16), rtol=1e-9)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(memory_format):
    seen = []

    def penalty(gradients):
        seen.extend(gradients)
        return two_sided(gradients)

    critic = nn.Sequential(
        conv(3, 4), nn.ReLU(), Net(lambda n, x: x.view(4, -1) if x.is_contiguous() else x.flatten(1)), nn.Linear(256, 1)
    )
    critic = critic.to(memory_format=memory_format)
    x = torch.randn(IMAGE).contiguous(memory_format=memory_format)
    _, parameters, gradients = penalty_gradients(critic, [x], penalty)
    assert seen[0].shape == x.shape
    assert all(p.stride() == g.stride() for p, g in zip(parameters, gradients))


def test_a_view_that_channels_last_does_not_have():
    agree(Net(lambda n, x: n.m[1](F.relu(n.m[0](x)).view(4, -1)), conv(), nn.Linear(384, 1)), torch.randn(IMAGE))


def test_batches_of_one_and_none():
    critic = nn.Sequential(conv(), nn.ReLU(), *head(6, 8))
    agree(critic, torch.randn(1, 3, 8, 8))
    gradient_penalty(critic.float(), torch.randn(0, 3, 8, 8), torch.randn(0, 3, 8, 8)).backward()


def test_a_gradient_of_zero():
    critic = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
    nn.init.zeros_(critic[0].weight)
    _, _, gradients = penalty_gradients(critic, [torch.randn(6, 5)], ("two_sided",))
    assert all(torch.isfinite(g).all() for g in gradients)


def error(gradients, expected):
    return max(
        (g.double() - e).abs().max() / e.abs().max()
        for g, e in zip(gradients, expected)
        if e is not None and e.abs().max() > 0
    )


@pytest.mark.parametrize("trained", [False, True])
def test_accuracy_in_fp32(trained):
    """At most twice the error of eager double backward in fp32."""
    torch.manual_seed(0)
    critic = nn.Sequential(
        conv(3, 16, 4, 2), nn.LeakyReLU(0.2, True), conv(16, 32, 4, 2), nn.LeakyReLU(0.2, True),
        Net(lambda n, x: stddev(x)), conv(33, 32), nn.LeakyReLU(0.2, True), nn.Flatten(), nn.Linear(512, 1),
    )  # fmt: skip
    x = torch.randn(8, 3, 16, 16)
    if trained:
        optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
        for _ in range(30):
            optimizer.zero_grad()
            real, fake = torch.randn(8, 3, 16, 16).tanh(), 0.3 * torch.randn(8, 3, 16, 16)
            (critic(fake).mean() - critic(real).mean() + gradient_penalty(critic, real, fake)).backward()
            optimizer.step()
    _, expected = by_double_backward(copy.deepcopy(critic).double(), [x])
    _, eager = by_double_backward(critic, [x], dtype=torch.float32)
    _, parameters, gradients = penalty_gradients(critic, [x], ("two_sided",))
    found = dict(zip(parameters, gradients))
    pairs = [(found[p], e, g) for p, e, g in zip(critic.parameters(), expected, eager) if p in found and e is not None]
    ours = error([p[0] for p in pairs], [p[1] for p in pairs])
    theirs = error([p[2] for p in pairs], [p[1] for p in pairs])
    assert ours <= 2 * theirs + 1e-6


# ---- autocast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch.manual_seed(0)
    critic = nn.Sequential(
        conv(3, 8), nn.LeakyReLU(0.2, True), nn.utils.spectral_norm(conv(8, 8)), nn.Tanh(), *head(8, 8)
    )
    x = torch.randn(4, 3, 8, 8)
    exact = copy.deepcopy(critic)
    with torch.autocast("cpu", dtype):
        critic(x)  # fills autocast's cache of weights
        for p, q in zip(critic.buffers(), exact.buffers()):
            p.copy_(q)
        value, parameters, gradients = penalty_gradients(critic, [x], ("two_sided",))
    expected_value, expected_parameters, expected = penalty_gradients(exact, [x], ("two_sided",))
    assert value.dtype == torch.float32 and len(parameters) == len(expected_parameters)
    torch.testing.assert_close(value, expected_value, rtol=0.1, atol=0.1)
    for p, g, e in zip(parameters, gradients, expected):
        assert g.dtype == p.dtype == torch.float32
        assert (g - e).norm() <= 0.1 * e.norm()


def test_small_directions_survive_fp16():
    """A tangent below fp16's range is scaled into it."""
    critic = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(6, 5)

    def tiny(gradients):
        value, directions = two_sided(gradients)
        return value * 1e-7, [1e-7 * d for d in directions]

    with torch.autocast("cpu", torch.float16):
        _, _, gradients = penalty_gradients(critic, [x], tiny)
    _, _, expected = penalty_gradients(critic, [x], tiny)
    for g, e in zip(gradients, expected):
        assert (g - e).norm() <= 0.02 * e.norm()


# ---- torch.compile ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="a critic cannot be passed into a region of one graph there")
@pytest.mark.parametrize(
    "name",
    [
        "conv2d",
        "residual",
        "minibatch stddev",
        "spectral norm, hook",
        "group norm",
        "spectral norm, gankern",
        "minibatch discrimination",
    ],
)
def test_compiles(name):
    torch.manual_seed(0)
    critic, shape = CASES[name]
    critic = copy.deepcopy(critic)
    twin = copy.deepcopy(critic)
    x = torch.randn(shape)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        value, parameters, gradients = penalty_gradients(critic, [x], ("two_sided",))
        return value, gradients

    for _ in range(2):
        value, gradients = step(x)
        expected_value, _, expected = penalty_gradients(twin, [x], ("two_sided",))
        torch.testing.assert_close(value, expected_value)
        torch.testing.assert_close(gradients, expected)
        torch.testing.assert_close(list(critic.buffers()), list(twin.buffers()))


# ---- training --------------------------------------------------------------------------------------------------


def test_trains_as_double_backward_does():
    path = Path(__file__).parents[2] / "benchmarks" / "wgan_gp_gaussians.py"
    spec = importlib.util.spec_from_file_location("wgan_gp_gaussians", path)
    gaussians = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gaussians)
    options = dict(width=32, batch=32, critic_steps=2)
    curves = {m: gaussians.train(m, 30, dtype=torch.float64, **options) for m in ("tangent", "double_backward")}
    (ours, our_points), (theirs, their_points) = curves.values()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(our_points, their_points, rtol=1e-8, atol=1e-8)
    single = {m: gaussians.train(m, 20, **options)[0] for m in ("tangent", "double_backward")}
    torch.testing.assert_close(single["tangent"], single["double_backward"], rtol=1e-3, atol=1e-4)


# ---- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")
def test_peak_memory():
    """At most 0.7 of the penalty by hand, in a process of its own each."""
    code = """
import sys, torch
from torch import nn
from gankern.tangent.method import penalty_gradients
sys.path[:0] = {folders!r}
from test_tangent import by_double_backward, two_sided
layers = []
for a, b in ((3, 64), (64, 128), (128, 256)):
    layers += [nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
critic = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 64, 1))
x = torch.randn(32, 3, 64, 64)
critic(x[:1])
def read(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
if sys.argv[1] == "tangent":
    penalty_gradients(critic, [x], two_sided)
else:
    by_double_backward(critic, [x], dtype=torch.float32)
print(read("VmHWM") - before)
"""
    code = code.format(folders=[str(folder) for folder in Path(__file__).parents[:2]])
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")
    peaks = {}
    for method in ("tangent", "eager"):
        run = [sys.executable, "-c", code, method]
        peaks[method] = int(subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout)
    assert peaks["tangent"] <= 0.7 * peaks["eager"], peaks


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_group_norm_first_in_any_memory_format(memory_format):
    """Torch's backward of group norm crashes for channels_last inputs where the input's gradient is not asked for."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 1)).double()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64).to(memory_format=memory_format)
    r1_penalty(critic, x, weight=2.0, method="tangent").backward()
    ours = [p.grad.clone() if p.grad is not None else None for p in critic.parameters()]
    critic.zero_grad()
    x = x.contiguous().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    g.flatten(1).square().sum(1).mean().backward()
    for a, p in zip(ours, critic.parameters(), strict=True):
        assert (a is None) == (p.grad is None)
        if a is not None:
            torch.testing.assert_close(a, p.grad, rtol=1e-10, atol=1e-10)


class Rows(nn.Module):
    """Rows of different lengths as one nested tensor."""

    def forward(self, x):
        rows = torch.nested.as_nested_tensor([row[: i + 1] for i, row in enumerate(x)])
        return torch.nested.to_padded_tensor(rows, 0.0).tanh().sum(1)


class LookedUp(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.embedding = nn.Embedding(3, 4, sparse=sparse)

    def forward(self, x):
        return (self.embedding(torch.tensor([0, 1, 1])) * x).tanh().sum(1)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return (torch.eye(4, dtype=x.dtype).to_sparse_csr() @ self.linear(x).t()).tanh().sum(0)


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("critic", [Rows(), LookedUp(sparse=True), Mixed()], ids=["nested", "sparse gradient", "CSR"])
def test_what_is_sparse_or_nested_is_refused_by_name(critic):
    critic, x = critic.double(), torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="sparse|nested"):
        r1_penalty(critic, x, method="tangent")
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(critic(leaf).sum(), leaf, create_graph=True)
    torch.testing.assert_close(r1_penalty(critic, x), 5 * g.square().sum(1).mean().detach())


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_way_out_for_a_compiled_critic(dynamic):
    """Of dynamic sizes, its backward takes over what the forward kept, and torch words its refusal otherwise."""
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    critic = torch.compile(network, backend="aot_eager", dynamic=dynamic)
    with pytest.raises(RuntimeError, match="^r1_penalty: .*\n.*_orig_mod"):
        r1_penalty(critic, torch.randn(4, 5), method="double_backward")
