"""InfoGAN: the paper's sizes, and the bound of the information against its definition."""

from math import log

import pytest
import torch

from gankern import data, games, training
from gankern.games import Run


def count(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


@pytest.mark.parametrize(
    "size, generator, discriminator, q", [(28, 6_652_481, 6_559_169, 133_004), (32, 8_624_321, 8_525_249, 133_004)]
)
@pytest.mark.parametrize("layers", ["torch", "gankern"])
def test_parameters_of_the_paper(size, generator, discriminator, q, layers):
    images = torch.zeros(8, 1, size, size)
    config = training.configure("infogan", "mnist5k", images, latent=62)
    with torch.device("meta"):
        networks = games.find("infogan")(Run(config, layers)).networks
    assert count(networks["generator"]) == generator
    assert count(networks["trunk"], networks["head"]) == discriminator
    assert count(networks["q"]) == q


def test_information_by_its_definition():
    config = training.configure("infogan", "digits", data.load("digits"), options={"classes": 3, "numbers": 1})
    game = games.find("infogan")(Run(config, "torch"))
    features, classes, numbers = torch.randn(6, 128), torch.arange(6) % 3, torch.rand(6, 1)
    out = game.networks["q"](features)
    right = (out[:, :3].log_softmax(1)[torch.arange(6), classes] - 0.5 * (numbers - out[:, 3:])[:, 0] ** 2).mean()
    torch.testing.assert_close(game.information(features, classes, numbers), right + log(3))


def test_sizes_that_cannot_be_halved():
    with pytest.raises(ValueError, match="halved twice"):
        games.find("infogan")(Run(training.configure("infogan", "digits", torch.zeros(8, 1, 30, 30)), "torch"))
