"""BigGAN: the published parameter counts, its parts of the latent, bad input; standing statistics."""

import pytest
import torch

from gankern import losses
from gankern.models import SizeError
from gankern.models.biggan import biggan
from gankern.models.biggan_deep import biggan_deep, standing_statistics

SMALL = {"size": 32, "width": 4, "latent": 8, "embedding": 6, "num_classes": 5}


def test_parameter_counts(nothing_iterated):
    with torch.device("meta"):
        gan = biggan()
    counts = [sum(p.numel() for p in net.parameters()) for net in (gan.generator, gan.discriminator)]
    assert counts == [70_433_988, 87_982_370]


@pytest.mark.parametrize(("options", "side"), [(SMALL, 16), ({**SMALL, "size": 128, "width": 2, "latent": 12}, 64)])
def test_where_attention_is(options, side):
    gan, seen = biggan(**options), []
    for net in (gan.generator, gan.discriminator):
        net.attention.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[2:])))
    labels = torch.tensor([1, 4])
    images = gan.generator(torch.randn(2, options["latent"]), labels)
    assert images.shape == (2, 3, options["size"], options["size"])
    assert gan.discriminator(images, labels).shape == (2,)
    assert seen == [(side, side)] * 2


def test_each_block_has_its_part_of_the_latent():
    """What the norms of a block are given is the class's embedding and the block's own part."""
    generator = biggan(**SMALL).generator.eval()
    z, given = torch.arange(16.0).view(2, 8), []
    for block in generator.blocks:
        block.norm_act1.register_forward_pre_hook(lambda module, inputs: given.append(inputs[1]))
    generator(z, torch.tensor([3, 0]))
    embedded = generator.embed(torch.tensor([3, 0]))
    for i, c in enumerate(given, start=1):
        assert torch.equal(c, torch.cat([embedded, z[:, 2 * i : 2 * i + 2]], 1))
    assert len(given) == 3


def test_bad_input_is_named():
    with pytest.raises(SizeError, match="sizes 32, 128, got 64"):
        biggan(64)
    with pytest.raises(ValueError, match="latent must be a multiple of 4, the parts it is cut into; got 10"):
        biggan(32, latent=10)
    with pytest.raises(ValueError, match="labels must be from 0 to 4, got 5"):
        biggan(**SMALL).generator(torch.randn(2, 8), torch.tensor([0, 5]))


@pytest.mark.parametrize("layers", ["torch", "gankern"])
@pytest.mark.parametrize("make", [biggan, biggan_deep])
def test_standing_statistics_are_the_batches_mean(make, layers):
    """Of the first norm: the mean over the batches of the means and unbiased variances of what it is given."""
    torch.manual_seed(0)
    generator = make(**SMALL, layers=layers).generator
    momenta = {m.momentum for m in generator.modules() if hasattr(m, "running_mean")}
    block = generator.blocks[0]
    first = block.norm_act1 if make is biggan else block.norms[0]
    batches = [(torch.randn(6, 8), torch.arange(6) % 5) for _ in range(3)]
    seen = []
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    vectors = {k: v.clone() for k, v in generator.state_dict().items() if k.rpartition(".")[2] in ("_u", "_v")}
    assert standing_statistics(generator, batches) is generator
    hook.remove()
    assert vectors and all(torch.equal(v, generator.state_dict()[k]) for k, v in vectors.items())  # none iterates
    assert {m.momentum for m in generator.modules() if hasattr(m, "running_mean")} == momenta
    assert not any(m.training for m in generator.modules())
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
    torch.testing.assert_close(first.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.running_var, variance, rtol=1e-5, atol=1e-6)


def test_orthogonal_penalties():
    w, v = torch.randn(3, 2, 2, 1, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    off = full = 0.0
    for rows in (w.flatten(1), v):
        for i in range(len(rows)):
            for j in range(len(rows)):
                product = float(rows[i] @ rows[j])
                off += (i != j) * product**2
                full += (product - (i == j)) ** 2
    assert losses.orthogonal_penalty([w, v]).item() == pytest.approx(off)
    assert losses.orthogonal_penalty([w, v], diagonal=True).item() == pytest.approx(full)
    with pytest.raises(ValueError, match=r"orthogonal_penalty: a weight has shape \(3,\)"):
        losses.orthogonal_penalty([torch.ones(3)])


def test_the_orthogonal_penalty_of_half_precision_is_computed_in_fp32():
    penalty = losses.orthogonal_penalty([torch.full((2, 64), 20.0, dtype=torch.float16)])
    assert penalty.dtype == torch.float32 and penalty.item() == 2 * 25600.0**2
