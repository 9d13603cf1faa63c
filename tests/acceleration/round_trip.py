"""A script: accelerate, compile, train, evaluate, another batch size, export, restore, with four networks in one process;
equal to the original throughout. test_round_trip.py runs it."""

import copy
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern
from gankern.acceleration import _chains, _convolutions, _functions, _norms, _root

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # in double precision


class Generator(nn.Module):
    """Upsampling, batch norm and functions in blocks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(F.relu(self.norm(self.a(F.interpolate(x, scale_factor=2))))))


class Critic(nn.Module):
    """A mean behind a convolution, and the deviation of the minibatch in the middle of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(9, 8, 3, padding=1), nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(F.avg_pool2d(self.a(x), 2), 0.2)
        deviation = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()
        x = torch.cat([x, deviation.view(1, 1, 1, 1).expand(x.shape[0], 1, *x.shape[2:])], 1)
        return self.c(F.relu(self.b(x)).flatten(1))


def normalised(form) -> nn.Module:
    return nn.Sequential(
        form(nn.Conv2d(8, 8, 3, padding=1)), nn.AvgPool2d(2), nn.LeakyReLU(0.2), nn.Flatten(), form(nn.Linear(128, 1))
    )


NETWORKS = {
    "generator": Generator,
    "critic": Critic,
    "spectral norm, hook": lambda: normalised(nn.utils.spectral_norm),
    "spectral norm, parametrization": lambda: normalised(nn.utils.parametrizations.spectral_norm),
}


def training_step(model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimiser.zero_grad()
    y = model(x)
    y.square().sum().backward()
    optimiser.step()
    return y.detach()


def same_state(net: nn.Module, twin: nn.Module) -> None:
    torch.testing.assert_close(dict(twin.state_dict()), dict(net.state_dict()), **CLOSE)


def round_trip(name: str) -> None:
    torch.manual_seed(0)
    net = NETWORKS[name]().double()
    twin = copy.deepcopy(net)
    pristine = [dict(m.__dict__) for m in twin.modules()]
    x = torch.randn(4, 8, 8, 8, dtype=torch.float64)

    assert gankern.accelerate(twin).replaced
    run = torch.compile(twin, backend="aot_eager")
    optimisers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (net, twin)]
    for batch in (x, 2 * x, x):  # train
        results = [training_step(m, o, batch) for m, o in zip((net, run), optimisers)]
        torch.testing.assert_close(*results, **CLOSE)
    same_state(net, twin)
    net.eval(), run.eval()  # evaluate, with and without a graph
    torch.testing.assert_close(run(x), net(x), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(run(x), net(x), **CLOSE)
    for count in (2, 6):  # other batch sizes, compiled and not, in either mode
        torch.testing.assert_close(run(x.repeat(2, 1, 1, 1)[:count]), net(x.repeat(2, 1, 1, 1)[:count]), **CLOSE)
        torch.testing.assert_close(twin(x.repeat(2, 1, 1, 1)[:count]), net(x.repeat(2, 1, 1, 1)[:count]), **CLOSE)
    net.train(), run.train()
    for model in (run, twin):
        results = [training_step(m, o, x[:2]) for m, o in zip((net, model), optimisers)]
        torch.testing.assert_close(*results, **CLOSE)
    same_state(net, twin)
    net.eval(), run.eval()
    program = torch.export.export(twin, (x,)).module()
    torch.testing.assert_close(program(x), net(x), **CLOSE)
    gankern.restore(run)
    same_state(net, twin)
    net.load_state_dict(twin.state_dict())
    assert torch.equal(twin(x), net(x))
    for module, before in zip(twin.modules(), pristine, strict=True):
        added = module.__dict__.keys() - before.keys()  # torch.compile notes something in each module, too
        assert not added & {"forward", "_gankern_changes", "__prepare_scriptable__"}, added
    torch.testing.assert_close(run(x), net(x), **CLOSE)  # what was compiled is the original's now


def main() -> None:
    warnings.simplefilter("ignore")
    # What is for large tensors alone is done for these small ones too.
    _functions.FROM.update(cpu=0, cuda=0)
    _chains.FROM.update(dict.fromkeys(_chains.FROM, 0))
    _convolutions.CALL, _norms.LARGE = -math.inf, 1
    for cost in ("operation", "forward", "layer"):
        setattr(_root.Gains, cost, 0.0)
    for name in NETWORKS:
        round_trip(name)
        print(name, flush=True)


if __name__ == "__main__":
    main()
