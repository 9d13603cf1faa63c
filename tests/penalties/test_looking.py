"""Looking at a critic does not move it on: reading a spectrally normalised weight iterates."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gankern
from gankern import penalties
from gankern.nn import coupling
from gankern.nn.utils import group_spectral_norm


def critic():
    torch.manual_seed(0)
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1)), nn.LeakyReLU(0.2), nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(256, 1)),
    ).double()  # fmt: skip


@pytest.mark.parametrize(
    "prepare", [lambda net: net, group_spectral_norm, gankern.accelerate], ids=["torch", "grouped", "accelerated"]
)
@pytest.mark.parametrize("joint", [False, True, None])
def test_a_critic_step_iterates_as_often_as_its_passes(prepare, joint):
    real, fake = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    net, plain = critic(), critic()
    prepare(net)
    step = penalties.critic_step(net, real, fake, penalty=None, joint=joint)
    if joint is False:
        loss = plain(real).mean()
        loss = plain(fake).mean() - loss
    else:
        both = plain(torch.cat([real, fake]))
        loss = both[4:].mean() - both[:4].mean()
    torch.testing.assert_close(step.loss, loss, rtol=1e-10, atol=1e-10)
    for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_doubt_changes_nothing():
    net = critic()
    before = copy.deepcopy(net.state_dict())
    assert coupling.doubt(net, 4, 4) is None
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
