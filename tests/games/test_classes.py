"""SAGAN and BigGAN as games: two rates, orthogonal regularisation, standing statistics, bad options."""

import pytest
import torch

from gankern import data, games, losses, training

NAMES = ["sagan", "biggan", "biggan_deep"]


def trainer(name, **options):
    samples = data.load("shapes", 32)
    labels = data.condition("shapes", samples, "labels")
    options = {"batch_size": 4, "threads": 1, "steps": 2, "width": 4, "latent": 8} | options
    config = training.configure(name, "shapes", samples, labels, **options)
    return training.Trainer(config, "gankern", samples, labels)


@pytest.mark.parametrize("name", NAMES)
def test_the_discriminator_learns_four_times_as_fast(name):
    players = trainer(name).game.players
    assert players["d"].lr == 4e-4 and players["g"].lr is None
    assert games.find(name).preset["lr"] == 1e-4


def test_orthogonal_regularisation_is_added_to_both_losses():
    found = []
    for weight in (0.0, 0.5):
        game = trainer("biggan", options={"orthogonal": weight}).game
        losses_of = []
        torch.manual_seed(0)
        for network, loss in (
            (game.discriminator, game._discriminator_loss(0)),
            (game.generator, game._generator_loss()),
        ):
            embedded = {id(p) for m in network.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
            weights = [p for p in network.parameters() if p.ndim > 1 and id(p) not in embedded]
            losses_of.append((loss(slice(None)).item(), losses.orthogonal_penalty(weights).item()))
        found.append(losses_of)
    for (plain, penalty), (regularised, _) in zip(*found):
        assert penalty > 0 and regularised == pytest.approx(plain + 0.5 * penalty, rel=1e-4)


def test_samples_are_of_standing_statistics():
    game = trainer("biggan_deep", options={"standing": 2}).game
    network = game.average()
    assert network is not game.generator and not network.training

    def mean(network):
        return next(m.running_mean for m in network.modules() if hasattr(m, "running_mean"))

    assert not torch.equal(mean(network), mean(game.generator))
    assert torch.equal(mean(network), mean(game.average()))  # always of the same latents


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"conditioning": "concatenation"}, "conditioning must be projection, got concatenation"),
        ({"options": {"orthogonal": -1.0}}, "option orthogonal must be 0 or more, got -1.0"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        trainer("biggan", **options)
