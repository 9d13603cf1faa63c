"""What a run can be told beside the papers' settings: points, labels, parts of a batch, precision, figures, files."""

import csv
import json
from dataclasses import asdict

import pytest
import torch

from gankern import data, models, training
from gankern.games.adversarial import Adversarial
from gankern.training import checkpoint as checkpoints
from gankern.training import record as records

TINY = {"latent": 8, "batch_size": 8, "threads": 1, "steps": 4}
WIDTHS = {"gan": 10, "wgan_gp": 2}


@pytest.fixture(scope="module")
def images():
    return data.load("digits")[:200]


@pytest.fixture(scope="module")
def labels():
    return data.labels("digits")[:200]


def config(model, images, labels=None, **options):
    return training.configure(model, "digits", images, labels, **TINY | {"width": WIDTHS.get(model, 4)} | options)


def trained_twice(configuration, samples, tmp_path, labels=None):
    """The checkpoints of a run of four steps, and of one that was stopped after two and resumed."""
    training.train(configuration, samples, tmp_path / "a", labels=labels)
    half = type(configuration)(**asdict(configuration) | {"steps": 2})
    training.train(half, samples, tmp_path / "b", labels=labels)
    saved = checkpoints.load(tmp_path / "b" / training.CHECKPOINT)
    training.train(training.reconfigure(saved.config, steps=4), samples, tmp_path / "b", saved, labels=labels)
    return [checkpoints.load(tmp_path / run / training.CHECKPOINT) for run in "ab"]


# ------------------------------------------------------------------------------------------------------------
# Points


@pytest.mark.parametrize("name", data.POINTS)
def test_points_train_and_resume(same, tmp_path, name):
    points = data.load(name)
    options = dict(width=8, batch_size=16, threads=1, steps=4, ema=0.9, decay_steps=4, n_critic=2, evaluate_samples=100)
    a, b = trained_twice(training.configure("wgan_gp_toy", name, points, **options), points, tmp_path)
    assert same(a.trainers, b.trainers)
    assert a.history["figures"][-1] == b.history["figures"][-1]
    found = a.history["figures"][-1]["gankern"]
    assert ("modes_covered" in found) == (points.modes is not None)
    assert found["sliced_wasserstein"] > 0 and abs(found["wasserstein_estimate"]) < 10
    for picture in ("samples.png", "metrics.png"):
        assert (tmp_path / "a" / picture).read_bytes().startswith(b"\x89PNG")


def test_points_compare(tmp_path):
    points = data.load("8gaussians")
    options = dict(width=16, batch_size=32, threads=1, steps=5, compare=True, n_critic=2)
    record = training.train(
        training.configure("wgan_gp_toy", "8gaussians", points, **options), points, tmp_path / "run"
    )
    assert record["comparison"]["largest_loss_difference"]["first 5 steps"]["gankern"] < 1e-4
    assert record["figures"].keys() == {"step", "torch", "gankern"}
    records.table(record)


def test_figures_of_perfect_points():
    """The data themselves have all modes, 98.9 % of high quality, and next to no distance."""
    points = data.load("25gaussians")
    configuration = training.configure("wgan_gp_toy", "25gaussians", points, width=8, threads=1)
    trainer = training.Trainer(configuration, "torch", points)
    trainer.game.sample = lambda latents: points.sample(len(latents), torch.Generator().manual_seed(7))
    found = Adversarial.evaluator(configuration, points)(trainer.game)
    assert found["modes_covered"] == 25
    assert found["high_quality"] == pytest.approx(0.989, abs=0.005)
    assert found["sliced_wasserstein"] < 0.03


def test_points_and_images_do_not_mix(images):
    points = data.load("8gaussians")
    with pytest.raises(ValueError, match="dcgan is for images, and 8gaussians are points: pass --data mnist5k or"):
        training.configure("dcgan", "8gaussians", points)
    with pytest.raises(ValueError, match="wgan_gp_toy is for points, and digits are images: pass --data 8gaussians or"):
        training.configure("wgan_gp_toy", "digits", images)
    with pytest.raises(ValueError, match="have no --size"):
        training.configure("wgan_gp_toy", "8gaussians", points, size=32)
    with pytest.raises(ValueError, match="neither size nor channels"):
        data.load("8gaussians", size=32)


def test_learning_rates_fall_to_zero():
    points = data.load("8gaussians")
    options = dict(width=4, batch_size=4, threads=1, decay_steps=4, lr=0.4, n_critic=1)
    trainer = training.Trainer(training.configure("wgan_gp_toy", "8gaussians", points, **options), "torch", points)
    rates = []
    for _ in range(6):
        trainer.step()
        rates.append([group["lr"] for o in trainer.optimisers.values() for group in o.param_groups])
    assert rates == [[pytest.approx(lr)] * 2 for lr in (0.4, 0.3, 0.2, 0.1, 0.0, 0.0)]


