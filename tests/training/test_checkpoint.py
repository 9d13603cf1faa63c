"""Checkpoints that are damaged, forged or of something else: one sentence, and the file left alone."""

import copy
import random

import pytest
import torch

from gankern import data, training
from gankern.training import checkpoint as checkpoints

STEPS = 2


@pytest.fixture(scope="module")
def images():
    return data.load("digits")[:64]


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """The bytes of a small run's checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = dict(width=2, latent=4, batch_size=8, threads=1, steps=STEPS, ema=0.9)
    training.train(training.configure("sn_dcgan", "digits", images, **options), images, out)
    return (out / training.CHECKPOINT).read_bytes()


def test_any_flipped_bit_is_found(run, tmp_path):
    """Of the tensors, of the archive's own records, of the padding and of the digest."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(run)
    assert checkpoints.load(path).step == STEPS
    chosen = random.Random(0)
    places = [
        *chosen.sample(range(8 * len(run)), 150),
        *range(8 * len(run) - 8 * 70, 8 * len(run), 13),
        *range(0, 512, 7),
    ]
    for place in places:
        damaged = bytearray(run)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(training.CheckpointError, match=r"is not a checkpoint .*, or it is damaged"):
            checkpoints.load(path)
        assert path.read_bytes() == damaged
    for length in (0, 1, 21, len(run) // 2, len(run) - 1):
        path.write_bytes(run[:length])
        with pytest.raises(training.CheckpointError, match="or it is damaged"):
            checkpoints.load(path)


def test_an_archive_without_a_digest_is_held_to_its_checksums(run, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(run)
    torch.save(torch.load(path, weights_only=True), path)
    assert checkpoints.load(path).step == STEPS
    plain = path.read_bytes()
    weights = next(iter(checkpoints.load(path).trainers.values()))["generator"]
    place = plain.index(next(iter(weights.values())).numpy().tobytes()[:16])
    path.write_bytes(plain[:place] + bytes([plain[place] ^ 1]) + plain[place + 1 :])
    with pytest.raises(training.CheckpointError, match="or it is damaged"):
        checkpoints.load(path)


def change(content, where, value):
    *folders, name = where.split("/")
    for folder in folders:
        content = content[int(folder) if folder.isdigit() else folder]
    if value is None:
        del content[name]
    else:
        content[name] = value(content[name]) if callable(value) else value


def broken(x):
    x = x.clone()
    x.view(-1)[0] = float("nan")
    return x


SIDE = "trainers/gankern"
# What is changed -> what loading says, or else (None) what going on and sampling say.
CHANGES = {
    "version missing": ("version", None, "layout version None"),
    "config missing": ("config", None, "config is missing"),
    "step missing": ("step", None, "step is missing"),
    "history missing": ("history", None, "history is missing"),
    "trainers missing": ("trainers", None, "trainers is missing"),
    "an option missing": ("config/lr", None, "config lacks lr"),
    "an option too many": ("config/temperature", 1.0, "config has temperature"),
    "an option of another type": ("config/width", "2", "width must be int, got '2'"),
    "an option out of range": ("config/beta1", 7.0, "beta1 must be at least 0"),
    "another model": ("config/model", "dcgann", "unknown model"),
    "step a string": ("step", "2", "step must be an integer"),
    "step negative": ("step", -1, "step must be at least 0"),
    "config a list": ("config", [1], "config must be a dict"),
    "trainers a list": ("trainers", [1], "trainers must be a dict"),
    "another side": ("trainers", lambda t: {"torch": t["gankern"]}, "trainers is of torch"),
    "a side that is nothing": (SIDE, 3, "gankern must be a dict"),
    "a shorter history": ("history/steps/gankern", lambda x: x[:1], r"history of gankern must be \[2, columns\]"),
    "history of text": ("history/steps", "none", "steps must be a dict"),
    "figures a dictionary": ("history/figures", {}, "figures must be a list"),
    "figures of nothing": ("history/figures", [{"step": 1}], "figures must be of a step and of each side"),
}
STATES = {
    "generator missing": (f"{SIDE}/generator", None),
    "generator renamed": (SIDE, lambda s: {("g" if k == "generator" else k): v for k, v in s.items()}),
    "average missing": (f"{SIDE}/average", None),
    "a weight missing": (f"{SIDE}/average", lambda s: dict(list(s.items())[:-1])),
    "a weight renamed": (f"{SIDE}/average", lambda s: {k.replace("weight", "weights"): v for k, v in s.items()}),
    "a weight of another shape": (f"{SIDE}/average", lambda s: {k: v[..., None] for k, v in s.items()}),
    "a weight that is text": (f"{SIDE}/average", lambda s: dict.fromkeys(s, "x")),
    "average a list": (f"{SIDE}/average", [1, 2]),
    "not a number in the average": (f"{SIDE}/average", lambda s: {k: broken(v) if v.is_floating_point() else v for k, v in s.items()}),
}  # fmt: skip
TRAINERS = {
    "discriminator missing": (f"{SIDE}/discriminator", None),
    "not a number in the discriminator": (f"{SIDE}/discriminator", lambda s: {k: broken(v) if v.is_floating_point() else v for k, v in s.items()}),
    "optimiser missing": (f"{SIDE}/g_optimiser", None),
    "optimiser of other shapes": (f"{SIDE}/g_optimiser/state/0/exp_avg", torch.zeros(1)),
    "optimiser of other names": (f"{SIDE}/g_optimiser/state/0", {"step": torch.tensor(1.0), "momentum": torch.zeros(1)}),
    "optimiser not finite": (f"{SIDE}/g_optimiser/state/0/exp_avg_sq", lambda x: broken(x)),
    "optimiser of other options": (f"{SIDE}/g_optimiser/param_groups/0/betas", (0.9, 0.9)),
    "optimiser's rate": (f"{SIDE}/g_optimiser/param_groups/0/lr", "fast"),
    "random state of another length": (f"{SIDE}/random_state", torch.zeros(5, dtype=torch.uint8)),
    "random state of another type": (f"{SIDE}/random_state", 7),
    "batches missing": (f"{SIDE}/batches", None),
    "an order that repeats": (f"{SIDE}/batches/order", lambda x: torch.zeros_like(x)),
    "a position beyond": (f"{SIDE}/batches/position", 1000),
    "steps of another number": (f"{SIDE}/steps", 1),
    "steps of another type": (f"{SIDE}/steps", "2"),
    "something unknown": (f"{SIDE}/colour", {}),
}  # fmt: skip


def altered(run, tmp_path, where, value):
    path = tmp_path / training.CHECKPOINT
    path.write_bytes(run)
    content = torch.load(path, weights_only=True)
    change(content, where, value)
    torch.save(content, path)
    return path


def one_sentence(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_missing_or_wrong_is_said_in_one_sentence(run, tmp_path, kind):
    where, value, words = CHANGES[kind]
    path = altered(run, tmp_path, where, value)
    before = path.read_bytes()
    with pytest.raises(training.CheckpointError, match=words) as error:
        checkpoints.load(path)
    assert one_sentence(error) and str(path) in str(error.value) and path.read_bytes() == before


@pytest.mark.parametrize("kind", [*STATES, *TRAINERS])
def test_a_state_that_does_not_fit(run, images, tmp_path, kind):
    path = altered(run, tmp_path, *(STATES | TRAINERS)[kind])
    (tmp_path / "samples").mkdir()
    before, saved = path.read_bytes(), checkpoints.load(path)
    with pytest.raises(training.CheckpointError, match=r"checkpoint\.pt") as error:
        training.train(training.reconfigure(saved.config, steps=3), images, tmp_path, saved)
    assert one_sentence(error) and path.read_bytes() == before
    if kind in STATES:
        with pytest.raises(training.CheckpointError, match="gankern side") as error:
            checkpoints.generator(saved, "gankern")
        assert one_sentence(error)
    with pytest.raises(training.CheckpointError, match="not of torch"):
        checkpoints.generator(saved, "torch")


def test_a_weight_of_the_average_that_is_not_finite_gets_into_no_checkpoint(images, tmp_path):
    trainer = training.Trainer(
        training.configure("sn_dcgan", "digits", images, width=2, latent=4, batch_size=8, threads=1), "gankern", images
    )
    assert trainer.is_finite()
    next(trainer.average.parameters()).data.view(-1)[0] = float("inf")
    assert not trainer.is_finite()


def small(images, **options):
    return training.configure("sn_dcgan", "digits", images, width=2, latent=4, batch_size=8, threads=1, **options)


def test_a_run_that_died_before_its_first_checkpoint_is_started_again(images, tmp_path):
    out = tmp_path / "run"
    (out / "samples").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "log.csv").write_text("step\n")
    (out / ".checkpoint.pt.1.2.gankern-tmp").write_bytes(b"half")
    training.train(small(images, steps=1), images, out)
    assert checkpoints.load(out / training.CHECKPOINT).step == 1
    assert not list(out.glob(".*"))
    with pytest.raises(training.OutputInUse):
        training.train(small(images, steps=1), images, out)


@pytest.mark.parametrize("name", ["notes.txt", "samples/mine.png", "checkpoint.pt"])
def test_what_is_somebody_s_is_not_taken_for_a_run_that_died(images, tmp_path, name):
    (tmp_path / "samples").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(training.OutputInUse):
        training.train(small(images, steps=1), images, tmp_path)
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) <= 2


def test_a_half_written_picture_is_drawn_again(images, tmp_path):
    out = tmp_path / "run"
    training.train(small(images, steps=1), images, out)
    picture = out / "samples" / "step-000001.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    saved = checkpoints.load(out / training.CHECKPOINT)
    training.train(training.reconfigure(saved.config, steps=2), images, out, saved)
    assert picture.read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": "5"}, "steps must be int, got '5'"),
        ({"lr": [0.1]}, "lr must be float, got a list"),
        ({"compare": 1}, "compare must be bool, got 1"),
        ({"seed": 2**64}, "seed must be from"),
        ({"seed": 1.5}, "seed must be int"),
        ({"device": "mps"}, "device must be cpu, cuda or cuda:N, got 'mps'"),
        ({"device": "meta"}, "device must be cpu"),
        ({"on_error": "ignore"}, "on_error must be 'stop' or 'skip'"),
        ({"steps": True}, "steps must be int, got True"),
    ],
)
def test_options_of_another_type_are_named(images, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        small(images, **options)


def test_numbers_of_numpy_become_plain(images):
    numpy = pytest.importorskip("numpy")
    config = small(images, steps=numpy.int64(3), lr=numpy.float32(0.5), gradient_penalty=1)
    assert (type(config.steps), type(config.lr), type(config.gradient_penalty)) == (int, float, float)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, c, t: training.configure("sn_dcgan", "digits", None), "samples must be images: .*, got None"),
        (lambda x, c, t: training.configure("sn_dcgan", "digits", [1]), r"samples\[0\] must be a tensor .*, got 1"),
        (lambda x, c, t: training.configure("sn_dcgan", "digits", x.bool()), "samples must be of uint8 or of floating"),
        (lambda x, c, t: training.configure("sn_dcgan", "digits", x[0, 0]), "samples must be images"),
        (lambda x, c, t: training.configure(None, "digits", x), "model must be a name, got None|unknown model"),
        (lambda x, c, t: training.configure("sn_dcgan", None, x), "data must be str, got None"),
        (lambda x, c, t: training.Trainer(None, "torch", x), "config must be a Config, got None"),
        (lambda x, c, t: training.Trainer(c, None, x), "set of layers must be a name, got None"),
        (lambda x, c, t: training.Trainer(c, "tensorflow", x), "unknown set of layers"),
        (lambda x, c, t: training.Trainer(c, "torch", 5), "samples must be images: .*, got 5"),
        (lambda x, c, t: training.train(None, x, t), "config must be a Config, got None"),
        (lambda x, c, t: training.train(c, x, None), "out must be the path of a folder, got None"),
        (lambda x, c, t: training.train(c, x, t, saved={}), "saved must be a Checkpoint or None, got a dict"),
    ],
)
def test_wrong_arguments_are_named(images, tmp_path, call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call(images, small(images), tmp_path / "run")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x: -x - 1, "labels must be 0 or more, got -"),
        (lambda x: x.float(), "labels must be integers"),
        (lambda x: x[:5], "labels must be 64 integers"),
        (lambda x: [str(y) for y in x], "labels must be integers .*, got a list"),
        (lambda x: x == 3, "labels must be integers"),
    ],
)
def test_labels_that_are_none(images, wrong, words):
    labels = data.labels("digits")[:64]
    with pytest.raises((TypeError, ValueError), match=words):
        training.configure("sn_dcgan", "digits", images, wrong(labels), conditioning="projection")


def test_labels_beyond_those_of_the_run(images):
    labels = data.labels("digits")[:64]
    config = training.configure("sn_dcgan", "digits", images, labels, conditioning="projection", width=2, threads=1)
    for wrong, words in (
        (labels + 1, "labels must be from 0 to 9, got 10"),
        (None, "labels must be a tensor, got None"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            training.Trainer(config, "torch", images, wrong)
    assert copy.copy(config) == config


def test_a_configuration_is_read_from_a_path_of_either_kind(images, tmp_path):
    training.train(small(images, steps=1), images, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    assert checkpoints.read_config(str(path)) == checkpoints.read_config(path) == small(images, steps=1)
