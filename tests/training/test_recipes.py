"""What papers add to a generator against a discriminator, as options of every run: right values on both sets of layers,
and runs that resume."""

import math

import pytest
import torch
from typer.testing import CliRunner

from gankern import data, games, losses, training
from gankern.cli import app
from gankern.games._critic import DISCRIMINATOR_LOSSES, Objective
from gankern.training import checkpoint as checkpoints

TINY = {"latent": 4, "batch_size": 4, "threads": 1, "steps": 4, "width": 10}


@pytest.fixture(scope="module")
def images():
    return data.load("digits")[:64]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trainer(images, model="gan", layers="torch", **options):
    return training.Trainer(training.configure(model, "digits", images, **TINY | options), layers, images)


class Square(torch.nn.Module):
    """D(x) = ½ s |x|² has the gradient s x: every penalty of it is written down by hand."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x):
        return 0.5 * self.scale * x.flatten(1).square().sum(1)


@pytest.mark.parametrize("side", DISCRIMINATOR_LOSSES)
@pytest.mark.parametrize("name", ["gradient_penalty", "zero_centered", "dragan", "r1", "r2", "r1 and r2"])
def test_penalties_by_their_formulas(side, name):
    critic = Square()
    real, fake, noise = torch.randn(3, 5, 1, 2, 3, dtype=torch.float64)
    alpha = torch.rand(5, dtype=torch.float64)
    names = name.split(" and ")
    objective = Objective(losses.get("wasserstein"), **dict.fromkeys(names, 3.0))
    draws = {f"{n}_alpha": alpha for n in names} | {"noise": noise}
    loss = DISCRIMINATOR_LOSSES[side](critic, real, fake, draws, (), objective)

    def length(x):
        return critic.scale * x.flatten(1).norm(dim=1)

    between = alpha.view(5, 1, 1, 1)
    right = {
        "gradient_penalty": 3.0 * (length(real + between * (fake - real)) - 1.0).square().mean(),
        "zero_centered": 3.0 * length(real + between * (fake - real)).square().mean(),
        "dragan": 3.0 * (length(real + between * noise) - 1.0).square().mean(),
        "r1": 1.5 * length(real).square().mean(),
        "r2": 1.5 * length(fake).square().mean(),
    }
    expected = critic(fake).mean() - critic(real).mean() + sum(right[n] for n in names)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(expected, critic.scale)
    loss.backward()
    torch.testing.assert_close(critic.scale.grad, gradient)


def test_penalties_every_few_steps_weigh_as_much_more():
    objective = Objective(losses.get("hinge"), r1=10.0, gradient_penalty=2.0, drift=0.5)
    assert objective.in_turn(8, 4).penalties() == {"gradient_penalty": 8.0, "r1": 40.0}
    assert [objective.in_turn(step, 4).penalties() for step in (1, 2, 3, 5)] == [{}] * 4
    assert objective.in_turn(3, 4).drift == 0.5 and objective.in_turn(7, 1) == objective


def test_lazy_penalties_count_the_discriminators_steps(images):
    """With three of them a step and a penalty at every second: 0, 2 of the first step, 1 (the fourth) of the second."""
    played = trainer(images, "wgan_gp", width=2, r1=1.0, gradient_penalty=0.0, n_critic=3, penalty_every=2)
    seen = []
    loss = played.game.discriminator_loss

    def note(critic, real, fake, draws, labels, objective):
        seen.append(objective.r1)
        return loss(critic, real, fake, draws, labels, objective)

    played.game.discriminator_loss = note
    for _ in range(2):
        played.step()
    assert seen == [2.0, 0.0, 2.0, 0.0, 2.0, 0.0]


def test_dragans_noise_is_half_the_standard_deviation(images):
    played = trainer(images, "wgan_gp", width=2, gradient_penalty=0.0, dragan=10.0)
    caught = {}

    def note(critic, real, fake, draws, labels, objective):
        caught.update(draws, real=real)
        return critic(real).mean()

    played.game.discriminator_loss = note
    played.step()
    noise = caught["noise"] / (0.5 * caught["real"].std())
    assert noise.shape == caught["real"].shape and noise.min() >= 0.0 and noise.max() < 1.0
    assert abs(noise.mean() - 0.5) < 0.1 and abs(noise.std() - 12**-0.5) < 0.05


def test_noisy_labels_exchange_real_and_fake():
    objective = Objective(losses.get("non_saturating", 0.9))
    real, fake = torch.randn(2, 6)
    assert objective.swapped().loss.discriminator(real, fake) == objective.loss.discriminator(fake, real)


@pytest.mark.parametrize(("probability", "least", "most"), [(1.0, 40, 40), (0.25, 3, 20), (0.0, 0, 0)])
def test_noisy_labels_come_with_their_probability(images, probability, least, most):
    played = trainer(images, noisy_labels=probability, steps=40)
    seen = []
    loss = played.game.discriminator_loss

    def note(critic, real, fake, draws, labels, objective):
        seen.append(objective.loss is not played.game.objective.loss)
        return loss(critic, real, fake, draws, labels, objective)

    played.game.discriminator_loss = note
    for _ in range(40):
        played.step()
    assert least <= sum(seen) <= most


def test_instance_noise_is_on_all_that_the_discriminator_sees_and_falls(images):
    """The discriminator sees constant images, real and generated, so that all that varies is the noise."""
    constant = torch.zeros_like(images)
    played = trainer(constant, instance_noise=0.8, instance_noise_steps=4, batch_size=64)
    with torch.no_grad():  # sigmoid(0) is 0 in [-1, 1]
        for parameter in played.generator.parameters():
            parameter.zero_()
    played.optimisers["g"] = torch.optim.SGD(played.generator.parameters(), 0.0)
    stds = []
    played.discriminator.register_forward_pre_hook(lambda _, inputs: stds.append(inputs[0].std().item()))
    for _ in range(5):
        played.step()
    assert stds == pytest.approx([0.8] * 3 + [0.6] * 3 + [0.4] * 3 + [0.2] * 3 + [0.0] * 3, abs=0.04)
    stays = trainer(images, instance_noise=0.3).game.stabilisers  # without a number of steps
    assert stays.noise_std() == 0.3
    stays.step = 1000
    assert stays.noise_std() == 0.3


@pytest.mark.parametrize("model", ["gan", "sn_dcgan"])
def test_feature_matching_by_its_definition(double, images, model):
    """The loss of the generator less the same without: the weight times |E f(x) - E f(G(z))|² of the last layer's input."""
    images = images.double()
    options = {"conditioning": None, "minibatch_discrimination": 3}
    played = trainer(images, model, feature_matching=0.7, **options)
    game = played.game
    for module in game.discriminator.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    game.discriminator.eval()  # spectral norm stands still
    latents, real = torch.randn(4, 4), images[:4]
    game.seen, game.run.normal = [real], lambda *size: latents
    loss = game._generator_loss()(slice(0, 4))
    fake = game.generator(latents)
    flat = {
        "gan": lambda x: game.discriminator.main(x.flatten(1)),
        "sn_dcgan": lambda x: game.discriminator.main(x).flatten(1),
    }
    difference = flat[model](real).mean(0) - flat[model](fake).mean(0)
    expected = game.loss.generator(game.discriminator(fake)) + 0.7 * difference.square().sum()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(*(torch.autograd.grad(x, list(game.generator.parameters())) for x in (loss, expected))):
        torch.testing.assert_close(a, b)


