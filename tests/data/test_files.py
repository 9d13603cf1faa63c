"""A folder of pictures and CIFAR-10's python files, whole and broken."""

import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from gankern import data
from gankern.data import BrokenFile, ImageFolder, cifar10

RANDOM = np.random.default_rng(0)


def picture(path, size=(8, 8), mode="RGB", pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = RANDOM.integers(0, 256, shape, dtype=np.uint8) if pixels is None else pixels
    Image.fromarray(pixels).save(path)
    return pixels


def as_images(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0


@pytest.fixture
def folder(tmp_path):
    """Three good pictures in two folders, and a text file."""
    pixels = [picture(tmp_path / name) for name in ("a.png", "b/c.PNG", "d.bmp")]
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path, pixels


def test_pictures_in_the_order_of_their_paths(folder):
    path, pixels = folder
    images = ImageFolder(path)
    assert images.shape == (3, 3, 8, 8) and len(images) == 3
    torch.testing.assert_close(images[:], torch.stack([as_images(p) for p in pixels]), rtol=0, atol=1e-6)
    torch.testing.assert_close(images[torch.tensor([2, 0])][1], as_images(pixels[0]), rtol=0, atol=1e-6)
    assert torch.equal(images[-1], images[2])
    assert images[:].is_contiguous()


def test_load_takes_a_folder(folder):
    images = data.load(str(folder[0]), size=4)
    assert images[:2].shape == (2, 3, 4, 4)


def test_grey(folder):
    path, pixels = folder
    images = ImageFolder(path, channels=1)
    assert images.shape == (3, 1, 8, 8)
    luma = pixels[0] @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose((images[0][0] + 1) * 127.5, luma, atol=1.0)


def test_a_grey_picture_among_colours(tmp_path):
    grey = picture(tmp_path / "grey.png", mode="L")
    image = ImageFolder(tmp_path)[0]
    assert torch.equal(image[0], image[2])
    torch.testing.assert_close(image[0], torch.from_numpy(grey).float() / 127.5 - 1.0)


def test_resizing_crops_to_the_centre_square(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 255
    picture(tmp_path / "wide.png", pixels=pixels)
    assert ImageFolder(tmp_path, size=4)[0].min() > 0.9


@pytest.mark.parametrize(
    ("size", "message"),
    [((16, 16), "b.png is 16x16, not 8x8, as .*a.png is; pass size="), ((8, 4), "b.png is 8x4, not 8x8")],
)
def test_another_size_offers_to_resize(tmp_path, size, message):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size)
    with pytest.raises(BrokenFile, match=message):
        ImageFolder(tmp_path)
    assert ImageFolder(tmp_path, size=8)[:].shape == (2, 3, 8, 8)


def test_not_a_square(tmp_path):
    picture(tmp_path / "a.png", (8, 4))
    with pytest.raises(BrokenFile, match="a.png is 8x4, not a square; pass size="):
        ImageFolder(tmp_path)


def broken(path, kind):
    if kind == "no picture":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        picture(path, (64, 64))
        path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("kind", ["no picture", "empty", "truncated"])
def test_a_broken_picture_is_named(folder, kind, caplog):
    path, _ = folder
    broken(path / "bad.png", kind)
    said = ".*truncated" if kind == "truncated" else "not a picture of BMP, .*, or damaged"
    with pytest.raises(BrokenFile, match=rf"bad\.png: {said} .*on_error='skip'"):
        ImageFolder(path, size=8)
    with caplog.at_level(logging.WARNING):
        images = ImageFolder(path, size=8, on_error="skip")
    assert len(images) == 3
    assert images[:].isfinite().all()
    assert "bad.png" in caplog.text


def test_a_picture_that_breaks_later_is_named(folder):
    path, _ = folder
    images = ImageFolder(path)
    (path / "d.bmp").write_bytes(b"BM")
    images[:2]
    with pytest.raises(BrokenFile, match=r"d\.bmp"):
        images[2]


def test_without_verification_headers_are_read(folder):
    path, _ = folder
    broken(path / "z.png", "truncated")
    images = ImageFolder(path, size=8, verify=False)
    assert len(images) == 4
    with pytest.raises(BrokenFile, match=r"z\.png"):
        images[3]


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pictures"):
        ImageFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder .*missing"):
        ImageFolder(tmp_path / "missing")
    broken(tmp_path / "bad.png", "empty")
    with pytest.raises(BrokenFile, match="none of the 1 pictures"):
        ImageFolder(tmp_path, on_error="skip")


@pytest.mark.parametrize("options", [{"channels": 2}, {"on_error": "ignore"}, {"size": 0}])
def test_bad_options(folder, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ImageFolder(folder[0], **options)


# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(tmp_path):
    """Five files as the authors' are, but with 4 images each."""
    expected, labels = [], []
    for i in range(1, 6):
        pixels = RANDOM.integers(0, 256, (4, 3072), dtype=np.uint8)
        numbers = RANDOM.integers(0, 10, 4).tolist()
        content = {b"batch_label": b"training batch", b"labels": numbers, b"data": pixels, b"filenames": [b"a.png"] * 4}
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(content, protocol=2))
        expected.append(pixels)
        labels += numbers
    return tmp_path, np.concatenate(expected).reshape(-1, 3, 32, 32), labels


def test_cifar10(batches):
    path, expected, labels = batches
    images, numbers = cifar10(path)
    np.testing.assert_allclose(images.numpy(), expected / 127.5 - 1.0, atol=1e-6)
    assert numbers.tolist() == labels
    assert torch.equal(data.load(str(path)), images)
    assert torch.equal(data.labels(str(path)), numbers)
    assert data.load(str(path), size=16, channels=1).shape == (20, 1, 16, 16)


class Malicious:
    def __reduce__(self):
        return print, ("code that a file ran",)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", pickle.dumps([1, 2]), pickle.dumps({b"data": np.zeros((4, 5)), b"labels": [0] * 4})],
    ids=["empty", "garbage", "list", "shape"],
)
def test_a_broken_cifar_file_is_named(batches, content, caplog):
    path, expected, labels = batches
    (path / "data_batch_3").write_bytes(content)
    with pytest.raises(BrokenFile, match="data_batch_3: .*on_error='skip'"):
        cifar10(path)
    with caplog.at_level(logging.WARNING):
        images, numbers = cifar10(path, on_error="skip")
    assert len(images) == len(numbers) == 16
    assert "data_batch_3" in caplog.text


def test_a_missing_cifar_file_is_named(batches):
    (batches[0] / "data_batch_5").unlink()
    with pytest.raises(BrokenFile, match="data_batch_5: there is no such file"):
        cifar10(batches[0])


def test_a_pickle_cannot_run_code(batches, capsys):
    (batches[0] / "data_batch_1").write_bytes(pickle.dumps({b"data": Malicious(), b"labels": []}))
    with pytest.raises(BrokenFile, match="data_batch_1: .*builtins.print"):
        cifar10(batches[0])
    assert "code that a file ran" not in capsys.readouterr().out


def test_no_usable_file(tmp_path):
    with pytest.raises(BrokenFile, match="none of data_batch_1"):
        cifar10(tmp_path, on_error="skip")
