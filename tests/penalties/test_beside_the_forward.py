"""What a critic does beside its operators: hooks, gradients of its own, writes around autograd, state, threads. A penalty
is right, by whichever form; the tangent form says why it refuses; and an attempt that was given up leaves no trace."""

import copy
import functools
import logging
import random
import threading
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import in_threads, with_gradient
from torch import nn
from torch.utils.checkpoint import checkpoint

import gankern.functional as GF
import gankern.nn as gnn
from gankern import penalties
from gankern.nn.utils.parametrizations import spectral_norm
from gankern.tangent import method as tangent
from gankern.tangent import reached
from gankern.tangent.tape import Tape


class Net(nn.Module):
    """A critic from a function of its modules and of features [4, 4, 8, 8]."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.first, self.m = function, nn.Conv2d(3, 4, 3, padding=1), nn.ModuleList(modules)
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.last(self.function(self, torch.tanh(self.first(x)))).square().mean((1, 2, 3))


def by_hand(critic, real, fake, alpha):
    """The penalty and its gradients in plain torch."""
    x = torch.lerp(real, fake, alpha.view(-1, *[1] * (real.dim() - 1))).requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    (10 * (g.flatten(1).norm(dim=1) - 1).square().mean()).backward()


def samples(*shape):
    return (*torch.randn(2, *(shape or (4, 3, 8, 8)), dtype=torch.float64), torch.rand(4, dtype=torch.float64))


def gradients(critic):
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in critic.parameters()]


def check(critic, points, refused):
    """Gradients as in plain torch by "auto", and by "tangent", unless that refuses with these words."""
    critic = critic.double()
    plain = copy.deepcopy(critic)
    by_hand(plain, *points)
    for method in ("auto", "tangent"):
        ours = copy.deepcopy(critic)
        if method == "tangent" and refused is not None:
            with pytest.raises(ValueError, match=refused):
                penalties.gradient_penalty(ours, *points[:2], alpha=points[2], method=method)
            continue
        penalties.gradient_penalty(ours, *points[:2], alpha=points[2], method=method).backward()
        for g, e in zip(gradients(ours), gradients(plain)):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


Reversed = with_gradient("Reversed", lambda grad: -0.5 * grad)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class OfItsOwn(torch.autograd.Function):
    """Whose forward records what its gradient does not use."""

    @staticmethod
    def forward(ctx, x):
        with torch.enable_grad():
            return 1.5 * x

    @staticmethod
    def backward(ctx, g):
        return 3 * g


def hooked(net, h):
    h.register_hook(lambda g: 0.5 * g)
    return h


def hooked_if_it_requires_a_gradient(net, h):
    if h.requires_grad and not h.is_leaf:
        h.register_hook(lambda g: 0.5 * g)
    return h


def hooked_late(net, h):
    y = h * 2
    h.register_hook(lambda g: 0.5 * g)
    return y


def hooked_node(net, h):
    h.grad_fn.register_prehook(lambda grads: tuple(0.5 * g for g in grads))
    return h * 2


def retaining(net, h):
    h.retain_grad()
    return h


def with_a_gradient_of_its_own(net, h):
    (g,) = torch.autograd.grad(h.square().sum(), h, create_graph=True)
    return h + g


def with_rounded_saved_tensors(net, h):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.round(decimals=2), lambda t: t):
        return torch.sigmoid(h)


def through_data(net, h):
    y = F.leaky_relu(h, 0.2)
    h.data.mul_(-1)
    return y


def another_data(net, h):
    h.data = h.data * 2
    return h


def through_numpy(net, h):
    y = F.leaky_relu(h, 0.2).tanh()
    memory = y.detach().numpy()
    memory *= 0.5
    return y


def through_memory_got_before(net, h):
    h = h * 1
    memory = h.detach().untyped_storage()
    y = F.leaky_relu(h, 0.2)
    memory.copy_((-h.detach()).untyped_storage())
    return y


def through_an_array(net, h):
    y = h.tanh()
    np.asarray(y.detach())[:] *= 0.5
    return y


def frozen_within(net, h):
    net.m[0].requires_grad_(False)
    y = net.m[0](h).tanh()
    net.m[0].requires_grad_(True)
    return y


def frozen_by_assignment(net, h):
    weight = net.m[0].weight
    weight.requires_grad = False
    y = net.m[0](h).tanh()
    weight.requires_grad = True
    return y


def a_leaf_of_its_own(net, h):
    return h * h.detach().requires_grad_().sigmoid()


def strided(net, h):
    return h.as_strided((4, 4, 64), (256, 1, 4)).tanh().view(4, 4, 8, 8)


def strided_constant(net, h):
    return h * h.detach().as_strided((4, 4, 8, 8), (256, 1, 32, 4))


def without_gradient(function, h):
    with torch.no_grad():
        return F.interpolate(function(h), (8, 8))


def in_inference_mode(net, h):
    with torch.inference_mode():
        gate = net.m[1](h)
    return h * float(gate.sum())


BESIDE = {
    "a hook of a tensor": (hooked, "hook of a tensor"),
    "a hook after the tensor's use": (hooked_late, "hook of a tensor"),
    "a hook behind requires_grad": (hooked_if_it_requires_a_gradient, "hook of a tensor"),
    "a hook of a node": (hooked_node, "reads grad_fn"),
    "retain_grad": (retaining, "retain_grad"),
    "a gradient of its own": (with_a_gradient_of_its_own, "a gradient of its own"),
    "hooks of saved tensors": (with_rounded_saved_tensors, "hooks of saved tensors"),
    "gradient reversal": (lambda net, h: Reversed.apply(h), "Function Reversed"),
    "straight-through": (lambda net, h: StraightThrough.apply(h) * h, "Function StraightThrough"),
    "a Function that records": (lambda net, h: OfItsOwn.apply(h), "Function OfItsOwn"),
    "a write through .data": (through_data, r"through \.data"),
    "another .data": (another_data, r"writes \.data"),
    "a write through numpy": (through_numpy, "reads the memory of a tensor"),
    "a write to memory got before": (through_memory_got_before, "reads the memory of a tensor"),
    "a write through an array": (through_an_array, "reads the memory of a tensor"),
    "frozen within": (frozen_within, "freezes or unfreezes"),
    "frozen by assignment": (frozen_by_assignment, "freezes or unfreezes"),
    "a leaf of its own": (a_leaf_of_its_own, None),
    "numbers by numpy": (lambda net, h: h * float(h.detach().abs().amax().numpy()), None),
    "a checkpoint": (
        lambda net, h: checkpoint(lambda h: net.m[0](h).tanh(), h, use_reentrant=False),
        None if torch.__version__ >= (2, 13) else "reads grad_fn",  # older ones look there whether to recompute
    ),
    "reading .data": (lambda net, h: h * (h.data > 0), None),
    "reading requires_grad": (
        lambda net, h: h.sigmoid() if h.requires_grad and net.last.weight.requires_grad and not h.is_leaf else h,
        None,
    ),
    "as_strided": (strided, None),
    "as_strided of a constant": (strided_constant, None),
    "no_grad and this library's convolution": (lambda net, h: h * without_gradient(net.m[1], h), None),
    "no_grad and this library's primitive": (
        lambda net, h: h * without_gradient(lambda h: GF.pixel_norm(h.square()), h),
        None,
    ),
    "no_grad and this library's filter": (
        lambda net, h: h * without_gradient(lambda h: GF.downsample2d(h, torch.tensor([1.0, 3, 3, 1]).to(h)), h),
        None,
    ),
    "inference mode": (in_inference_mode, None),
    "constants of a value": (lambda net, h: h * (h > 0) + h.detach() * h.argmax(1, keepdim=True), None),
}


@pytest.mark.parametrize("name", BESIDE)
def test_beside_the_forward(name):
    torch.manual_seed(0)
    function, refused = BESIDE[name]
    check(Net(function, nn.Conv2d(4, 4, 3, padding=1), gnn.ConvDownsample2d(4, 4, 3)), samples(), refused)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def by_its_own_memory(function):
    return lambda net, h: function(1.5 * h)


REFUSED = {
    "a Function that is differentiable once": (lambda net, h: Once.apply(h), "once_differentiable"),
    "that Function beside others": (lambda net, h: h.square() + Once.apply(h), "once_differentiable"),
    "times itself": (by_its_own_memory(lambda h: h.mul_(h)), "inplace operation"),
    "times its values": (by_its_own_memory(lambda h: h.mul_(h.detach())), "inplace operation"),
    "over its values": (by_its_own_memory(lambda h: h.div_(h.detach())), "inplace operation"),
    "times a view's values": (by_its_own_memory(lambda h: h.flatten(1).mul_(h.detach().flatten(1)).view_as(h)),
                              "inplace operation"),
    "to the power of itself": (by_its_own_memory(lambda h: h.abs().add_(1).pow_(h.detach()) * h.pow_(h.detach())),
                               "inplace operation"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["auto", "double_backward", "tangent"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused(name, method):
    """Nobody is given a penalty without a part of its gradient."""
    torch.manual_seed(0)
    function, says = REFUSED[name]
    critic, (real, fake, alpha) = Net(function, nn.Conv2d(4, 4, 3, padding=1)).double(), samples()
    with pytest.raises(RuntimeError, match=says):
        by_hand(copy.deepcopy(critic), real, fake, alpha)
    with pytest.raises(
        ValueError if method == "tangent" else RuntimeError, match=None if method == "tangent" else says
    ):
        penalties.gradient_penalty(critic, real, fake, alpha=alpha, method=method).backward()


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_modules(register):
    torch.manual_seed(0)
    critic = Net(lambda net, h: net.m[0](h), nn.Conv2d(4, 4, 3, padding=1))
    getattr(critic.m[0], register)(lambda module, *grads: tuple(0.5 * g for g in grads[0]))
    check(critic, samples(), r"backward hook of a module.*Conv2d 'm\.0'")


def test_backward_hooks_of_all_modules():
    handle = nn.modules.module.register_module_full_backward_hook(lambda module, ins, outs: (0.5 * ins[0],))
    try:
        with pytest.raises(ValueError, match="hooks of all modules"):
            penalties.gradient_penalty(nn.Linear(3, 1), *torch.randn(2, 4, 3), method="tangent")
    finally:
        handle.remove()


def test_a_function_of_a_module_with_a_backward_hook():
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()
    layer.register_full_backward_hook(lambda module, ins, outs: (0.5 * ins[0],))
    real, fake, alpha = samples(4, 3)

    def critic(x):
        return layer(x).tanh().sum(1)

    with pytest.raises(ValueError, match="hook|grad_fn"):
        penalties.gradient_penalty(critic, real, fake, method="tangent")
    penalties.gradient_penalty(critic, real, fake, alpha=alpha).backward()
    ours, layer.weight.grad = layer.weight.grad, None
    by_hand(critic, real, fake, alpha)
    torch.testing.assert_close(ours, layer.weight.grad)


def test_random_numbers_are_those_of_the_caller_s_layout():
    """Dropout's mask follows the order in memory, which the tape would change."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Tanh(), nn.Flatten(), nn.Linear(144, 1)).double()
    real, fake, alpha = samples()
    values = []
    for method in ("double_backward", "tangent", "tangent"):
        torch.manual_seed(1)
        values.append(penalties.gradient_penalty(critic, real, fake, alpha=alpha, method=method).item())
    assert values[0] == pytest.approx(values[1], rel=1e-12) and values[1] == values[2]


