"""Differentiable augmentation against loops over pixels; flips; and a run that uses them."""

import dataclasses

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gankern import data, training
from gankern.data.augment import AUGMENTATIONS, augment, draw

N, C, H, W = 5, 3, 8, 8
X = torch.randn(N, C, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def numbers(count, seed=2):
    return torch.rand(N, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_colour():
    u = numbers(3)
    for x, (b, s, c), y in zip(X, u, augment(X, {"color": u})):
        x = x + (b - 0.5)
        grey = x.mean(0)
        x = torch.stack([(channel - grey) * 2 * s + grey for channel in x])
        expected = (x - x.mean()) * (c + 0.5) + x.mean()
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("u", [numbers(2), torch.zeros(N, 2), torch.ones(N, 2), numbers(2, 9)])
def test_translation(u):
    seen = augment(X, {"translation": u})
    for x, (v, h), y in zip(X, u, seen):
        down, right = (min(2, int(3 * t)) - 1 for t in (v.item(), h.item()))  # an eighth of 8 is one pixel either way
        expected = torch.zeros_like(x)
        for i in range(H):
            for j in range(W):
                if 0 <= i + down < H and 0 <= j + right < W:
                    expected[:, i, j] = x[:, i + down, j + right]
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("u", [numbers(2), torch.zeros(N, 2), torch.ones(N, 2)])
def test_cutout(u):
    for x, (v, h), y in zip(X, u, augment(X, {"cutout": u})):
        top, left = (min(8, int(9 * t)) - 2 for t in (v.item(), h.item()))  # of a hole of four pixels
        expected = x.clone()
        for i in range(H):
            for j in range(W):
                if top <= i < top + 4 and left <= j < left + 4:
                    expected[:, i, j] = 0
        torch.testing.assert_close(y, expected)


def test_holes_and_shifts_go_everywhere():
    u = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    x = torch.ones(4000, 1, H, W)
    often = (augment(x, {"cutout": u}) == 0).float().mean((0, 1))
    assert often.min() > 0.05 and often.max() < 0.6
    assert abs(augment(x, {"translation": u}).mean().item() - (1 - 2 / 3 / 8) ** 2) < 0.01


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_gradients(name):
    u = {name: numbers(AUGMENTATIONS[name][1])[:2]}
    x = X[:2, :, :6, :6].clone().requires_grad_()
    assert gradcheck(lambda x: augment(x, u), x) and gradgradcheck(lambda x: augment(x, u).square(), x)


def config(**options):
    images = data.load("digits")
    options = dict(width=4, latent=8, batch_size=16, threads=1, steps=3) | options
    return training.configure("sn_dcgan", "digits", images, **options), images


def test_both_sides_of_a_comparison_see_the_same(tmp_path):
    settings, images = config(augment="color,translation,cutout", flip=True, compare=True, gradient_penalty=1.0)
    record = training.train(settings, images, tmp_path / "run")
    assert record["comparison"]["largest_loss_difference"]["all steps"]["gankern"] < 1e-3
    plain, _ = config(gradient_penalty=1.0)
    first = training.Trainer(plain, "torch", images).step().losses
    assert training.Trainer(settings, "torch", images).step().losses != first


def test_parts_of_a_batch_have_the_numbers_of_the_whole():
    settings, images = config(augment="color,translation,cutout", flip=True, discriminator_norm="none", loss="hinge")
    whole = training.Trainer(settings, "torch", images).step().losses
    parts = training.Trainer(dataclasses.replace(settings, accumulate=2), "torch", images).step().losses
    assert parts["d"] == pytest.approx(whole["d"], rel=1e-3)


def test_flips():
    settings, _ = config(flip=True, batch_size=64)
    images = torch.zeros(64, 1, 8, 8) - 1.0
    images[:, :, :, 0] = 1.0  # one edge
    trainer = training.Trainer(settings, "torch", images)
    (batch,) = trainer.game.run.batch()
    left, right = (batch[:, 0, :, edge] == 1.0 for edge in (0, 7))
    assert (left.all(1) ^ right.all(1)).all() and 16 < left.all(1).sum() < 48


def test_wrong_wishes():
    with pytest.raises(ValueError, match="did you mean color"):
        config(augment="colour")
    with pytest.raises(ValueError, match="infogan has no use for it"):
        training.configure("infogan", "digits", data.load("digits"), augment="color")
    with pytest.raises(ValueError, match="for images, not for points"):
        training.configure("wgan_gp_toy", "8gaussians", data.load("8gaussians"), flip=True)
    assert draw((), lambda n: torch.rand(2, n)) == {}
