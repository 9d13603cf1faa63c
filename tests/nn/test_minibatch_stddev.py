"""The layer hands its options on, and says them."""

import torch

import gankern.functional as GF
import gankern.nn as gnn


def test_options_reach_the_function():
    x = torch.randn(6, 4, 3, 3)
    options = {"layout": "contiguous", "unbiased": True, "on_indivisible": "largest_divisor", "eps": 1e-3}
    layer = gnn.MinibatchStdDev(4, 2, **options)
    assert torch.equal(layer(x), GF.minibatch_stddev(x, group_size=4, num_channels=2, **options))
    assert layer.extra_repr() == (
        "group_size=4, num_channels=2, layout='contiguous', unbiased=True, on_indivisible='largest_divisor', eps=0.001"
    )
    assert repr(gnn.MinibatchStdDev()) == "MinibatchStdDev(group_size=4, num_channels=1)"
    assert not layer.state_dict()


def test_gradient_penalty_through_it():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), gnn.MinibatchStdDev(), torch.nn.Conv2d(5, 1, 3)).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    penalties = {}
    for implementation in (None, "reference"):
        network[1].implementation = implementation
        (g,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        penalties[implementation] = torch.autograd.grad(g.square().sum(), list(network.parameters()), allow_unused=True)
    for ours, right in zip(penalties[None], penalties["reference"]):
        assert (ours is None) == (right is None)
        if ours is not None:
            torch.testing.assert_close(ours, right)
