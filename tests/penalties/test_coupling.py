"""critic_step joins real and generated batches only where it is known that samples stay apart: the numbers are those of
two passes, whatever the critic has in it."""

import copy

import pytest
import torch
from torch import nn

import gankern
import gankern.nn as gnn
from gankern import models, penalties
from gankern.nn import coupling

REAL, FAKE = torch.randn(8, 3, 8, 8), 0.3 * torch.randn(8, 3, 8, 8)


class Deviation(nn.Module):
    def forward(self, x):
        return torch.cat([x, x.std(0).mean().expand(len(x), 1, *x.shape[2:])], 1)


class Similarity(nn.Module):
    def forward(self, x):
        return torch.cat([x, (-(x[:, None] - x[None]).abs().sum(2)).exp().sum(1, keepdim=True)], 1)


class ReLU(nn.ReLU):
    """The name and the base class of one that keeps samples apart, and another forward."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Attention(nn.Module):
    """Over the batch: the default of torch's attention."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0].mean(1)


def centred(module, args, output):
    return output - output.mean(0)


def hooked(critic):
    critic[0].register_forward_hook(centred)
    return critic


def overridden(critic):
    forward = critic[0].forward
    critic[0].forward = lambda x: forward(x - x.mean(0))
    return critic


def plain(*more):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.LeakyReLU(0.2), *more, nn.Flatten(), nn.LazyLinear(1))


COUPLED = {
    "deviation": lambda: plain(Deviation()),
    "similarity": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6), Similarity(), nn.Linear(7, 1)),
    "forward of its own": lambda: plain(ReLU()),
    "attention over the batch": lambda: nn.Sequential(nn.Unflatten(2, (2, 4)), nn.Flatten(2), nn.Linear(64, 12), Attention(), nn.Linear(12, 1)),
    "batch norm": lambda: plain(nn.BatchNorm2d(4)),
    "softmax over the batch": lambda: plain(nn.Softmax(0)),
    "softmax with a negative dimension": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Softmax(-2), nn.Linear(4, 1)),
    "softmax of maps, over what is no batch to it": lambda: nn.Sequential(
        nn.Flatten(2), nn.Softmax2d(), nn.Flatten(), nn.Linear(192, 1)
    ),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 1))),
    "hook": lambda: hooked(plain()),
    "overridden": lambda: overridden(plain()),
    "function": lambda: (lambda x: (x - x.mean(0)).flatten(1).square().sum(1)),
    "recurrent": lambda: nn.Sequential(nn.Flatten(2), nn.Flatten(1), nn.RNN(192, 4)),
    "gankern's": lambda: nn.Sequential(nn.Flatten(), gnn.MinibatchDiscrimination(192, 4, 3), nn.Linear(196, 1)),
    "class that was changed": lambda: plain(nn.Softshrink()),
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_equals_two_passes(name, monkeypatch):
    torch.manual_seed(0)
    critic = COUPLED[name]()
    critic(REAL)
    if name == "class that was changed":
        monkeypatch.setattr(nn.Softshrink, "forward", lambda self, x: x - x.mean(0))
    select = (lambda out: out[0][:, 0]) if name == "recurrent" else None
    twin = copy.deepcopy(critic)
    step = penalties.critic_step(critic, REAL, FAKE, penalty=None, select=select)
    of_real, of_fake = twin(REAL), twin(FAKE)
    if select is not None:
        of_real, of_fake = select(of_real), select(of_fake)
    torch.testing.assert_close(step.real_output, of_real.detach())
    torch.testing.assert_close(step.fake_output, of_fake.detach())


def passes(critic, *samples):
    """How often the critic's first leaf ran, counted by its weight's use."""
    count = 0
    first = next(m for m in critic.modules() if hasattr(m, "weight") and m.weight is not None)
    original = type(first).forward

    def forward(self, *args):
        nonlocal count
        count += self is first
        return original(self, *args)

    known = coupling._APART.get(type(first))
    type(first).forward = forward
    coupling._APART[type(first)] = forward
    try:
        penalties.critic_step(critic, *samples, penalty=None)
    finally:
        type(first).forward = original
        coupling._APART[type(first)] = known
    return count


