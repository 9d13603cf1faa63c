"""SAGAN: the paper's parameter counts, where attention is, both sets of layers, bad input."""

import pytest
import torch

from gankern.models import SizeError
from gankern.models.sagan import sagan

SMALL = {"size": 32, "width": 4, "latent": 8, "num_classes": 5}


def test_parameter_counts():
    with torch.device("meta"):
        gan = sagan()
    counts = [sum(p.numel() for p in net.parameters()) for net in (gan.generator, gan.discriminator)]
    assert counts == [42_078_852, 39_463_618]


@pytest.mark.parametrize(
    ("options", "side"), [({"size": 128, "width": 2, "latent": 8, "num_classes": 5}, 32), (SMALL, 16)]
)
def test_where_attention_is(options, side):
    gan, seen = sagan(**options), []
    for net in (gan.generator, gan.discriminator):
        net.attention.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[2:])))
    labels = torch.tensor([1, 4])
    images = gan.generator(torch.randn(2, 8), labels)
    assert images.shape == (2, 3, options["size"], options["size"])
    assert gan.discriminator(images, labels).shape == (2,)
    assert seen == [(side, side)] * 2


def test_bad_input_is_named():
    with pytest.raises(SizeError, match="sizes 32, 128, got 64"):
        sagan(64)
    with pytest.raises(ValueError, match="num_classes"):
        sagan(32, num_classes=0)
    gan = sagan(**SMALL)
    with pytest.raises(ValueError, match="labels must be from 0 to 4, got 5"):
        gan.generator(torch.randn(1, 8), torch.tensor([5]))
