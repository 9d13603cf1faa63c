"""Unrolled GAN and MRGAN: sizes, the unrolled gradient against a hand-written one, bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gankern import data, games, training
from gankern.games import Run
from gankern.games.unrolled import Adam, unrolled_value

RING = data.POINTS["8gaussians"]


def made(name, layers="torch", share=(0, 1), **options):
    config = training.configure(name, "8gaussians", RING, threads=1, **options)
    with torch.device("meta"):
        return games.find(name)(Run(config, layers, share=share, samples=RING))


@pytest.mark.parametrize("layers", ["torch", "gankern"])
def test_parameters_of_the_notebook(layers):
    networks = made("unrolled", layers).networks
    assert [sum(p.numel() for p in n.parameters()) for n in networks.values()] == [49_666, 17_025]


def test_adam_as_a_function_is_adam():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))]
    optimiser = torch.optim.Adam(parameters, lr=1e-2, betas=(0.5, 0.999))
    for _ in range(4):
        rule, before = Adam.of(optimiser), [p.detach().clone() for p in parameters]
        gradients = tuple(torch.randn_like(p) for p in parameters)
        for p, g in zip(parameters, gradients):
            p.grad = g
        ahead = rule(before, gradients)
        optimiser.step()
        torch.testing.assert_close(ahead, [p.detach() for p in parameters])
    assert int(rule.step[0]) == 4


def test_unrolled_gradient_against_differences():
    """K = 3 in double precision, with Adam's slots in the middle of a training: the derivative of V(theta^K) is the
    limit of its differences, not what is left of it where theta^K is taken for a constant."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    optimiser = torch.optim.Adam(critic.parameters(), lr=0.05, betas=(0.5, 0.999))
    real, fake = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        optimiser.zero_grad()
        (F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()).backward()
        optimiser.step()
    kept = {name: x.clone() for name, x in critic.state_dict().items()}

    def unrolled(x, steps=3):
        return unrolled_value(critic, Adam.of(optimiser), real, x, steps)

    assert torch.autograd.gradcheck(unrolled, (fake,), eps=1e-6, atol=1e-7)
    (through,) = torch.autograd.grad(unrolled(fake), fake)
    # The discriminator is as it was: weights and running statistics.
    assert all(torch.equal(x, kept[name]) for name, x in critic.state_dict().items())
    for _ in range(3):  # lookahead: the same weights, as constants
        optimiser.zero_grad()
        (F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()).backward()
        optimiser.step()
    (ahead,) = torch.autograd.grad(F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean(), fake)
    assert not torch.allclose(ahead, through, rtol=1e-2)


def test_value_ahead_is_the_value_after_the_discriminators_own_steps():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)).double()  # with dead units: gradients of 0
    nn.init.constant_(critic[0].bias, -1.0)
    optimiser = torch.optim.Adam(critic.parameters(), lr=0.05)
    real, fake = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    ahead = unrolled_value(critic, Adam.of(optimiser), real, fake, 4)
    (gradient,) = torch.autograd.grad(ahead, fake)
    for _ in range(4):
        optimiser.zero_grad()
        (F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()).backward()
        optimiser.step()
    after = F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()
    torch.testing.assert_close(ahead, after, rtol=1e-9, atol=1e-9)
    assert gradient.isfinite().all()


def test_wrong_options():
    with pytest.raises(ValueError, match="unroll must be 0 or more, got -1"):
        made("unrolled", options={"unroll": -1})
    with pytest.raises(ValueError, match="must be adam, got rmsprop"):
        made("unrolled", optimiser="rmsprop")
    with pytest.raises(ValueError, match="in one process; got 2"):
        made("unrolled", share=(0, 2))


@pytest.mark.parametrize("loss", ["minimax", "non_saturating"])
def test_mrgan_takes_reconstructions_for_real(loss):
    """The second term is -log D, where the loss of samples is log(1 - D) too: the more D likes G(E(x)), the smaller."""
    game = made("mrgan", loss=loss, options={"distance": 0.2, "adversarial": 0.2})
    assert sum(p.numel() for p in game.networks["encoder"].parameters()) == 2 * 128 + 128 + 128 * 129 + 256 * 129
    real = torch.randn(6, 2)
    game.networks["encoder"], game.networks["generator"] = nn.Identity(), nn.Sequential()  # G(E(x)) = x
    values = []
    for logit in (-1.0, 2.0):
        game.networks["discriminator"] = lambda x, logit=logit: torch.full((len(x), 1), logit)
        values.append(game.regulariser(real).item())
        assert values[-1] == pytest.approx(0.2 * F.softplus(torch.tensor(-logit)).item())
    assert values[1] < values[0]
    game.networks["generator"] = lambda z: z + 3.0
    assert game.regulariser(real).item() == pytest.approx(values[1] + 0.2 * 18.0, rel=1e-5)
