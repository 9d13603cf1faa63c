"""Trainers whose steps are CUDA graphs: with recorded steps in place of graphs, the numbers are those without."""

import copy

import pytest
import torch
import torch.nn.functional as F

from gankern import data, games, training
from gankern.training import replayed
from gankern.training.trainer import Trainer

SMALL = dict(width=4, latent=8, batch_size=8, steps=9, threads=1)
QUICK = {
    "gan_cls": {"options": {"encoder_steps": 2}, "width": 8},
    "cgan": {"width": 4},
    "lapgan": {"width": 2},
    "vaegan": {"options": {"balance": 0.0, "hidden": 8}, "lr": 1e-5},  # exponentials make much of a rounding
    "cyclegan": {"batch_size": 2, "width": 4, "options": {"blocks": 1, "pool": 3}},
    "srgan": {"width": 4, "options": {"blocks": 1, "mse_steps": 2}},
}
POINTS = dict(width=8, batch_size=8, steps=9, threads=1)


@pytest.fixture
def graphs(recorded, monkeypatch):
    """A switch: whether trainers made from now on replay their steps, though on the CPU."""

    def switch(on):
        monkeypatch.setattr(replayed, "refusal", lambda trainer: None if on else "no")

    return switch


def samples_of(name):
    return data.load(name)


def trained(config, side, samples, labels, steps):
    trainer = Trainer(config, side, samples, labels)
    losses = [trainer.step().losses for _ in range(steps)]
    return trainer, losses


CASES = {
    "sn_dcgan": ("sn_dcgan", "gankern", {"ema": 0.9}),
    "penalty every other step, and a schedule": (
        "wgan_gp", "gankern", {"n_critic": 1, "penalty_every": 2, "decay_steps": 20, "ema": 0.9}),
    "torch's layers, parts of a batch": ("wgan_gp", "torch", {"n_critic": 2, "accumulate": 2}),
    "rmsprop and clipping": ("dcgan", "gankern", {"optimiser": "rmsprop", "clip": 0.05, "flip": True}),
    "noise that fades, and ends": (
        "sn_dcgan", "gankern", {"instance_noise": 0.1, "instance_noise_steps": 6}),
    "growing": ("progan", "gankern", {"grow_steps": 3, "size": 8}),
}  # fmt: skip


@pytest.mark.parametrize(("model", "side", "options"), CASES.values(), ids=CASES)
def test_the_numbers_are_those_without_graphs(model, side, options, graphs, recorded, same):
    images = samples_of("digits")
    config = training.configure(model, "digits", images, **(SMALL | options))
    found = []
    for on in (False, True):
        graphs(on)
        trainer, losses = trained(config, side, images, None, 9)
        state = trainer.state_dict()
        found.append((losses, state))
        assert (len(recorded) > 0) == on
    assert found[0][0] == found[1][0]
    assert same(*(state for _, state in found))  # the checkpoint knows nothing of graphs


# Games whose steps all do the same work, or do with these options, and two whose early steps do another.
OTHERS = [name for name in games.names() if games.find(name).same_work] + ["vaegan", "srgan", "gan_cls"]


@pytest.mark.parametrize("name", OTHERS)
def test_games_of_their_own_have_the_same_numbers(name, graphs, recorded, monkeypatch):
    """Whatever a move draws in another way than by `run` comes in another order where the draws come first."""
    monkeypatch.setattr(F, "dropout", lambda x, *options: x)  # whose numbers a GPU draws
    game = games.find(name)
    samples = data.load(game.data, game.preset.get("size"))
    condition = None if game.needs is None else data.condition(game.data, samples, game.needs)
    options = {"batch_size": 6, "threads": 1, "steps": 4} | QUICK.get(name, {"width": 8})
    config = training.configure(name, game.data, samples, condition, **options)
    found = []
    for on in (False, True):
        graphs(on)
        torch.manual_seed(0)
        trainer, losses = trained(config, "gankern", samples, condition, 4)
        assert (len(recorded) > 0) == on
        found.append((losses, trainer.state_dict()))
    (plain, of_plain), (replayed_, of_replayed) = found
    # Adam's steps that can be captured round otherwise; other draws are other numbers altogether.
    torch.testing.assert_close(replayed_, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_replayed["random_state"], of_plain["random_state"])


