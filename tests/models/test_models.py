"""What holds for every model: published parameter counts, and that torch's and gankern's layers make one model."""

import pytest
import torch

import gankern.nn as gnn
from gankern import models

# A small form of every model, and of every option.
SMALL = {name: {"size": 16, "channels": 3, "latent": 6, "width": 4} for name in models.MODELS} | {
    "dcgan": {"size": 16, "channels": 1, "latent": 6, "width": 4},
    "gan": {"size": 6, "channels": 2, "latent": 6, "width": 25},
    "progan": {"size": 16, "channels": 3, "latent": 6, "width": 8},
    "sngan": {"size": 32, "channels": 1, "latent": 6, "width": 2},
    "wgan_gp_toy": {"width": 8},
}
LABELLED = ["dcgan", "gan", "sn_dcgan", "sngan", "wgan_gp"]
OPTIONS = {
    "plain": {},
    "projection": {"num_classes": 5},
    "concatenation": {"num_classes": 5, "conditioning": "concatenation"},
    "minibatch_discrimination": {"minibatch_discrimination": 3},
    "virtual": {"generator_norm": "virtual"},
    "virtual and labels": {"generator_norm": "virtual", "num_classes": 5},
    "virtual discriminator": {"discriminator_norm": "virtual"},
    "no norm": {"discriminator_norm": "none"},
}
# What does not have all options.
WITHOUT = {
    "gan": ["virtual", "virtual and labels", "virtual discriminator", "no norm"],
    "sn_dcgan": ["virtual discriminator", "no norm"],
    "sngan": ["virtual discriminator", "no norm"],
    "wgan_gp": ["virtual discriminator", "no norm"],
}
CASES = [(name, "plain") for name in SMALL]
CASES += [(name, option) for name in LABELLED for option in list(OPTIONS)[1:] if option not in WITHOUT.get(name, [])]


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("layers", models.LAYERS)
@pytest.mark.parametrize(
    ("name", "options", "generator", "discriminator"),
    [
        ("dcgan", {"size": 64}, 3_576_704, 2_765_568),
        ("sngan", {"size": 32}, 4_276_739, 1_053_825),
        ("wgan_gp", {"size": 32}, 1_204_483, 1_053_825),
        ("wgan_gp_toy", {}, 527_874, 527_361),
    ],
)
def test_published_parameter_counts(name, options, generator, discriminator, layers):
    gan = models.build(name, layers=layers, **options)
    assert (count(gan.generator), count(gan.discriminator)) == (generator, discriminator)


def build(name, option, layers, seed=3):
    """The model, with reference batches where it has virtual batch norms."""
    torch.manual_seed(seed)
    gan = models.build(name, layers=layers, **SMALL[name], **OPTIONS[option])
    random = torch.Generator().manual_seed(9)
    channels, size = SMALL[name].get("channels", 0), SMALL[name].get("size", 0)
    for network, shape in ((gan.generator, [gan.latent]), (gan.discriminator, [channels, size, size])):
        if any(isinstance(module, gnn.VirtualBatchNorm2d) for module in network.modules()):
            batch = torch.randn(7, *shape, generator=random)
            labels = [torch.randint(gan.num_classes, (7,), generator=random)] if gan.num_classes else []
            gnn.set_reference_batch(network, batch, *labels)
    return gan


def play(gan, seed=0, samples=4):
    """Images, logits, and the gradients of both networks' parameters, in fp64."""
    random = torch.Generator().manual_seed(seed)
    gan.generator.double()
    gan.discriminator.double()
    latents = torch.randn(samples, gan.latent, generator=random, dtype=torch.float64)
    torch.manual_seed(seed)  # of dropout
    labels = [torch.randint(gan.num_classes, (samples,), generator=random)] if gan.num_classes else []
    images = gan.generator(latents, *labels)
    logits = gan.discriminator(images, *labels)
    logits.square().mean().backward()
    gradients = {
        f"{player}.{key}": parameter.grad
        for player in ("generator", "discriminator")
        for key, parameter in getattr(gan, player).named_parameters()
    }
    return images, logits, gradients


@pytest.mark.parametrize(("name", "option"), CASES)
def test_both_sets_of_layers_are_one_model(name, option):
    """Same keys, same initial values and same random draws, so checkpoints move both ways; same numbers."""
    stock, ours = build(name, option, "torch"), build(name, option, "gankern")
    build(name, option, "torch")
    after_torch = torch.get_rng_state()
    build(name, option, "gankern")
    assert torch.equal(torch.get_rng_state(), after_torch)
    for player in ("generator", "discriminator"):
        theirs, mine = getattr(stock, player).state_dict(), getattr(ours, player).state_dict()
        assert list(theirs) == list(mine)
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-6)
        getattr(ours, player).load_state_dict(theirs)
        getattr(stock, player).load_state_dict(mine)
        getattr(ours, player).load_state_dict(theirs)
        getattr(stock, player).load_state_dict(theirs)

    expected, got = play(stock), play(ours)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-9, atol=1e-11)
    for key, gradient in expected[2].items():
        torch.testing.assert_close(got[2][key], gradient, rtol=1e-7, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("name", "option"), CASES)
def test_every_parameter_learns(name, option):
    gradients = play(build(name, option, "gankern"))[2]
    # A projection model's untouched classes, and the RGB layers of other resolutions, have no gradient.
    missing = [key for key, gradient in gradients.items() if gradient is None and "_rgb" not in key]
    assert not missing
    dead = [key for key, gradient in gradients.items() if gradient is not None and not gradient.any()]
    assert not dead


