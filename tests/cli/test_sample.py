"""gankern sample: pictures from a checkpoint."""

import pytest
import torch
import typer
from matplotlib.image import imread
from typer.testing import CliRunner

from gankern import data, training
from gankern.cli.sample import COLUMNS, paths, sample

app = typer.Typer()
app.command()(sample)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    images = data.load("digits")
    options = dict(width=4, latent=8, steps=2, threads=1, compare=True, ema=0.9)
    training.train(training.configure("sn_dcgan", "digits", images, **options), images, out)
    return out


def test_a_seed_decides_the_picture(folder, tmp_path):
    pictures = []
    for seed in (1, 1, 2):
        result = run(folder / training.CHECKPOINT, "--out", tmp_path / "grid.png", "--num", 10, "--seed", seed)
        assert result.exit_code == 0, result.output
        pictures.append(imread(tmp_path / "grid.png"))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()
    assert pictures[0].shape[:2] == (8 * (2 * 10 + 2), 8 * (8 * 10 + 2))  # 2 rows of 8, each pixel 8 × 8


def test_a_run_folder_and_either_side_of_a_comparison(folder, tmp_path):
    for layers in ("torch", "gankern"):
        result = run(folder, "--out", tmp_path / f"{layers}.png", "--layers", layers)
        assert result.exit_code == 0, result.output
        assert (tmp_path / f"{layers}.png").is_file()


def test_interpolation(folder, tmp_path):
    result = run(folder, "--out", tmp_path / "path.png", "--interpolate", "--num", 16)
    assert result.exit_code == 0, result.output


def test_paths_go_from_latent_to_latent_along_the_sphere():
    latents = torch.nn.functional.normalize(torch.randn(3, 20, dtype=torch.float64))
    rows = paths(latents).view(3, COLUMNS, 20)
    torch.testing.assert_close(rows[:, 0], latents)
    torch.testing.assert_close(rows[:, -1], latents.roll(-1, 0))
    torch.testing.assert_close(rows.norm(dim=2), torch.ones(3, COLUMNS, dtype=torch.float64))
    steps = (rows[:, 1:] - rows[:, :-1]).norm(dim=2)
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), rtol=1e-5, atol=1e-6)


def test_errors(folder, tmp_path):
    for arguments, words in [
        ([tmp_path / "nothing.pt"], "there is no checkpoint"),
        ([tmp_path], "there is no checkpoint"),
        ([folder / "log.csv"], "is not a checkpoint"),
        ([folder, "--layers", "jax"], "holds torch and gankern layers, --layers jax was asked for"),
        ([folder, "--out", tmp_path / "no" / "such" / "folder.png"], "No such file or directory"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ") and words in result.stderr
        assert result.stderr.count("\n") == 1
    assert run(folder, "--num", 0).exit_code == 2
