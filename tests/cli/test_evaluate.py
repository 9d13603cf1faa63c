"""gankern evaluate as a user calls it."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from gankern import data, metrics, training
from gankern.cli import app
from gankern.training import pictures

pytest.importorskip("torchmetrics")


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    images = data.load("digits", 16)
    config = training.configure("dcgan", "digits", images, size=16, width=4, latent=8, steps=1, batch_size=8, threads=1)
    training.train(config, images, folder / "run")
    points = data.load("8gaussians")
    toy = training.configure("wgan_gp_toy", "8gaussians", points, width=8, steps=1, threads=1)
    training.train(toy, points, folder / "toy")
    for name, start in (("some", 0), ("others", 40)):
        (folder / name).mkdir()
        for i, pixels in enumerate(pictures.pixels(images[start : start + 40])):
            Image.fromarray(pixels[:, :, 0]).save(folder / name / f"{i}.png")
    (folder / "empty").mkdir()
    (folder / "bad.pt").write_text("text")
    return folder


def test_a_run_beside_its_data(place, tmp_path):
    result = run(place / "run", "--samples", 60, "--json", tmp_path / "f.json")
    assert result.exit_code == 0, result.output
    for words in ("FID, own classifier", "KID, own classifier", "Inception score, own classifier", "precision, own",
                  "sliced Wasserstein distance", "No figure here compares with a paper's"):  # fmt: skip
        assert words in result.output
    content = json.loads((tmp_path / "f.json").read_text())
    assert content["samples"] == 60 and content["features"] == "own classifier"
    assert {"fid_own_classifier", "swd", "swd_16"} <= content["figures"].keys()


def test_truncation_beside_the_whole(place):
    """A limit that no number is beyond changes nothing; the others are columns, and entries of the file."""
    limits = (100, 0.01)
    result = run(
        place / "run", "--samples", 60, "--json", "-", *(x for limit in limits for x in ("--truncation", limit))
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    far, near = content["truncation"]
    assert (far["limit"], near["limit"]) == limits and far["figures"] == content["figures"]
    assert near["figures"]["fid_own_classifier"] != content["figures"]["fid_own_classifier"]
    shown = run(place / "run", "--samples", 60, "--truncation", 0.5).output
    assert "value" in shown and "within ±0.5" in shown


def test_two_folders(place):
    result = run(place / "others", place / "some", "--json", "-")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    real, fake = data.load(place / "some"), data.load(place / "others")
    random = torch.Generator().manual_seed(0)
    chosen = [x[torch.randperm(40, generator=random)] for x in (real, fake)]
    assert content["figures"]["swd_16"] == metrics.laplacian_swd(*chosen)[16]
    assert content["features"] is None and real.shape[1] == 1
    same = json.loads(run(place / "some", place / "some", "--json", "-").stdout)
    assert same["figures"]["swd"] < 0.5 * content["figures"]["swd"]


def test_features_of_a_file(place, tmp_path):
    class Features(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)

    torch.jit.script(Features()).save(tmp_path / "f.pt")
    result = run(place / "others", place / "some", "--features", tmp_path / "f.pt")
    assert result.exit_code == 0 and "FID, own features" in result.output, result.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere", "some"], 1, "there is no run and no folder nowhere"),
        (["some"], 2, "REAL is missing"),
        (["some", "nowhere"], 2, "unknown data"),
        (["empty", "some"], 1, "there are no pictures"),
        (["run", "--features", "bad.pt"], 2, "not a TorchScript file"),
        (["run", "--features", "none.pt"], 1, "there is no TorchScript file"),
        (["run", "--device", "tpu"], 2, "device must be"),
        (["toy", "8gaussians"], 2, "points in the plane"),
        (["some", "others", "--truncation", "0.5"], 2, "--truncation is of a run's latents; some holds pictures"),
        (["run", "--truncation", "0"], 2, "truncation must be a positive number, got 0"),
    ],
)
def test_wrong_calls(place, monkeypatch, arguments, code, says):
    monkeypatch.chdir(place)
    result = run(*arguments)
    assert result.exit_code in (1, 2) and says in result.stderr and result.stderr.count("\n") == 1, result.output
    assert code == result.exit_code or "bad.pt" in arguments or "empty" in arguments
