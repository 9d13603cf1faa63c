"""EBGAN, BEGAN, VAE-GAN, BiGAN and ALI: the papers' sizes, formulas, bad input."""

import math

import pytest
import torch
from typer.testing import CliRunner

from gankern import data, games, training
from gankern.cli import app
from gankern.games import Run
from gankern.games.ebgan import repelling_term
from gankern.training import checkpoint


def count(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


def made(name, images, layers="torch", samples=None, **options):
    config = training.configure(name, "shapes", images, threads=1, **options)
    return games.find(name)(Run(config, layers, samples=samples))


@pytest.mark.parametrize("layers", ["torch", "gankern"])
def test_parameters_of_the_papers(layers):
    def counts(name, channels, size, **options):
        with torch.device("meta"):
            game = made(name, torch.zeros(2, channels, size, size), layers, size=size, **options)
        return [count(network) for network in game.networks.values()]

    assert sum(counts("ebgan", 3, 64, width=64)[1:]) == 1_318_659
    for width, generator, discriminator in ((128, 1_716_611, 13_405_379), (64, 563_395, 4_011_651)):
        g, encoder, decoder = counts("began", 3, 64, width=width, latent=64)
        assert g == decoder == generator and encoder + decoder == discriminator
    paper = {"width": 256, "latent": 128, "options": {"hidden": 1024, "kernel": 5}}
    encoder, decoder, features, head = counts("vaegan", 3, 64, **paper)
    assert (encoder, decoder, features + head) == (18_071_360, 4_693_155, 10_953_857)
    encoder, decoder, features, head = counts("vaegan", 3, 32, **paper)
    assert (encoder, decoder, features + head) == (5_488_448, 2_481_187, 4_047_873)
    encoder, decoder, features, head = counts("vaegan", 3, 32, options={"kernel": 5})
    assert (encoder, decoder, features + head) == (205_008, 164_211, 195_233)
    assert counts("bigan", 1, 28, width=1024, latent=50) == [1_907_472, 1_906_738, 1_905_665]
    generator, encoder, discriminator = counts("bigan", 3, 32, width=512, latent=64, options={"ali": True})
    assert (generator, encoder, discriminator) == (981_152, 3_118_496, 10_368_641)


def test_repelling_term_in_loops():
    """With the square: opposite codes repel as equal ones do."""
    torch.manual_seed(0)
    codes = torch.randn(5, 3, dtype=torch.float64)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    right = sum(torch.cosine_similarity(codes[i], codes[j], dim=0) ** 2 for i, j in pairs) / len(pairs)
    torch.testing.assert_close(repelling_term(codes), right)
    assert repelling_term(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == 1.0


def test_margin_is_half_the_variance_and_the_hinge_is_of_each_sample():
    images = data.load("digits")
    game = made("ebgan", images, samples=images)
    assert game.margin == pytest.approx(0.5 * images[game.run.spread(1000)].var(0).mean().item())
    assert made("ebgan", images, samples=images, options={"margin": 0.7}).margin == 0.7
    game.networks["decoder"] = torch.nn.Identity()
    game.networks["encoder"] = torch.nn.Identity()  # D is 0 for all: the hinge is the margin
    game.run.batches = iter([images[:64]])
    assert next(game.moves())[1].item() == pytest.approx(game.margin)


def test_data_in_the_order_of_their_classes_are_measured_from_end_to_end():
    digits = data.load("mnist5k")
    labels = data.condition("mnist5k", digits, "labels")
    assert labels[:500].unique().tolist() == [0]  # as they lie
    config = training.configure("vaegan", "mnist5k", digits, width=8, latent=4, threads=1, evaluate_samples=100)
    game = games.find("vaegan")(Run(config, "torch", samples=digits))
    assert labels[game.looked_at(100)].unique().tolist() == [*range(10)]
    before, between = game.vector(labels)
    assert before.shape == (10, 4) and between.shape == (4,) and between.any()
    assert game.vector(torch.zeros_like(labels)) is None and game.vector(None) is None
    assert len(game.pictures()) == 3
    halves = torch.cat([torch.full((2000, 1, 8, 8), value) for value in (-1.0, 1.0)])
    assert made("ebgan", halves, samples=halves, size=8).margin == pytest.approx(0.5, rel=0.01)


def test_balance_of_began(monkeypatch):
    """k and M by their formulas, with errors that are known; both are in the checkpoint."""
    images = torch.zeros(16, 1, 8, 8)
    game = made("began", images, samples=images, size=8, options={"rate": 0.1}, width=4, latent=4)
    game.run.batches = iter([images] * 3)
    k, smooth = 0.0, None
    for of_real, of_fake in ((0.8, 0.2), (0.4, 0.1), (0.2, 9.0)):
        errors = iter(torch.tensor([of_real, 0.5, of_fake]))
        monkeypatch.setattr(game, "error", lambda images, errors=errors: next(errors))
        (_, d), (_, g) = game.moves()
        assert d.item() == pytest.approx(of_real - k * 0.5) and g.item() == pytest.approx(of_fake)
        k = min(max(k + 0.1 * (0.5 * of_real - of_fake), 0.0), 1.0)
        now = of_real + abs(0.5 * of_real - of_fake)
        smooth = now if smooth is None else 0.95 * smooth + 0.05 * now
    assert game.extra_state()["k"].item() == pytest.approx(k) == 0.0
    assert game.extra_state()["convergence"].item() == pytest.approx(smooth)


def test_divergence_of_the_prior_and_who_is_trained_on_what():
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    game = made("vaegan", images, samples=images, size=16, width=8, latent=4, batch_size=8)
    mean, log_var = game.networks["encoder"](images).chunk(2, 1)
    normal = torch.distributions.Normal
    right = torch.distributions.kl_divergence(normal(mean, (0.5 * log_var).exp()), normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(game.encode(images)[1], right)
    game.run.batches = iter([images] * 2)
    assert [player for player, _ in game.moves()] == ["d", "g", "e"]
    plain = made("vaegan", images, samples=images, size=16, width=8, latent=4, options={"vae": True})
    assert list(plain.networks) == ["encoder", "decoder"] and list(plain.players) == ["v"]


@pytest.mark.parametrize(
    ("real", "fake", "balance", "moves"),
    [
        (0.7, 0.7, 0.35, "dge"),
        (0.3, 0.7, 0.35, "ge"),  # the discriminator is ahead: below 0.33
        (0.7, 0.3, 0.35, "ge"),
        (0.7, 1.1, 0.35, "de"),  # the decoder is: above 1.03
        (1.1, 0.7, 0.35, "de"),
        (0.3, 1.1, 0.35, "dge"),  # both would rest
        (0.3, 0.7, 0.0, "dge"),
        (0.7, 1.1, 0.0, "dge"),
        (0.3, 0.7, 0.4, "dge"),
    ],
)
def test_balance_of_vaegan(real, fake, balance, moves):
    """Who moves where the discriminator's costs are ``real`` and ``fake``."""
    images = torch.ones(4, 1, 16, 16)
    game = made(
        "vaegan", images, samples=images, size=16, width=8, latent=4, batch_size=4, options={"balance": balance}
    )
    game.run.batches = iter([images])
    logit = {True: -math.log(math.expm1(real)), False: math.log(math.expm1(fake))}  # softplus(-l), and softplus(l)
    features = game.networks["features"]

    def head(seen):
        return torch.full((len(seen), 1), logit[torch.equal(seen, features(images))]) + 0 * seen.sum()

    game.networks["head"] = head
    assert "".join(player for player, _ in game.moves()) == moves


@pytest.mark.parametrize(
    ("loss", "right"),
    [
        ("non_saturating", [math.log1p(math.exp(-3)) + math.log1p(math.exp(-2)), math.log1p(math.exp(3)) + math.log1p(math.exp(2))]),
        ("least_squares", [0.5 * 2**2 + 0.5 * 2**2, 0.5 * 3**2 + 0.5 * 3**2]),
        ("hinge", [0.0, 3.0 + 2.0]),
        ("minimax", [math.log1p(math.exp(-3)) + math.log1p(math.exp(-2)), -math.log1p(math.exp(-3)) - math.log1p(math.exp(-2))]),
    ],
)  # fmt: skip
def test_losses_of_pairs(loss, right):
    """The discriminator's, and the pair's with the labels of both exchanged; minimax is its opposite."""
    images = 2 * torch.rand(64, 1, 8, 8) - 1
    game = made("bigan", images, samples=images, width=8, loss=loss)
    game.run.batches = iter([images])
    told = []

    def discriminator(x, z):
        told.append(3.0 if torch.equal(x, images) else -2.0)  # the logit of (x, E(x)), and of (G(z), z)
        return torch.full((len(x),), told[-1])

    game.networks["discriminator"] = discriminator
    (d, d_loss), (g, g_loss) = game.moves()
    assert [d_loss.item(), g_loss.item()] == pytest.approx(right)
    assert game.players["g"].networks == ("generator", "encoder")


def test_noise_on_images_of_pairs_is_of_training_and_of_the_option():
    images, latents = torch.zeros(400, 1, 8, 8), torch.zeros(400, 16)
    for noise, spread in ((0.3, 0.3), (0.0, 0.0)):
        game = made("bigan", images, samples=images, width=8, options={"noise": noise})
        judge, seen = game.networks["discriminator"], []
        judge.image.register_forward_hook(lambda *told, seen=seen: seen.append(told[-1]))
        judge(images, latents)
        assert seen[-1].std().item() == pytest.approx(spread, rel=0.02)
        judge.eval()(images, latents)
        assert not seen[-1].any()


@pytest.mark.parametrize("layers", ["torch", "gankern"])
def test_batch_norms_of_vaegan_have_the_authors_eps(layers):
    """1e-6: 4 of the encoder, 4 of the decoder, 4 of the discriminator."""
    game = made("vaegan", torch.zeros(2, 3, 16, 16), layers, size=16, width=8, latent=4)
    norms = [m for n in game.networks.values() for m in n.modules() if "BatchNorm" in type(m).__name__]
    assert [m.eps for m in norms] == [1e-6] * 12


@pytest.mark.parametrize("name", ["ebgan", "began", "vaegan"])
@pytest.mark.parametrize("option", [{"loss": "hinge"}, {"real_target": 0.9}])
def test_another_loss_is_refused(name, option):
    with pytest.raises(ValueError, match=f"the losses of {name} are its own"):
        made(name, torch.zeros(2, 3, 32, 32), **option)


def test_wrong_sizes_and_options():
    images = torch.zeros(2, 3, 20, 20)
    for name, text in (("ebgan", "halved three times"), ("began", "power of two"), ("vaegan", "halved three times")):
        with pytest.raises(ValueError, match=f"{name}: images of a size that .*{text}.* got 20"):
            made(name, images, size=20)
    with pytest.raises(ValueError, match="ALI's networks are for 32x32 .* got 20x20"):
        made("bigan", images, options={"ali": True})
    with pytest.raises(ValueError, match="option noise must be 0 or more, got -1.0"):
        made("bigan", torch.zeros(2, 1, 8, 8), options={"noise": -1})
    with pytest.raises(ValueError, match="kernel must be 4 or 5, got 3"):
        made("vaegan", torch.zeros(2, 3, 32, 32), options={"kernel": 3})


def test_samples_of_a_checkpoint_are_of_the_latents_that_it_was_trained_on(tmp_path):
    """BEGAN's latents are uniform: a checkpoint of it is drawn by its own pictures, and not from normal latents."""
    images = data.load("digits")
    config = training.configure(
        "began", "digits", images, size=8, width=4, latent=4, steps=1, batch_size=8, evaluate=0, threads=1
    )
    training.train(config, images, tmp_path / "run")
    command = CliRunner().invoke(app, ["sample", str(tmp_path / "run"), "--out", str(tmp_path / "samples.png")])
    assert command.exit_code == 0, command.output
    with pytest.raises(ValueError, match="no network that makes samples of latents alone"):
        checkpoint.game(checkpoint.load(tmp_path / "run" / training.CHECKPOINT), "gankern").average()
    with pytest.raises(ValueError, match="ema: began keeps no average"):
        made("began", images, size=8, ema=0.9)
