"""What holds of every game: both sets of layers play it alike, a run that stops and resumes plays on as if it had not
stopped, and its pictures, figures and checkpoint can be had."""

import json

import pytest
import torch

from gankern import data, games, models, training
from gankern.training import checkpoint

NEW = [name for name in games.names() if name not in models.MODELS]

# What would take long, made short.
QUICK = {"gan_cls": {"options": {"encoder_steps": 2}, "width": 8}, "cgan": {"width": 4}, "lapgan": {"width": 2}}
QUICK |= {name: {"width": 4, "latent": 8} for name in ("sagan", "biggan", "biggan_deep")}


def prepared(name, dtype=torch.float32, **options):
    """(configuration, samples, condition) of a game at its own preset, on its own data."""
    game = games.find(name)
    samples = data.load(game.data, game.preset.get("size"))
    condition = None if game.needs is None else data.condition(game.data, samples, game.needs)
    if torch.is_tensor(samples):
        samples = samples.to(dtype)
    options = (
        {"batch_size": 8, "threads": 1, "steps": 3, "checkpoint_every": 2, "evaluate": 0}
        | QUICK.get(name, {})
        | options
    )
    return training.configure(name, game.data, samples, condition, **options), samples, condition


@pytest.mark.parametrize("name", NEW)
def test_the_same_losses_in_double_precision(double, name):
    config, samples, condition = prepared(name, torch.float64)
    stock, ours = (training.Trainer(config, layers, samples, condition) for layers in ("torch", "gankern"))
    for _ in range(3):
        a, b = stock.step(), ours.step()
        torch.testing.assert_close(b.losses, a.losses, rtol=1e-10, atol=1e-10)
    assert stock.is_finite() and ours.is_finite()


@pytest.mark.parametrize("name", NEW)
def test_stopped_and_resumed(name, tmp_path, same):
    config, samples, condition = prepared(name)
    training.train(config, samples, tmp_path / "whole", labels=condition)
    training.train(training.reconfigure(config, steps=2), samples, tmp_path / "run", labels=condition)
    saved = checkpoint.load(tmp_path / "run" / training.CHECKPOINT)
    training.train(training.reconfigure(config, steps=3), samples, tmp_path / "run", saved, labels=condition)
    a, b = (checkpoint.load(tmp_path / folder / training.CHECKPOINT) for folder in ("whole", "run"))
    assert a.step == b.step == 3
    assert same(a.trainers, b.trainers)


@pytest.mark.parametrize("name", NEW)
def test_pictures_figures_and_the_way_back(name, tmp_path, same):
    config, samples, condition = prepared(name, steps=2, evaluate=1, evaluate_samples=100)
    record = training.train(config, samples, tmp_path / "run", labels=condition)
    assert (tmp_path / "run" / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "record.json").read_text())["parameters"] == record["parameters"]
    played = checkpoint.game(checkpoint.load(tmp_path / "run" / training.CHECKPOINT), "gankern")
    assert {n: sum(p.numel() for p in net.parameters()) for n, net in played.networks.items()} == record["parameters"]
    assert all(not network.training for network in played.networks.values())
    first, second = played.pictures(), played.pictures()
    assert first and all(torch.equal(first[n].batch, second[n].batch) for n in first)  # always of the same latents


# Games whose own data have labels, which their measures use, though the games need none.
UNLABELLED = [name for name in NEW if games.find(name).needs is None and not games.for_points(name)]


@pytest.mark.parametrize("name", UNLABELLED)
def test_images_without_labels_are_trained_on_measured_and_drawn(name, tmp_path):
    """Figures that need a classifier are left out; nothing stops at the first checkpoint."""
    images = torch.rand(40, 3, 32, 32) * 2 - 1
    sizes = {"batch_size": 8, "width": 8, "size": 32, "threads": 1, "options": QUICK.get(name, {}).get("options")}
    config = training.configure(name, "mine", images, steps=1, evaluate=1, evaluate_samples=100, **sizes)
    training.train(config, images, tmp_path / "run")
    figures = (tmp_path / "run" / "metrics.csv").read_text()
    assert "class" not in figures and "fid" not in figures and "assignment" not in figures
    assert (tmp_path / "run" / "samples.png").exists()


# Every option of every game.
OWN = [(name, option) for name in NEW for option in vars(games.find(name).Options).get("__dataclass_fields__", {})]


@pytest.mark.parametrize("name", NEW)
def test_options_of_other_games(name):
    """Each is refused by name, with what this game has."""
    mine = {option for owner, option in OWN if owner == name}
    for option in sorted({option for _, option in OWN} - mine):
        with pytest.raises(ValueError, match=option) as raised:
            games.find(name).options_of(name, {option: 1.0})
        assert name in str(raised.value) and (not mine or any(m in str(raised.value) for m in mine))


@pytest.mark.parametrize("name", NEW)
def test_data_of_the_wrong_kind(name):
    """Points for a game of images, images for one of points, and images alone for one that needs more."""
    if games.for_points(name):
        with pytest.raises(ValueError, match=f"{name} is for points, and digits are images"):
            training.configure(name, "digits", data.load("digits"))
        return
    with pytest.raises(ValueError, match=f"{name} is for images, and 8gaussians are points"):
        training.configure(name, "8gaussians", data.load("8gaussians"))
    needs = games.find(name).needs
    if needs is not None:
        with pytest.raises(ValueError, match=f"{name} needs {needs}, and mine has none"):
            training.configure(name, "mine", torch.zeros(8, 3, 32, 32))
