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
