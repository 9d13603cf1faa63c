"""Games that are told what to draw: cGAN on vectors, and text to image. The papers' sizes, formulas, bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from gankern import data, games, models, training
from gankern.cli import app
from gankern.data import drawn
from gankern.games import Run
from gankern.games._measures import regressor
from gankern.games._scenes import HEADS, SceneReader, in_place
from gankern.games._text import TextEncoder, embed_jointly, same_texts, standardise
from gankern.games._text_networks import SMALL
from gankern.games.cgan import PaperDiscriminator, PaperGenerator
from gankern.games.gan_cls import Discriminator, Generator
from gankern.models.layers import LAYERS


def count(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


def made(name, samples, condition, layers="torch", **options):
    config = training.configure(name, options.pop("data", "x"), samples, condition, **options)
    return games.find(name)(Run(config, layers, samples=samples, condition=condition))


# ---- vectors as conditions of the models


@pytest.mark.parametrize("layers", ["torch", "gankern"])
@pytest.mark.parametrize("name", ["gan", "dcgan", "sn_dcgan", "wgan_gp"])
def test_a_one_hot_vector_is_a_label(layers, name):
    """The networks of vectors hold what those of labels hold, and give the same for one-hot vectors."""
    shape = {"size": 16, "channels": 1, "latent": 4, "width": 4, "layers": layers, "num_classes": 3}
    labels, images, latents = torch.tensor([0, 2, 1, 2]), torch.randn(4, 1, 16, 16), torch.randn(4, 4)
    for how in ("concatenation", "projection"):
        of_labels, of_vectors = (models.build(name, **shape, conditioning=f"{v}{how}") for v in ("", "vector_"))
        pairs = [("discriminator", images)] + ([("generator", latents)] if how == "concatenation" else [])
        for network, x in pairs:
            a, b = getattr(of_labels, network).eval(), getattr(of_vectors, network).eval()
            b.load_state_dict(a.state_dict())
            torch.testing.assert_close(b(x, F.one_hot(labels, 3).float()), a(x, labels))
        vectors = torch.randn(4, 3)
        one, other = of_vectors.generator(latents, vectors), of_vectors.generator(latents, 2 * vectors)
        assert one.isfinite().all() and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, r"call it with vectors \[N, 3\]"),
        (torch.tensor([0, 1]), "the condition must be floating point|the condition"),
        (torch.zeros(2, 4), r"the condition must be \[2, 3\], got"),
        (torch.zeros(3, 3), r"the condition must be \[2, 3\], got"),
    ],
)
def test_wrong_vectors(wrong, message):
    gan = models.dcgan(8, 1, 4, 2, num_classes=3, conditioning="vector_projection")
    for network, x in ((gan.generator, torch.zeros(2, 4)), (gan.discriminator, torch.zeros(2, 1, 8, 8))):
        with pytest.raises((ValueError, TypeError), match=message):
            network(x, wrong)


def test_existing_models_train_on_attributes_and_resume(tmp_path, same):
    shapes = data.load("shapes", 16)
    attributes = data.condition("shapes", shapes, "attributes")
    options = {"latent": 4, "width": 2, "batch_size": 8, "threads": 1, "conditioning": "vector_projection"}
    config = training.configure("sn_dcgan", "shapes", shapes, attributes, steps=3, **options)
    assert config.num_classes == 13
    training.train(config, shapes, tmp_path / "a", labels=attributes)
    training.train(training.reconfigure(config, steps=2), shapes, tmp_path / "b", labels=attributes)
    saved = training.checkpoint.load(tmp_path / "b" / training.CHECKPOINT)
    training.train(training.reconfigure(config, steps=3), shapes, tmp_path / "b", saved, labels=attributes)
    a, b = (training.checkpoint.load(tmp_path / f / training.CHECKPOINT) for f in "ab")
    assert same(a.trainers, b.trainers)


def test_labels_and_attributes_are_not_mistaken():
    shapes = data.load("shapes", 16)
    attributes, labels = (data.condition("shapes", shapes, kind) for kind in ("attributes", "labels"))
    with pytest.raises(ValueError, match=r"attributes must be \[100000, M\]"):
        training.configure("dcgan", "shapes", shapes, labels, conditioning="vector_projection")
    with pytest.raises((ValueError, TypeError), match="labels must be"):
        training.configure("dcgan", "shapes", shapes, attributes, conditioning="projection")


# ---- cGAN


@pytest.mark.parametrize("layers", LAYERS)
def test_parameters_of_the_paper(layers):
    layers = LAYERS[layers]
    with torch.device("meta"):
        assert count(PaperGenerator((1, 28, 28), 100, 10, False, layers)) == 972_784
        assert count(PaperGenerator((1, 28, 28), 100, 10, True, layers)) == 2_413_984
        assert count(PaperDiscriminator(784, 10, layers)) == 1_224_351
        assert count(TextEncoder(128)) == 73_088
        assert count(Generator(32, 3, 64, 32, SMALL, layers)) == 436_224
        assert count(Discriminator(32, 3, 32, SMALL, layers)) == 200_896


@pytest.mark.parametrize("layers", ["torch", "gankern"])
@pytest.mark.parametrize(
    ("width", "options", "generator", "discriminator"),
    [
        (128, {"paper": True}, 18_909_699, 4_032_321),
        (64, {"paper": True, "blocks": False}, 4_756_736, 2_899_072),
        (32, {"spectral": False}, 1_370_624, 785_344),
        (32, {}, 1_370_624, 783_936),  # without batch norm's scales and shifts
    ],
)
def test_parameters_of_text_to_image_by_its_options(layers, width, options, generator, discriminator):
    images, texts = torch.zeros(2, 3, 64, 64), torch.zeros(2, 5, 64, dtype=torch.long)
    with torch.device("meta"):
        game = made("gan_cls", images, texts, layers, size=64, latent=100, width=width, options=options)
    assert count(game.networks["generator"]) == generator
    assert count(game.networks["discriminator"]) == discriminator


@pytest.mark.parametrize("networks", ["mlp", "dcgan", "sn_dcgan"])
@pytest.mark.parametrize("conditioning", ["concatenation", "projection"])
def test_cgan_on_labels(networks, conditioning):
    images, labels = data.load("digits", size=16)[:64], data.labels("digits")[:64]
    options = {"batch_size": 8, "threads": 1, "conditioning": conditioning, "size": 16, "latent": 8}
    options |= {} if networks == "mlp" else {"width": 4}  # the paper's has its own
    config = training.configure("cgan", "digits", images, labels, options={"networks": networks}, **options)
    trainer = training.Trainer(config, "gankern", images, labels)
    trainer.step()
    drawn = trainer.game.pictures()
    assert trainer.is_finite() and drawn["one class a column"].columns == 10
    assert drawn["one class a column"].batch.shape == (80, 1, 16, 16)


def test_real_images_come_with_their_own_vectors_and_fakes_with_theirs():
    shapes = data.load("shapes", 8)
    attributes = data.condition("shapes", shapes, "attributes")
    known = {tuple(a.tolist()): image for a, image in zip(attributes[:64], shapes[:64])}
    images, vectors = shapes[:64], attributes[:64]
    config = training.configure("cgan", "shapes", images, vectors, batch_size=8, width=2, latent=4, size=8, threads=1)
    trainer = training.Trainer(config, "torch", images, vectors)
    seen, made = [], []
    judge, generate = trainer.game.judge, trainer.game.generate
    trainer.game.judge = lambda x, y: (seen.append((x, y)), judge(x, y))[1]
    trainer.game.generate = lambda z, y: (made.append((generate(z, y), y)), made[-1][0])[1]
    trainer.step()
    real, fake, again = seen
    assert all(torch.equal(known[tuple(y.tolist())], x) for x, y in zip(*real))
    for (x, y), (image, vector) in zip((fake, again), made):
        assert torch.equal(x, image) and torch.equal(y, vector)


# ---- text to image


def scene_trainer(layers="torch", **options):
    samples = data.load("captions", 16)
    captions = data.condition("captions", samples, "captions")
    config = training.configure("gan_cls", "captions", samples, captions, batch_size=8, width=4, latent=4, size=16,
                                threads=1, options={"encoder_steps": 1} | options)  # fmt: skip
    return training.Trainer(config, layers, samples, captions)


@pytest.mark.parametrize(
    ("mismatched", "mismatches", "interpolated"), [(1.0, 1, 1.0), (0.0, 1, 0.5), (2.0, 3, 0.0), (0.5, 20, 0.0)]
)
def test_losses_by_their_formulas(mismatched, mismatches, interpolated):
    """Each player's loss from what the discriminator was asked, in its order. Of a batch of 8 there are 7 mismatches."""
    game = scene_trainer(mismatched=mismatched, mismatches=mismatches, interpolated=interpolated).game
    game.step, asked = 1, []
    texts = torch.randint(1, 27, (8, 5, 64))  # no two alike
    game.run.batch = lambda: (torch.randn(8, 3, 16, 16), texts)
    judge = game.networks["discriminator"].eval()  # no power iteration between one call and another
    judge.register_forward_hook(lambda _, inputs, out: asked.append((*inputs, out)))
    moves = game.moves()
    player, loss = next(moves)
    (real, codes, right), (fake, of_fake, generated), *wrong = asked
    assert player == "d" and torch.equal(codes, of_fake) and not fake.requires_grad
    expected = F.softplus(-right).mean() + 0.5 * F.softplus(generated).mean()
    assert len(wrong) == (mismatched > 0)
    for image, others, logits in wrong:  # a real image with others' texts, each of the same weight
        assert torch.equal(image, real) and len(others) == 8 * min(mismatches, 7)
        for k, (text, of_text) in enumerate(zip(others.split(8), logits.split(8)), 1):
            assert torch.equal(text, codes[(torch.arange(8) - k) % 8])
            torch.testing.assert_close(of_text, judge(real, text))
        expected = expected + 0.5 * mismatched * F.softplus(logits).mean()
    torch.testing.assert_close(loss, expected)
    asked.clear()
    player, loss = next(moves)
    (_, own, generated), *between = asked
    assert player == "g" and torch.equal(own, codes) and len(between) == (interpolated > 0)
    expected = F.softplus(-generated).mean()
    for _, mixed, logits in between:
        torch.testing.assert_close(mixed, 0.5 * codes[:4] + 0.5 * codes[4:])
        expected = expected + interpolated * F.softplus(-logits).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("captions", "number"), [(4, 4), (9, 5)])