# ------------------------------------------------------------------------------------------------------------
# Labels, and what papers add


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize("conditioning", ["projection", "concatenation"])
@pytest.mark.parametrize("model", ["gan", "dcgan", "sn_dcgan", "wgan_gp"])
def test_conditional_models_train_and_resume(same, images, labels, tmp_path, model, conditioning):
    configuration = config(model, images, labels, conditioning=conditioning, ema=0.9)
    assert configuration.num_classes == 10
    a, b = trained_twice(configuration, images, tmp_path, labels)
    assert same(a.trainers, b.trainers)
    generator = checkpoints.generator(a, "gankern")
    latents = torch.randn(1, 8).expand(2, 8)
    one, other = generator(latents, torch.tensor([3, 4]))
    assert (one - other).abs().max() > 0  # the label matters


def test_the_discriminator_sees_an_image_with_its_own_label(images, labels):
    trainer = training.Trainer(config("dcgan", images, labels, conditioning="projection"), "torch", images, labels)
    known = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels)}
    for _ in range(3):
        batch, of_batch = next(trainer.batches)
        assert [known[image.numpy().tobytes()] for image in batch] == of_batch.tolist()


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("dcgan", {"minibatch_discrimination": 3}),
        ("dcgan", {"generator_norm": "virtual", "discriminator_norm": "virtual"}),
        ("wgan_gp", {"generator_norm": "virtual", "ema": 0.9}),
        ("sn_dcgan", {"generator_norm": "virtual", "minibatch_discrimination": 2}),
    ],
)
def test_options_that_papers_add_train_and_resume(same, tmp_path, model, options):
    images = data.load("digits", size=16)[:200]
    a, b = trained_twice(config(model, images, **options), images, tmp_path)
    assert same(a.trainers, b.trainers)
    assert checkpoints.generator(a, "gankern")(torch.randn(2, 8)).isfinite().all()


def test_bad_options(images, labels):
    with pytest.raises(ValueError, match="needs labels, and digits has none"):
        config("dcgan", images, conditioning="projection")
    with pytest.raises(ValueError, match="unknown conditioning 'projecting'; did you mean projection"):
        config("dcgan", images, labels, conditioning="projecting")
    with pytest.raises(ValueError, match="progan has no option conditioning; dcgan, gan, .* have"):
        training.Trainer(config("progan", images, labels, conditioning="projection"), "torch", images, labels)
    with pytest.raises(ValueError, match="gan has no option generator_norm"):
        training.Trainer(config("gan", images, generator_norm="virtual"), "torch", images)
    with pytest.raises(ValueError, match="sizes 32 and 64, got 8.*--size N --resize resizes the images of digits"):
        training.Trainer(config("sngan", images), "torch", images)
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        config("gan", images, precision="fp8")
    with pytest.raises(ValueError, match="evaluate_samples must be at least 100"):
        config("gan", images, evaluate_samples=1)
    with pytest.raises(ValueError, match="there is no TorchScript file nothing.pt"):
        config("gan", images, features="nothing.pt")
    with pytest.raises(ValueError, match="8 does not go evenly into 1 processes times 3 parts.*multiple of 3"):
        training.Trainer(config("gan", images, accumulate=3), "torch", images)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("sngan", {"optimiser": "rmsprop", "beta2": 0.5}, "beta2 is of the optimiser adam; rmsprop has none"),
        ("wgan", {"beta1": 0.9}, "beta1 is of the optimiser adam; rmsprop has none"),
        ("aae", {"optimiser": "sgd", "beta1": 0.9}, "beta1 is of the optimiser adam; sgd has none"),
        ("gan", {"lr_floor": 1e-5}, "lr_floor has no effect without decay_steps or lr_decay"),
        ("gan", {"instance_noise_steps": 10}, "instance_noise_steps has no effect without instance_noise"),
        ("gan", {"penalty_every": 4}, "penalty_every has no effect without gradient_penalty or .* or r2"),
        ("infogan", {"features": "a.pt"}, "features is an option of .*; infogan has no use for it"),
        ("aae", {"evaluate_samples": 500}, "evaluate_samples is an option of .*; aae has no use for it"),
        ("aae", {"augment": "color"}, "augment is an option of .*; aae has no use for it"),
    ],
)
def test_options_without_an_effect(model, options, said):
    images = data.load("digits", size=32 if model == "sngan" else None)[:100]
    with pytest.raises(ValueError, match=said):
        training.configure(model, "digits", images, **options)


