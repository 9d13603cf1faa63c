"""SAGAN (Zhang 2018, arXiv 1805.08318): SN-GAN's residual blocks, spectral norm in both networks, and attention.

At 128 pixels with ch 64 and 1,000 classes the generator has 42,078,852 parameters, the discriminator 39,463,618. The
norms of the generator's blocks have a weight and a bias for each class; the last one does not. Attention is at 32x32
(at half the size of smaller images).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from gankern.core.arguments import labels as check_labels
from gankern.models import _attention
from gankern.models import layers as layer_tables
from gankern.models._sizes import check_positive, of_size
from gankern.models.gan import GAN
from gankern.models.layers import Layers, normalise_spectrally
from gankern.models.resnet import DiscriminatorBlock, GeneratorBlock
from gankern.nn.coupling import apart

# size → multiples of ch between the blocks, and behind how many blocks there is attention: generator, discriminator.
ARCHITECTURES = {
    32: ((4, 4, 4, 4), 2, (2, 2, 2, 2), 1),  # SN-GAN's of CIFAR-10: attention at 16x16
    128: ((16, 16, 8, 4, 2, 1), 3, (1, 2, 4, 8, 16, 16), 2),
}
HALVINGS = {32: 2, 128: 5}


@apart
class Generator(_attention.Generator):
    """Each block's condition is the class."""

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        labels = check_labels("labels", labels, len(latents), self.num_classes)
        return self.images(latents, [labels] * len(self.blocks))


@apart
class Discriminator(nn.Module):
    """(images [N, channels, size, size], classes [N]) → logits [N], by projection."""

    def __init__(
        self, widths: list[int], attention: int, halvings: int, channels: int, num_classes: int, table: Layers
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(before, after, table, downsample=i < halvings, first=i == 0, wide=True)
            for i, (before, after) in enumerate(pairwise([channels, *widths]))
        )
        self.attention_at, self.attention = attention, table.self_attention(widths[attention - 1])
        self.relu = table.relu()
        self.last = table.linear(widths[-1], 1)
        self.embed = nn.Embedding(num_classes, widths[-1])

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        labels = check_labels("labels", labels, len(images), self.num_classes)
        x = images
        for i, block in enumerate(self.blocks):
            x = block(self.attention(x) if i == self.attention_at else x)
        features = self.relu(x).sum((2, 3))
        return self.last(features).squeeze(1) + (self.embed(labels) * features).sum(1)


def sagan(
    size: int = 128, channels: int = 3, latent: int = 128, width: int = 64, num_classes: int = 1000,
    layers: str = "torch", attention: bool = True,
) -> GAN:  # fmt: skip
    """SAGAN for images of 128 pixels, or of 32; ``width`` is the paper's ch. Without ``attention`` it is what the paper
    holds it against.

    >>> import torch
    >>> gan = sagan(32, width=4, latent=8, num_classes=5)
    >>> labels = torch.tensor([0, 4])
    >>> gan.discriminator(gan.generator(torch.randn(2, 8), labels), labels).shape
    torch.Size([2])
    """
    generated, generator_attention, judged, judged_attention = of_size("sagan", ARCHITECTURES, size)
    check_positive(channels=channels, latent=latent, width=width, num_classes=num_classes)
    table = layer_tables.get(layers)
    if not attention:
        table = replace(table, self_attention=lambda _: nn.Identity())
    norm = partial(table.conditional_batch_norm_act, num_classes=num_classes)
    generator = Generator(
        [width * m for m in generated],
        lambda _, before, after: GeneratorBlock(before, after, norm, table),
        generator_attention,
        channels,
        latent,
        num_classes,
        table,
    )
    discriminator = Discriminator(
        [width * m for m in judged], judged_attention, HALVINGS[size], channels, num_classes, table
    )
    for network in (generator, discriminator):
        normalise_spectrally(network, table)
    return GAN(generator, discriminator, latent, num_classes)
