"""gankern sample: pictures from a checkpoint."""

import pytest
import torch
import typer
from matplotlib.image import imread
from typer.testing import CliRunner

from gankern import data, games, training
from gankern.cli import app as whole_app
from gankern.cli.sample import COLUMNS, paths, sample, terms
from gankern.training import CHECKPOINT, checkpoint
from gankern.training.export import drawing

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


def test_terms_of_a_sum():
    latents = torch.nn.functional.normalize(torch.randn(9, 20, dtype=torch.float64)) * 3.0
    a, b, c, total = terms("1,2 - 0+ 8", latents)
    torch.testing.assert_close(b, latents[0])
    torch.testing.assert_close(c, latents[8])
    mean = (latents[1] + latents[2]) / 2
    torch.testing.assert_close(a, mean * 3.0 / mean.norm())
    expected = mean - latents[0] + latents[8]
    torch.testing.assert_close(total, expected * 3.0 / expected.norm())
    for wrong in ("", "1+", "-1", "a+b", "1,,2", "1*2"):
        with pytest.raises(ValueError, match="must be a sum such as"):
            terms(wrong, latents)
    with pytest.raises(ValueError, match="there are images 0 to 8, not 9"):
        terms("1+9", latents)


def test_arithmetic_and_animation(folder, tmp_path):
    from PIL import Image

    result = run(folder, "--out", tmp_path / "sum.png", "--arithmetic", "3-1+5")
    assert result.exit_code == 0, result.output
    assert imread(tmp_path / "sum.png").shape[:2] == (8 * (10 + 2), 8 * (4 * 10 + 2))  # three terms and the sum
    result = run(folder, "--out", tmp_path / "training.gif", "--animate")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "training.gif") as animation:
        assert animation.n_frames == len(list((folder / "samples").iterdir())) == 2


def test_points_and_labels(tmp_path):
    points = data.load("8gaussians")
    config = training.configure("wgan_gp_toy", "8gaussians", points, width=8, steps=1, threads=1)
    training.train(config, points, tmp_path / "points")
    result = run(tmp_path / "points", "--out", tmp_path / "points.png", "--num", 500)
    assert result.exit_code == 0, result.output
    result = run(tmp_path / "points", "--label", 1)
    assert result.exit_code == 2 and "was trained with --conditioning; this one was not" in result.stderr

    images, labels = data.load("digits"), data.labels("digits")
    options = dict(width=4, latent=8, steps=1, threads=1, conditioning="projection")
    config = training.configure("sn_dcgan", "digits", images, labels, **options)
    training.train(config, images, tmp_path / "digits", labels=labels)
    for more in ([], ["--label", 9]):
        result = run(tmp_path / "digits", "--out", tmp_path / "digits.png", *more)
        assert result.exit_code == 0, result.output
    result = run(tmp_path / "digits", "--label", 10)
    assert result.exit_code == 2 and "--label must be from 0 to 9, got 10" in result.stderr


def test_errors(folder, tmp_path):
    for arguments, words in [
        ([tmp_path / "nothing.pt"], "there is no checkpoint"),
        ([tmp_path], "there is no checkpoint"),
        ([folder / "log.csv"], "is not a checkpoint"),
        ([folder, "--layers", "jax"], "holds torch and gankern layers, --layers jax was asked for"),
        ([folder, "--arithmetic", "1+"], "must be a sum such as"),
        ([folder, "--animate", "--interpolate"], "one of --interpolate"),
        ([folder, "--out", tmp_path / "no" / "such" / "folder.png"], "No such file or directory"),
    ]:
        result = run(*arguments)
        assert result.exit_code == (1 if "checkpoint" in words else 2)
        assert result.stderr.startswith("Error: ") and words in result.stderr
        assert result.stderr.count("\n") == 1
    assert run(folder, "--num", 0).exit_code == 2


# ---- every model that can be trained ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A run of one step of every game that draws its samples itself."""
    folder = tmp_path_factory.mktemp("games")
    names = [name for name in games.names() if games.find(name).averaged is None]
    quick = {"gan_cls": {"options": {"encoder_steps": 1}}}
    for name in names:
        game = games.find(name)
        images = data.load(game.data, game.preset.get("size"))
        labels = None if game.needs is None else data.condition(game.data, images, game.needs)
        options = {"steps": 1, "batch_size": 8, "threads": 1, "evaluate": 0} | quick.get(name, {})
        config = training.configure(name, game.data, images, labels, **options)
        training.train(config, images, folder / name, labels=labels)
    assert names
    return {name: folder / name for name in names}


def test_games_that_draw_their_samples_themselves(played, tmp_path):
    for name, folder in played.items():
        out = tmp_path / f"{name}.png"
        result = run(folder, "--out", out)
        assert result.exit_code == 0, result.output
        assert f"of {name} after 1 steps" in result.output and out.stat().st_size > 1000
        result = run(folder, "--out", tmp_path / "x.png", "--interpolate")
        assert result.exit_code == 2 and "draws its samples itself" in result.stderr


def test_checkerboards_of_games(played):
    """A report, or in one sentence that there is no upsampling: both are answers."""
    for name, folder in played.items():
        result = CliRunner().invoke(whole_app, ["checkerboard", str(folder)])
        assert isinstance(result.exception, SystemExit | None), name
        game = checkpoint.game(checkpoint.load(folder / CHECKPOINT), "gankern")
        network, inputs = drawing(game)
        images = list(game.pictures().values())[-1].batch
        assert network(*inputs).shape[1:] == images.shape[1:], name
        if result.exit_code:
            assert "no layer that upsamples" in result.stderr and result.stderr.count("\n") == 1
