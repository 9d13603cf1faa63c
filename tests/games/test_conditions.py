"""AC-GAN, the classifier of K + 1 classes, and the adversarial auto-encoder: the papers' sizes, formulas, bad input."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from gankern import data, games, metrics, training
from gankern.games import Run
from gankern.games._networks import Noise
from gankern.games.semisupervised import Classifier, make_generator
from gankern.models.layers import LAYERS


def count(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


def made(name, images, labels=None, layers="torch", samples=None, **options):
    config = training.configure(name, "digits", images, labels, **options)
    return games.find(name)(Run(config, layers, samples=samples, condition=labels))


@pytest.mark.parametrize("layers", ["torch", "gankern"])
def test_parameters_of_the_papers(layers):
    classes = torch.arange(10)
    with torch.device("meta"):
        acgan = made(
            "acgan", torch.zeros(10, 3, 32, 32), classes.cpu(), layers, latent=100, options={"kernel": 5}
        ).networks
        aae = made("aae", torch.zeros(10, 1, 28, 28), None, layers, width=1000).networks
        generator = make_generator((100, 500, 500, 784), (1, 28, 28), LAYERS[layers])
        classifier = Classifier((784, 1000, 500, 250, 250, 250, 10), LAYERS[layers], lambda draw: draw())
        cifar = made("semisupervised", torch.zeros(10, 3, 32, 32), classes.cpu(), layers, latent=100).networks
        assert cifar["generator"](torch.zeros(2, 100)).shape == (2, 3, 32, 32)
        assert [x.shape for x in cifar["classifier"](torch.zeros(2, 3, 32, 32))] == [(2, 192), (2, 10)]
    assert count(acgan["generator"]) == 2_994_051 and count(acgan["trunk"], acgan["heads"]) == 1_664_875
    assert [count(network) for network in aae.values()] == [1_794_008, 1_794_784, 1_011_001]
    assert count(generator) == 694_568 and count(classifier) == 1_538_770
    assert count(cifar["generator"]) == 4_933_382 and count(cifar["classifier"]) == 1_406_804


@pytest.mark.parametrize("layers", ["torch", "gankern"])
@pytest.mark.parametrize(
    ("name", "options", "std"),
    [("acgan", {"width": 96}, 0.02), ("bigan", {"width": 64, "options": {"ali": True}}, 0.01)],
)
def test_weights_of_the_papers_are_drawn_normally(name, options, std, layers):
    """Of all layers, the discriminator's among them; biases are 0."""
    torch.manual_seed(0)
    game = made(name, torch.zeros(10, 3, 32, 32), torch.arange(10), layers, **options)
    for network in game.networks.values():
        for parameter, values in network.named_parameters():
            if values.ndim > 1 and not parameter.endswith("bias"):
                assert values.std().item() == pytest.approx(std, rel=0.5 if values.numel() < 2000 else 0.1), parameter
            elif parameter.endswith("bias"):
                assert not values.any(), parameter


def test_convolutional_classifier_of_many_classes(double):
    """Both sets of layers play it alike; weights have their lengths, trained ones only the last of each network; the
    generator's loss is the mean of absolute differences of features."""
    images, labels = 2 * torch.rand(40, 3, 16, 16) - 1, torch.arange(40) % 2
    options = {"width": 8, "latent": 4, "batch_size": 6, "threads": 1, "options": {"labels_per_class": 5}}
    config = training.configure("semisupervised", "mine", images, labels, **options)
    stock, ours = (training.Trainer(config, side, images, labels) for side in ("torch", "gankern"))
    for _ in range(2):
        torch.testing.assert_close(ours.step().losses, stock.step().losses, rtol=1e-10, atol=1e-10)
    classifier, generator = (stock.game.networks[name] for name in ("classifier", "generator"))
    convolutions = [m for m in classifier.modules() if isinstance(m, torch.nn.Conv2d)]
    lengths = torch.stack([m.weight.flatten(1).norm(dim=1).std() for m in convolutions])
    assert len(convolutions) == 9 and lengths.max() < 1e-12  # all of a layer's outputs alike
    scales = [n for net in (classifier, generator) for n, p in net.named_parameters() if "scale" in n]
    assert len(scales) == 2
    last = [m for m in generator.modules() if isinstance(m, torch.nn.ConvTranspose2d)][-1]
    scale = last.parametrizations.weight[0].scale.flatten()
    torch.testing.assert_close(last.weight.transpose(0, 1).flatten(1).norm(dim=1), scale.abs())
    # x goes through layers of that slope as large as it came: mean square 1, for normal numbers.
    x, slope = torch.randn(200_000), 0.2
    seen = torch.nn.functional.leaky_relu(x, slope).square().mean() * convolutions[0].weight[0].square().sum()
    assert seen.item() == pytest.approx(1.0, rel=0.02)
    told = []
    classifier.register_forward_hook(lambda *call: told.append(call[-1][0]))
    moves = list(stock.game.moves())
    assert [player for player, _ in moves] == ["d", "g"]
    real, fake = told[-2].mean(0), told[-1].mean(0)
    torch.testing.assert_close(moves[1][1], (real - fake).abs().sum() / 12)
    assert not told[-2].requires_grad and len(real) == 12