def test_a_presets_betas_are_no_wish_of_other_optimisers():
    """SN-GAN's are 0 and 0.9: its run with RMSProp, and the file of that run's options, are no error."""
    images = data.load("digits", size=32)[:100]
    found = training.configure("sngan", "digits", images, optimiser="rmsprop")
    again = {name: value for name, value in asdict(found).items() if name not in ("model", "data", "channels")}
    assert training.configure("sngan", "digits", images, **again) == found
    assert training.configure("sngan", "digits", images).beta1 == 0.0


def test_every_model_knows_its_options():
    """models.OPTIONS is what the builders take."""
    values = {"num_classes": 3, "conditioning": "projection", "minibatch_discrimination": 2,
              "generator_norm": "virtual", "discriminator_norm": "none"}  # fmt: skip
    for name in models.MODELS:
        shape = {} if name in models.FOR_POINTS else {"size": 32, "channels": 1}
        options = {option: values[option] for option in models.OPTIONS[name]}
        models.build(name, width=4, latent=4, **shape, **options)
        for option in values.keys() - models.OPTIONS[name]:
            with pytest.raises(ValueError, match=f"{name} has no option {option}"):
                models.build(name, width=4, latent=4, **shape, **{option: values[option]})


# ------------------------------------------------------------------------------------------------------------
# Parts of a batch, and precision


@pytest.mark.parametrize("model", ["wgan_gp", "gan"])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(images, model):
    """Where nothing couples the samples of a batch; the norms of a generator do, virtual batch norm does not."""
    options = {"generator_norm": "virtual"} if model == "wgan_gp" else {"loss": "least_squares"}
    trainers = [
        training.Trainer(config(model, images, accumulate=parts, n_critic=1, **options), "gankern", images)
        for parts in (1, 4)
    ]
    if model == "gan":  # its dropout draws for every pass
        for trainer in trainers:
            for module in trainer.discriminator.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
    whole, parts = (trainer.step() for trainer in trainers)
    assert whole.d_loss == pytest.approx(parts.d_loss, rel=1e-5)
    assert whole.g_loss == pytest.approx(parts.g_loss, rel=1e-4, abs=1e-5)
    for player in ("discriminator", "generator"):
        for a, b in zip(*(getattr(trainer, player).parameters() for trainer in trainers)):
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("layers", ["torch", "gankern"])
@pytest.mark.parametrize("model", ["dcgan", "sn_dcgan", "wgan_gp"])
def test_half_precision_is_near_full_precision(images, model, layers, precision):
    full, half = (
        training.Trainer(config(model, images, precision=p, n_critic=1), layers, images) for p in ("fp32", precision)
    )
    a, b = full.step(), half.step()
    scale = max(1.0, abs(a.d_loss))
    assert b.d_loss == pytest.approx(a.d_loss, abs=0.05 * scale)
    assert b.g_loss == pytest.approx(a.g_loss, abs=0.05)
    assert half.is_finite() and next(half.generator.parameters()).dtype == torch.float32


def test_half_precision_resumes(same, images, tmp_path):
    a, b = trained_twice(config("dcgan", images, precision="fp16"), images, tmp_path)
    assert same(a.trainers, b.trainers)
    assert a.trainers["gankern"]["d_scaler"]["scale"] > 1


# ------------------------------------------------------------------------------------------------------------
# Figures, logs and files


