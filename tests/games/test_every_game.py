"""What holds of every game: both sets of layers play it alike, a run that stops and resumes plays on as if it had not
stopped, and its pictures, figures and checkpoint can be had."""

import dataclasses
import json
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from gankern import data, games, models, training
from gankern.nn import coupling
from gankern.training import checkpoint

NEW = [name for name in games.names() if name not in models.MODELS]

# What would take long, made short.
QUICK = {"gan_cls": {"options": {"encoder_steps": 2}, "width": 8}, "cgan": {"width": 4}, "lapgan": {"width": 2}}
QUICK |= {name: {"width": 4, "latent": 8} for name in ("sagan", "biggan", "biggan_deep")}


def prepared(name, dtype=torch.float32, **options):
    """(configuration, samples, condition) of a game at its own preset, on its own data."""
    game = games.find(name)
    samples = data.load(game.data, options.get("size", game.preset.get("size")))
    condition = None if game.needs is None else data.condition(game.data, samples, game.needs)
    if torch.is_tensor(samples):
        samples = samples.to(dtype)
    options = (
        {"batch_size": 8, "threads": 1, "steps": 3, "checkpoint_every": 2, "evaluate": 0}
        | QUICK.get(name, {})
        | options
    )
    return training.configure(name, game.data, samples, condition, **options), samples, condition


def few(name):
    """Samples for the figures, of a game that does not say how many."""
    return {"evaluate_samples": 100} if "evaluate_samples" in games.find(name).takes else {}


@pytest.mark.parametrize("name", NEW)
def test_the_same_losses_in_double_precision(double, name):
    config, samples, condition = prepared(name, torch.float64)
    stock, ours = (training.Trainer(config, layers, samples, condition) for layers in ("torch", "gankern"))
    for _ in range(3):
        a, b = stock.step(), ours.step()
        torch.testing.assert_close(b.losses, a.losses, rtol=1e-10, atol=1e-10)
    assert stock.is_finite() and ours.is_finite()
    for network in (*stock.game.networks.values(), *ours.game.networks.values()):
        assert coupling.unknown_layers(network) == {}  # whether samples stay apart: processes and parts of a batch ask


@pytest.mark.usefixtures("nothing_drawn")
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
    config, samples, condition = prepared(name, steps=2, evaluate=1, **few(name))
    record = training.train(config, samples, tmp_path / "run", labels=condition)
    assert (tmp_path / "run" / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "record.json").read_text())["parameters"] == record["parameters"]
    played = checkpoint.game(checkpoint.load(tmp_path / "run" / training.CHECKPOINT), "gankern")
    assert {n: sum(p.numel() for p in net.parameters()) for n, net in played.networks.items()} == record["parameters"]
    assert all(not network.training for network in played.networks.values())
    first, second = played.pictures(), played.pictures()
    assert first and all(torch.equal(first[n].batch, second[n].batch) for n in first)  # always of the same latents


