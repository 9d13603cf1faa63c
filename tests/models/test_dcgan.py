"""DCGAN and its spectrally normalised form: architecture, spectral norms, sizes."""

import pytest
import torch

from gankern import models


def test_sn_dcgan_discriminator_is_3_64_128_256_512():
    gan = models.sn_dcgan(size=64, channels=3)
    convolutions = [m for m in gan.discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [tuple(c.weight.shape) for c in convolutions] == [
        (64, 3, 4, 4),
        (128, 64, 4, 4),
        (256, 128, 4, 4),
        (512, 256, 4, 4),
    ]
    assert gan.discriminator.head.linear.weight.shape == (1, 512 * 4 * 4)


@pytest.mark.parametrize("name", ["dcgan", "sn_dcgan"])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3), (32, 1), (64, 3), (128, 1)])
def test_shapes(name, size, channels):
    gan = models.build(name, size=size, channels=channels, latent=10, width=4)
    images = gan.generator(torch.randn(3, 10))
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() <= 1.0
    assert gan.discriminator(images).shape == (3,)


def test_channels_stop_doubling_at_eight_times_the_width():
    gan = models.dcgan(size=256, width=4)
    widest = max(m.out_channels for m in gan.discriminator.modules() if isinstance(m, torch.nn.Conv2d))
    assert widest == 32


@pytest.mark.parametrize(("source", "target"), [("torch", "gankern"), ("gankern", "torch")])
def test_state_dict_moves_between_the_sets_of_layers(source, target):
    torch.manual_seed(0)
    first = models.sn_dcgan(size=32, channels=1, width=8, layers=source).discriminator
    images = torch.randn(4, 1, 32, 32)
    first(images)  # a training forward, so that u and v have moved on
    second = models.sn_dcgan(size=32, channels=1, width=8, layers=target).discriminator
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(images), first(images), rtol=1e-5, atol=1e-6)


def test_spectral_norm_of_every_convolution_is_one():
    discriminator = models.sn_dcgan(size=32, channels=1, width=8, layers="gankern").discriminator
    for _ in range(200):
        discriminator(torch.randn(1, 1, 32, 32))
    discriminator.eval()
    for module in discriminator.modules():
        if isinstance(module, torch.nn.Conv2d):
            norm = torch.linalg.matrix_norm(module.weight.detach().flatten(1), ord=2)
            assert norm.item() == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("size", [0, -8, 4, 7, 28, 48, 100])
def test_sizes_that_are_not_powers_of_two(size):
    with pytest.raises(ValueError, match="power of two"):
        models.sn_dcgan(size=size)


def test_the_nearest_sizes_are_offered():
    with pytest.raises(ValueError, match="nearest are 16 and 32"):
        models.dcgan(size=28)


@pytest.mark.parametrize("option", ["width", "channels", "latent"])
def test_options_below_one(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        models.dcgan(**{option: 0})
