"""What is their own of the games that make images of images: losses by hand, pools, figures, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

from gankern import data, games, training
from gankern.games._translation import hue_distance
from gankern.games.cyclegan import ImagePool
from gankern.games.pix2pix import HELD_OUT, foreground_iou, saturation
from gankern.games.srgan import decibels, enlarge, shrink


def trainer(name, layers="gankern", size=None, **options):
    game = games.find(name)
    samples = data.load(game.data, size)
    condition = None if game.needs is None else data.condition(game.data, samples, game.needs)
    options = {"batch_size": 2, "threads": 1, "steps": 1, "evaluate": 0, "width": 4} | options
    config = training.configure(name, game.data, samples, condition, **options)
    return training.Trainer(config, layers, samples, condition)


def moves_of(game, seed=3):
    torch.manual_seed(seed)
    return {player: float(loss.detach()) for player, loss in game.moves()}


def test_pix2pix_losses_by_hand():
    game = trainer("pix2pix", options={"dropout": 0}).game
    (image, given), game.run.batch = game.run.batch(), None
    game.run.batch = lambda: (image, given)
    found = moves_of(game)
    with torch.no_grad():
        fake = game.networks["generator"](given)
        real, made = (game.networks["discriminator"](torch.cat([given, x], 1)) for x in (image, fake))
    cross = F.binary_cross_entropy_with_logits
    right = 0.5 * (cross(real, torch.ones_like(real)) + cross(made, torch.zeros_like(made)))
    assert found["d"] == pytest.approx(right.item(), rel=1e-5)
    right = cross(made, torch.ones_like(made)) + 100 * (image - fake).abs().mean()
    assert found["g"] == pytest.approx(right.item(), rel=1e-4)
    alone = trainer("pix2pix", options={"dropout": 0, "adversarial_weight": 0.0}).game
    assert set(moves_of(alone)) == {"g"}
    squared = trainer("pix2pix", options={"dropout": 0, "adversarial_weight": 0.0, "squared": True}).game
    squared.run.batch = lambda: (image, given)
    found = moves_of(squared)
    with torch.no_grad():
        right = 100 * F.mse_loss(squared.networks["generator"](given), image)
    assert found == {"g": pytest.approx(right.item(), rel=1e-4)}


def test_pix2pix_of_frames_is_held_against_both_futures(monkeypatch):
    """Who always turns back is right, as one of them is, and never turns on; the mean of both is as far from either."""
    samples = data.load("turning")
    frames = data.condition("turning", samples, "pairs")
    game = training.Trainer(
        training.configure("pix2pix", "turning", samples, frames, width=4), "gankern", samples, frames
    ).game
    _, (on, back) = game.futures(samples, HELD_OUT)
    monkeypatch.setattr(game, "translate", lambda frames, seed: frames[:, 6:9])
    found = game.figures()
    assert found["nearer"] < 1e-6 and found["turns_on"] < 0.05
    monkeypatch.setattr(game, "translate", lambda frames, seed: (on + back) / 2)
    assert game.figures()["nearer"] == pytest.approx(0.25 * (on - back).square().mean().item(), rel=1e-5)
    monkeypatch.setattr(game, "translate", lambda frames, seed: frames[:, 9:])
    (picture,) = game.pictures().values()
    assert picture.batch.shape == (32, 3, 32, 32)


def test_pix2pix_pictures_have_dropout_and_change_nothing():
    game = trainer("pix2pix").game
    given = torch.rand(2, 1, 32, 32)
    before = {k: v.clone() for k, v in game.networks["generator"].state_dict().items()}
    a, b, c = game.translate(given, 0), game.translate(given, 0), game.translate(given, 1)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert all(torch.equal(v, before[k]) for k, v in game.networks["generator"].state_dict().items())


def test_cyclegan_losses_by_hand():
    for loss, identity in (("least_squares", 0.5), ("non_saturating", 0.0)):
        game = trainer("cyclegan", loss=loss, options={"identity": identity, "blocks": 1}).game
        a, b = game.run.batch()
        game.run.batch = lambda a=a, b=b: (a, b)
        found = moves_of(game)
        g, f, d_a, d_b = (game.networks[name] for name in ("a_to_b", "b_to_a", "d_a", "d_b"))
        with torch.no_grad():
            fake_b, fake_a = g(a), f(b)
            real, made = (d_a(a), d_b(b)), (d_a(fake_a), d_b(fake_b))
            cycle = F.l1_loss(f(fake_b), a) + F.l1_loss(g(fake_a), b)
            same = F.l1_loss(g(b), b) + F.l1_loss(f(a), a)
        cross = F.binary_cross_entropy_with_logits
        measure = F.mse_loss if loss == "least_squares" else cross
        ones, zeros = torch.ones_like(real[0]), torch.zeros_like(real[0])
        right = sum(measure(d, ones) for d in made) + 10 * cycle + 10 * identity * same
        assert found["g"] == pytest.approx(right.item(), rel=1e-4)
        right = 0.5 * sum(measure(r, ones) + measure(m, zeros) for r, m in zip(real, made))
        assert found["d"] == pytest.approx(right.item(), rel=1e-4)


def test_pool():
    images = torch.arange(1.0, 6.0).view(5, 1, 1, 1)
    pool = ImagePool(2, images[:2])

    def exchanged(images, coins, places):
        return pool.exchange(images, pool.decide(torch.tensor(coins), torch.tensor(places))).flatten().tolist()

    never, always = [0.9, 0.9], [0.1, 0.1]
    assert pool.state().shape == (0, 1, 1, 1)
    assert exchanged(images[:2], always, [0, 1]) == [1, 2]  # filled first
    assert exchanged(images[2:4], never, [0, 1]) == [3, 4]
    assert pool.state().flatten().tolist() == [1, 2]
    # Each image by itself: the first takes the place of 1, the second of what stands there then.
    assert exchanged(images[2:4], always, [0, 0]) == [1, 3]
    assert pool.state().flatten().tolist() == [4, 2]
    kept, pool = pool.state(), ImagePool(2, images[:2])
    pool.load_state(kept)
    assert exchanged(images[3:5], [0.1, 0.9], [1, 0]) == [2, 5]
    pool = ImagePool(3, images[:2])  # is full within a batch
    assert exchanged(images[:2], always, [0, 0]) == [1, 2]
    assert exchanged(images[2:4], always, [2, 2]) == [3, 3]
    assert pool.state().flatten().tolist() == [1, 2, 4]
    pool = ImagePool(0, images)
    assert exchanged(images, [0.0] * 5, [0] * 5) == [1, 2, 3, 4, 5] and pool.state().shape == (0, 1, 1, 1)


def test_srgan_learns_from_pixels_first():
    game = trainer("srgan", options={"mse_steps": 1, "blocks": 1}).game
    assert not game.begin(0) and set(moves_of(game)) == {"g"}
    assert game.begin(1) and list(moves_of(game)) == ["d", "g"]  # Adam begins anew
    assert all(not p.requires_grad for p in game.features.parameters())
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert shrink(images).shape == (2, 3, 4, 4) and enlarge(shrink(images)).shape == images.shape


def test_bicubic_on_whole_photographs():
    """With antialiasing and a = -0.5 it is 21.14 and 29.46 dB where luma has the full range; ours is from 16 to 235."""
    pytest.importorskip("sklearn")
    from gankern.data.drawn import _photographs

    less = 20 * math.log10(255 / 219)
    for picture, right in zip(_photographs(), (21.14, 29.46)):
        picture = picture[None, :, :424, :640]
        assert decibels(enlarge(shrink(picture)), picture) - less == pytest.approx(right, abs=0.15)


def test_what_the_figures_measure():
    covered = torch.zeros(1, 1, 8, 8)
    covered[:, :, 2:6, 2:6] = 1
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1) * covered - (1 - covered)
    grey = 0.5 * covered.expand(1, 3, 8, 8) - (1 - covered)
    assert saturation(red, covered) == 1 and saturation(grey, covered) == 0
    assert foreground_iou(red, covered) == 1
    green = red[:, [1, 0, 2]]
    assert hue_distance(red, green, covered).item() == pytest.approx(1 / 3) and hue_distance(red, red, covered) == 0


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("pix2pix", {"size": 30}, "pix2pix: images of a size that can be halved twice"),
        ("pix2pix", {"options": {"l1_weight": -1.0}}, "option l1_weight must be 0 or more, got -1.0"),
        ("cyclegan", {"size": 18}, "cyclegan: images of a size that can be halved twice"),
        ("cyclegan", {"options": {"pool": -1}}, "option pool must be 0 or more, got -1"),
        ("cyclegan", {"loss": "hinge"}, "unknown loss of cyclegan 'hinge'"),
        ("srgan", {"size": 40}, "srgan: images of a size that can be halved four times"),
    ],
)
def test_bad_input_is_named(name, options, says):
    with pytest.raises(ValueError, match=says):
        trainer(name, **options)
