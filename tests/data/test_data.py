"""Ranges and shapes of the image sets, and batches that can be stopped and resumed."""

import pytest
import torch

from gankern import data


@pytest.mark.parametrize(("name", "shape"), [("mnist5k", (5000, 1, 32, 32)), ("digits", (1797, 1, 8, 8))])
def test_images(name, shape):
    images = data.load(name)
    assert images.shape == shape
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1.0, 1.0)


def test_mnist_is_padded_not_stretched():
    images = data.load("mnist5k")
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert (images[:, :, border] == -1.0).all()
    assert (images[:, :, 2:-2, 2:-2].amax(dim=(1, 2, 3)) > 0.9).all()  # a digit in every image


def test_resize():
    images = data.load("digits", size=16)
    assert images.shape == (1797, 1, 16, 16)
    assert images.min() >= -1.0 and images.max() <= 1.0
    with pytest.raises(ValueError, match="size"):
        data.load("digits", size=0)


def test_resize_of_data_that_is_no_square():
    wide = torch.zeros(1, 1, 4, 8)
    wide[:, :, :, 2:6] = 1.0
    assert torch.equal(data.resize(wide, 2), torch.ones(1, 1, 2, 2))


def test_halving_is_by_means():
    images = torch.rand(2, 3, 8, 8)
    expected = images.view(2, 3, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(data.resize(images, 4), expected)


def test_channels():
    grey = data.load("digits")
    assert torch.equal(data.load("digits", channels=3), grey.expand(-1, 3, -1, -1))
    assert data.load("shapes", size=16)[:2].shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        data.load("digits", channels=2)
    with pytest.raises(ValueError, match="shapes has 3 channels"):
        data.load("shapes", channels=1)


@pytest.mark.parametrize("name", ["digits", "mnist5k", "shapes"])
def test_labels(name):
    labels = data.labels(name)
    assert len(labels) == len(data.load(name))
    assert labels.dtype == torch.int64
    assert labels.bincount().min() > 100  # every class is there


def test_a_caller_may_write_into_its_images():
    data.load("digits").fill_(7.0)
    assert data.load("digits").max() == 1.0


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match=r"unknown data 'mnist'; did you mean mnist5k\? .*folder of images"):
        data.load("mnist")
    with pytest.raises(ValueError, match="unknown data"):
        data.labels("mnist")


def test_an_epoch_sees_every_image_once():
    batches = data.EndlessBatches(torch.arange(12.0).view(12, 1, 1, 1), batch_size=4, seed=3)
    first = torch.cat([next(batches) for _ in range(3)]).flatten()
    second = torch.cat([next(batches) for _ in range(3)]).flatten()
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()


def test_an_incomplete_batch_is_dropped():
    batches = data.EndlessBatches(torch.arange(10.0).view(10, 1, 1, 1), batch_size=4, seed=0)
    for _ in range(5):
        epoch = torch.cat([next(batches), next(batches)]).flatten().tolist()
        assert len(set(epoch)) == 8


def test_a_seed_decides_the_batches():
    images = torch.arange(100.0).view(100, 1, 1, 1)
    first, again, other = (data.EndlessBatches(images, 10, seed) for seed in (1, 1, 2))
    torch.manual_seed(123)  # what others draw does not matter
    drawn = [torch.cat([next(b) for _ in range(25)]) for b in (first, again, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("steps", [0, 1, 7, 10, 23])
def test_resume_anywhere(steps):
    images = torch.arange(100.0).view(100, 1, 1, 1)
    straight = data.EndlessBatches(images, 10, seed=5)
    for _ in range(steps):
        next(straight)
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in straight.state_dict().items()}
    resumed = data.EndlessBatches(images, 10, seed=99)
    resumed.load_state_dict(state)
    for _ in range(25):
        assert torch.equal(next(straight), next(resumed))


def test_refusals():
    images = torch.zeros(10, 1, 8, 8)
    for batch_size in (0, 11):
        with pytest.raises(ValueError, match="between 1 and the 10 images"):
            data.EndlessBatches(images, batch_size, seed=0)
    with pytest.raises(ValueError, match="10 images, here are 8"):
        data.EndlessBatches(images[:8], 2, 0).load_state_dict(data.EndlessBatches(images, 2, 0).state_dict())