def test_the_game_of_the_docs_is_all_that_a_game_needs(tmp_path, monkeypatch):
    """As it stands there it is trained, evaluated and drawn, though it has no figures, and looked at again."""
    docs = (Path(__file__).parents[2] / "docs" / "games.md").read_text()
    module = types.ModuleType("gankern.games.tiny")
    exec(re.search(r"```python\n(from gankern\.games import Game.*?)```", docs, re.DOTALL)[1], vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = games.names() | {"tiny": "tiny"}
    monkeypatch.setattr(games, "names", lambda: known)
    config, samples, _ = prepared("tiny", steps=2, evaluate=1)
    training.train(config, samples, tmp_path / "run")
    assert (tmp_path / "run" / "samples.png").is_file() and not (tmp_path / "run" / "metrics.png").exists()
    played = checkpoint.game(checkpoint.load(tmp_path / "run" / training.CHECKPOINT), "gankern")
    assert played.pictures()["samples"].batch.shape[1:] == samples.shape[1:]


# Games whose own data have labels, which their measures use, though the games need none.
UNLABELLED = [name for name in NEW if games.find(name).needs is None and not games.for_points(name)]


@pytest.mark.parametrize("name", UNLABELLED)
def test_images_without_labels_are_trained_on_measured_and_drawn(name, tmp_path):
    """Figures that need a classifier are left out; nothing stops at the first checkpoint."""
    images = torch.rand(40, 3, 32, 32) * 2 - 1
    sizes = {"batch_size": 8, "width": 8, "size": 32, "threads": 1, "options": QUICK.get(name, {}).get("options")}
    config = training.configure(name, "mine", images, steps=1, evaluate=1, **few(name), **sizes)
    training.train(config, images, tmp_path / "run")
    figures = (tmp_path / "run" / "metrics.csv").read_text()
    assert "class" not in figures and "fid" not in figures and "assignment" not in figures
    assert (tmp_path / "run" / "samples.png").exists()


@pytest.mark.parametrize("name", NEW)
def test_no_loss_is_asked_for_in_vain(name):
    """Another loss, and labels that are smoothed, make other numbers, or are refused."""
    short = {"options": {"mse_steps": 0}} if name == "srgan" else {}

    def first(**asked):
        torch.manual_seed(0)
        try:
            config, samples, condition = prepared(name, batch_size=4, **short, **asked)
            game = training.Trainer(config, "torch", samples, condition)
        except ValueError:
            return None
        return tuple(map(float, game.step().losses.values()))

    found = [first()]
    own = games.find(name).preset["loss"]
    for loss in {own, "non_saturating", "least_squares"}:
        found += [first(loss=loss)] if loss != own else []
        found.append(first(loss=loss, real_target=0.9))
    told = [losses for losses in found if losses is not None]
    assert len(set(told)) == len(told) > 0


# Images as small as a game takes, and an option's other value where twice the default would change nothing in a step.
SIZES = {"cyclegan": 16, "pix2pix": 16, "srgan": 32, "gan_cls": 16, "lapgan": 16, "cgan": 16, "began": 16, "vaegan": 16}
OTHERWISE = {
    "cyclegan": {"pool": 1, "strided": 1, "upsample": "nearest"}, "gan_cls": {"encoder_steps": 3},
    "cgan": {"networks": "sn_dcgan"},
}  # fmt: skip


@pytest.mark.parametrize("name", NEW)
def test_no_option_is_asked_for_in_vain(name, monkeypatch):
    """Another width, other latents and each of the game's own options make other networks or numbers, or are refused
    by name."""
    game, quick = games.find(name), QUICK.get(name, {})
    small = {"width": 8, "latent": game.preset["latent"]} | quick | ({"size": SIZES[name]} if name in SIZES else {})
    if name == "srgan":
        small["options"] = {"mse_steps": 0}
    monkeypatch.setattr("gankern.games.gan_cls.standardise", lambda *_: None)  # of a thousand texts

    def trained(own=None, **asked):
        asked = small | asked | {"options": small.get("options", {}) | (own or {})}
        config, samples, condition = prepared(name, batch_size=4, **asked)
        return training.Trainer(config, "torch", samples, condition)

    def shapes(trainer):
        return [p.shape for network in trainer.game.networks.values() for p in network.parameters()]

    def numbers(trainer):
        losses, played = trainer.step().losses, trainer.game
        networks = [*played.networks.values(), *([played.average()] if game.averaged else [])]
        state = [x.flatten().double() for network in networks for x in network.state_dict().values()]
        kept = [torch.as_tensor(x).flatten().double() for x in played.extra_state().values()]
        return torch.cat([*state, *kept, torch.tensor(list(losses.values()))])

    usual = trained()
    drawn, before = shapes(usual), numbers(usual)
    asked = [{option: 2 * small[option]} for option in ("width", "latent")]
    for field in dataclasses.fields(game.Options):
        if field.name == "balance":
            continue  # of costs that come later: test_balance_of_vaegan
        value = OTHERWISE.get(name, {}).get(field.name)
        if value is None:
            value = (
                not field.default if isinstance(field.default, bool) else type(field.default)(2 * field.default or 1)
            )
        asked.append({"own": {field.name: value}})
    for options in asked:
        (option,) = options.get("own", options)
        try:
            other = trained(**options)
        except ValueError as error:
            assert option in str(error).lower()
        else:
            assert shapes(other) != drawn or not torch.equal(numbers(other), before), options


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("acgan", {"kernel": 5}, "kernel has no effect at 8x8"),
        ("bigan", {"ali": True, "noise": 0.5}, "noise has no effect with ali"),
        ("sagan", {"diagonal": True}, "diagonal has no effect with orthogonal 0"),
        ("cgan", {"deeper": True}, "deeper has no effect with networks dcgan"),
        ("cyclegan", {"cycle": 0, "identity": 1}, "identity has no effect with cycle 0"),
        ("gan_cls", {"blocks": False}, "blocks has no effect without paper"),
        ("gan_cls", {"paper": True, "spectral": False}, "spectral has no effect with paper"),
        ("gan_cls", {"mismatched": 0, "mismatches": 3}, "mismatches has no effect with mismatched 0"),
        ("pix2pix", {"adversarial_weight": 0, "strided": 2}, "strided has no effect with adversarial_weight 0"),
        ("pix2pix", {"l1_weight": 0, "squared": True}, "squared has no effect with l1_weight 0"),
        ("vaegan", {"vae": True, "gamma": 1}, "gamma has no effect with vae"),
        ("vaegan", {"vae": True, "balance": 0}, "balance has no effect with vae"),
        ("vaegan", {"pixel_std": 0.5}, "pixel_std has no effect without vae"),
    ],
)
def test_options_that_others_leave_nothing_to_do(name, options, said):
    config, samples, condition = prepared(
        name, options=options, **{"width": 16} if name in ("gan_cls", "bigan") else {}
    )
    if options.get("ali"):
        config = dataclasses.replace(config, size=32)
    with pytest.raises(ValueError, match=f"{name}: {said}.*; leave it out, or at .*, got"):
        games.find(name)(games.Run(config, "torch", samples=samples, condition=condition))


