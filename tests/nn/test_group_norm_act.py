"""Modules of group normalisation with an activation, against torch's own."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gankern
import gankern.nn as gnn


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"eps": 1e-2}], ids=str)
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 5, 3), (6, 4, 2, 5, 3)], ids=str)
def test_is_torchs_with_an_activation(shape, options):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 2
    try:
        theirs = nn.GroupNorm(2, 4, **options)
    except TypeError:  # an older torch has no bias=
        theirs = nn.GroupNorm(2, 4)
        theirs.register_parameter("bias", None)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(0.5, 2)
    for activation, slope in (("leaky_relu", 0.2), (None, 1.0)):
        norm = gnn.GroupNormAct(2, 4, **options, activation=activation)
        norm.load_state_dict(theirs.state_dict())
        assert list(norm.state_dict()) == list(theirs.state_dict())
        for copied in (norm, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            torch.testing.assert_close(copied(x), F.leaky_relu(theirs(x), slope), rtol=1e-4, atol=1e-5)


def test_what_it_says():
    norm = gnn.GroupNormAct(2, 4, activation="relu")
    assert "2, 4" in repr(norm) and "activation='relu'" in repr(norm) and isinstance(norm, nn.GroupNorm)
    with pytest.raises(ValueError, match="GroupNormAct: activation is 'elu'"):
        gnn.GroupNormAct(2, 4, activation="elu")
    with pytest.raises(ValueError, match="GroupNormAct: num_groups is 0; it must be at least 1"):
        gnn.GroupNormAct(0, 4)
    with pytest.raises(ValueError, match=r"num_channels \(4\) must be divisible by num_groups \(3\)"):
        gnn.GroupNormAct(3, 4)
    with pytest.raises(ValueError, match=r"GroupNormAct: x has shape \(2, 3, 5, 5\); it must be \[N, 4, ...\]"):
        gnn.GroupNormAct(2, 4)(torch.ones(2, 3, 5, 5))


def test_the_layer_norm_of_a_critic_under_a_gradient_penalty():
    """Which is of each sample: no other one moves its penalty."""
    torch.manual_seed(0)
    critic = nn.Sequential(
        nn.Conv2d(3, 8, 3), gnn.GroupNormAct(1, 8, activation="leaky_relu"), nn.Conv2d(8, 1, 6), nn.Flatten()
    ).double()
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 6), nn.Flatten())
    plain.double().load_state_dict({k.replace("2.", "3."): v for k, v in critic.state_dict().items()})
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def right(net, x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        penalty = g.flatten(1).square().sum(1).mean() / 2
        return penalty, *torch.autograd.grad(penalty, net.parameters(), materialize_grads=True)

    expected = right(plain, x)
    penalty = gankern.penalties.r1_penalty(critic, x, weight=1.0)
    found = penalty, *torch.autograd.grad(penalty, critic.parameters(), materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(True), nn.Conv2d(8, 8, 3), nn.GroupNorm(1, 8, affine=False),
        nn.LeakyReLU(0.2), nn.Conv2d(8, 4, 3), nn.GroupNorm(4, 4), nn.Flatten(2), nn.GroupNorm(2, 4), nn.PReLU(),
    ).double()  # fmt: skip


def penalised(net, x):
    """A step's results: output, gradients, and those of a penalty."""
    x = x.clone().requires_grad_()
    y = net(x)
    (g,) = torch.autograd.grad(y.pow(3).mean(), x, create_graph=True)
    return y, *torch.autograd.grad(y.square().mean() + g.square().sum(), [x, *net.parameters()])


@pytest.mark.parametrize("size", [12, 80])
def test_accelerate_takes_the_norm_and_the_activation_behind_it(size):
    plain, fast = network(), network()
    report = gankern.accelerate(fast)
    norms = [row for row in report.replaced if "GroupNorm" in row.before]
    assert len(norms) == 4 and all("group norm" in row.after for row in norms)
    x = torch.randn(6, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for values in (x, x.contiguous(memory_format=torch.channels_last)):
        for a, b in zip(penalised(plain, values), penalised(fast, values), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert fast(values).stride() == plain(values).stride()
        with torch.no_grad():
            torch.testing.assert_close(plain(values), fast(values), rtol=1e-12, atol=1e-12)
    assert gankern.last_implementation("group_norm_act") is not None
    gankern.restore(fast)
    assert torch.equal(plain(x), fast(x))


def test_accelerate_leaves_torchs_errors_and_other_classes():
    class Own(nn.GroupNorm):
        def forward(self, input):
            return F.group_norm(input + 1, self.num_groups, self.weight, self.bias, self.eps)

    for make in (lambda: Own(2, 8), lambda: nn.GroupNorm(2, 8)):
        plain, fast = (nn.Sequential(make(), nn.ReLU()).double() for _ in range(2))
        gankern.accelerate(fast)
        x = torch.randn(2, 8, 30, 30, dtype=torch.float64)
        for a, b in zip(penalised(plain, x), penalised(fast, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        for wrong in (torch.ones(1, 8)[:, :7], torch.ones(8)):
            with pytest.raises(Exception) as right:
                plain(wrong.double())
            with pytest.raises(right.type):
                fast(wrong.double())


def test_without_a_bias_it_starts_anew():
    norm = gnn.GroupNormAct(2, 4, bias=False)
    with torch.no_grad():
        norm.weight.fill_(3.0)
    norm.reset_parameters()
    assert norm.bias is None and torch.equal(norm.weight, torch.ones(4))
