"""gankern export and sample --each, as a user calls them."""

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import gankern
from gankern import data, training
from gankern.cli import app
from gankern.training import pictures


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def train(folder, model="dcgan", samples="digits", labels=None, **options):
    images = data.load(samples)
    config = training.configure(model, samples, images, labels, steps=1, threads=1, batch_size=8, **options)
    training.train(config, images, folder, labels=labels)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    classes = {"labels": data.labels("digits"), "conditioning": "projection"}
    return {
        "plain": train(folder / "plain", width=4, latent=8),
        "classes": train(folder / "classes", width=4, latent=8, **classes),
        "points": train(folder / "points", "wgan_gp_toy", "8gaussians", width=8),
        "infogan": train(folder / "infogan", "infogan"),
    }


def test_all_kinds_at_once(runs):
    result = run("export", runs["plain"], "--onnx", "--safetensors", "--torchscript")
    assert result.exit_code == 0, result.output
    files = {path.name for path in runs["plain"].glob("generator.*")}
    assert files == {"generator.onnx", "generator.safetensors", "generator.pt"}
    assert result.stdout.count("equal to the run's generator to ") == 3


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere", "--onnx"], 1, "there is no checkpoint"),
        (["plain"], 2, "one of --onnx, --safetensors, --torchscript says what to write"),
        (["plain", "--onnx", "--safetensors", "--out", "x"], 2, "--out names one file"),
        (["plain", "--onnx", "--layers", "torch"], 2, "holds gankern layers"),
        (["plain", "--onnx", "--out", "/dev/full/x"], 2, "--out /dev/full/x: cannot be written"),
    ],
)
def test_wrong_calls(runs, arguments, code, says):
    result = run("export", *(runs.get(x, x) for x in arguments))
    assert result.exit_code == code and says in result.stderr and result.stderr.count("\n") == 1, result.output


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "safetensors"])
def test_a_missing_package_is_one_sentence(runs, package, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    if package == "safetensors":
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    result = run("export", runs["plain"], "--safetensors" if package == "safetensors" else "--onnx")
    assert result.exit_code == 1 and f"needs {package}: pip install 'gankern[export]'" in result.stderr


def test_samples_one_by_one(runs, tmp_path):
    """The same images as the generator makes of these latents, whatever the batches, to half a grey level."""
    latents = torch.randn(10, 8, generator=torch.Generator().manual_seed(3))
    expected = gankern.load_generator(runs["plain"])(latents).detach()
    exact = (expected * 127.5 + 127.5)[:, 0].numpy()
    for batch_size in (3, 64):
        folder = tmp_path / str(batch_size)
        options = ("--seed", 3, "--batch-size", batch_size)
        result = run("sample", runs["plain"], "--each", folder, "--samples", 10, *options)
        assert result.exit_code == 0, result.output
        files = sorted(folder.iterdir())
        assert [path.name for path in files] == [f"{i:06}.png" for i in range(10)]
        read = np.stack([np.asarray(Image.open(path)) for path in files])
        assert read.shape == (10, 8, 8) and np.abs(read - exact).max() <= 0.5 + 1e-4
        result = run("sample", runs["plain"], "--each", tmp_path / "all.npz", "-n", 10, *options)
        assert result.exit_code == 0, result.output
        with np.load(tmp_path / "all.npz") as arrays:
            assert arrays.files == ["arr_0"] and (arrays["arr_0"][..., 0] == read).all()


def test_arrays_have_the_labels(runs, tmp_path):
    result = run("sample", runs["classes"], "--each", tmp_path / "x.npz", "--num", 12)
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["arr_0"].shape == (12, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [*range(10), 0, 1]
    result = run("sample", runs["points"], "--each", tmp_path / "p.npz", "-n", 5)
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "p.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 2) and arrays["arr_0"].dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plain", "--each", "full"], "is not empty"),
        (["plain", "--each", "a_file"], "is a file"),
        (["plain", "--each", "new", "--interpolate"], "--each is of samples alone"),
        (["plain", "--device", "tpu"], "device must be cpu, cuda or cuda:N"),
        (["points", "--each", "new"], "name a FILE.npz"),
        (["infogan", "--each", "new"], "draws its samples itself"),
    ],
)
def test_wrong_samples(runs, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.png").write_bytes(b"")
    (tmp_path / "a_file").write_bytes(b"")
    result = run("sample", *(runs.get(x, x) for x in arguments))
    assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1, result.output
    assert not list(tmp_path.glob("new/*"))


def test_pixels_are_rounded_not_cut():
    levels = torch.arange(256.0)
    images = (levels / 127.5 - 1.0).view(1, 1, 16, 16)
    assert (pictures.pixels(images).ravel() == levels.numpy()).all()
    assert (pictures.pixels(images + 0.9 / 255) == pictures.pixels(images)).mean() > 0.99