def test_a_checkpoint_of_either_kind_is_continued_by_either(graphs, same):
    images = samples_of("digits")
    config = training.configure("sn_dcgan", "digits", images, **SMALL)
    graphs(False)
    whole, _ = trained(config, "gankern", images, None, 6)
    for first, second in ((True, True), (True, False), (False, True)):
        graphs(first)
        state = copy.deepcopy(trained(config, "gankern", images, None, 3)[0].state_dict())
        graphs(second)
        trainer, _ = trained(config, "gankern", images, None, 4)  # has graphs that read what is replaced
        trainer.load_state_dict(state)
        for _ in range(3):
            trainer.step()
        assert same(trainer.state_dict(), whole.state_dict())


def test_a_step_that_cannot_be_captured_goes_on_as_it_is(graphs, same, monkeypatch, caplog):
    images = samples_of("digits")
    config = training.configure("sn_dcgan", "digits", images, **SMALL)
    graphs(False)
    plain, losses = trained(config, "gankern", images, None, 4)
    graphs(True)

    def refuse(graph, stream):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    trainer, own = trained(config, "gankern", images, None, 4)
    assert own == losses and trainer.replays is None
    assert same(trainer.state_dict(), plain.state_dict())
    assert "steps are not replayed as CUDA graphs: step cannot be captured: operation not permitted" in caplog.text


class _OnCuda:
    """Stands for a trainer on a device that is not here."""

    def __init__(self, trainer, **changes):
        self.__dict__ = {**trainer.__dict__, "device": torch.device("cuda"), **changes}


def test_why_steps_are_not_replayed(monkeypatch):
    images = samples_of("digits")

    def trainer(model="sn_dcgan", **options):
        return Trainer(training.configure(model, "digits", images, **(SMALL | options)), "gankern", images)

    own = trainer()
    assert own.replays is None and "this run is on cpu" in own.not_replayed
    assert replayed.refusal(_OnCuda(own)) is None
    assert "SGD takes" in replayed.refusal(_OnCuda(trainer(optimiser="sgd")))
    for options in ({"noisy_labels": 0.1}, {"historical_average": 0.1}):
        assert "not known to do the same work" in replayed.refusal(_OnCuda(trainer(**options)))
    monkeypatch.setenv(replayed.VARIABLE, "0")
    assert "GANKERN_CUDA_GRAPHS=0 is set" in replayed.refusal(_OnCuda(own))
    monkeypatch.delenv(replayed.VARIABLE)
    several = type("Processes", (), {"number": 2})()
    assert "several processes" in replayed.refusal(_OnCuda(own, processes=several))


def test_every_draw_of_a_game_that_can_be_replayed_is_written_down(monkeypatch):
    """A random number or a batch that a move takes in another way would be frozen in a graph: with what was written down
    given again, nothing else is drawn."""
    images = samples_of("digits")
    labels = torch.arange(len(images)) % 10
    for options, labelled in (
        ({}, None),
        ({"augment": "color,translation,cutout", "flip": True}, None),
        ({"dragan": 1.0, "r1": 1.0}, None),
        ({"conditioning": "projection", "num_classes": 10}, labels),
        ({"feature_matching": 0.1, "instance_noise": 0.1}, None),
    ):
        config = training.configure("dcgan", "digits", images, labelled, **(SMALL | options))
        trainer = Trainer(config, "gankern", images, labelled)
        assert trainer.game.work() is not None
        draws = []
        trainer.game.run.drawn = replayed.Replays._write_down(draws)
        trainer.play(timed=False)
        values = [draw() for draw in draws]
        before, batches = torch.get_rng_state(), copy.deepcopy(trainer.batches.state_dict())
        trainer.game.run.drawn = replayed.Replays._give(iter(values))
        trainer.play(timed=False)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(batches["order"], trainer.batches.state_dict()["order"])
        assert batches["position"] == trainer.batches.state_dict()["position"]
