"""The models with self-attention: the same of torch's layers and of gankern's, gradients of gradients included."""

import pytest
import torch
from torch import nn

from gankern.models.biggan import biggan
from gankern.models.biggan_deep import biggan_deep
from gankern.models.sagan import sagan


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (biggan, {"size": 32, "width": 4, "latent": 8, "embedding": 6, "num_classes": 5}),
        (biggan_deep, {"size": 32, "width": 4, "latent": 8, "embedding": 6, "num_classes": 5}),
        (sagan, {"size": 32, "width": 4, "latent": 8, "num_classes": 5}),
    ],
    ids=["biggan", "biggan_deep", "sagan"],
)
def test_both_sets_of_layers_compute_the_same(build, options):
    results, kept = [], None
    for layers in ("torch", "gankern"):
        torch.manual_seed(0)
        gan = build(**options, layers=layers)
        networks = nn.ModuleList([gan.generator, gan.discriminator]).double()
        for net in networks:
            net.attention.gamma.data.fill_(0.5)
        if kept is not None:  # the vectors of the spectral norms were warmed up in float32, each by its own kernels
            networks.load_state_dict(kept)
        kept = {name: value.clone() for name, value in networks.state_dict().items()}
        generator = torch.Generator().manual_seed(1)
        z = torch.randn(3, 8, generator=generator, dtype=torch.float64)
        labels = torch.tensor([0, 4, 2])
        images = gan.generator(z, labels)
        logits = gan.discriminator(images, labels)
        (g,) = torch.autograd.grad(logits.sum(), images, create_graph=True)  # R1 goes through attention
        loss = logits.square().sum() + g.square().sum()
        loss.backward()
        results.append((images, logits, [p.grad for p in networks.parameters()], list(networks.state_dict())))
    (images, logits, grads, keys), (ours, our_logits, our_grads, our_keys) = results
    assert images.shape == (3, 3, 32, 32) and logits.shape == (3,) and keys == our_keys
    torch.testing.assert_close(images, ours, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(logits, our_logits, rtol=1e-8, atol=1e-8)
    for a, b in zip(grads, our_grads, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        else:
            assert (a is None or not a.any()) and (b is None or not b.any())
