"""The trainer: exact seeds, exact resume, checkpoints that are whole, and what a run leaves behind."""

import csv
import json
import os
from dataclasses import replace

import pytest
import torch

from gankern import data, training
from gankern.training import checkpoint as checkpoints
from gankern.training import loop, pictures


@pytest.fixture(scope="module")
def images():
    return data.load("digits")


def config(images, **options):
    options = {"width": 8, "latent": 16, "seed": 1, "threads": 1} | options
    return training.configure("sn_dcgan", "digits", images, **options)


def losses(path):
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "options",
    [{"layers": "torch"}, {"layers": "gankern"}, {"compare": True}, {"n_critic": 2, "ema": 0.9}],
    ids=["torch", "gankern", "compare", "n_critic and ema"],
)
def test_resumed_run_equals_uninterrupted_run(same, images, tmp_path, options):
    # 28 batches an epoch: with 30 steps both halves cross an epoch's end or start inside one.
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    training.train(config(images, steps=30, **options), images, whole)

    training.train(config(images, steps=15, **options), images, halves)
    torch.manual_seed(987)  # whatever happened to the global stream in between must not matter
    saved = checkpoints.load(halves / training.CHECKPOINT)
    training.train(training.reconfigure(saved.config, steps=30), images, halves, saved)

    a, b = (checkpoints.load(folder / training.CHECKPOINT) for folder in (whole, halves))
    assert a.step == b.step == 30
    assert same(a.trainers, b.trainers)
    assert losses(whole / "log.csv") == losses(halves / "log.csv")
    assert (whole / "samples.png").read_bytes() == (halves / "samples.png").read_bytes()


def test_dcgan_resumes_too(same, images, tmp_path):
    options = dict(width=8, latent=16, threads=1, ema=0.9)
    training.train(training.configure("dcgan", "digits", images, steps=6, **options), images, tmp_path / "a")
    training.train(training.configure("dcgan", "digits", images, steps=3, **options), images, tmp_path / "b")
    saved = checkpoints.load(tmp_path / "b" / training.CHECKPOINT)
    training.train(training.reconfigure(saved.config, steps=6), images, tmp_path / "b", saved)
    a, b = (checkpoints.load(tmp_path / name / training.CHECKPOINT) for name in "ab")
    assert same(a.trainers, b.trainers)


def test_what_others_draw_does_not_matter_and_is_left_alone(images):
    def run(disturb):
        trainer = training.Trainer(config(images), "torch", images)
        results = []
        for i in range(3):
            torch.manual_seed(i if disturb else 0)
            before = torch.get_rng_state()
            step = trainer.step()
            assert torch.equal(before, torch.get_rng_state())
            results.append((step.d_loss, step.g_loss))
        return results

    assert run(disturb=True) == run(disturb=False)


def test_the_two_sides_start_from_the_same_state_and_see_the_same_numbers(same, images):
    stock, ours = (training.Trainer(config(images), layers, images) for layers in ("torch", "gankern"))
    for _ in range(5):
        a, b = stock.step(), ours.step()
        assert a.d_loss == pytest.approx(b.d_loss, abs=1e-4)
        assert a.g_loss == pytest.approx(b.g_loss, abs=1e-4)
    assert torch.equal(stock.random_state, ours.random_state)
    assert same(stock.batches.state_dict(), ours.batches.state_dict())


def test_generator_step_leaves_no_gradient_in_the_discriminator(images):
    trainer = training.Trainer(config(images), "torch", images)
    trainer._minimise("g", trainer.game._generator_loss())
    assert all(p.grad is None for p in trainer.discriminator.parameters())
    assert all(p.grad is not None for p in trainer.generator.parameters())


def test_sampling_changes_nothing(same, images):
    trainer = training.Trainer(config(images, ema=0.9), "torch", images)
    trainer.step()
    before = {key: value.clone() for key, value in trainer.generator.state_dict().items()}
    latents = torch.randn(4, 16)
    assert torch.equal(trainer.sample(latents), trainer.sample(latents))
    assert same(before, trainer.generator.state_dict())
    assert trainer.generator.training


def test_average_is_between_the_weights_it_has_seen(images):
    trainer = training.Trainer(config(images, ema=0.5, lr=0.01), "torch", images)
    trainer.step()
    first = [p.detach().clone() for p in trainer.generator.parameters()]
    trainer.step()
    averages = trainer.average.module.parameters()
    for before, now, average in zip(first, trainer.generator.parameters(), averages, strict=True):
        # two updates: the first copies, the second goes to decay (1 + 1)/(10 + 1)
        torch.testing.assert_close(average, torch.lerp(before, now, 1 - 2 / 11))


