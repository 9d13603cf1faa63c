"""Looking at a network does not move it on: a spectrally normalised weight iterates when it is read in training mode."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gankern
from gankern import diagnostics
from gankern.diagnostics import latent
from gankern.metrics import extractors
from gankern.nn import utils


def generator(spectral_norm):
    torch.manual_seed(0)
    return nn.Sequential(
        spectral_norm(nn.Linear(4, 4 * 4 * 4)), nn.Unflatten(1, (4, 4, 4)), nn.BatchNorm2d(4), nn.ReLU(),
        spectral_norm(nn.ConvTranspose2d(4, 4, 4, 2, 1)), nn.BatchNorm2d(4, momentum=None), nn.ReLU(),
        nn.Upsample(scale_factor=2), spectral_norm(nn.Conv2d(4, 3, 3, padding=1)), nn.Tanh(),
    )  # fmt: skip


LOOKS = {
    "checkerboard": lambda net: diagnostics.checkerboard(net, torch.randn(2, 4)),
    "project": lambda net: latent.project(net, torch.zeros(1, 3, 16, 16), 4, steps=2, starts=1),
    "accelerate and restore": lambda net: (gankern.accelerate(net), gankern.restore(net)),
    "extractor": lambda net: extractors.Extractor(nn.Sequential(net, nn.Flatten()), name="mine")(torch.randn(2, 4)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "spectral_norm",
    [parametrizations.spectral_norm, nn.utils.spectral_norm, utils.parametrizations.spectral_norm],
    ids=["parametrization", "hook", "gankern"],
)
@pytest.mark.parametrize("name", LOOKS)
def test_looking_leaves_a_network_as_it_was(name, spectral_norm, training):
    net = generator(spectral_norm).train(training)
    before = copy.deepcopy(net.state_dict())
    flags = [p.requires_grad for p in net.parameters()]
    LOOKS[name](net)
    after = net.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), after.values()))
    assert {m.training for m in net.modules()} == {training}
    assert flags == [p.requires_grad for p in net.parameters()]