@pytest.mark.parametrize("name", ["bigan", "semisupervised"])
def test_copies_of_networks_draw_their_noise_without_the_run(name):
    images, labels = data.load("digits"), data.labels("digits")
    run = Run(training.configure(name, "digits", images, labels, width=8), "torch", samples=images, condition=labels)
    run.drawn = lambda draw: pytest.fail("a copy draws by the run")
    network = games.find(name)(run).networks["discriminator" if name == "bigan" else "classifier"]
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        noise = next(module for module in copied.modules() if isinstance(module, Noise))
        x = torch.zeros(4, 3)
        assert noise(x).any() and not noise.eval()(x).any()


@pytest.mark.parametrize("kernel", [4, 5])
def test_convolutional_acgan_plays(kernel, monkeypatch):
    images, labels = data.load("digits", size=16)[:32], data.labels("digits")[:32]
    options = {"width": 24, "batch_size": 4, "threads": 1, "options": {"kernel": kernel}}
    trainer = training.Trainer(
        training.configure("acgan", "digits", images, labels, **options), "gankern", images, labels
    )
    trainer.step()
    assert trainer.is_finite() and trainer.game.sample(torch.arange(3)).shape == (3, 1, 16, 16)
    monkeypatch.setattr("gankern.games.acgan.read_classes", lambda images, *_: torch.arange(len(images)) % 10)
    found = trainer.game.figures()
    assert found["label_accuracy"] == 1.0
    assert found["similarity_real"] == metrics.within_class_similarity(images, labels) != found["similarity"]


def test_k_plus_one_classes_are_the_softmax_of_k_plus_one():
    """log D and log(1 - D) of the formulas are those of a softmax whose last logit is 0, and the supervised and the
    unsupervised loss are the loss of that softmax, split."""
    logits, labels = 3 * torch.randn(50, 10, dtype=torch.float64), torch.randint(10, (50,))
    whole = torch.cat([logits, torch.zeros(50, 1, dtype=torch.float64)], 1).log_softmax(1)
    s = logits.logsumexp(1)
    torch.testing.assert_close(F.logsigmoid(s), whole[:, :10].logsumexp(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(F.logsigmoid(-s), whole[:, 10], rtol=1e-12, atol=1e-12)
    of_class = F.cross_entropy(logits, labels, reduction="none")
    right = -whole[torch.arange(50), labels]
    torch.testing.assert_close(of_class - F.logsigmoid(s), right, rtol=1e-12, atol=1e-12)


def test_no_label_but_the_chosen_ones_is_used_and_no_held_out_image():
    images, labels = data.load("digits"), data.labels("digits")
    config = training.configure("semisupervised", "digits", images, labels, options={"labels_per_class": 3}, threads=1)
    trainer = training.Trainer(config, "torch", images, labels)
    assert trainer.game.labels.bincount().tolist() == [3] * 10
    training_images, test = trainer.game.run.held_out(0.25)
    assert len(test) == 449 and not set(test.tolist()) & set(training_images.tolist())
    assert len(trainer.batches.images) == len(training_images)
    chosen = torch.cat([training_images[labels[training_images] == c][:3] for c in range(10)])
    assert torch.equal(trainer.game.labelled, images[chosen])
    # Whatever the labels of the others are, the losses are the same.
    again = training.Trainer(config, "torch", images, labels)
    again.batches.labels = torch.zeros_like(again.batches.labels)
    assert again.step().losses == trainer.step().losses


@pytest.mark.parametrize(
    ("number", "says"), [(0, "must be positive, got 0"), (10_000, r"must be from 1 to 1\d\d for these data, got 10000")]
)
def test_labels_that_there_are_not(number, says):
    images, labels = data.load("digits"), data.labels("digits")
    with pytest.raises(ValueError, match=f"labels_per_class {says}"):
        made("semisupervised", images, labels, samples=images, options={"labels_per_class": number})


def test_wrong_data_and_options():
    with pytest.raises(ValueError, match="acgan needs labels, and x has none"):
        training.configure("acgan", "x", torch.zeros(8, 1, 8, 8))
    with pytest.raises(ValueError, match="halved three times, got 12"):
        made("acgan", torch.zeros(10, 1, 12, 12), torch.arange(10))
    with pytest.raises(ValueError, match="kernel must be 4 or 5, got 3"):
        made("acgan", torch.zeros(10, 1, 16, 16), torch.arange(10), options={"kernel": 3})
    with pytest.raises(ValueError, match="aae cannot divide its batch: accumulate must be 1"):
        images = data.load("digits")
        training.Trainer(training.configure("aae", "digits", images, accumulate=2), "torch", images)
