"""Networks of several parts with losses of their own: what one part's gradient needs has nothing to do with the others,
also where gankern computes the spectral norm of all layers in one call."""

import contextlib
import copy

import patterns
import pytest
import torch
from torch import nn

import gankern
import gankern.functional as GF
from gankern.core import native
from gankern.nn.utils import group_spectral_norm

FORMS = {"hook": nn.utils.spectral_norm, "parametrization": nn.utils.parametrizations.spectral_norm,
         "copied wrapper": patterns.CopiedWrapper}  # fmt: skip
MAKE = {"accelerate": gankern.accelerate, "group_spectral_norm": group_spectral_norm}


@pytest.fixture(params=["C++ nodes", "Python"], autouse=True)
def nodes(request):
    """Autograd's nodes in C++, where these are there, and in Python."""
    with native.python_gradients() if request.param == "Python" else contextlib.nullcontext():
        yield


class Scales(nn.Module):
    """A critic for each of several scales, as pix2pixHD has them, and layers that are for labels alone."""

    def __init__(self, normalize):
        super().__init__()
        self.critics = nn.ModuleList(
            nn.Sequential(
                normalize(nn.Conv2d(3, 4, 3, padding=1)), nn.LeakyReLU(0.2), normalize(nn.Conv2d(4, 1, 3)), nn.Tanh()
            )
            for _ in range(3)
        )
        self.labels = normalize(nn.Linear(4, 4))

    def forward(self, x):
        return [critic(x) for critic in self.critics]


def backward_each(net, x):
    for y in net(x):
        y.sum().backward()


def step_each(net, x):
    """Between the backward of one part and that of the next, the first part's weights are overwritten."""
    optimisers = [torch.optim.SGD(critic.parameters(), 0.1) for critic in net.critics]
    for _ in range(2):
        for optimiser, y in zip(optimisers, net(x)):
            optimiser.zero_grad()
            y.sum().backward()
            optimiser.step()


def some_parts(net, x):
    first, _, last = net(x)
    last.sum().backward()
    with torch.no_grad():
        for p in net.labels.parameters():
            p.mul_(2)
    first.sum().backward()


def keeping_one(net, x):
    first, second, _ = net(x)
    first.sum().backward(retain_graph=True)
    second.sum().backward()
    first.sum().backward()


def penalty_of_each(net, x):
    """A second backward of each part, with its first."""
    for critic in range(3):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(net(x)[critic].sum(), x, create_graph=True)
        grad.square().sum().backward()


def second_order_of_each(net, x):
    """One first backward for all, and second ones apart."""
    total = sum(y.square().sum() for y in net(x))
    parts = [[p for p in critic.parameters() if p.requires_grad] for critic in net.critics]
    grads = iter(torch.autograd.grad(total, [p for part in parts for p in part], create_graph=True))
    for part in parts:
        sum(next(grads).square().sum() for _ in part).backward(retain_graph=True)


STEPS = (backward_each, step_each, some_parts, keeping_one, penalty_of_each, second_order_of_each)


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("form", FORMS)
def test_losses_of_their_own(form, make, step):
    if form == "copied wrapper" and make != "accelerate":
        pytest.skip("it groups torch's and gankern's forms alone")
    torch.manual_seed(0)
    net = Scales(FORMS[form]).double()
    twin = copy.deepcopy(net)
    MAKE[make](twin)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    step(net, x), step(twin, x)
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        # What is not reached has no gradient: zeros would move it in an optimiser with momentum.
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", MAKE)
def test_errors_of_the_same_part_stay(make):
    """A part's graph is gone after its backward, and its own weights may not be overwritten before."""
    torch.manual_seed(0)
    net = nn.ModuleList(nn.utils.spectral_norm(nn.Linear(3, 3)) for _ in range(2))
    net.forward = lambda x: [layer(x) for layer in net]
    MAKE[make](net)
    first, second = net(torch.randn(2, 3))
    with torch.no_grad():
        net[1].weight_orig.mul_(2)
    first.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.sum().backward()


@pytest.mark.skipif(native.NODES_MISSING is not None, reason="torch alone decides when to release what Python keeps")
def test_a_graph_is_released_layer_by_layer(nodes, request):
    if "Python" in request.node.name:
        pytest.skip("what a node in Python keeps goes with the graph")
    weights = [torch.randn(3, 3, requires_grad=True) for _ in range(2)]
    vectors = [[torch.randn(3) for _ in range(2)] for _ in range(2)]
    first, second = GF.spectral_norm_group(weights, *vectors, training=False)
    (first**2).sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        first.sum().backward()
    second.sum().backward()
    assert all(w.grad is not None for w in weights)