def test_feature_matching_needs_known_features(images):
    with pytest.raises(ValueError, match="feature_matching: which features of progan's discriminator"):
        trainer(data.load("digits", size=16)[:64], "progan", feature_matching=1.0, grow_steps=1)


def test_historical_averaging_of_both_players(double, images):
    """The loss less the same without: half the squared distance of the weights to the mean of all before the moves."""
    images = images.double()
    with_it, without = (trainer(images, historical_average=weight, lr=1e-12) for weight in (0.5, 0.0))
    history = {"d": [], "g": []}
    for _ in range(3):
        for player in "dg":
            for parameter, other in zip(with_it.parameters(player), without.parameters(player)):
                parameter.data += 0.01 * torch.randn_like(parameter)
                other.data.copy_(parameter)
            history[player].append([p.detach().clone() for p in with_it.parameters(player)])
        a, b = with_it.step(), without.step()
        for player in "dg":
            mean = [torch.stack(past).mean(0) for past in zip(*history[player])]
            distance = sum((x - m).square().sum().item() for x, m in zip(history[player][-1], mean))
            assert a.losses[player] - b.losses[player] == pytest.approx(0.5 * distance, rel=1e-6, abs=1e-9)
    assert distance > 0.01


def test_momentum_rises_and_the_learning_rate_falls_to_its_floor(images):
    options = {"optimiser": "sgd", "lr": 0.1, "momentum": 0.5, "momentum_end": 0.7, "momentum_steps": 4}
    played = trainer(images, lr_decay=2.0, lr_floor=0.03, **options)
    rates = []
    for _ in range(6):
        played.step()
        rates += [(g["lr"], g["momentum"]) for o in played.optimisers.values() for g in o.param_groups]
    lrs, momenta = zip(*rates[::2])
    assert rates[::2] == rates[1::2]  # of both players
    assert lrs == pytest.approx([0.1, 0.05, 0.03, 0.03, 0.03, 0.03])
    assert momenta == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7, 0.7])


def test_learning_rates_fall_for_as_long_as_one_likes(images):
    """2^1024 is no number any more."""
    played = trainer(images, lr_decay=2.0, lr=0.1, lr_floor=0.01)
    played.steps = 2000
    played.step()
    assert played.rates == {"d": 0.01, "g": 0.01}