def test_looking_up_derivatives_draws_no_random_numbers(monkeypatch):
    """torch is asked once which derivatives an operator has; of one that draws random numbers like its argument too."""
    monkeypatch.setattr(reached, "_answers", {})

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x):
            h = self.layers[:2](x)
            return self.layers[2](h * torch.rand_like(h) + torch.randn_like(h))

    x, after = torch.randn(4, 5), []
    for method in ("auto", "double_backward"):
        torch.manual_seed(0)
        critic = Noisy()
        value = penalties.r1_penalty(critic, x, method=method)
        after.append((value.item(), torch.rand(()).item()))
    assert after[0] == pytest.approx(after[1], rel=1e-6)


# ---- what an attempt that was given up leaves behind -------------------------------------------------------------


class Stateful(nn.Module):
    """Moves buffers, frozen parameters, attributes and all random numbers before it does what is refused."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.drop = spectral_norm(nn.Linear(5, 6)), nn.Linear(6, 1), nn.Dropout(0.5)
        self.u = nn.Parameter(torch.ones(6), requires_grad=False)
        self.calls, self.history, self.moving = 0, [], torch.zeros(6)

    def forward(self, x):
        self.calls += 1
        self.history.append(self.calls)
        h = self.drop(self.first(x)) * (1 + random.random())
        self.u.data = self.u.data * 0.5 + 1
        self.moving.add_(h.detach().mean(0))
        return self.last(Reversed.apply(h.tanh() * self.u)) + torch.randn(len(x), 1)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda x: net(x), lambda net: net.forward])
def test_a_fallback_leaves_the_critic_as_double_backward_does(wrap, caplog):
    states = []
    real, fake = torch.randn(2, 4, 5)
    for method in ("double_backward", "auto"):
        torch.manual_seed(1)
        critic = Stateful()
        called = wrap(critic)
        torch.manual_seed(2)
        random.seed(2)
        with caplog.at_level(logging.INFO, "gankern"):
            for _ in range(3):
                penalties.gradient_penalty(called, real, fake, method=method).backward()
        tensors = [*critic.buffers(), *critic.parameters(), *gradients(critic), critic.moving, torch.rand(3)]
        states.append((tensors, critic.calls, critic.history, random.random()))
        assert [p.requires_grad for p in critic.parameters()].count(False) == 1 and critic.training
    (plain, *rest), (ours, *ours_rest) = states
    assert rest == ours_rest
    for a, b in zip(plain, ours):
        torch.testing.assert_close(a, b)
    logged = sum("Function Reversed" in record.message for record in caplog.records)
    assert logged == 1 or not isinstance(called, nn.Module)


def a_generator():
    return torch.Generator().manual_seed(5)


EVERYBODYS = torch.ones(())


# What it is before, and what a critic that has it as ``kept`` does with it; and what is left of it.
KEPT = {
    "torch's generator": (a_generator, lambda n, x: x + torch.randn(x.shape, generator=n.kept), lambda k: k.get_state()),
    "Python's generator": (lambda: random.Random(5), lambda n, x: x * n.kept.random(), lambda k: k.random()),
    "NumPy's generator": (lambda: np.random.default_rng(5), lambda n, x: x * n.kept.random(), lambda k: k.random()),
    "NumPy's older one": (lambda: np.random.RandomState(5), lambda n, x: x * n.kept.rand(), lambda k: k.rand()),
    "list in a dict": (lambda: {"a": []}, lambda n, x: n.kept["a"].append(1) or x * len(n.kept["a"]), str),
    "defaultdict": (lambda: defaultdict(list), lambda n, x: n.kept["a"].append(1) or x * len(n.kept["a"]), str),
    "Counter": (Counter, lambda n, x: n.kept.update("a") or x * n.kept["a"], str),
    "tensor in a tuple": (lambda: (torch.ones(()),), lambda n, x: x * n.kept[0].add_(1), lambda k: k[0]),
    "tensor of an object": (
        lambda: SimpleNamespace(u=torch.ones(())),
        lambda n, x: x * torch.add(n.kept.u, 1, out=n.kept.u),
        lambda k: k.u,
    ),
    "sparse buffer": (lambda: torch.eye(2).to_sparse(), lambda n, x: x * n.kept.mul_(2).sum(), lambda k: k.to_dense()),
    "network in a list": (
        lambda: [spectral_norm(nn.Linear(5, 5))], lambda n, x: n.kept[0](x), lambda k: k[0].parametrizations.weight[0]._u,
    ),
    "everybody's tensor": (lambda: len(EVERYBODYS.fill_(1).shape), lambda n, x: x * EVERYBODYS.add_(1), str),
    "made by the critic": (lambda: None, lambda n, x: x * torch.empty(5).normal_().mul_(2).detach_(), str),
}  # fmt: skip


class Keeps(nn.Module):
    def __init__(self, kept, use):
        super().__init__()
        self.kept, self.use, self.drop = kept, use, nn.Dropout(0.5)
        self.layers = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 1)])

    def forward(self, x, *conditions, **named):
        x = self.use(self, x, *conditions, **named)
        return self.layers[1](Reversed.apply(self.drop(self.layers[0](x)).tanh()))


def both_ways(make, called=lambda critic: critic, **options):
    """By double backward and by an attempt that is given up: value, gradients and random numbers are the same."""
    real, fake = torch.randn(2, 4, 5)
    left = []
    for method in ("double_backward", "auto", "tangent"):
        torch.manual_seed(1)
        critic = make()
        given = copy.deepcopy(options)
        if method == "tangent":  # is refused, and by hand it goes on as if nothing had been
            with pytest.raises(ValueError, match="Function Reversed"):
                penalties.gradient_penalty(called(critic), real, fake, alpha=torch.ones(4), method=method, **given)
            method = "double_backward"
        torch.manual_seed(2)
        value = penalties.gradient_penalty(called(critic), real, fake, alpha=torch.ones(4), method=method, **given)
        value.backward()
        left.append((critic, given, [value.detach(), *gradients(critic), torch.rand(3)]))
    for _, _, found in left[1:]:
        for a, b in zip(left[0][2], found):
            torch.testing.assert_close(a, b)
    return [(critic, given) for critic, given, _ in left]


@pytest.mark.parametrize("what", KEPT)
def test_a_fallback_leaves_what_the_critic_keeps(what):
    kept, use, look = KEPT[what]
    looks = [look(critic.kept) for critic, _ in both_ways(lambda: Keeps(kept(), use))]
    for other in looks[1:]:
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(other, looks[0])
        else:
            assert other == looks[0]


@pytest.mark.parametrize(
    ("options", "use"),
    [
        ({"critic_args": (torch.ones(4, 1),)}, lambda n, x, y: x * y.add_(1)),
        ({"critic_kwargs": {"d": {"y": 2.0}}}, lambda n, x, d: x * d.pop("y", 5.0)),
        ({"critic_kwargs": {"d": [[]]}}, lambda n, x, d: d[0].append(1) or x * len(d[0])),
    ],
)
def test_a_fallback_leaves_the_conditions(options, use):
    given = [str(given) for _, given in both_ways(lambda: Keeps(None, use), **options)]
    assert given[0] == given[1] == given[2]


GIVEN_UP = {
    "running statistics": lambda: Net(lambda n, h: n.m[0](h), nn.BatchNorm2d(4)),
    "a frozen weight": lambda: Net(lambda n, h: Reversed.apply(n.m[0](h)), nn.Conv2d(4, 4, 1).requires_grad_(False)),
    "a tensor that it writes to": lambda: Net(lambda n, h: Reversed.apply(h * n.m[0].weight.mul_(2).view(4, 1, 1)), nn.BatchNorm2d(4).requires_grad_(False)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*batch norm in training mode")
@pytest.mark.parametrize("what", GIVEN_UP)
def test_a_fallback_leaves_graphs_of_before(what):
    """Losses whose graphs were made before the penalty, which is the usual order, have saved what the attempt restores."""
    real, fake, alpha = samples()
    critics, errors = [GIVEN_UP[what]().double()], []
    critics.append(copy.deepcopy(critics[0]))
    for critic, ours in zip(critics, (False, True)):
        loss = critic(fake).mean() - critic(real).mean()
        if ours:
            loss = loss + penalties.gradient_penalty(critic, real, fake, alpha=alpha)
        else:
            by_hand(critic, real, fake, alpha)
        try:
            loss.backward()
        except RuntimeError as error:  # of a write between forward and backward, torch's own here
            errors.append(str(error))
    assert len(errors) == (2 if "writes" in what else 0), errors
    if not errors:
        for a, b in zip(gradients(critics[1]), gradients(critics[0])):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("holds", ["list", "dict", "default", "object", "partial"])
def test_a_fallback_finds_networks_in_containers(holds):
    """Those that a function has its networks in: spectral norm must not have iterated twice."""

    def called(critic):
        nets = {"d": [critic]}
        match holds:
            case "list":
                return lambda x: nets["d"][0](x)
            case "dict":
                return lambda x, nets=nets: nets["d"][0](x)
            case "default":
                return lambda x, *, net=(critic,): net[0](x)
            case "object":
                owner = SimpleNamespace(nets=nets)
                return lambda x: owner.nets["d"][0](x)
            case "partial":
                return functools.partial(lambda nets, x: nets[0](x), [critic])

    def make():
        return Keeps(spectral_norm(nn.Linear(5, 5)), lambda n, x: n.kept(x))

    iterated = [critic.kept.parametrizations.weight[0]._u for critic, _ in both_ways(make, called)]
    torch.testing.assert_close(iterated[1], iterated[0])
    torch.testing.assert_close(iterated[2], iterated[0])


def in_a_list(critic):
    seen = []
    critic.layers[0].register_forward_hook(lambda module, args, output: seen.append(output) and None)
    return lambda: len(seen)


def in_a_number(critic):
    count = 0

    def hook(module, args):
        nonlocal count
        count += 1

    critic.layers[1].register_forward_pre_hook(hook)
    return lambda: count


class Meter:
    def __init__(self):
        self.count, self.seen, self.nothing = 0, [0], []

    def __call__(self, module, args, output=None):
        self.count += 1
        self.seen.append(self.count)
        self.nothing.append(self.count)

    def look(self):
        return self.count, self.seen, self.nothing


def in_an_object(critic, method=lambda meter: meter):
    meter = Meter()
    for layer in critic.layers:
        layer.register_forward_hook(method(meter))
    return meter.look


@pytest.mark.parametrize(
    ("watch", "expected"),
    [
        (in_a_list, 1), (in_a_number, 1), (in_an_object, (2, [0, 1, 2], [1, 2])),
        (lambda critic: in_an_object(critic, lambda meter: meter.__call__), (2, [0, 1, 2], [1, 2])),
        (lambda critic: in_an_object(critic, lambda meter: functools.partial(meter)), (2, [0, 1, 2], [1, 2])),
    ],
)  # fmt: skip
def test_a_fallback_leaves_what_hooks_of_the_forward_keep(watch, expected):
    """Those that collect features, or count."""

    def make():
        critic = Keeps(None, lambda n, x: x)
        critic.look = watch(critic)
        return critic

    assert [critic.look() for critic, _ in both_ways(make)] == [expected] * 3


@pytest.mark.parametrize("hidden", ["critic", "hook"])
def test_a_fallback_leaves_what_hooks_of_hidden_networks_keep(hidden):
    """Networks that are no submodules, but in a list of the critic's or of a hook's."""
    networks = []

    def make():
        network = nn.Linear(5, 5)
        network.meter = Meter()
        network.register_forward_hook(network.meter)
        networks.append([network])
        if hidden == "critic":
            return Keeps(networks[-1], lambda n, x: n.kept[0](x))
        critic = Keeps(None, lambda n, x: x)
        critic.layers[0].register_forward_pre_hook(lambda module, args, nets=networks[-1]: (nets[0](args[0]),))
        return critic

    both_ways(make)
    assert [network.meter.look() for (network,) in networks] == [(1, [0, 1], [1])] * 3


def test_a_fallback_leaves_the_attributes_of_a_critic_that_is_an_object():
    class Owner(Meter):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def __call__(self, x):
            super().__call__(None, None)
            return self.network(x)

    def make():
        critic = Keeps(None, lambda n, x: x)
        critic.owner = Owner(critic)
        return critic

    for called in (lambda critic: critic.owner, lambda critic: critic.owner.__call__):
        assert [critic.owner.look() for critic, _ in both_ways(make, called)] == [(1, [0, 1], [1])] * 3


def test_an_unexpected_error_falls_back_once(caplog, monkeypatch):
    calls = []

    def fail(self, *arguments):
        calls.append(1)
        raise KeyError("nobody expected this")

    monkeypatch.setattr(Tape, "push", fail)
    critic = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    with caplog.at_level(logging.INFO, "gankern"):
        for _ in range(3):
            penalties.gradient_penalty(critic, *torch.randn(2, 4, 5)).backward()
    assert len(calls) == 1 and len([r for r in caplog.records if "nobody expected this" in r.message]) == 1
    assert critic[0].weight.grad is not None


def test_the_critic_s_own_error_reaches_the_user():
    critic = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        penalties.gradient_penalty(critic, *torch.randn(2, 4, 7))
    penalties.gradient_penalty(critic, *torch.randn(2, 4, 5), method="auto")
    assert tangent.refusal(critic) is None


@pytest.mark.parametrize("method", ["auto", "tangent"])
def test_attention_names_the_way_out(method):
    critic = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Flatten(), nn.Linear(48, 1))
    real, fake = torch.randn(2, 4, 6, 8)
    with pytest.raises((RuntimeError, ValueError), match=r"sdpa_kernel\(torch.nn.attention.SDPBackend.MATH\)"):
        penalties.gradient_penalty(critic, real, fake, method=method)
    critic = copy.deepcopy(critic)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        penalties.gradient_penalty(critic, real, fake, method=method).backward()


@pytest.mark.parametrize("method", ["auto", "tangent", "double_backward"])
def test_a_batch_of_one_and_squeeze(method):
    torch.manual_seed(0)
    layer = nn.Linear(5, 1)
    real, fake, alpha = *torch.randn(2, 1, 5), torch.rand(1)
    value = penalties.gradient_penalty(lambda x: layer(x).squeeze(), real, fake, alpha=alpha, method=method)
    torch.testing.assert_close(value, 10 * (layer.weight.norm().detach() - 1) ** 2)


# ---- threads -----------------------------------------------------------------------------------------------------


def test_another_thread_is_left_alone():
    """While one thread penalises a critic, another runs it, and trains a network of this library's layers."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), gnn.PixelNorm(), nn.Flatten(), nn.Linear(8 * 36, 1))
    x, stop, wrong = torch.randn(4, 3, 8, 8), threading.Event(), []

    def penalise():
        while not stop.is_set():
            penalties.gradient_penalty(critic, x, -x, method="tangent")

    def train():
        net = nn.Sequential(spectral_norm(nn.Linear(6, 8)), gnn.LeakyReLU(), spectral_norm(nn.Linear(8, 1)))
        try:
            for _ in range(300):
                net.zero_grad()
                net(torch.randn(4, 6)).mean().backward()
                wrong.extend(p for p in net.parameters() if p.grad is None)
                if not critic(x).requires_grad or not all(p.requires_grad for p in critic.parameters()):
                    wrong.append("requires_grad")
        except Exception as error:
            wrong.append(error)
        finally:
            stop.set()

    in_threads(penalise, train)
    assert not wrong


