"""Networks in channels_last, as they are on a GPU in half precision: the same numbers by either set of layers."""

import pytest
import torch

from gankern import models

SIZES = {"sngan": 32, "wgan_gp": 32, "progan": 32}


@pytest.mark.parametrize("layers", ["torch", "gankern"])
@pytest.mark.parametrize("name", sorted(set(models.MODELS) - {"wgan_gp_toy"}))
def test_the_numbers_do_not_depend_on_the_memory_format(double, name, layers):
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        gan = models.build(name, layers=layers, size=SIZES.get(name, 32), width=8)
        networks = [n.to(memory_format=memory_format).eval() for n in (gan.generator, gan.discriminator)]
        torch.manual_seed(1)
        images = networks[0](torch.randn(8, gan.latent)).contiguous(memory_format=memory_format)
        logits = networks[1](images)
        logits.sum().backward()
        gradients = [p.grad for n in networks for p in n.parameters() if p.grad is not None]
        found.append([images, logits, *gradients])
    for other, right in zip(found[1], found[0]):
        scale = right.abs().max().item() + 1e-6
        torch.testing.assert_close(other, right, rtol=1e-9, atol=1e-9 * scale)