def test_momentum_steps_by_hand(images):
    """v ← m v + g, θ ← θ - lr v, with the momentum of each step."""
    played = trainer(images, optimiser="sgd", lr=0.1, momentum=0.0, momentum_end=0.8, momentum_steps=2, dragan=0.0)
    (weight, *_) = played.parameters("d")
    velocity, expected = torch.zeros_like(weight), weight.detach().clone()
    for momentum in (0.0, 0.4, 0.8):
        played.step()
        velocity = momentum * velocity + weight.grad
        expected = expected - 0.1 * velocity
        torch.testing.assert_close(weight.detach(), expected)


RECIPES = {
    "momentum": ("gan", {"optimiser": "sgd", "lr": 0.05, "momentum": 0.0, "momentum_end": 0.7, "momentum_steps": 3,
                         "lr_decay": 1.1}),
    "noise": ("gan", {"noisy_labels": 0.3, "instance_noise": 0.5, "instance_noise_steps": 3, "historical_average": 0.1,
                      "feature_matching": 0.1}),
    "penalties": ("wgan_gp", {"width": 2, "n_critic": 3, "gradient_penalty": 0.0, "dragan": 1.0, "r1": 1.0, "r2": 1.0,
                              "zero_centered": 1.0, "penalty_every": 2, "accumulate": 2}),
}  # fmt: skip


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize("name", RECIPES)
def test_a_stopped_run_goes_on_as_if_it_had_not(same, images, tmp_path, name):
    model, options = RECIPES[name]
    config = training.configure(model, "digits", images, **TINY | options)
    training.train(config, images, tmp_path / "a")
    training.train(training.reconfigure(config, steps=2), images, tmp_path / "b")
    saved = checkpoints.load(tmp_path / "b" / training.CHECKPOINT)
    training.train(training.reconfigure(saved.config, steps=4), images, tmp_path / "b", saved)
    a, b = (checkpoints.load(tmp_path / run / training.CHECKPOINT) for run in "ab")
    assert same(a.trainers, b.trainers)
    assert checkpoints.game(a, "gankern").average()(torch.randn(2, 4)).isfinite().all()


@pytest.mark.parametrize("name", RECIPES)
def test_both_sets_of_layers_train_alike(double, images, name):
    model, options = RECIPES[name]
    images = images.double()
    a, b = (trainer(images, model, layers, **options) for layers in ("torch", "gankern"))
    for _ in range(3):
        torch.testing.assert_close(b.step().losses, a.step().losses, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.5}, "momentum is of the optimiser sgd; adam has none"),
        ({"optimiser": "sgd", "momentum_end": 0.7}, "momentum_end and momentum_steps go together"),
        ({"optimiser": "sgd", "momentum_steps": 5}, "momentum_end and momentum_steps go together"),
        ({"optimiser": "sgd", "momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"noisy_labels": 1.5}, "noisy_labels must be a probability from 0 to 1, got 1.5"),
        ({"lr_decay": 0.5}, "lr_decay must be 1 .* or more, got 0.5"),
        ({"lr_floor": -1.0}, "lr_floor must be 0 or more"),
        ({"penalty_every": 0}, "penalty_every must be at least 1"),
        ({"r1": -1.0}, "r1 must be 0 or more"),
        ({"instance_noise": math.inf}, "instance_noise must be 0 or more, got inf"),
    ],
)
def test_options_that_make_no_sense(images, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(images, **options)


@pytest.mark.parametrize("name", sorted(games.ADVERSARIAL_OPTIONS))
def test_a_game_that_has_no_use_for_an_option_says_so(images, name):
    words = {"conditioning": "projection", "augment": "translation", "features": "network.pt"}
    value = words | {"noisy_labels": 0.5, "evaluate_samples": 500}
    value = value.get(name, "virtual" if "norm" in name else 2)
    with pytest.raises(ValueError, match=f"{name} is .*infogan has no use for it|grow_steps is for progan"):
        training.configure("infogan", "digits", images, data.labels("digits")[:64], **{name: value})


def test_a_game_that_keeps_no_average_says_so(images):
    with pytest.raises(ValueError, match="ema: infogan keeps no average; .*dcgan.* do"):
        training.configure("infogan", "digits", images, ema=0.9)


def test_from_the_command_line(tmp_path):
    command = (
        "train gan --data digits --steps 2 --batch-size 8 --width 10 --latent 4 --threads 1 --optimiser sgd --lr 0.1 "
    )
    command += "--momentum 0.5 --momentum-end 0.7 --momentum-steps 9 --lr-decay 1.00004 --lr-floor 1e-6 --r1 1 --r2 1 "
    command += "--dragan 1 --zero-centered 1 --penalty-every 2 --feature-matching 1 --historical-average 0.1 "
    command += "--noisy-labels 0.05 --instance-noise 0.1 --instance-noise-steps 100"
    result = CliRunner().invoke(app, [*command.split(), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    saved = checkpoints.load(tmp_path / "run" / training.CHECKPOINT).config
    assert (saved.momentum_end, saved.lr_decay, saved.penalty_every, saved.noisy_labels) == (0.7, 1.00004, 2, 0.05)
    assert saved.r1 == saved.r2 == saved.dragan == saved.zero_centered == saved.feature_matching == 1.0
