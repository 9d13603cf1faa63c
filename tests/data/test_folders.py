"""Folders that say more than their pictures: of classes, of pairs, and of two domains without pairs."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from gankern import data
from gankern.cli import app
from gankern.data import BrokenFile, ImagePairs, UnpairedImages

RANDOM = np.random.default_rng(0)


def picture(path, width=8, height=8, value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if value is not None:
        pixels[...] = value
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0


# ---- classes


def test_labels_are_the_folders_in_the_order_of_their_names(tmp_path):
    for name in ("dog/1.png", "cat/deep/2.png", "dog/0.png", "Cat/3.png"):
        picture(tmp_path / name)
    images = data.load(tmp_path)
    assert images.classes == ["Cat", "cat", "dog"]
    named = [images.classes[label] for label in data.condition(tmp_path, images, "labels")]
    assert named == [path.relative_to(tmp_path).parts[0] for path in images.paths]
    assert torch.equal(data.labels(tmp_path), images.labels) and images.labels.dtype == torch.int64


def test_labels_of_a_folder_whose_broken_files_are_left_out(tmp_path):
    for name in ("a/1.png", "b/2.png", "b/3.png", "c/4.png"):
        picture(tmp_path / name)
    (tmp_path / "b/2.png").write_bytes(b"broken")
    images = data.load(tmp_path, on_error="skip")
    assert data.condition(tmp_path, images, "labels").tolist() == [0, 1, 2]
    assert torch.equal(data.labels(tmp_path, "skip"), images.labels)
    (tmp_path / "a/1.png").write_bytes(b"broken")  # a class without a picture is none
    assert data.load(tmp_path, on_error="skip").classes == ["b", "c"]


def test_folders_put_together_of_links(tmp_path):
    """Each class a link to a folder elsewhere; one leads back to the whole, one goes on to another class."""
    for name in ("there/one/1.png", "there/two/deep/2.pgm"):
        picture(tmp_path / name)
    root = tmp_path / "root"
    root.mkdir()
    for name, target in (("a", "there/one"), ("b", "there/two")):
        (root / name).symlink_to(tmp_path / target)
    (root / "b/back").symlink_to(root)
    images = data.load(root)
    assert [str(path.relative_to(root)) for path in images.paths] == ["a/1.png", "b/deep/2.pgm"]
    assert images.classes == ["a", "b"]
    (root / "a/3.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(BrokenFile, match=r"a/3\.png: .*No such file"):
        data.load(root)
    assert len(data.load(root, on_error="skip")) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("a/1.png", "b/2.png", "3.png"),
            "no labels: these come from a folder for each class, two at least, and .*3.png",
        ),
        (("a/1.png", "a/2.png"), "a is the only one"),
        (("1.png",), "1.png is in none"),
    ],
)
def test_folders_without_classes(tmp_path, names, message):
    for name in names:
        picture(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        data.condition(tmp_path, data.load(tmp_path), "labels")


# ---- pairs


@pytest.mark.parametrize("folders", [("A", "B"), ("trainA", "trainB")])
def test_pairs_in_two_folders(tmp_path, folders):
    first = [picture(tmp_path / folders[0] / name) for name in ("x.png", "deep/y.bmp")]
    second = [picture(tmp_path / folders[1] / name) for name in ("x.bmp", "deep/y.png")]
    pairs = data.load(tmp_path, kind="pairs")
    sources = data.condition(tmp_path, pairs, "pairs")
    assert pairs.shape == sources.shape == (2, 3, 8, 8)
    order = torch.tensor([1, 0])  # deep/y comes before x
    torch.testing.assert_close(pairs[order], torch.stack(second), rtol=0, atol=1e-6)
    torch.testing.assert_close(sources[order], torch.stack(first), rtol=0, atol=1e-6)


def test_pairs_side_by_side(tmp_path):
    whole = [picture(tmp_path / f"{i}.png", width=16) for i in range(3)]
    pairs = ImagePairs(tmp_path)
    torch.testing.assert_close(pairs[:], torch.stack(whole)[..., 8:], rtol=0, atol=1e-6)
    torch.testing.assert_close(pairs.conditions["pairs"][:], torch.stack(whole)[..., :8], rtol=0, atol=1e-6)
    assert pairs[:0].shape == (0, 3, 8, 8)


def test_pairs_are_cropped_alike(tmp_path):
    pixels = np.zeros((8, 32, 3), np.uint8)
    pixels[:, 4:12], pixels[:, 20:28] = 255, 128  # the centres of both halves
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    pairs = ImagePairs(tmp_path, size=4, channels=1)
    assert pairs.shape == (1, 1, 4, 4)
    assert pairs.conditions["pairs"][0].min() > 0.9 and pairs[0].abs().max() < 0.05


@pytest.mark.parametrize(
    ("files", "size", "message"),
    [
        ({"A/x.png": (8, 8), "B/x.png": (8, 6)}, 4, "A/x.png is 8x8, and .*B/x.png 8x6: pairs must be of one size"),
        ({"A/x.png": (16, 8), "B/x.png": (8, 8)}, None, "A/x.png is 16x8, and .*B/x.png 8x8"),
        ({"A/x.png": (8, 8), "B/y.png": (8, 8)}, None, "A/x.png has no counterpart"),
        ({"A/x.png": (8, 8), "B/x.png": (8, 8), "B/y.png": (8, 8)}, None, "B/y.png has no counterpart"),
        ({"x.png": (15, 8)}, None, "x.png is 15 pixels wide"),
        ({"x.png": (8, 8)}, None, "x.png is 4x8, not a square; pass size="),
        ({"x.png": (16, 8), "y.png": (32, 16)}, None, "y.png is 16x16, not 8x8, as .*x.png is"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_pairs_that_do_not_fit(tmp_path, files, size, message, verify):
    for name, extent in files.items():
        picture(tmp_path / name, *extent)
    with pytest.raises(BrokenFile, match=message):
        ImagePairs(tmp_path, size, verify=verify)


def test_pairs_that_do_not_fit_can_be_left_out(tmp_path, caplog):
    for name in ("A/x.png", "B/x.png", "A/y.png", "A/z.png"):
        picture(tmp_path / name)
    picture(tmp_path / "B/z.png", 6, 6)
    with caplog.at_level(logging.WARNING):
        assert len(ImagePairs(tmp_path, on_error="skip")) == 1
    assert "y.png has no counterpart" in caplog.text and "z.png" in caplog.text


def test_two_pictures_of_one_name(tmp_path):
    for name in ("A/x.png", "A/x.bmp", "B/x.png"):
        picture(tmp_path / name)
    with pytest.raises(BrokenFile, match="x.bmp and .*x.png have one name"):
        ImagePairs(tmp_path)


@pytest.mark.parametrize("kind", [ImagePairs, UnpairedImages])
def test_one_of_two_folders(tmp_path, kind):
    picture(tmp_path / "B/x.png")
    with pytest.raises(FileNotFoundError, match="has a folder B and no A"):
        kind(tmp_path)


# ---- two domains without pairs


def test_unpaired_folders_of_different_length(tmp_path):
    first = [picture(tmp_path / f"A/{i}.png", value=10 * i) for i in range(3)]
    second = [picture(tmp_path / f"B/{i}.png", value=100 + 10 * i) for i in range(7)]
    images = data.load(tmp_path, kind="unpaired")
    others = data.condition(tmp_path, images, "unpaired")
    assert len(images) == len(others) == 7
    for source, known in ((images, first), (others, second)):
        values = {round(float((x[0, 0, 0] + 1) * 127.5)) for x in source[:]}
        assert values == {round(float((x[0, 0, 0] + 1) * 127.5)) for x in known}  # every picture comes


def test_unpaired_pictures_of_one_name_do_not_come_together(tmp_path):
    for i in range(20):
        for folder in "AB":
            picture(tmp_path / folder / f"{i:02}.png", value=10 * i)
    images = UnpairedImages(tmp_path)
    same = (images[:] == images.conditions["unpaired"][:]).flatten(1).all(1)
    assert same.sum() < 5
    assert torch.equal(images.conditions["unpaired"][:], UnpairedImages(tmp_path).conditions["unpaired"][:])


def test_unpaired_pictures_of_two_sizes(tmp_path):
    picture(tmp_path / "A/x.png")
    picture(tmp_path / "B/x.png", 6, 6)
    with pytest.raises(ValueError, match="A are 8x8, those of .*B 6x6; pass size="):
        UnpairedImages(tmp_path)
    assert UnpairedImages(tmp_path, 4).shape == (1, 3, 4, 4)


def test_a_folder_without_domains(tmp_path):
    picture(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError, match="has no folders A and B or trainA and trainB"):
        data.load(tmp_path, kind="unpaired")


# ---- what is drawn, and what has nothing of the kind


def test_drawn_pairs_and_domains():
    edges, plain = data.load("edges"), data.load("plain")
    assert torch.equal(edges.conditions["pairs"][:2], edges.conditions["edges"][:2])
    others = data.condition("plain", plain, "unpaired")
    assert torch.equal(others[:2], data.load("striped")[:2])
    assert torch.equal(others.conditions["unpaired"][:2], plain[:2])


@pytest.mark.parametrize(
    ("name", "kind", "there_are"),
    [
        ("photos", "labels", "digits, shapes, CIFAR-10's files, a folder with a folder for each class"),
        ("digits", "pairs", "edges, turning, a folder with pictures of one name in A and B"),
        ("shapes", "captions", "captions$"),
        ("captions", "attributes", "shapes, plain, striped, edges"),
        ("photos", "unpaired", "plain, striped, a folder with folders A and B"),
    ],
)
def test_data_of_another_kind_say_which_have_it(name, kind, there_are):
    with pytest.raises(ValueError, match=f"have? no {kind}.*Data with {kind}: .*{there_are}|no {kind}.*{there_are}"):
        data.condition(name, data.load(name), kind)


def test_training_on_folders_of_classes(tmp_path):
    for i in range(8):
        picture(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png")
    command = ["train", "acgan", "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "run"), "--batch-size", "4",
               "--steps", "1", "--evaluate", "0", "--threads", "1", "--layers", "torch"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    picture(tmp_path / "photos" / "loose.png")
    result = CliRunner().invoke(app, [*command[:-4], "--out", str(tmp_path / "other")])
    assert result.exit_code and "loose.png is in none" in result.output.replace("\n", " ")
    assert not (tmp_path / "other").exists() and (tmp_path / "run" / "checkpoint.pt").exists()
