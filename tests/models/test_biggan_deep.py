"""BigGAN-deep: the paper's parameter counts, both sets of layers, truncation, bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gankern.models import SizeError
from gankern.models.biggan_deep import biggan_deep, truncated

SMALL = {"size": 32, "width": 4, "latent": 8, "embedding": 6, "num_classes": 5}
COUNTS = [
    ({"size": 128}, 50_244_484, 34_590_210),
    ({"size": 256}, 55_736_708, 38_247_426),
    ({"size": 512}, 56_019_780, 38_301_122),
    ({"size": 32, "width": 16, "latent": 32, "embedding": 32, "num_classes": 5}, 200_324, 47_906),
    ({"size": 32, "width": 64, "num_classes": 10}, 3_161_220, 733_570),
]


@pytest.mark.parametrize(("options", "generator", "discriminator"), COUNTS, ids=[str(c[1]) for c in COUNTS])
def test_parameter_counts(options, generator, discriminator, nothing_iterated):
    with torch.device("meta"):
        gan = biggan_deep(**options)
    counts = [sum(p.numel() for p in net.parameters()) for net in (gan.generator, gan.discriminator)]
    assert counts == [generator, discriminator]


def test_every_weight_has_a_spectral_norm_of_one():
    torch.manual_seed(0)
    gan = biggan_deep(**SMALL)
    labels = torch.arange(5)
    for _ in range(50):  # power iterations
        gan.discriminator(gan.generator(torch.randn(5, 8), labels), labels)
    for net in (gan.generator, gan.discriminator):
        net.eval()
        layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
        assert layers
        for layer in layers:
            assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_the_skip_has_no_weights():
    """With the last convolutions at zero a block of the generator is its first channels, doubled."""
    block = biggan_deep(**SMALL).generator.blocks[1]
    x, c = torch.randn(2, 16, 4, 4), torch.randn(2, 14)
    last = block.convolutions[3]
    nn.utils.parametrize.remove_parametrizations(last, "weight")
    with torch.no_grad():
        last.weight.zero_(), last.bias.zero_()
    torch.testing.assert_close(block(x, c), F.interpolate(x, scale_factor=2, mode="nearest"))


def test_truncation_draws_again():
    generator = torch.Generator().manual_seed(0)
    z = truncated((2000, 4), 0.5, generator)
    assert z.abs().max() <= 0.5 and z.std().item() == pytest.approx(0.2839, abs=0.01)  # scaled by 0.5 it would be 0.5
    whole = truncated((2000, 4), None, generator)
    assert whole.std().item() == pytest.approx(1, abs=0.03)
    with pytest.raises(ValueError, match="limit must be above 0"):
        truncated((2,), 0.0)


BAD = [
    (lambda: biggan_deep(64), SizeError, "sizes 32, 128, 256, 512, got 64"),
    (lambda: biggan_deep(32, width=6), ValueError, "width must be a multiple of 4"),
    (lambda: biggan_deep(32, num_classes=0), ValueError, "num_classes"),
]


@pytest.mark.parametrize(("call", "error", "says"), BAD, ids=[b[2] for b in BAD])
def test_bad_options_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_labels_out_of_range_are_named():
    gan = biggan_deep(**SMALL)
    for labels, says in ((torch.tensor([0, 5]), "labels must be from 0 to 4, got 5"), (torch.rand(2), "float32")):
        with pytest.raises(ValueError, match=says):
            gan.generator(torch.randn(2, 8), labels)
        with pytest.raises(ValueError, match=says):
            gan.discriminator(torch.randn(2, 3, 32, 32), labels)