def test_the_first_gan_is_the_papers():
    gan = models.gan(size=28)
    assert [tuple(p.shape) for p in gan.generator.parameters() if p.ndim == 2] == [
        (1200, 100),
        (1200, 1200),
        (784, 1200),
    ]
    assert [tuple(p.shape) for p in gan.discriminator.parameters() if p.ndim == 2] == [
        (240 * 5, 784),
        (240 * 5, 240),
        (1, 240),
    ]


@pytest.mark.parametrize(("name", "option"), CASES)
def test_one_sample(name, option):
    gan = build(name, option, "gankern")
    gan.generator.eval()
    gan.discriminator.eval()
    labels = [torch.zeros(1, dtype=torch.long)] if gan.num_classes else []
    assert gan.discriminator(gan.generator(torch.randn(1, gan.latent), *labels), *labels).shape == (1,)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("option", ["projection", "concatenation"])
def test_labels_matter_to_both_players(name, option):
    gan = build(name, option, "gankern")
    gan.generator.eval()
    gan.discriminator.eval()
    with torch.no_grad():  # batch norms of all classes start equal: move them apart
        for key, parameter in gan.generator.named_parameters():
            if "norm" in key:
                parameter += torch.randn_like(parameter)
    latents = torch.randn(2, gan.latent)
    first, second = torch.tensor([0, 1]), torch.tensor([0, 2])
    images, others = gan.generator(latents, first), gan.generator(latents, second)
    torch.testing.assert_close(images[0], others[0])
    assert not torch.allclose(images[1], others[1])
    logits, changed = gan.discriminator(images, first), gan.discriminator(images, second)
    torch.testing.assert_close(logits[0], changed[0])
    assert not torch.allclose(logits[1], changed[1])


def test_projection_is_an_inner_product():
    """Miyato & Koyama 2018, equation 3: the difference between two labels is ⟨V_a − V_b, features⟩."""
    gan = build("wgan_gp", "projection", "torch")
    network = gan.discriminator.network
    images = torch.randn(3, *(3, 16, 16))
    features = network.relu(network.blocks(images)).mean((2, 3))
    a, b = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3])
    table = network.head.embedding.weight
    expected = ((table[a] - table[b]) * features).sum(1)
    torch.testing.assert_close(gan.discriminator(images, a) - gan.discriminator(images, b), expected)


def test_wrong_labels():
    gan = build("wgan_gp", "projection", "torch")
    latents = torch.randn(2, gan.latent)
    with pytest.raises(ValueError, match="this model has 5 classes: call it with labels"):
        gan.generator(latents)
    with pytest.raises(ValueError, match=r"labels must be 2 integers, one a sample, got \(3,\)"):
        gan.generator(latents, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="torch.float32"):
        gan.discriminator(torch.randn(2, 3, 16, 16), torch.zeros(2))
    with pytest.raises(ValueError, match=r"labels must be from 0 to 4, got 5"):
        gan.generator(latents, torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes must be 0"),
        ({"conditioning": "projektion"}, "did you mean projection?"),
        ({"minibatch_discrimination": -3}, "minibatch_discrimination must be 0"),
        ({"generator_norm": "virtul"}, "unknown generator_norm 'virtul'; did you mean virtual?"),
        ({"discriminator_norm": "no"}, "unknown discriminator_norm 'no'; did you mean none?"),
        ({"discriminator_norm": "virtual", "size": 8}, "discriminator_norm must be batch or none at 8x8, .* 'virtual'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        models.dcgan(**options)


def test_a_virtual_generator_makes_one_image_whatever_the_batch():
    gan = build("dcgan", "virtual", "gankern")
    latents = torch.randn(6, gan.latent)
    torch.testing.assert_close(gan.generator(latents)[:2], gan.generator(latents[:2]), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="set_reference_batch"):
        models.dcgan(size=16, width=2, generator_norm="virtual").generator(torch.randn(2, 100))


@pytest.mark.parametrize(("size", "near"), [(7, "8 and 16"), (48, "32 and 64"), (0, "8 and 16"), (100, "64 and 128")])
def test_sizes_that_are_not_powers_of_two(size, near):
    with pytest.raises(
        ValueError, match=f"size must be a power of two, at least 8, got {size}; the nearest are {near}"
    ):
        models.wgan_gp(size=size)


def test_sngan_sizes():
    with pytest.raises(ValueError, match=r"sizes 32 and 64, got 128; sn_dcgan and wgan_gp are for any"):
        models.sngan(size=128)
    gan = models.sngan(size=64, width=2, latent=4)
    assert gan.generator(torch.randn(2, 4)).shape == (2, 3, 64, 64)
    assert gan.discriminator(torch.randn(2, 3, 64, 64)).shape == (2,)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'sndcgan'; did you mean sn_dcgan"):
        models.build("sndcgan")
    with pytest.raises(ValueError, match=r"unknown set of layers 'gankernel'; did you mean gankern\?"):
        models.dcgan(layers="gankernel")


@pytest.mark.parametrize("size", [8, 32, 64])
def test_wgan_gp_critic_has_no_coupling_between_samples(size):
    """The penalty is on each sample's own gradient: the critic's value must not depend on the rest of the batch."""
    critic = models.wgan_gp(size=size, width=4).discriminator.double()
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(critic(images)[:1], critic(images[:1]), rtol=1e-12, atol=1e-14)
