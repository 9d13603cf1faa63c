"""BigGAN (Brock 2018, arXiv 1809.11096): SAGAN's blocks, one embedding for all norms, a part of the latent a block.

At 128 pixels with ch 96 and 1,000 classes the generator has 70,433,988 parameters, the discriminator 87,982,370.

The latent is cut into one part more than there are blocks: the first makes the first map, each other one goes, with the
class's embedding, to the norms of a block: batch norm by 1 + W [embed(y), z_i] and W' [embed(y), z_i]. Attention is at
64x64 (at 16x16 of 32 pixels). Every weight has a spectral norm of one; weights are drawn orthogonally.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gankern.core.arguments import labels as check_labels
from gankern.models import _attention
from gankern.models import layers as layer_tables
from gankern.models._sizes import check_positive, of_size
from gankern.models.biggan_deep import initialise
from gankern.models.gan import GAN
from gankern.models.layers import normalise_spectrally
from gankern.models.resnet import GeneratorBlock
from gankern.models.sagan import HALVINGS, Discriminator
from gankern.nn.coupling import apart

# As sagan.ARCHITECTURES.
ARCHITECTURES = {
    32: ((4, 4, 4, 4), 2, (4, 4, 4, 4), 1),  # attention at 16x16
    128: ((16, 16, 8, 4, 2, 1), 4, (1, 2, 4, 8, 16, 16), 1),
}


@apart
class Generator(_attention.Generator):
    """Each block's condition is the class's embedding and its part of the latent."""

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        labels = check_labels("labels", labels, len(latents), self.num_classes)
        first, *parts = latents.split(latents.shape[1] // (len(self.blocks) + 1), 1)
        embedded = self.embed(labels)
        return self.images(first, [torch.cat([embedded, part], 1) for part in parts])


def biggan(
    size: int = 128, channels: int = 3, latent: int = 120, width: int = 96, num_classes: int = 1000,
    embedding: int = 128, layers: str = "torch",
) -> GAN:  # fmt: skip
    """BigGAN for images of 128 pixels (or 32, a small one of its kind); ``width`` is the paper's ch.

    ``latent`` is a multiple of the number of its parts: 6 of 128 pixels, 4 of 32. Sample by
    :func:`gankern.models.biggan_deep.truncated` latents.

    >>> gan = biggan(32, width=4, latent=8, embedding=8, num_classes=5)
    >>> labels = torch.tensor([0, 4])
    >>> gan.discriminator(gan.generator(torch.randn(2, 8), labels), labels).shape
    torch.Size([2])
    """
    generated, attention, judged, judged_attention = of_size("biggan", ARCHITECTURES, size)
    check_positive(channels=channels, latent=latent, width=width, num_classes=num_classes, embedding=embedding)
    if latent % len(generated):
        raise ValueError(f"latent must be a multiple of {len(generated)}, the parts it is cut into; got {latent}")
    table, part = layer_tables.get(layers), latent // len(generated)

    def norm(features: int) -> nn.Module:
        return table.linear_batch_norm_relu(features, embedding + part)

    generator = Generator(
        [width * m for m in generated],
        lambda _, before, after: GeneratorBlock(before, after, norm, table),
        attention,
        channels,
        part,
        num_classes,
        table,
        embedding,
    )
    discriminator = Discriminator(
        [width * m for m in judged], judged_attention, HALVINGS[size], channels, num_classes, table
    )
    for network in (generator, discriminator):
        network.apply(initialise)
        normalise_spectrally(network, table)
    return GAN(generator, discriminator, latent, num_classes)
