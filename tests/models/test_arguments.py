"""Models told by wrong options and called with wrong labels: the message names them."""

import pytest
import torch

from gankern import models

OPTIONS = {"size": 8, "channels": 1, "latent": 4, "width": 2}


@pytest.mark.parametrize("bad", [None, "8", 8.0, [8], True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", sorted(models.MODELS.keys() - models.FOR_POINTS))
def test_options_that_are_no_integers_are_named(name, option, bad):
    with pytest.raises((TypeError, ValueError), match=rf"{option} must be .*got"):
        models.build(name, **OPTIONS | {"size": 32 if name == "sngan" else 8} | {option: bad})


@pytest.mark.parametrize("bad", [None, ["dcgan"], 3])
def test_names_that_are_none(bad):
    with pytest.raises(TypeError, match="model must be a name"):
        models.build(bad)
    with pytest.raises(TypeError, match="set of layers must be a name"):
        models.build("dcgan", **OPTIONS, layers=bad)


@pytest.mark.parametrize("conditioning", ["projection", "concatenation"])
@pytest.mark.parametrize("layers", ["torch", "gankern"])
def test_labels(conditioning, layers):
    gan = models.build("sn_dcgan", **OPTIONS, num_classes=3, conditioning=conditioning, layers=layers)
    gan.generator.eval(), gan.discriminator.eval()
    latents, images, labels = torch.randn(4, 4), torch.randn(4, 1, 8, 8), torch.tensor([0, 2, 1, 2])
    for network, x in ((gan.generator, latents), (gan.discriminator, images)):
        expected = network(x, labels)
        for dtype in (torch.int32, torch.uint8, torch.int16):  # any integers are labels
            assert torch.equal(network(x, labels.to(dtype)), expected)
        for bad, words in (
            (labels + 1, "labels must be from 0 to 2, got 3"),
            (labels - 1, "labels must be from 0 to 2, got -1"),
            (labels == 1, "labels must be integers"),
            (labels.float(), "labels must be integers"),
            (labels[:2], "labels must be 4 integers"),
            (labels[:, None], "labels must be 4 integers"),
            ([0, 2, 1, 2], "labels must be a tensor, got a list"),
            ("cat", "labels must be a tensor, got 'cat'"),
            (None, "has 3 classes: call it with labels"),
        ):
            with pytest.raises((TypeError, ValueError), match=words):
                network(x, bad)
        with pytest.raises(TypeError, match="input must be a tensor, got None"):
            network(None, labels)