def test_the_mean_of_several_texts_is_the_code(captions, number):
    """Of ``number`` different ones of the image's five."""
    game = scene_trainer(captions=captions).game
    game.step, asked = 1, []
    texts = torch.randint(1, 27, (8, 5, 64))
    game.run.batch = lambda: (torch.randn(8, 3, 16, 16), texts)
    game.networks["discriminator"].register_forward_hook(lambda _, inputs, out: asked.append(inputs[1]))
    next(game.moves())
    of_each = game.networks["encoder"](texts.flatten(0, 1)).unflatten(0, (8, 5))
    sets = torch.tensor(list(itertools.combinations(range(5), number)))
    means = of_each[:, sets].mean(2)  # [8, sets, length]
    nearest = (means - asked[0][:, None]).abs().amax(2).amin(1)
    torch.testing.assert_close(nearest, torch.zeros(8), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="option captions must be at least 1, got 0"):
        scene_trainer(captions=0)


@pytest.mark.parametrize("spectral", [True, False])
def test_the_small_discriminator_of_texts_is_spectrally_normalised(spectral):
    """Each weight is divided by its largest singular value, in the place of batch norm."""
    judge = scene_trainer("gankern", spectral=spectral).game.networks["discriminator"].eval()
    weights = [m.weight.flatten(1) for m in judge.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    sizes = torch.stack([torch.linalg.matrix_norm(w, 2) for w in weights])
    assert len(sizes) == 5 and bool((sizes > 0.5).all()) == spectral  # else they are drawn from N(0, 0.02)
    if spectral:
        torch.testing.assert_close(sizes, torch.ones(5), atol=0.1, rtol=0)  # a few power iterations
    assert any("BatchNorm" in type(m).__name__ for m in judge.modules()) != spectral


def test_the_same_text_is_no_mismatch():
    game = scene_trainer(mismatches=2).game
    game.step, asked = 1, []
    several = torch.randint(1, 27, (4, 5, 64))
    several = several[torch.tensor([0, 0, 1, 1, 1, 2, 3, 0])]  # 1, 3 and 4 have the text of the one before, 0 that of 7
    game.run.batch = lambda: (torch.randn(8, 3, 16, 16), several)
    game.networks["discriminator"].register_forward_hook(lambda _, inputs, out: asked.append(out))
    _, loss = next(game.moves())
    right, generated, wrong = asked
    expected = F.softplus(-right).mean() + 0.5 * F.softplus(generated).mean()
    # One back 2, 5, 6 and 7 have another text; two back all but 1, which has that of 7, and 4, which has that of 2.
    torch.testing.assert_close(loss, expected + 0.5 * F.softplus(wrong)[[2, 5, 6, 7, 8, 10, 11, 13, 14, 15]].mean())
    assert same_texts(several)[0].tolist() == [True, True, False, False, False, False, False, True]


def test_the_encoder_is_trained_before_the_first_step_and_left_alone():
    trainer = scene_trainer(encoder_steps=2)
    before = [p.clone() for p in trainer.game.networks["encoder"].parameters()]
    trainer.step()
    after = [p.clone() for p in trainer.game.networks["encoder"].parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(after, trainer.game.networks["encoder"].parameters()))


def test_joint_embedding_tells_texts_of_images():
    """Images that are one number each, and texts that spell it: after training, a text fits its own image best."""
    torch.manual_seed(0)
    images = torch.eye(4).repeat(8, 1)
    texts = torch.arange(1, 5).repeat(8)[:, None, None].expand(-1, 5, 6)
    encoder, look = TextEncoder(8), torch.nn.Linear(4, 8)
    fit = []
    for steps in (0, 60):
        embed_jointly(encoder, look, images, texts, steps, 16)
        codes = encoder(texts[:4, 0])
        fit.append((codes[:, None] - codes).square().sum(2)[~torch.eye(4, dtype=torch.bool)].min().item())
    assert fit[1] > 10 * fit[0]


def test_codes_stand_beside_latents_as_their_equals():
    """Mean 0 and variance 1 of each number over the data's texts, and otherwise the same code."""
    torch.manual_seed(0)
    encoder, texts = TextEncoder(8).double(), torch.randint(1, 27, (60, 5, 12))
    before = encoder(texts[:, 0])
    standardise(encoder, texts)
    after = encoder(texts[:, 0])
    torch.testing.assert_close(after, (before - before.mean(0)) / before.std(0))


def test_what_scenes_are_read_for():
    scenes = drawn.Scenes(32)
    scene = scenes.scenes(torch.arange(200))
    answers = in_place(scene)
    for n in range(200):
        text = drawn.describe(scene, n)[0]
        if " left of " in text or " above " in text or not any(r in text for r in drawn.RELATIONS):
            assert answers["kind"][n] == scene.kind[n] and answers["colour"][n] == scene.colour[n]
        else:  # right of, below: the other shape is the one that is left, or on top
            assert answers["kind"][n] == scene.other_kind[n] and answers["other_colour"][n] == scene.colour[n]
        assert answers["axis"][n] == (-1 if scene.relation[n] < 0 else int(" above " in text or " below " in text))


def test_reading_right_and_wrong_answers():
    """A reader that is handed the answers scores 1, and one that has shapes exchanged has no relation right."""
    reader = SceneReader.__new__(SceneReader)
    scene = drawn.Scenes(32).scenes(torch.arange(300))
    answers = in_place(scene)

    def told(answers):
        return {n: F.one_hot(answers[n].clamp(min=0), k).float().mul(9).log_softmax(1) for n, k in HEADS.items()}

    reader.read = lambda images: told(answers)
    assert reader.score(torch.zeros(300), scene) == {"shape": 1.0, "relation": 1.0}
    exchanged = answers | {"colour": answers["other_colour"].clamp(min=0), "other_colour": answers["colour"]}
    reader.read = lambda images: told(exchanged)
    two = scene.relation >= 0
    same_colour = (answers["colour"] == answers["other_colour"])[two].float().mean().item()
    assert reader.score(torch.zeros(300), scene)["relation"] == pytest.approx(same_colour)


def test_wrong_data_and_options():
    images = torch.zeros(8, 3, 32, 32)
    with pytest.raises(ValueError, match="gan_cls needs captions, and x has none"):
        training.configure("gan_cls", "x", images)
    with pytest.raises(
        ValueError, match="data: shapes has no captions; it has attributes. Data with captions: captions"
    ):
        data.condition("shapes", data.load("shapes"), "captions")
    with pytest.raises(ValueError, match="a power of two from 16 on, got 8"):
        made("gan_cls", torch.zeros(8, 3, 8, 8), torch.zeros(8, 5, 64, dtype=torch.long), size=8)
    with pytest.raises(ValueError, match="option networks dcgan, sn_dcgan or mlp; got .* 'unet'"):
        made("cgan", images, torch.zeros(8, 13), size=32, options={"networks": "unet"})


def test_a_checkpoint_of_another_game(tmp_path):
    """One line that names both, and the run is as it was."""
    images = data.load("digits")
    config = training.configure("aae", "digits", images, steps=1, width=8, batch_size=8, threads=1, evaluate=0)
    training.train(config, images, tmp_path / "run")
    before = (tmp_path / "run" / training.CHECKPOINT).read_bytes()
    result = CliRunner().invoke(app, ["train", "infogan", "--resume", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "trained with model=aae, not model=infogan" in " ".join(result.output.split())
    assert (tmp_path / "run" / training.CHECKPOINT).read_bytes() == before


def test_what_measures_a_game_leaves_the_random_streams_of_gpus_alone(monkeypatch):
    images = data.load("edges", 8)
    config = training.configure("pix2pix", "edges", images, data.condition("edges", images, "pairs"), size=8, width=2)
    game = games.find("pix2pix")(Run(config, "gankern", samples=images))
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    SceneReader(32, 4, 1)
    regressor(torch.zeros(4, 1, 8, 8), torch.zeros(4, 2), [0], 1)
    assert game.translate(torch.zeros(2, 1, 8, 8), seed=3).shape == (2, 3, 8, 8)
    assert not seeded and torch.equal(torch.get_rng_state(), before)
