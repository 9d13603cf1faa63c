"""A run's generator for programs without gankern: the same images, whatever the file."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch

import gankern
from gankern import data, training
from gankern.training import CHECKPOINT, checkpoint
from gankern.training.export import KINDS, inputs_of
from gankern.training.loop import is_best


def train(folder, model, samples="digits", labels=None, **options):
    images = data.load(samples, options.get("size"))
    config = training.configure(model, samples, images, labels, **{"steps": 1, "threads": 1, "batch_size": 8} | options)
    training.train(config, images, folder, labels=labels)
    return folder


SMALL = {"width": 4, "latent": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    labels = data.labels("digits")
    return {
        "average": train(folder / "average", "sn_dcgan", ema=0.9, compare=True, **SMALL),
        "projection": train(folder / "projection", "sn_dcgan", labels=labels, conditioning="projection", **SMALL),
        "concatenation": train(folder / "concat", "wgan_gp", labels=labels, conditioning="concatenation", **SMALL),
        "virtual": train(folder / "virtual", "dcgan", generator_norm="virtual", **SMALL),
        "growing": train(folder / "growing", "progan", grow_steps=1, steps=2, **SMALL),
        "residual": train(folder / "residual", "sngan", size=32, **SMALL),
        "maxout": train(folder / "maxout", "gan", **SMALL),
        "points": train(folder / "points", "wgan_gp_toy", "8gaussians", width=8),
        "acgan": train(folder / "acgan", "acgan", labels=labels),
        "infogan": train(folder / "infogan", "infogan"),
        "aae": train(folder / "aae", "aae"),
    }


RUNS = ("average", "projection", "concatenation", "virtual", "growing", "residual", "maxout", "points", "acgan",
        "infogan", "aae")  # fmt: skip


def inputs(run, number):
    """Other inputs than the files were made and tried with."""
    saved = checkpoint.load(run)
    game = checkpoint.game(saved, saved.config.sides[-1])
    made, *labels = (x[:1] for x in inputs_of(game))
    latents = torch.randn(number, made.shape[1], generator=torch.Generator().manual_seed(5))
    return (latents, *(torch.arange(number) * 3 % 10 for _ in labels))


@pytest.mark.usefixtures("onnx_functions_once")
@pytest.mark.parametrize("name", RUNS)
def test_onnxruntime_gives_the_images_of_the_run(runs, name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path, difference = training.export(runs[name], "onnx", tmp_path / "deep" / "g.onnx")
    assert difference < 1e-2
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    assert names == ["latents", "labels"][: len(names)] and [x.name for x in session.get_outputs()] == ["images"]
    config = json.loads(session.get_modelmeta().custom_metadata_map["config"])
    assert config["latent"] == training.find_run(runs[name])[0].latent
    generator = gankern.load_generator(runs[name])
    for number in (1, 6):
        values = inputs(runs[name], number)
        (got,) = session.run(None, {n: x.numpy() for n, x in zip(names, values, strict=True)})
        expected = generator(*values).detach()
        assert got.shape == expected.shape
        torch.testing.assert_close(
            torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item() + 1e-6
        )


@pytest.mark.parametrize("name", RUNS)
def test_the_plain_torch_form(runs, name, tmp_path):
    """TorchScript and safetensors hold the network of torch's layers; nothing of gankern's runs in it."""
    values = inputs(runs[name], 5)
    expected = gankern.load_generator(runs[name])(*values).detach()
    bound = dict(rtol=1e-4, atol=1e-4 * expected.abs().max().item() + 1e-6)
    saved = checkpoint.load(runs[name])
    plain = checkpoint.generator(saved, saved.config.sides[-1], "torch")
    torch.testing.assert_close(plain(*values).detach(), expected, **bound)
    script, _ = training.export(runs[name], "torchscript", tmp_path / "g.pt")
    extra = {"config": ""}
    torch.testing.assert_close(torch.jit.load(script, _extra_files=extra)(*values).detach(), expected, **bound)
    assert json.loads(extra["config"])["model"] == training.find_run(runs[name])[0].model
    safetensors = pytest.importorskip("safetensors.torch")
    weights, _ = training.export(runs[name], "safetensors", tmp_path / "g.safetensors")
    loaded = safetensors.load_file(weights)
    assert loaded.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, loaded[key]) for key, value in plain.state_dict().items())


def test_a_torchscript_file_needs_no_gankern(runs, tmp_path):
    path, _ = training.export(runs["virtual"], "torchscript", tmp_path / "g.pt")
    code = (
        "import sys, torch; g = torch.jit.load(sys.argv[1]); print(tuple(g(torch.randn(2, 8)).shape), "
        "[name for name in sys.modules if name.startswith('gankern')])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 1, 8, 8) []", done.stderr


def test_which_weights(runs):
    """The average by default, as samples are drawn; the last ones where they are asked for; either side of two."""
    latents = torch.randn(3, 8)
    saved = checkpoint.load(runs["average"])
    shown = checkpoint.game(saved, "gankern").average()(latents)
    torch.testing.assert_close(gankern.load_generator(runs["average"])(latents), shown, rtol=0, atol=0)
    torch.testing.assert_close(
        gankern.load_generator(str(runs["average"] / CHECKPOINT))(latents), shown, rtol=0, atol=0
    )
    for side in ("torch", "gankern"):
        last = gankern.load_generator(runs["average"], side, averaged=False)
        for key, value in saved.trainers[side]["generator"].items():
            assert torch.equal(value, last.state_dict()[key])
        average = gankern.load_generator(runs["average"], side)
        assert all(
            torch.equal(average.state_dict()[key.removeprefix("module.")], value)
            for key, value in saved.trainers[side]["average"].items()
            if key != "n_averaged"
        )
        assert not last.training and not average.training


def test_a_run_of_another_machine_is_loaded(runs, tmp_path):
    """The device, the data and the features of a run need not be here to look at what it made."""
    saved = checkpoint.load(runs["residual"])
    state = torch.load(runs["residual"] / CHECKPOINT, weights_only=True)
    state["config"] |= {"device": "cuda:7", "data": "/nowhere/pictures", "features": "nowhere.pt"}
    torch.save(state, tmp_path / "theirs.pt")
    generator = gankern.load_generator(tmp_path / "theirs.pt")
    latents = torch.randn(2, 8)
    assert torch.equal(generator(latents), checkpoint.generator(saved, "gankern")(latents))
    config = checkpoint.load(tmp_path / "theirs.pt").config
    with pytest.raises(ValueError, match=r"there is no TorchScript file nowhere.pt"):
        training.Trainer(config, "gankern", data.load("digits"))
    with pytest.raises(ValueError, match="cuda:7"):
        training.Trainer(dataclasses.replace(config, features=None), "gankern", data.load("digits"))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((3,), TypeError, "path must be"),
        (("nowhere",), checkpoint.CheckpointError, "there is no checkpoint nowhere"),
        (("run", "jax"), ValueError, "jax"),
        (("run", None, True, 3), TypeError, "device"),
    ],
)
def test_what_cannot_be_loaded(runs, arguments, error, says):
    arguments = tuple(runs["maxout"] if x == "run" else x for x in arguments)
    with pytest.raises(error, match=says):
        gankern.load_generator(*arguments)


def test_what_cannot_be_exported(runs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="did you mean onnx"):
        training.export(runs["maxout"], "onx")
    with pytest.raises(ValueError, match="holds gankern layers, layers=torch"):
        training.export(runs["maxout"], "onnx", layers="torch")
    with pytest.raises(TypeError, match="out must be"):
        training.export(runs["maxout"], "onnx", 3)

    def wrong(network, inputs, metadata):
        return b"a file", lambda values: network(*values) + 0.1

    monkeypatch.setitem(KINDS, "onnx", (wrong, ".onnx"))
    with pytest.raises(training.TrainingError, match="nothing was written"):
        training.export(runs["maxout"], "onnx", tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())


# ---- snapshots, the best checkpoint, and a run from another's weights ----------------------------------------------


def test_snapshots_and_the_best_one(tmp_path):
    images = data.load("8gaussians")
    options = dict(width=8, steps=6, checkpoint_every=1, evaluate=1, evaluate_samples=100, threads=1, n_critic=1)
    config = training.configure(
        "wgan_gp_toy", "8gaussians", images, keep=2, best="sliced_wasserstein", batch_size=16, **options
    )
    training.train(config, images, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir())
    assert names == ["step-000005.pt", "step-000006.pt"]
    assert checkpoint.load(tmp_path / "run" / "snapshots" / names[0]).step == 5
    best = checkpoint.load(tmp_path / "run" / "best.pt")
    rows = checkpoint.load(tmp_path / "run").history["figures"]
    values = {row["step"]: row["gankern"]["sliced_wasserstein"] for row in rows}
    assert best.step == min(values, key=values.get) and len(values) == 7
    gankern.load_generator(tmp_path / "run" / "best.pt")


def test_what_is_best_among_figures_that_are_no_numbers():
    nan = math.nan
    assert is_best(1.0, []) and is_best(2.0, [1.0]) and not is_best(1.0, [1.0])
    assert is_best(1.0, [nan]) and is_best(2.0, [nan, 1.0, nan]) and not is_best(1.0, [2.0, nan])
    assert not is_best(nan, []) and not is_best(nan, [1.0])


def test_wrong_wishes_for_the_best(tmp_path):
    images = data.load("digits")
    with pytest.raises(ValueError, match="best must be one of fid"):
        training.configure("dcgan", "digits", images, best="fud", evaluate=1)
    with pytest.raises(ValueError, match="evaluate must be at least 1"):
        training.configure("dcgan", "digits", images, best="fid")
    points = data.load("8gaussians")
    config = training.configure("wgan_gp_toy", "8gaussians", points, width=8, best="max:beauty", evaluate_samples=100)
    with pytest.raises(ValueError, match="no figure 'beauty'; there are: modes_covered"):
        training.train(config, points, tmp_path / "run")


def test_a_run_from_anothers_weights(runs, tmp_path):
    images = data.load("digits")
    config = training.configure(
        "sn_dcgan", "digits", images, start_from=runs["average"], ema=0.9, steps=1, lr=1e-9, threads=1, **SMALL
    )
    training.train(config, images, tmp_path / "second")
    first, second = checkpoint.load(runs["average"]), checkpoint.load(tmp_path / "second")
    assert second.step == 1
    for part in ("generator", "discriminator", "average"):
        for key, value in first.trainers["gankern"][part].items():
            moves = "running" in key or ("parametrizations" in key and "original" not in key)  # in every forward
            if value.is_floating_point() and not moves:
                torch.testing.assert_close(second.trainers["gankern"][part][key], value, rtol=0, atol=1e-6)
    other = training.configure("sn_dcgan", "digits", images, start_from=runs["average"], width=8, steps=1, threads=1)
    with pytest.raises(checkpoint.CheckpointError, match="the state of the gankern side does not fit"):
        training.train(other, images, tmp_path / "third")
