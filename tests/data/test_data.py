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


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: data.load(None), "data must be a name .*None"),
        (lambda: data.load(["digits"]), "data must be a name .*list"),
        (lambda: data.labels(3), "data must be a name .*3"),
        (lambda: data.load("digits", size="8"), "size must be an integer, got '8'"),
        (lambda: data.load("digits", size=8.0), "size must be an integer, got 8.0"),
        (lambda: data.load("digits", channels="3"), "channels must be 1 or 3, got '3'"),
        (lambda: data.load("digits", on_error=None), "on_error must be 'stop' or 'skip', got None"),
        (lambda: data.ImageFolder(None), "folder must be a path, got None"),
        (lambda: data.ImageFolder(".", size="8"), "size must be an integer"),
        (lambda: data.cifar10(None), "folder must be a path, got None"),
        (lambda: data.resize(None, 8), "images must be a tensor, got None"),
        (lambda: data.resize(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 4), "images must hold floating"),
        (lambda: data.resize(torch.zeros(1, 8, 8), 4), r"images must be \[N, C, H, W\]"),
        (lambda: data.resize(torch.zeros(1, 1, 8, 8), None), "size must be an integer, got None"),
        (lambda: data.EndlessBatches([1, 2], 1, 0), "images must be a tensor or an ImageSource, got a list"),
        (lambda: data.EndlessBatches(torch.zeros(4, 1), "2", 0), "batch_size must be an integer, got '2'"),
        (lambda: data.EndlessBatches(torch.zeros(4, 1), 2, 2**64), "seed must be from"),
        (lambda: data.EndlessBatches(torch.zeros(4, 1), 2, None), "seed must be an integer, got None"),
        (lambda: data.EndlessBatches(torch.zeros(4, 1), 2, 0, labels=[1, 2, 3, 4]), "labels must be a tensor"),
        (lambda: data.EndlessBatches(torch.zeros(4, 1), 2, 0, share=(2, 2)), "share must be"),
        (lambda: data.EndlessPoints(None, 2, 0), "points must be Points, got None"),
        (lambda: data.EndlessPoints(data.POINTS["swiss_roll"], None, 0), "batch_size must be an integer, got None"),
        (lambda: data.Shapes(size="8"), "size must be an integer, got '8'"),
        (lambda: data.Shapes(seed=2**63), "seed must be from"),
        (lambda: data.Shapes().factors([1]), "indices must be a tensor, got a list"),
        (lambda: data.Shapes().factors(torch.tensor([1.0])), "indices must be"),
        (lambda: data.shapes.draw(None, 8), "factors must be Factors, got None"),
        (lambda: data.shapes.draw(data.Factors(torch.tensor([5]), *7 * [torch.zeros(1)]), 8), "kind must be from 0 to 4"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"order": torch.zeros(10, dtype=torch.int64)}, "each of the 10 images once"),
        ({"order": torch.arange(1, 11)}, "each of the 10 images once"),
        ({"order": list(range(10))}, "order must be a tensor"),
        ({"position": -1}, "position must be from 0 to 10, got -1"),
        ({"position": "2"}, "position must be an integer"),
        ({"random": None}, "random state must be a tensor"),
    ],
)
def test_a_saved_order_that_is_none(change, words):
    batches = data.EndlessBatches(torch.zeros(10, 1), 2, 0)
    before = batches.state_dict()
    with pytest.raises((TypeError, ValueError), match=words):
        batches.load_state_dict(before | change)
    assert torch.equal(batches.order, before["order"]) and batches.position == before["position"]


def test_a_path_is_as_good_as_a_string(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pictures"):
        data.load(tmp_path)


class Doubled(data.ImageSource):
    """Row i is 2 i: a condition that is read when it is asked for."""

    shape = (6, 1)

    def read(self, indices):
        return 2.0 * indices[:, None]


def test_labels_may_be_a_source_too():
    batches = data.EndlessBatches(torch.arange(6.0).view(6, 1, 1, 1), batch_size=3, seed=0, labels=Doubled())
    for _ in range(4):
        images, labels = next(batches)
        assert torch.equal(labels[:, 0], 2.0 * images[:, 0, 0, 0])


@pytest.mark.parametrize("labels", [[0] * 6, "labels", 3])
def test_labels_of_another_kind_are_refused(labels):
    with pytest.raises(TypeError, match="labels must be a tensor, an ImageSource or None"):
        data.EndlessBatches(torch.zeros(6, 1, 2, 2), batch_size=2, seed=0, labels=labels)


def test_as_many_labels_as_images():
    with pytest.raises(ValueError, match="there are 6 labels for 4 images"):
        data.EndlessBatches(torch.zeros(4, 1, 2, 2), batch_size=2, seed=0, labels=Doubled())