@pytest.mark.parametrize("method", ["auto", "tangent", "double_backward"])
def test_a_penalty_whose_forward_runs_again(method, monkeypatch):
    """Activation checkpointing around a penalty saves as much each time, and leaves it where it has all."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 1)).double()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    penalties.r1_penalty(critic, x, method="double_backward").backward()
    want = [p.grad for p in critic.parameters()]
    monkeypatch.setattr(reached, "_answers", {})  # of operators that the tangent form knows from before
    for _ in range(2):
        critic.zero_grad()
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        again = checkpoint(lambda s: s * penalties.r1_penalty(critic, x, method=method), scale, use_reentrant=False)
        again.backward()
        for parameter, gradient in zip(critic.parameters(), want):
            torch.testing.assert_close(parameter.grad, gradient)
        assert tangent.refusal(critic) is None


def test_penalties_in_many_threads_and_within_each_other():
    torch.manual_seed(0)
    critics = [nn.Sequential(nn.Linear(5, 8), gnn.LeakyReLU(), nn.Linear(8, 1)).double() for _ in range(4)]
    x = torch.randn(6, 5, dtype=torch.float64)
    want = [penalties.r1_penalty(critic, x, method="tangent").item() for critic in critics]
    got = [[] for _ in critics]

    def run(i):
        return lambda: got[i].extend(penalties.r1_penalty(critics[i], x, method="tangent").item() for _ in range(30))

    in_threads(*map(run, range(len(critics))))
    assert got == [[value] * 30 for value in want]

    inner = []

    def outer(x):
        inner.append(penalties.r1_penalty(critics[1], x.detach(), method="tangent").item())
        return critics[0](x)

    assert penalties.r1_penalty(outer, x, method="tangent").item() == want[0] and inner == [want[1]]
