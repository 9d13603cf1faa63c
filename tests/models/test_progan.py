"""ProGAN: the paper's table, growing, fading in, and equalised learning rates."""

import math

import pytest
import torch
import torch.nn.functional as F

from gankern import models
from gankern.models.progan import channels_at, fade


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module", params=models.LAYERS)
def full(request):
    return models.progan(layers=request.param)


def test_published_parameter_counts(full):
    assert count(full.generator) == 23_079_115
    assert count(full.discriminator) == 23_087_249
    # The paper's own figures, 23.1M each, are of the last resolution's path.
    assert count(full.generator) - sum(count(rgb) for rgb in full.generator.to_rgb[:-1]) == 23_071_507
    assert count(full.discriminator) - sum(count(rgb) for rgb in full.discriminator.from_rgb[:-1]) == 23_077_137


def test_channels_of_the_papers_table():
    table = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
    assert {resolution: channels_at(resolution) for resolution in table} == table


@pytest.mark.parametrize("layers", models.LAYERS)
def test_every_resolution(layers):
    gan = models.progan(size=64, width=8, latent=5, layers=layers)
    for level in range(5):
        for alpha in (0.0, 0.3, 1.0):
            resolution = 4 << level
            for network in (gan.generator, gan.discriminator):
                network.resize(resolution, alpha)
            images = gan.generator(torch.randn(4, 5))
            assert images.shape == (4, 3, resolution, resolution)
            assert gan.discriminator(images).shape == (4,)


def in_double(**options):
    torch.manual_seed(0)
    gan = models.progan(**options)
    gan.generator.double()
    gan.discriminator.double()
    return gan


@pytest.mark.parametrize("layers", models.LAYERS)
def test_a_new_block_changes_nothing_at_first(layers):
    """At alpha 0 the generator gives the old images, pixels doubled, and the discriminator the old logits of them."""
    gan = in_double(size=16, width=8, latent=5, layers=layers)
    latents = torch.randn(4, 5, dtype=torch.float64)
    for network in (gan.generator, gan.discriminator):
        network.resize(8)
    images = gan.generator(latents)
    logits = gan.discriminator(images)
    for network in (gan.generator, gan.discriminator):
        network.resize(16, 0.0)
    doubled = gan.generator(latents)
    torch.testing.assert_close(doubled, images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(gan.discriminator(doubled), logits)


def test_fade_in_is_linear_in_alpha():
    torch.manual_seed(0)
    gan = models.progan(size=16, width=8, latent=5)
    latents = torch.randn(4, 5)
    images = {}
    for alpha in (0.0, 0.25, 1.0):
        gan.generator.resize(16, alpha)
        images[alpha] = gan.generator(latents)
    torch.testing.assert_close(images[0.25], 0.75 * images[0.0] + 0.25 * images[1.0])
    # Real images fade alike.
    real = torch.randn(2, 3, 16, 16)
    coarse = F.avg_pool2d(real, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(fade(real, 0.25), 0.75 * coarse + 0.25 * real)
    assert fade(real, 1.0) is real


@pytest.mark.parametrize("layers", models.LAYERS)
def test_forward_by_hand(layers):
    """The whole generator and discriminator at 8×8, from the state_dict alone, in plain formulas."""
    gan = in_double(size=8, width=6, latent=5, layers=layers)
    with torch.no_grad():
        for parameter in [*gan.generator.parameters(), *gan.discriminator.parameters()]:
            if parameter.ndim == 1:
                parameter.normal_()
    g = {key: value for key, value in gan.generator.state_dict().items()}
    d = {key: value for key, value in gan.discriminator.state_dict().items()}

    def norm(x):
        return x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()

    def leaky(x):
        return torch.where(x < 0, 0.2 * x, x)

    def conv(x, state, key, padding, gain=2**0.5):
        weight = state[f"{key}.weight"]
        return F.conv2d(x, weight * gain / math.sqrt(weight[0].numel()), state[f"{key}.bias"], padding=padding)

    z = torch.randn(8, 5, dtype=torch.float64)
    # 4×4: the paper's "conv 4×4" of the latent as a 1×1 map, which is a dense layer with a gain of √2/4.
    weight = g["blocks.0.0.weight"] * math.sqrt(2) / 4 / math.sqrt(5)
    x = torch.einsum("nl,lchw->nchw", norm(z), weight) + g["blocks.0.0.bias"][:, None, None]
    x = norm(leaky(x))
    x = norm(leaky(conv(x, g, "blocks.0.1", 1)))
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = norm(leaky(conv(x, g, "blocks.1.0", 1)))
    x = norm(leaky(conv(x, g, "blocks.1.1", 1)))
    images = conv(x, g, "to_rgb.1", 0, gain=1.0)
    torch.testing.assert_close(gan.generator(z), images, rtol=1e-9, atol=1e-11)

    x = leaky(conv(images, d, "from_rgb.1.0", 0))
    x = leaky(conv(x, d, "blocks.1.0", 1))
    x = leaky(conv(x, d, "blocks.1.2", 1))
    x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    deviations = torch.empty(8, 1, 4, 4, dtype=torch.float64)
    for i in range(8):  # sample i's group: those with the same i mod (8/4)
        group = x[i % 2 :: 2]
        deviations[i] = ((group - group.mean(0)).pow(2).mean(0) + 1e-8).sqrt().mean()
    x = torch.cat([x, deviations], 1)
    x = leaky(conv(x, d, "blocks.0.1", 1))
    x = leaky(conv(x, d, "blocks.0.3", 0))
    logits = x.flatten(1) @ (d["head.weight"] / math.sqrt(6)).T + d["head.bias"]
    torch.testing.assert_close(gan.discriminator(images), logits[:, 0], rtol=1e-9, atol=1e-11)


def test_initial_weights_are_standard_normal_and_activations_of_unit_size(full):
    for network in (full.generator, full.discriminator):
        for key, parameter in network.named_parameters():
            if key.endswith("bias"):
                assert not parameter.any(), key
            elif parameter.numel() > 10_000:
                assert abs(parameter.mean().item()) < 0.05, key
                assert abs(parameter.std().item() - 1.0) < 0.05, key


def test_state_dict_remembers_the_resolution():
    gan = models.progan(size=16, width=4, latent=5)
    gan.generator.resize(8, 0.7)
    other = models.progan(size=16, width=4, latent=5).generator
    other.load_state_dict(gan.generator.state_dict())
    assert (other.resolution, other.alpha) == (8, 0.7)


def test_refusals():
    gan = models.progan(size=16, width=4, latent=5)
    with pytest.raises(ValueError, match="power of two, from 4 to 16, got 32; the nearest is 16"):
        gan.generator.resize(32)
    with pytest.raises(ValueError, match="got 12; the nearest are 8 and 16"):
        gan.generator.resize(12)
    with pytest.raises(ValueError, match="alpha must be from 0"):
        gan.generator.resize(8, 1.5)
    with pytest.raises(ValueError, match="runs at 16x16 now, and got images of 8x8"):
        gan.discriminator(torch.zeros(4, 3, 8, 8))
    with pytest.raises(ValueError, match="power of two, from 4 to 1024, got 2048"):
        models.progan(size=2048)
    with pytest.raises(ValueError, match="6 is not divisible by group_size 4"):
        gan.discriminator(torch.zeros(6, 3, 16, 16))