def test_of_every_layer_of_ours_it_is_known():
    layers = {cls for cls in map(vars(gnn).get, gnn.__all__) if isinstance(cls, type) and issubclass(cls, nn.Module)}
    ours = {cls for cls in layers if cls.__module__.startswith("gankern.")}
    assert len(ours) > 40
    assert {cls.__name__ for cls in ours if cls not in coupling._APART and cls not in coupling._COUPLED} == set()


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
    ids=lambda register: register.__name__,
)
def test_under_hooks_of_all_modules_nothing_is_known(register):
    assert coupling.doubt(nn.Linear(3, 2), 4, 2) is None
    handle = register(lambda *arguments: None)
    try:
        assert coupling.doubt(nn.Linear(3, 2), 4, 2) == "hooks of all modules are registered"
    finally:
        handle.remove()


KNOWN = {
    "layers of torch": lambda: plain(nn.InstanceNorm2d(4), nn.AvgPool2d(2), nn.Dropout(0.1)),
    "evaluation": lambda: plain(nn.BatchNorm2d(4)).eval(),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 8)), nn.Flatten(), nn.utils.spectral_norm(nn.Linear(4, 1))
    ),
    "dcgan": lambda: models.dcgan(size=8, width=4, discriminator_norm="none").discriminator,
    "wgan_gp": lambda: models.wgan_gp(size=8, width=4).discriminator,
    "wgan_gp, accelerated": lambda: _accelerated(models.wgan_gp(size=8, width=4).discriminator),
    "gan": lambda: models.gan(size=8, channels=3, width=10).discriminator,
}  # fmt: skip


def _accelerated(critic):
    gankern.accelerate(critic)
    return critic


@pytest.mark.parametrize("name", KNOWN)
def test_known_critics_are_joined(name):
    critic = KNOWN[name]()
    critic(REAL)
    assert coupling.doubt(critic, 8, 4) is None
    if name not in ("spectral norm", "wgan_gp, accelerated"):
        assert passes(critic, REAL, FAKE) == 1


def test_apart_is_asked_of_the_class_itself():
    class Residual(nn.Module):
        def forward(self, x):
            return x + x.relu()

    coupling.apart(Residual)

    class Centred(Residual):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    class Inherits(Residual):
        pass

    assert coupling.doubt(nn.Sequential(Residual()), 8, 4) is None
    assert "not known" in coupling.doubt(nn.Sequential(Centred()), 8, 4)
    assert "not known" in coupling.doubt(nn.Sequential(Inherits()), 8, 4)


def test_other_conditions_for_generated_samples():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.embedding = nn.Linear(192, 4), nn.Embedding(5, 4)

        def forward(self, x, labels, *, scale=1.0):
            return scale * (self.features(x.flatten(1)).tanh() * self.embedding(labels)).sum(1)

    torch.manual_seed(0)
    critic, twin = Conditional(), Conditional()
    twin.load_state_dict(critic.state_dict())
    a, b = torch.arange(8) % 5, torch.arange(1, 9) % 5
    step = penalties.critic_step(
        critic, REAL, FAKE, penalty=penalties.R2Penalty(weight=1.0, half=False), critic_args=(a,),
        critic_kwargs={"scale": 2.0}, fake_args=(b,), fake_kwargs={"scale": 3.0},
    )  # fmt: skip
    step.loss.backward()
    x = FAKE.clone().requires_grad_()
    of_real, of_fake = twin(REAL, a, scale=2.0), twin(FAKE, b, scale=3.0)
    (g,) = torch.autograd.grad(twin(x, b, scale=3.0).sum(), x, create_graph=True)
    loss = of_fake.mean() - of_real.mean() + g.square().flatten(1).sum(1).mean()
    loss.backward()
    torch.testing.assert_close(step.loss, loss)
    for p, q in zip(critic.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    with pytest.raises(ValueError, match="joint=True with fake_args"):
        penalties.critic_step(critic, REAL, FAKE, critic_args=(a,), fake_args=(b,), joint=True)


def test_advice_that_can_help():
    class Packed(nn.Module):
        def forward(self, x):
            return x.reshape(len(x) // 2, -1).sum(1)

    class TimeFirst(nn.Module):
        def forward(self, x):
            return x.square().sum((0, 2))

    with pytest.raises(ValueError, match="pass them packed"):
        penalties.critic_step(Packed(), REAL, FAKE)
    penalties.critic_step(lambda x: x.square().flatten(1).sum(1), REAL.view(4, 6, 8, 8), FAKE.view(4, 6, 8, 8))
    sequences, critic = torch.randn(2, 5, 3, 4), TimeFirst()
    with pytest.raises(ValueError, match=r"transpose\(0, 1\)"):
        penalties.critic_step(critic, *sequences.transpose(1, 2))
    step = penalties.critic_step(lambda x: critic(x.transpose(0, 1)), *sequences)
    assert step.real_output.shape == (5,)
