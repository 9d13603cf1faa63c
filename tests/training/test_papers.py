"""The other papers' ways of training: penalties, clipping, RMSProp, growing; each resumes exactly."""

import pytest
import torch

from gankern import data, losses, models, training
from gankern.games._critic import DISCRIMINATOR_LOSSES, Objective
from gankern.games._growth import stage
from gankern.training import checkpoint as checkpoints

TINY = {
    "gan": {"width": 10},
    "dcgan": {"width": 2, "ema": 0.9},
    "wgan": {"width": 2, "n_critic": 2},
    "wgan_gp": {"width": 2, "n_critic": 1},
    "progan": {"width": 4, "grow_steps": 1, "size": 16},
}


@pytest.fixture(scope="module")
def images():
    return data.load("digits", size=16)[:64]


def config(name, images, **options):
    options = {"latent": 4, "batch_size": 4, "threads": 1, "steps": 4, **TINY[name], **options}
    return training.configure(name, "digits", images, **options)


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize("name", TINY)
def test_resumed_run_equals_uninterrupted_run(same, images, tmp_path, name):
    training.train(config(name, images), images, tmp_path / "a")
    training.train(config(name, images, steps=2), images, tmp_path / "b")
    saved = checkpoints.load(tmp_path / "b" / training.CHECKPOINT)
    training.train(training.reconfigure(saved.config, steps=4), images, tmp_path / "b", saved)
    a, b = (checkpoints.load(tmp_path / run / training.CHECKPOINT) for run in "ab")
    assert same(a.trainers, b.trainers)
    sample = checkpoints.generator(a, "gankern")(torch.randn(2, 4))
    assert sample.shape[:2] == (2, 1) and sample.isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_both_sides_give_the_same_numbers(images, name):
    stock, ours = (training.Trainer(config(name, images), layers, images) for layers in ("torch", "gankern"))
    for _ in range(3):
        a, b = stock.step(), ours.step()
        assert a.d_loss == pytest.approx(b.d_loss, rel=1e-3, abs=1e-3)
        assert a.g_loss == pytest.approx(b.g_loss, rel=1e-3, abs=1e-3)
    assert torch.equal(stock.random_state, ours.random_state)


@pytest.mark.parametrize("side", DISCRIMINATOR_LOSSES)
def test_loss_of_a_linear_critic(side):
    """D(x) = ⟨w, x⟩ has the gradient w everywhere: λ·(‖w‖ − 1)²; the rest is means of its outputs."""
    critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1, bias=False)).double()
    real, fake = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    objective = Objective(losses.get("wasserstein"), gradient_penalty=7.0, drift=0.3)
    alpha = torch.rand(5, dtype=torch.float64)
    loss = DISCRIMINATOR_LOSSES[side](critic, real, fake, {"gradient_penalty_alpha": alpha}, (), objective)
    weight = critic[1].weight
    d_real, d_fake = real.flatten(1) @ weight[0], fake.flatten(1) @ weight[0]
    expected = d_fake.mean() - d_real.mean() + 7.0 * (weight.norm() - 1.0) ** 2 + 0.3 * d_real.square().mean()
    torch.testing.assert_close(loss, expected, check_dtype=False)
    (gradient,) = torch.autograd.grad(expected, critic.parameters())
    loss.backward()
    torch.testing.assert_close(weight.grad, gradient)


def test_wgan_clips_and_takes_rmsprop(images):
    trainer = training.Trainer(config("wgan", images), "torch", images)
    trainer.step()
    assert isinstance(trainer.optimisers["d"], torch.optim.RMSprop)
    assert max(p.abs().max() for p in trainer.discriminator.parameters()) <= 0.01 + 1e-9
    assert max(p.abs().max() for p in trainer.generator.parameters()) > 0.01


def test_stages_of_the_paper():
    """600k images to train a resolution and 600k to fade in the next, from 4 to 1024: 17 phases."""
    phase = 600
    assert stage(0, phase, 1024) == (4, 1.0)
    assert stage(599, phase, 1024) == (4, 1.0)
    assert stage(600, phase, 1024) == (8, 0.0)
    assert stage(900, phase, 1024) == (8, 0.5)
    assert stage(1200, phase, 1024) == (8, 1.0)
    assert stage(1800, phase, 1024) == (16, 0.0)
    assert stage(16 * 600 - 1, phase, 1024) == (1024, 599 / 600)
    assert stage(16 * 600, phase, 1024) == (1024, 1.0)
    assert stage(10**9, phase, 1024) == (1024, 1.0)
    assert stage(10**9, phase, 4) == (4, 1.0)


def test_growth_changes_networks_and_forgets_optimisers(images):
    trainer = training.Trainer(config("progan", images, grow_steps=2), "torch", images)
    seen = []
    for _ in range(5):
        before = trainer.optimisers["d"]
        trainer.step()
        networks = (trainer.generator, trainer.discriminator, trainer.average.module)
        assert len({(network.resolution, network.alpha) for network in networks}) == 1
        seen.append((trainer.generator.resolution, trainer.generator.alpha, trainer.optimisers["d"] is before))
    assert seen == [(4, 1.0, True), (4, 1.0, True), (8, 0.0, False), (8, 0.5, True), (8, 1.0, True)]
    assert trainer.sample(torch.randn(3, 4)).shape == (3, 1, 8, 8)


def test_every_model_has_a_preset():
    assert training.PRESETS.keys() == models.MODELS.keys()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wgan_gp", {"grow_steps": 5}, "wgan_gp does not grow"),
        ("wgan", {"clip": -1.0}, "clip must be a positive number"),
        ("wgan", {"optimiser": "adagrad"}, "unknown optimiser"),
        ("wgan_gp", {"gradient_penalty": -1.0}, "gradient_penalty must be 0 or more"),
        ("wgan_gp", {"real_target": 0.9}, "no labels to smooth"),
    ],
)
def test_bad_options(images, name, options, message):
    with pytest.raises(ValueError, match=message):
        config(name, images, **options)
