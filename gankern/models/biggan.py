"""BigGAN (Brock 2018, arXiv 1809.11096): SAGAN's blocks, one embedding for all norms, a part of the latent a block.

At 128 pixels with ch 96 and 1,000 classes the generator has 70,433,988 parameters, the discriminator 87,982,370.

The latent is cut into one part more than there are blocks: the first makes the first map, each other one goes, with the
class's embedding, to the norms of a block: batch norm by 1 + W [embed(y), z_i] and W' [embed(y), z_i]. Attention is at
64x64 (at 16x16 of 32 pixels). Every weight has a spectral norm of one; weights are drawn orthogonally.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from gankern.core.arguments import whole
from gankern.models import layers as layer_tables
from gankern.models._sizes import SizeError
from gankern.models.biggan_deep import check_labels, initialise
from gankern.models.gan import GAN
from gankern.models.layers import Layers, normalise_spectrally
from gankern.models.resnet import GeneratorBlock
from gankern.models.sagan import HALVINGS, Discriminator

# As sagan.ARCHITECTURES.
ARCHITECTURES = {
    32: ((4, 4, 4, 4), 2, (4, 4, 4, 4), 1),  # attention at 16x16
    128: ((16, 16, 8, 4, 2, 1), 4, (1, 2, 4, 8, 16, 16), 1),
}


class Generator(nn.Module):
    """(latents [N, latent], classes [N]) → images [N, channels, size, size] in [-1, 1]."""

    def __init__(
        self,
        widths: list[int],
        attention: int,
        channels: int,
        latent: int,
        embedding: int,
        num_classes: int,
        table: Layers,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.part = latent // len(widths)

        def norm(features: int) -> nn.Module:
            return table.linear_batch_norm_relu(features, embedding + self.part)

        self.embed = nn.Embedding(num_classes, embedding)
        self.first = table.linear(self.part, 16 * widths[0])
        self.blocks = nn.ModuleList(GeneratorBlock(before, after, norm, table) for before, after in pairwise(widths))
        self.attention_at, self.attention = attention, table.self_attention(widths[attention])
        self.norm = table.batch_norm_act(widths[-1])
        self.last = table.conv(widths[-1], channels, 3, padding=1)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        check_labels(labels, self.num_classes)
        first, *parts = latents.split(self.part, 1)
        embedded = self.embed(labels)
        x = self.first(first).unflatten(1, (-1, 4, 4))
        for i, (block, part) in enumerate(zip(self.blocks, parts, strict=True)):
            x = block(self.attention(x) if i == self.attention_at else x, torch.cat([embedded, part], 1))
        return self.last(self.norm(x)).tanh()


def biggan(
    size: int = 128,
    channels: int = 3,
    latent: int = 120,
    width: int = 96,
    num_classes: int = 1000,
    embedding: int = 128,
    layers: str = "torch",
) -> GAN:
    """BigGAN for images of 128 pixels (or 32, a small one of its kind); ``width`` is the paper's ch.

    ``latent`` is a multiple of the number of its parts: 6 of 128 pixels, 4 of 32. Sample by
    :func:`gankern.models.biggan_deep.truncated` latents.

    >>> gan = biggan(32, width=4, latent=8, embedding=8, num_classes=5)
    >>> labels = torch.tensor([0, 4])
    >>> gan.discriminator(gan.generator(torch.randn(2, 8), labels), labels).shape
    torch.Size([2])
    """
    if whole("size", size) not in ARCHITECTURES:
        raise SizeError(f"biggan has networks for sizes {', '.join(map(str, ARCHITECTURES))}, got {size}")
    given = {"channels": channels, "latent": latent, "width": width, "num_classes": num_classes, "embedding": embedding}
    for name, value in given.items():
        whole(name, value, least=1)
    generated, attention, judged, judged_attention = ARCHITECTURES[size]
    if latent % len(generated):
        raise ValueError(f"latent must be a multiple of {len(generated)}, the parts it is cut into; got {latent}")
    table = layer_tables.get(layers)
    generator = Generator(
        [width * m for m in generated], attention, channels, latent, embedding, num_classes, table
    )  # fmt: skip
    discriminator = Discriminator(
        [width * m for m in judged], judged_attention, HALVINGS[size], channels, num_classes, table
    )
    for network in (generator, discriminator):
        network.apply(initialise)
        normalise_spectrally(network, table)
    return GAN(generator, discriminator, latent, num_classes)
