"""LAPGAN: the paper's sizes, a pyramid that can be put together again, levels that are trained on their own."""

import pytest
import torch

from gankern import data, games, training
from gankern.games import Run
from gankern.games.lapgan import level_discriminator, level_generator
from gankern.models.layers import LAYERS


def trainer(layers="torch", size=16, labels=None, **options):
    images = data.load("digits", size)[:64]
    options = {"batch_size": 8, "width": 2, "latent": 4, "threads": 1, "size": size} | options
    config = training.configure("lapgan", "digits", images, labels, **options)
    return training.Trainer(config, layers, images, labels)


@pytest.mark.parametrize("layers", LAYERS)
def test_parameters_of_the_paper(layers):
    """From 16x16 to 32x32 with classes."""
    with torch.device("meta"):
        networks = [make(3, 32, 64, 10, LAYERS[layers]) for make in (level_generator, level_discriminator)]
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [232_579, 129_409]


@pytest.mark.parametrize("layers", LAYERS)
def test_the_pyramid_goes_up_as_it_came_down(layers):
    """up is the transpose of down, times 4; a box at the finest level, inside, keeps its mean."""
    game = trainer(layers).game
    x, y = torch.randn(2, 1, 16, 16), torch.randn(2, 1, 8, 8)
    assert (game.down(x) * y).sum().item() == pytest.approx((x * game.up(y)).sum().item() / 4, rel=1e-4)
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(game.down(torch.ones(1, 1, 16, 16))[inside], torch.ones(1, 1, 4, 4))
    torch.testing.assert_close(game.up(torch.ones(1, 1, 8, 8))[inside], torch.ones(1, 1, 12, 12))


def test_real_and_generated_have_the_same_coarse_image():
    game = trainer(size=32).game
    asked = []
    for size in game.sizes:
        game.networks[f"discriminator_{size}"].register_forward_hook(
            lambda _, x, out, size=size: asked.append((size, x[0]))
        )
        if size > 8:
            torch.nn.init.zeros_(game.networks[f"generator_{size}"].network[-1].weight)
            torch.nn.init.zeros_(game.networks[f"generator_{size}"].network[-1].bias)
    players = [player for player, _ in game.moves()]
    assert players == ["d32", "g32", "d16", "g16", "d8", "g8"]
    by_size = {size: [x for at, x in asked if at == size] for size in game.sizes}
    for size in (32, 16):  # a residual of 0 leaves up(down(the real image)), in both moves
        real, fake, again = by_size[size]
        torch.testing.assert_close(fake, game.up(game.down(real)))
        assert torch.equal(fake, again)
    torch.testing.assert_close(by_size[16][0], game.down(by_size[32][0]))
    torch.testing.assert_close(by_size[8][0], game.down(by_size[16][0]))


def test_samples_add_residuals_on_the_way_up():
    game = trainer(size=32).game
    small, middle, large = game.sample(3, seed=5)
    assert [tuple(x.shape) for x in (small, middle, large)] == [(3, 1, s, s) for s in (8, 16, 32)]
    random = torch.Generator().manual_seed(5)
    torch.randn(3, 4, generator=random)
    with game.evaluating():
        for before, after in ((small, middle), (middle, large)):
            size = after.shape[2]
            noise = 2 * torch.rand(3, 1, size, size, generator=random) - 1
            residual = game.networks[f"generator_{size}"](torch.cat([noise, game.up(before)], 1))
            torch.testing.assert_close(after, game.up(before) + residual)


def test_levels_are_trained_on_their_own():
    """A level learns the same whatever the weights of the others are."""
    a, b = trainer(size=32), trainer(size=32)
    for name in ("generator_8", "discriminator_16"):
        for parameter in b.game.networks[name].parameters():
            parameter.data.zero_()
    first, second = a.step().losses, b.step().losses
    assert all(first[player] == second[player] for player in ("d32", "g32"))
    assert first["d16"] != second["d16"] and first["g8"] != second["g8"]


def test_classes_have_a_plane():
    trained = trainer(labels=data.labels("digits")[:64], conditioning="concatenation")
    trained.step()
    game = trained.game
    assert trained.is_finite() and game.classes == 10
    one, other = (game.sample(2, 0, torch.tensor([c, c]))[-1] for c in (1, 2))
    assert not torch.equal(one, other)


def test_wrong_options():
    with pytest.raises(ValueError, match="a power of two from 16 on, got 8"):
        trainer(size=8)
    with pytest.raises(ValueError, match="conditioning must be concatenation, or left out, got projection"):
        trainer(labels=data.labels("digits")[:64], conditioning="projection")
    config = training.configure("lapgan", "digits", torch.zeros(8, 1, 32, 32))
    assert games.find("lapgan")(Run(config, "torch")).sizes == [32, 16, 8]
