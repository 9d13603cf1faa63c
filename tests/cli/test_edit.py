"""gankern edit: an image is found again, and a stroke reddens what is under the mask."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from typer.testing import CliRunner

from gankern import data, training
from gankern.cli import app
from gankern.cli.edit import _colour
from gankern.data import BrokenFile
from gankern.data.files import read_picture
from gankern.diagnostics import latent
from gankern.training import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A generator whose last layer is strong enough for colours to differ."""
    out = tmp_path_factory.mktemp("runs") / "run"
    images = data.load("shapes", 16)
    config = training.configure(
        "sn_dcgan", "shapes", images, size=16, width=8, latent=8, steps=2, batch_size=8, threads=1
    )
    training.train(config, images, out)
    saved = checkpoint.load(out / training.CHECKPOINT)
    state = saved.trainers["gankern"]
    for name in ("generator", "average"):
        last = sorted(key for key in state[name] if key.endswith("main.4.weight"))
        for key in last:
            state[name][key] *= 1000
    checkpoint.save(out / training.CHECKPOINT, saved)
    return out


def run(folder, *arguments):
    result = CliRunner().invoke(app, ["edit", str(folder), *map(str, arguments)])
    return " ".join(result.output.split()), result.exit_code


def cells(path, number):
    """The pictures side by side, each [16, 16, 3] in [0, 1]; a pixel is 4 x 4."""
    picture = imread(path)[8::4, 8::4, :3]
    return [picture[:16, 18 * i : 18 * i + 16] for i in range(number)]


def test_an_image_is_found_again(folder, tmp_path):
    told, code = run(folder, "--out", tmp_path / "found.png", "--steps", 300, "--seed", 3)
    assert code == 0, told
    target, found = cells(tmp_path / "found.png", 2)
    assert np.square(target - found).mean() < 0.05 * target.var()


def test_a_stroke_reddens_what_is_under_the_mask(folder, tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ("--mask", tmp_path / "mask.png", "--out", tmp_path / "edited.png", "--stay", 0.0, "--steps", 200)
    told, code = run(folder, *options)
    assert code == 0, told
    target, found, drawn, edited, blended = cells(tmp_path / "edited.png", 5)
    inside = np.s_[4:12, 4:12]
    assert drawn[inside].min() == 1.0 and drawn[0, 0].max() == 0.0
    red = np.array([1.0, 0.0, 0.0])
    assert np.square(edited[inside] - red).mean() < 0.8 * np.square(found[inside] - red).mean()
    # What is written on the image is the edit carried over, as the function has it.
    x, before, after = (torch.from_numpy(c.copy()).permute(2, 0, 1)[None] * 2 - 1 for c in (target, found, edited))
    expected = latent.transfer(x, before, after).clamp(-1, 1)[0].permute(1, 2, 0) * 0.5 + 0.5
    np.testing.assert_allclose(blended, expected.numpy(), atol=0.03)


def test_a_sketch_moves_the_edit(folder, tmp_path):
    """The same stroke with and without outlines ends elsewhere."""
    mask, sketch = np.full((16, 16), 255, np.uint8), np.zeros((16, 16, 3), np.uint8)
    sketch[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(sketch).save(tmp_path / "sketch.png")
    edits = []
    for more in ((), ("--outlines", tmp_path / "sketch.png")):
        told, code = run(
            folder, "--mask", tmp_path / "mask.png", *more, "--out", tmp_path / "x.png", "--stay", 0.0, "--steps", 20
        )
        assert code == 0, told
        edits.append(cells(tmp_path / "x.png", 5)[3])
    assert not np.array_equal(edits[0], edits[1])


def test_a_picture_from_a_file(folder, tmp_path):
    Image.fromarray(np.full((20, 30, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    told, code = run(folder, tmp_path / "grey.png", "--out", tmp_path / "x.png", "--steps", 5, "--starts", 2)
    assert code == 0, told
    assert abs(cells(tmp_path / "x.png", 2)[0] - 0.5).max() < 0.01


def test_colours():
    assert _colour("red", 3).tolist() == _colour("#FF0000", 3).tolist() == [1.0, -1.0, -1.0]
    assert _colour("ffffff", 1).item() == pytest.approx(1.0)


def test_reading_one_picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_picture(tmp_path / "a.png", 8)
    torch.testing.assert_close(image[0], torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0)
    assert read_picture(tmp_path / "a.png", 4, 1).shape == (1, 1, 4, 4)
    (tmp_path / "b.png").write_bytes(b"broken")
    with pytest.raises(BrokenFile, match="b.png"):
        read_picture(tmp_path / "b.png", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.png",), "there is no picture nothing.png"),
        (("--colour", "purplish", "--mask", "mask.png"), "--colour must be black, .*got 'purplish'"),
        (("--mask", "black.png"), "mask must be .* not all 0"),
        (("--out", "x.txt"), "a picture's name ends with"),
        (("--outlines", "mask.png"), "--outlines are wanted under the mask: pass --mask too"),
        (("--mask", "mask.png", "--outlines", "nothing.png"), "there is no picture nothing.png"),
    ],
)
def test_wrong_arguments(folder, tmp_path, monkeypatch, arguments, message):
    import re

    monkeypatch.chdir(tmp_path)
    for name, value in (("mask.png", 255), ("black.png", 0)):
        Image.fromarray(np.full((16, 16), value, np.uint8)).save(name)
    told, code = run(folder, *arguments, "--steps", 1, "--starts", 1)
    assert code in (1, 2) and re.search(message, told), told
    assert not (tmp_path / "edited.png").exists()
