"""Looking at a critic does not move it on: reading a spectrally normalised weight iterates."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gankern
import gankern.nn as gnn
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


class Counted(nn.Module):
    """A parametrization that says how often it was computed."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def forward(self, x):
        self.times += 1
        return x * 1.0


def counted(layer):
    for name in ("weight", "bias"):
        if getattr(layer, name, None) is not None:
            parametrize.register_parametrization(layer, name, Counted())
    return layer


LAYERS = {
    "conv2d": (lambda: nn.Conv2d(3, 3, 3, padding=1), (2, 3, 6, 6)),
    "conv2d, unbatched": (lambda: nn.Conv2d(3, 3, 3, padding=1), (3, 6, 6)),
    "conv2d, reflected": (lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    "conv2d, 4x4": (lambda: nn.Conv2d(8, 8, 4, 2, 1), (2, 8, 8, 8)),
    "conv2d, same": (lambda: nn.Conv2d(3, 3, 3, padding="same"), (2, 3, 6, 6)),
    "conv2d and mean": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.AvgPool2d(2)), (2, 3, 6, 6)),
    "upsample and conv2d": (lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, padding=1)), (2, 3, 6, 6)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 3, 4, 2, 1), (2, 3, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 3, 3), (2, 3, 6)),
    "conv1d, unbatched": (lambda: nn.Conv1d(3, 3, 3), (3, 6)),
    "conv1d, same": (lambda: nn.Conv1d(3, 3, 3, padding="same"), (2, 3, 6)),
    "conv3d": (lambda: nn.Conv3d(3, 3, 3), (2, 3, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 3, 3), (2, 3, 6)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (2, 3, 6, 6)),
    "batch norm and relu": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), (2, 3, 6, 6)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (2, 3, 6, 6)),
    "linear": (lambda: nn.Linear(6, 6), (2, 6)),
}  # fmt: skip


def times(net):
    return {n: m.times for n, m in net.named_modules() if isinstance(m, Counted)}


def of_layer(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    net = nn.Sequential(make()).double()
    for module in list(net.modules()):
        counted(module)
    for module in net.modules():
        if isinstance(module, Counted):
            module.times = 0
    return net, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_looking_computes_no_parameter(name):
    net, x = of_layer(name)
    report = gankern.accelerate(net)
    assert str(report) and report.to_dict()["module"] == "Sequential"
    coupling.doubt(net, 2, x.ndim), coupling.coupled_layers(net), coupling.unknown_layers(net)
    if report.replaced:
        gankern.restore(net)
    assert set(times(net).values()) == {0}
    with pytest.raises(ValueError, match="no spectrally normalised layer"):
        group_spectral_norm(net)
    assert set(times(net).values()) == {0}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_an_accelerated_layer_computes_its_parameters_as_often(name, differentiated, training, way):
    """A parametrization that keeps state (a spectral norm) would go on from another one else."""
    net, x = of_layer(name)
    net.train(training)
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    for _ in range(3):
        results = [m(x.clone().requires_grad_(differentiated)) for m in (net, twin)]
        torch.testing.assert_close(*results)
        assert times(net) == times(twin)


@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_a_refusal_does_not_iterate(form):
    for make in (gnn.utils.parametrizations.spectral_norm, gnn.utils.spectral_norm):
        layer = (parametrizations if form == "parametrization" else nn.utils).spectral_norm(nn.Linear(4, 3))
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match="normalized already"):
            make(layer)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))


class LooksLikeBigGAN(nn.Conv2d):
    """Has the parts of a known family, with a weight that is computed."""

    def __init__(self):
        super().__init__(3, 3, 3)
        self.register_buffer("u0", torch.randn(1, 3))
        self.register_buffer("sv0", torch.ones(1))

    def W_(self):
        return self.weight

    def forward(self, x):
        return self._conv_forward(x, self.W_(), self.bias)


def test_a_layer_that_looks_like_a_known_one_is_not_computed():
    net = nn.Sequential(counted(LooksLikeBigGAN()))
    for module in net.modules():
        if isinstance(module, Counted):
            module.times = 0
    gankern.accelerate(net)
    assert set(times(net).values()) == {0}
