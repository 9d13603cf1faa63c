"""Modules of instance normalisation with an activation, against torch's own. What holds for every such norm is in
test_norm_act.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gankern
import gankern.nn as gnn


def test_defaults_are_torchs():
    norm = gnn.InstanceNormAct2d(4, activation="relu")
    assert not norm.affine and not norm.track_running_stats and norm.eps == 1e-5 and norm.state_dict() == {}
    assert "activation='relu'" in repr(norm)
    assert isinstance(gnn.InstanceNorm2d(4), nn.InstanceNorm2d)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="InstanceNormAct2d: activation is 'elu'"):
        gnn.InstanceNormAct2d(4, activation="elu")
    with pytest.raises(ValueError, match=r"InstanceNormAct2d: x has shape \(2, 4\); it must be 4-D, or 3-D without"):
        gnn.InstanceNormAct2d(4)(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"InstanceNormAct2d: x has shape \(2, 3, 5, 5\); num_features is 4"):
        gnn.InstanceNormAct2d(4, affine=True)(torch.ones(2, 3, 5, 5))
    with pytest.warns(UserWarning, match="num_features is 4: without weights it makes no difference"):
        gnn.InstanceNormAct2d(4)(torch.rand(2, 3, 5, 5))
    with pytest.raises(ValueError, match="a channel needs more than one position"):
        gnn.InstanceNorm2d(4)(torch.ones(2, 4, 1, 1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 8, 3),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 4, 3), nn.InstanceNorm2d(4),
    )  # fmt: skip


def penalised(net, x):
    """A step's results: output, gradients, and those of a penalty."""
    x = x.clone().requires_grad_()
    y = net(x)
    (g,) = torch.autograd.grad(y.square().mean(), x, create_graph=True)
    loss = y.mean() + g.square().sum()
    return y, *torch.autograd.grad(loss, [x, *net.parameters()])


def test_accelerate_takes_the_norm_and_the_activation_behind_it():
    plain, fast = network().double(), network().double()
    report = gankern.accelerate(fast)
    norms = [row for row in report.replaced if "InstanceNorm2d" in row.before]
    assert len(norms) == 3 and all("instance norm" in row.after for row in norms)
    for step in range(2):
        x = torch.randn(2, 3, 30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        before = fast.state_dict()["4.running_mean"].clone()
        for a, b in zip(penalised(plain, x), penalised(fast, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert gankern.last_implementation("instance_norm_act") is not None
        assert not torch.equal(before, fast.state_dict()["4.running_mean"])
    torch.testing.assert_close(plain.state_dict(), fast.state_dict())
    plain.eval(), fast.eval()
    torch.testing.assert_close(plain(x), fast(x))
    gankern.restore(fast)
    torch.testing.assert_close(plain(x), fast(x))


def test_accelerate_leaves_torchs_errors_and_other_classes():
    class Own(nn.InstanceNorm2d):
        def _apply_instance_norm(self, input):
            return input + 1

    net = nn.Sequential(Own(8), nn.InstanceNorm2d(8))
    gankern.accelerate(net)
    x = torch.randn(2, 8, 30, 30)
    torch.testing.assert_close(net(x), F.instance_norm(x + 1))
    with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
        net(torch.ones(2, 8, 1, 1))
