"""A critic's step puts torch's convolutions on this library's kernels only where the critic may call one."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

import gankern.nn as gnn
from gankern import models
from gankern.penalties import critic_step
from gankern.tangent.convolutions import fast_convolutions


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight, padding=1)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * 2, self.bias)


def watched(critic):
    return not isinstance(fast_convolutions(critic, torch.zeros(1, 3, 8, 8)), contextlib.nullcontext)


def test_where_there_is_something_to_do():
    for layer in (nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), Calls(), OwnForward(3, 4, 3)):
        assert watched(nn.Sequential(layer, nn.ReLU(), nn.Flatten()))
    replaced = gnn.Conv2d(3, 4, 3)
    replaced.forward = lambda x: F.conv2d(x, replaced.weight)
    assert watched(replaced)
    for layers in ("torch", "gankern"):
        critic = models.build("dcgan", size=16, width=4, layers=layers).discriminator
        assert watched(critic) == (layers == "torch")
    ours = (gnn.Conv2d(3, 4, 3), gnn.ConvTranspose2d(3, 4, 4, 2, 1), gnn.EqualizedConv2d(3, 4, 3, padding=1))
    assert not watched(nn.Sequential(*ours, gnn.BatchNormAct2d(4), nn.Linear(2, 2)))


def test_the_numbers_are_the_same():
    torch.manual_seed(0)
    critic = models.build("dcgan", size=16, width=4, layers="gankern").discriminator.double()
    twin = models.build("dcgan", size=16, width=4, layers="torch").discriminator.double()
    twin.load_state_dict(critic.state_dict())
    real, fake = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)
    for network in (critic, twin):
        critic_step(network, real, fake, penalty=None).loss.backward()
    for mine, right in zip(critic.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, right.grad, rtol=1e-9, atol=1e-10)