def test_comparison_leaves_everything_that_was_promised(images, tmp_path):
    out = tmp_path / "run"
    record = training.train(config(images, steps=8, compare=True, checkpoint_every=4), images, out)

    assert json.loads((out / "record.json").read_text()) == record
    assert record["config"]["model"] == "sn_dcgan" and record["config"]["compare"] is True
    assert record["steps"] == 8
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["threads"] == torch.get_num_threads()
    assert record["parameters"]["discriminator"] == 8 * 16 + 8 + 8 * 16 + 1
    for side in ("torch", "gankern"):
        times = record["sides"][side]["median_milliseconds"]
        assert times["whole step"] > times["discriminator step"] > 0
        assert record["sides"][side]["images_per_second"] > 0
        assert record["sides"][side]["final_loss"]["discriminator"] > 0
    assert record["comparison"]["speedup"].keys() == {"discriminator step", "generator step", "whole step"}
    differences = record["comparison"]["largest_loss_difference"]
    assert differences.keys() == {"first 5 steps", "first 20 steps", "all steps"}
    for found in differences.values():
        assert 0 <= found["gankern"] < 1e-2 and 0 < found["control"] < 1e-2

    rows = losses(out / "log.csv")
    assert [row["step"] for row in rows] == [str(i) for i in range(1, 9)]
    assert rows[0].keys() == {"step"} | {f"{s}_{p}_loss" for s in ("torch", "gankern") for p in "dg"}
    for picture in ("samples.png", "losses.png", "samples/step-000000.png", "samples/step-000004.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_sides_take_turns_in_going_first(images, tmp_path, monkeypatch):
    order = []
    step = training.Trainer.step

    def noting(self):
        order.append(self.name)
        return step(self)

    create = training.Trainer.__init__

    def naming(self, config, layers, *others):
        create(self, config, layers, *others)
        self.name = layers

    monkeypatch.setattr(training.Trainer, "__init__", naming)
    monkeypatch.setattr(training.Trainer, "step", noting)
    training.train(config(images, steps=4, compare=True), images, tmp_path / "run")
    assert order[:8] == ["torch", "gankern", "gankern", "torch"] * 2
    assert order[8:] == ["torch"] * 4  # the control


def test_nan_stops_with_the_last_good_checkpoint(images, tmp_path, monkeypatch):
    step = training.Trainer.step
    taken = []

    def poisoned(self):
        taken.append(1)
        result = step(self)
        return replace(result, losses=result.losses | {"d": float("nan")}) if len(taken) == 5 else result

    monkeypatch.setattr(training.Trainer, "step", poisoned)
    with pytest.raises(training.Diverged, match=r"at step 5 .* D nan.*checkpoint.pt is the last good checkpoint"):
        training.train(config(images, steps=9, checkpoint_every=2), images, tmp_path / "run")
    assert checkpoints.load(tmp_path / "run" / training.CHECKPOINT).step == 4


def test_weights_that_are_not_finite_are_never_saved(images, tmp_path, monkeypatch):
    step = training.Trainer.step

    def poisoning(self):
        result = step(self)
        next(self.generator.parameters()).data[0] = float("inf")
        return result

    monkeypatch.setattr(training.Trainer, "step", poisoning)
    with pytest.raises(training.Diverged, match="not finite at step 1"):
        training.train(config(images, steps=3, checkpoint_every=1), images, tmp_path / "run")
    assert checkpoints.load(tmp_path / "run" / training.CHECKPOINT).step == 0


def test_output_folder_in_use(images, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(training.OutputInUse, match=r"in use: gankern train --resume .*; or pass another --out"):
        training.train(config(images, steps=1), images, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(("options", "says"), [
    ({"batch_size": 1}, "batch_size must be at least 2 for bigan, got 1, and batch norm needs more than one"),
    ({"best": "min:nothing", "evaluate": 1, "batch_size": 8}, "there is no figure 'nothing'"),
])  # fmt: skip
@pytest.mark.parametrize("there", [False, True])
def test_options_with_which_no_step_can_be_made_leave_nothing(tmp_path, options, says, there):
    """The option is named, the folder can be used again at once, and one that was there stays."""
    out = tmp_path / "run"
    if there:
        out.mkdir()
    samples = 2 * torch.rand(30, 1, 8, 8) - 1
    with pytest.raises(ValueError, match=says):
        training.train(training.configure("bigan", "x", samples, width=8, steps=2, **options), samples, out)
    assert out.exists() == there and not any(out.glob("*"))
    training.train(training.configure("bigan", "x", samples, width=8, steps=1, batch_size=2, evaluate=0), samples, out)
    with pytest.raises(training.OutputInUse):  # what has been trained is not emptied
        training.train(training.configure("bigan", "x", samples, width=8, steps=1, batch_size=1), samples, out)
    assert checkpoints.load(out / training.CHECKPOINT).step == 1


def test_batch_norm_of_pixels_takes_a_batch_of_one(images):
    trainer = training.Trainer(training.configure("dcgan", "x", images, width=4, batch_size=1), "torch", images)
    assert trainer.step().g_loss > 0


def test_a_run_cannot_be_resumed_backwards(images, tmp_path):
    training.train(config(images, steps=2), images, tmp_path / "run")
    saved = checkpoints.load(tmp_path / "run" / training.CHECKPOINT)
    with pytest.raises(training.CheckpointError, match="is at step 2, beyond the 1 asked for"):
        training.train(training.reconfigure(saved.config, steps=1), images, tmp_path / "run", saved)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(training.CheckpointError, match="is not a checkpoint of `gankern train`"):
        checkpoints.load(path)


def test_a_checkpoint_of_somebody_else_or_of_another_version(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(training.CheckpointError, match="there is no checkpoint"):
        checkpoints.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(training.CheckpointError, match="is not a checkpoint of `gankern train`"):
        checkpoints.load(path)
    torch.save({"format": checkpoints.FORMAT, "version": 99}, path)
    with pytest.raises(training.CheckpointError, match="layout version 99"):
        checkpoints.load(path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("n_critic", 0),
        ("threads", 0),
        ("checkpoint_every", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("ema", 1.0),
        ("device", "toaster"),
        ("loss", "hing"),
        ("layers", "tensorflow"),
    ],
)
def test_options_out_of_range(images, option, value):
    with pytest.raises(ValueError, match=option if option != "layers" else "set of layers"):
        config(images, **{option: value})


def test_data_of_another_size(images):
    with pytest.raises(ValueError, match=r"are 8x8 .* asked for 32x32: pass --size 8, or --resize"):
        config(images, size=32)


def test_a_resumed_run_may_not_change_what_is_computed(images):
    saved = config(images)
    assert training.reconfigure(saved, steps=7, lr=saved.lr, threads=None).steps == 7
    with pytest.raises(ValueError, match=r"with lr=0.001, not lr=0.1: a resumed run may only change steps"):
        training.reconfigure(saved, lr=0.1)


def test_grid():
    images = torch.stack([torch.full((1, 4, 4), value) for value in (-1.0, 0.0, 1.0)])
    picture = pictures.grid(images, columns=2, gap=1)
    assert picture.shape == (2 * 5 + 1, 2 * 5 + 1, 3)
    assert (picture[1:5, 1:5] == 0.0).all()
    assert (picture[1:5, 6:10] == 0.5).all()
    assert (picture[6:10, 1:5] == 1.0).all()
    assert (picture[0] == 1.0).all() and (picture[:, 5] == 1.0).all()
    with pytest.raises(ValueError, match="1 or 3 channels"):
        pictures.grid(torch.zeros(1, 2, 4, 4))


def test_pictures_may_come_with_their_graph(tmp_path):
    """A game's pictures are what its networks make: that has a gradient, unless the game sees to it."""
    from gankern.games import Picture

    images, points = torch.rand(2, 3, 4, 4) * 2 - 1, torch.rand(5, 2)
    for draw in (pictures.grid, pictures.pixels):
        assert (draw(images.clone().requires_grad_()) == draw(images)).all()
    for name, drawn in {"images": images, "points": points}.items():
        for grad in (True, False):
            picture = {"one": Picture(drawn.clone().requires_grad_(grad)), "points": Picture(points)}
            pictures.save_samples(tmp_path / f"{name}-{grad}.png", picture)
        assert (tmp_path / f"{name}-True.png").read_bytes() == (tmp_path / f"{name}-False.png").read_bytes()


def test_signals_are_put_back(images, tmp_path):
    import signal

    before = signal.getsignal(signal.SIGINT)
    with loop._stop_on_signal() as stop:
        assert signal.getsignal(signal.SIGINT) is not before
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is before  # a second one is no longer caught
    assert signal.getsignal(signal.SIGINT) is before


def test_sample_grids_are_whole_pixels_under_a_title(tmp_path):
    """Each pixel of an image is one square of one colour in the file, and the rows have room for their names."""
    from matplotlib.image import imread

    from gankern.games import Picture

    levels = torch.randint(256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float() / 127.5 - 1.0
    plain = Picture(levels)
    named = Picture(levels, rows=("cat", "a dog"))
    pictures.save_samples(tmp_path / "x.png", {"one": plain, "two": named}, "a model, step 3")
    image = imread(tmp_path / "x.png")[:, :, :3]
    small = pictures.grid(levels)
    scale = round(pictures.SMALLEST / small.shape[1])
    expected = (small.repeat(scale, 0).repeat(scale, 1) * 255).round() / 255
    top, height, width = 2 * pictures.LINE, len(expected), expected.shape[1]
    assert abs(image[top : top + height, :width] - expected).max() <= 1.01 / 255
    left = width + pictures.LETTER + pictures.LETTER * 6
    assert abs(image[top : top + height, left : left + width] - expected).max() <= 1.01 / 255
    assert image.shape[:2] == (top + height, left + width)
    assert (image[:top] < 0.5).any() and (image[top:, width + 5 : left - 5] < 0.5).any()  # title, names


def test_a_conditional_run_s_picture_has_a_row_for_each_class(images, tmp_path):
    labels = data.labels("digits")
    configuration = config(images, labels=labels, conditioning="projection", steps=1)
    trainer = training.Trainer(configuration, "gankern", images, labels)
    (picture,) = trainer.game.pictures().values()
    assert picture.rows == tuple("0123456789") and picture.batch.shape[0] == 80
    latents = torch.randn(64, configuration.latent, generator=torch.Generator().manual_seed(configuration.seed))[:8]
    expected = trainer.sample(latents, torch.full((8,), 3))
    torch.testing.assert_close(picture.batch[24:32], expected, rtol=1e-4, atol=1e-5)
