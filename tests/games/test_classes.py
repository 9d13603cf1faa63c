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


def test_without_attention_it_is_the_same_network_at_a_gamma_of_0():
    """Attention adds 5/4 C^2 + 1 weights to each network, and nothing to a map while gamma is 0."""
    with_it, without = (trainer("sagan", options={"attention": on}, evaluate_samples=100).game for on in (True, False))
    for name, channels in (("generator", 16), ("discriminator", 8)):
        networks = [game.networks[name] for game in (with_it, without)]
        counts = [sum(p.numel() for p in network.parameters()) for network in networks]
        assert counts[0] - counts[1] == channels**2 * 5 // 4 + 1
        networks[1].load_state_dict(networks[0].state_dict(), strict=False)
    latents, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    images = with_it.sample(latents, labels)
    assert torch.equal(images, without.sample(latents, labels))
    evaluated = games.find("sagan").evaluator(with_it.config, with_it.run.samples, with_it.run.condition)(with_it)
    assert {"fid_own_classifier", "label_accuracy", "attention_on_shape"} <= evaluated.keys()
    assert "attention_on_shape" in with_it.figures() and "attention_on_shape" not in without.figures()
    assert len(with_it.pictures()) == 2 and len(without.pictures()) == 1


def test_where_a_discriminator_looks():
    """Each position's attention sums to 1 over the keys; evenly spread it is 1 times the even share of the shape."""
    game = trainer("sagan").game
    images, table = game.looks(3)
    assert images.shape == (3, 3, 32, 32) and table.shape == (3, 16, 16, 8, 8)
    torch.testing.assert_close(table.sum((3, 4)), torch.ones(3, 16, 16))
    layer = game.discriminator.attention
    taken = []
    hook = layer.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    with game.evaluating():
        game.discriminator(images, torch.zeros(3, dtype=torch.long))
    hook.remove()
    with torch.no_grad():
        keys = torch.nn.functional.max_pool2d(layer.phi(taken[0]), 2)
        fits = torch.einsum("c,cij->ij", layer.theta(taken[0])[1, :, 5, 7], keys[1])
    torch.testing.assert_close(table[1, 5, 7], fits.flatten().softmax(0).view(8, 8))
    game.discriminator.attention.phi = torch.nn.Conv2d(8, 1, 1, bias=False)
    torch.nn.init.zeros_(game.discriminator.attention.phi.weight)
    assert game.figures()["attention_on_shape"] == pytest.approx(1.0, rel=1e-4)