def test_figures_of_images(images, tmp_path):
    images = data.load("digits", size=16)
    configuration = config("sn_dcgan", images, checkpoint_every=1, evaluate=2, evaluate_samples=200, compare=True)
    record = training.train(configuration, images, tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    for side in ("torch", "gankern"):
        found = record["figures"][side]
        assert (
            found["fid_own_classifier"] > 1.0
            and found["kid_own_classifier"] > 0.0
            and found["swd"] > 0.0
            and found["inception_score_own_classifier"] >= 1.0
        )
        assert float(rows[-1][f"{side}_fid_own_classifier"]) == found["fid_own_classifier"]
    assert (tmp_path / "run" / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_real_images_are_the_best(images):
    """Real images in the generator's place: no distance to themselves, an Inception score of nearly all classes."""
    images = data.load("digits", size=16)
    configuration = config("wgan_gp", images, evaluate=1, evaluate_samples=1000)
    trainer = training.Trainer(configuration, "torch", images)
    evaluate = Adversarial.evaluator(configuration, images)
    worse = evaluate(trainer.game)
    trainer.game.sample = lambda latents, labels: evaluate.real
    best = evaluate(trainer.game)
    assert (
        best["fid_own_classifier"] == pytest.approx(0.0, abs=1e-3)
        and worse["fid_own_classifier"] > 10 * best["fid_own_classifier"]
    )
    assert best["kid_own_classifier"] < 0.01 * worse["kid_own_classifier"]
    assert best["inception_score_own_classifier"] > 7 > worse["inception_score_own_classifier"]
    assert worse["swd"] > 3 * best["swd"]
    assert best["wasserstein_estimate"] == pytest.approx(0.0, abs=1e-5)


def test_figures_of_a_conditional_critic(images, labels):
    """A critic that knows the labels is asked with those of each batch: 0 for the same images twice."""
    images, labels = data.load("digits"), data.labels("digits")
    options = {"conditioning": "projection", "evaluate": 1, "evaluate_samples": 600}
    configuration = config("wgan_gp", images, labels, **options)
    trainer = training.Trainer(configuration, "gankern", images, labels)
    evaluate = Adversarial.evaluator(configuration, images, labels)
    assert evaluate(trainer.game)["wasserstein_estimate"] != 0.0
    trainer.game.sample = lambda latents, labels: evaluate.real
    assert evaluate(trainer.game)["wasserstein_estimate"] == 0.0


def test_figures_in_another_networks_features(images, tmp_path):
    class Means(torch.nn.Module):
        def forward(self, x):
            return x.flatten(2).mean(2).expand(-1, 2) + torch.stack([x[:, 0, 0, 0], x[:, 0, 1, 1]], 1)

    path = tmp_path / "features.pt"
    torch.jit.script(Means()).save(path)
    configuration = config("gan", images, evaluate=1, features=str(path), evaluate_samples=100)
    found = Adversarial.evaluator(configuration, images)(training.Trainer(configuration, "torch", images).game)
    assert found["fid_own_features"] >= 0 and not any("inception_score" in name for name in found)


def test_figures_need_labels_or_features(images, tmp_path):
    from matplotlib.image import imsave

    for i in range(8):
        imsave(tmp_path / f"{i}.png", images[i, 0].numpy())
    pictures = data.load(str(tmp_path), size=8)
    configuration = training.configure("gan", str(tmp_path), pictures, **TINY, width=10, evaluate=1)
    with pytest.raises(ValueError, match="nothing to train a classifier on .*pass --features FILE"):
        Adversarial.evaluator(configuration, pictures)


def test_tensorboard(images, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    training.train(config("gan", images, steps=2, tensorboard=True), images, out)
    saved = checkpoints.load(out / training.CHECKPOINT)
    training.train(training.reconfigure(saved.config, steps=3), images, out, saved)
    events = event_accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    losses = events.Scalars("d_loss/gankern")
    assert [event.step for event in losses] == [1, 2, 3]
    history = checkpoints.load(out / training.CHECKPOINT).history["steps"]["gankern"]
    assert [event.value for event in losses] == pytest.approx(history[:, 0].tolist())
    assert events.Images("samples/gankern")


def test_a_runs_files_can_be_fed_back(images, tmp_path):
    configuration = config("sn_dcgan", images, steps=1, lr=3e-4)
    training.train(configuration, images, tmp_path / "run")
    for name in ("config.json", "record.json"):
        options = training.read_options(tmp_path / "run" / name)
        model, of = options.pop("model"), options.pop("data")
        assert training.configure(model, of, images, **options) == configuration


def test_configuration_files(tmp_path):
    toml = tmp_path / "mine.toml"
    toml.write_text('model = "wgan_gp"\nlr = 1\nn_critic = 2\ncompare = true\n')
    assert training.read_options(toml) == {"model": "wgan_gp", "lr": 1.0, "n_critic": 2, "compare": True}
    assert type(training.read_options(toml)["lr"]) is float
    for name, content, message in [
        ("a.toml", "learning_rate = 1", "unknown option in .*a.toml 'learning_rate'"),
        ("a.toml", "n_critics = 1", "did you mean n_critic"),
        ("a.toml", 'lr = "fast"', "lr must be float, got 'fast'"),
        ("a.toml", "steps = 1.5", "steps must be int, got 1.5"),
        ("a.toml", "compare = 1", "compare must be bool, got 1"),
        ("a.toml", "a = ", "is not TOML"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "must hold options and their values, got a list"),
        ("a.yaml", "a: 1", "unknown kind of configuration file '.yaml'"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            training.read_options(tmp_path / name)


def test_record_names_what_ran(images, tmp_path):
    record = training.train(config("gan", images, steps=1), images, tmp_path / "run")
    assert record["processes"] == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == record["config"]