@pytest.mark.parametrize("name", NEW)
def test_a_batch_of_one(name):
    """It is trained on, or refused by the option's name."""
    config, samples, condition = prepared(name, batch_size=1)
    try:
        losses = training.Trainer(config, "torch", samples, condition).step().losses
    except ValueError as error:
        assert name in str(error) and "batch_size must be at least 2" in str(error)
    else:
        assert all(map(math.isfinite, losses.values()))


# Every option of every game.
OWN = [(name, option) for name in NEW for option in vars(games.find(name).Options).get("__dataclass_fields__", {})]


@pytest.mark.parametrize("name", NEW)
def test_options_of_other_games(name):
    """Each is refused by name, with what this game has."""
    mine = {option for owner, option in OWN if owner == name}
    for option in sorted({option for _, option in OWN} - mine):
        with pytest.raises(ValueError, match=option) as raised:
            games.find(name).options_of(name, {option: 1.0})
        assert name in str(raised.value) and (not mine or any(m in str(raised.value) for m in mine))


@pytest.mark.parametrize("name", NEW)
def test_data_of_the_wrong_kind(name):
    """Points for a game of images, images for one of points, and images alone for one that needs more."""
    if games.for_points(name):
        with pytest.raises(ValueError, match=f"{name} is for points, and digits are images"):
            training.configure(name, "digits", data.load("digits"))
        return
    with pytest.raises(ValueError, match=f"{name} is for images, and 8gaussians are points"):
        training.configure(name, "8gaussians", data.load("8gaussians"))
    needs = games.find(name).needs
    if needs is not None:
        with pytest.raises(ValueError, match=f"{name} needs {needs}, and mine has none"):
            training.configure(name, "mine", torch.zeros(8, 3, 32, 32))


@pytest.mark.parametrize("name", NEW)
def test_numbers_that_are_no_options_value(name):
    game = games.find(name)
    defaults = vars(game.options_of(name, {}))
    for option, default in defaults.items():
        if isinstance(default, bool | str):
            continue
        wrong = [-1, *([] if isinstance(default, int) else [-1e-3, math.nan, math.inf])]
        for value in wrong:
            with pytest.raises(ValueError, match=f"{name}: option {option} must be (0 or more|positive), got"):
                game.options_of(name, {option: value})
    for option in defaults.keys() & {"g_lr", "classes", "labels_per_class", "hidden", "features", "pixel_std"}:
        with pytest.raises(ValueError, match=f"{name}: option {option} must be positive, got 0"):
            game.options_of(name, {option: 0})


def test_options_of_another_type():
    for option, value, accepted in (
        ("blocks", 2.5, "a whole number, got 2.5"),
        ("blocks", True, "a whole number, got True"),
        ("cycle", "much", "a number, got 'much'"),
        ("cycle", True, "a number, got True"),
        ("upsample", 3, "a name, got 3"),
    ):
        with pytest.raises(ValueError, match=f"cyclegan: option {option} must be {accepted}"):
            games.find("cyclegan").options_of("cyclegan", {option: value})
    with pytest.raises(ValueError, match="gan_cls: option paper must be true or false, got 1"):
        games.find("gan_cls").options_of("gan_cls", {"paper": 1})


def test_a_resumed_run_keeps_its_games_options():
    saved, _, _ = prepared("infogan", options={"numbers": 3})
    # What it has is no change, whether it was given or is the default.
    for options in ({}, {"numbers": 3}, {"code_weight": 1}, {"numbers": 3, "classes": 10}):
        assert training.reconfigure(saved, steps=7, options=options).options == {"numbers": 3}
    for options, said in (({"numbers": 2}, "numbers=3, not numbers=2"), ({"classes": 5}, "classes=10, not classes=5")):
        with pytest.raises(ValueError, match=f"{said}: a resumed run keeps its game's options"):
            training.reconfigure(saved, steps=7, options=options)
    with pytest.raises(ValueError, match="unknown option of infogan 'cycle'"):
        training.reconfigure(saved, options={"cycle": 1.0})


def test_the_weights_of_another_model(tmp_path):
    config, samples, condition = prepared("aae", steps=1)
    training.train(config, samples, tmp_path / "aae", labels=condition)
    config, samples, condition = prepared("infogan", steps=1, start_from=str(tmp_path / "aae" / "checkpoint.pt"))
    with pytest.raises(checkpoint.CheckpointError, match="is of aae, which has no network .*a run of the same model"):
        training.train(config, samples, tmp_path / "run", labels=condition)
    assert not (tmp_path / "run").exists()
