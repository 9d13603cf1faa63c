"""BigGAN-deep (Brock 2018, arXiv 1809.11096): bottleneck blocks, one embedding for all norms, attention at 64x64.

| resolution, ch 128 | generator | discriminator |
|---|---|---|
| 128 | 50,244,484 | 34,590,210 |
| 256 | 55,736,708 | 38,247,426 |
| 512 | 56,019,780 | 38,301,122 |

(Published checkpoints have a last layer of ch outputs, of which three are used: 144,125 parameters more.)

Every weight of both networks has a spectral norm of one. Weights are drawn orthogonally. The condition c is the latent
and the class's embedding side by side, [z, embed(y)], given whole to every norm: batch norm by 1 + W c and W' c.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.core.arguments import labels as check_labels
from gankern.core.arguments import whole
from gankern.models import _attention
from gankern.models import layers as layer_tables
from gankern.models._sizes import check_positive, of_size
from gankern.models.gan import GAN
from gankern.models.layers import Layers, normalise_spectrally
from gankern.nn.coupling import apart


@dataclass(frozen=True)
class Architecture:
    """Widths in multiples of ch: of the maps before, between and after the blocks, and behind how many there is
    attention. In the generator every second block doubles the map, in the discriminator every first of two halves it.
    """

    generator: tuple[int, ...]
    discriminator: tuple[int, ...]
    generator_attention: int
    discriminator_attention: int


ARCHITECTURES = {
    32: Architecture((4,) * 7, (4,) * 7, 4, 2),  # a small one, not of the paper: attention at 16x16
    128: Architecture((16, 16, 16, 16, 8, 8, 4, 4, 2, 2, 1), (1, 2, 2, 4, 4, 8, 8, 16, 16, 16, 16), 8, 2),
    256: Architecture((16, 16, 16, 16, 8, 8, 8, 8, 4, 4, 2, 2, 1), (1, 2, 2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16), 8, 4),
    512: Architecture(
        (16, 16, 16, 16, 8, 8, 8, 8, 4, 4, 2, 2, 1, 1, 1), (1, 1, 1, 2, 2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16), 8, 6
    ),
}
SHRINK = 4  # of a bottleneck


@apart
class GeneratorBlock(nn.Module):
    """cBN ReLU 1x1, cBN ReLU [x 2] 3x3, cBN ReLU 3x3, cBN ReLU 1x1; beside it the first channels of x [x 2]."""

    def __init__(self, before: int, after: int, condition: int, doubles: bool, table: Layers) -> None:
        super().__init__()
        inner = before // SHRINK
        self.after, self.doubles = after, doubles
        self.norms = nn.ModuleList(table.linear_batch_norm_relu(n, condition) for n in (before, inner, inner, inner))
        second = table.upsample_conv(inner, inner, 3) if doubles else table.conv(inner, inner, 3, padding=1)
        self.convolutions = nn.ModuleList(
            [table.conv(before, inner, 1), second, table.conv(inner, inner, 3, padding=1), table.conv(inner, after, 1)]
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions):
            y = convolution(norm(y, c))
        skip = x[:, : self.after]
        return y + (F.interpolate(skip, scale_factor=2, mode="nearest") if self.doubles else skip)


@apart
class DiscriminatorBlock(nn.Module):
    """ReLU 1x1, ReLU 3x3, ReLU 3x3, ReLU [mean of 2x2] 1x1; beside it x [mean] and, of it, the channels that it has
    too few of."""

    def __init__(self, before: int, after: int, halves: bool, table: Layers) -> None:
        super().__init__()
        inner = after // SHRINK
        self.mean = table.mean_of_four() if halves else None
        self.main = nn.Sequential(
            table.relu(),
            table.conv(before, inner, 1),
            table.relu(inplace=True),
            table.conv(inner, inner, 3, padding=1),
            table.relu(inplace=True),
            table.conv(inner, inner, 3, padding=1),
            table.relu(inplace=True),
        )
        self.last = table.conv(inner, after, 1)
        self.more = table.conv(before, after - before, 1) if after > before else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if self.mean is not None:
            y, x = self.mean(y), self.mean(x)
        skip = x if self.more is None else torch.cat([x, self.more(x)], 1)
        return self.last(y) + skip


@apart
class Generator(_attention.Generator):
    """Each block's condition is the latent and the class's embedding."""

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        labels = check_labels("labels", labels, len(latents), self.num_classes)
        c = torch.cat([latents, self.embed(labels)], 1)
        return self.images(c, [c] * len(self.blocks))


@apart
class Discriminator(nn.Module):
    """(images [N, channels, size, size], classes [N]) → logits [N], by projection."""

    def __init__(self, widths: Sequence[int], attention: int, channels: int, num_classes: int, table: Layers) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.first = table.conv(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for i, (before, after) in enumerate(pairwise(widths)):
            self.blocks.append(DiscriminatorBlock(before, after, i % 2 == 0, table))
        self.attention_at = attention
        self.attention = table.self_attention(widths[attention])
        self.relu = table.relu()
        self.last = table.linear(widths[-1], 1)
        self.embed = nn.Embedding(num_classes, widths[-1])

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        labels = check_labels("labels", labels, len(images), self.num_classes)
        x = self.first(images)
        for i, block in enumerate(self.blocks):
            if i == self.attention_at:
                x = self.attention(x)
            x = block(x)
        features = self.relu(x).sum((2, 3))
        return self.last(features).squeeze(1) + (self.embed(labels) * features).sum(1)


def biggan_deep(
    size: int = 128, channels: int = 3, latent: int = 128, width: int = 128, num_classes: int = 1000,
    embedding: int = 128, layers: str = "torch",
) -> GAN:  # fmt: skip
    """BigGAN-deep for images of 128, 256 or 512 pixels (or 32, a small one of its kind).

    ``width`` is the paper's ch, a multiple of 4. Sample by :func:`truncated` latents.

    >>> gan = biggan_deep(32, width=4, latent=8, embedding=8, num_classes=5)
    >>> labels = torch.tensor([0, 4])
    >>> gan.discriminator(gan.generator(torch.randn(2, 8), labels), labels).shape
    torch.Size([2])
    """
    shape = of_size("biggan_deep", ARCHITECTURES, size)
    check_positive(channels=channels, latent=latent, num_classes=num_classes, embedding=embedding)
    if whole("width", width, least=4) % SHRINK:
        raise ValueError(f"width must be a multiple of {SHRINK}, by which blocks are narrowed; got {width}")
    table = layer_tables.get(layers)
    maps = [[width * m for m in widths] for widths in (shape.generator, shape.discriminator)]
    condition = latent + embedding
    generator = Generator(
        maps[0],
        lambda i, before, after: GeneratorBlock(before, after, condition, i % 2 == 1, table),
        shape.generator_attention,
        channels,
        condition,
        num_classes,
        table,
        embedding,
    )
    discriminator = Discriminator(maps[1], shape.discriminator_attention, channels, num_classes, table)
    for network in (generator, discriminator):
        network.apply(initialise)
        normalise_spectrally(network, table)
    return GAN(generator, discriminator, latent, num_classes)


def initialise(module: nn.Module) -> None:
    """Orthogonal weights, the discriminator's embedding among them; biases 0."""
    if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
        if module.weight.device.type != "meta":
            nn.init.orthogonal_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # a tensor, where there is one


@torch.no_grad()
def standing_statistics(generator: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> nn.Module:
    """The generator in evaluation mode, its batch norms' statistics the means of those of these batches of its inputs,
    in place of the ones that training left behind ("standing statistics", Brock 2018, arXiv 1809.11096, section 3).

    >>> gan = biggan_deep(32, width=4, latent=8, embedding=8, num_classes=5)
    >>> batches = [(truncated((16, 8), 0.5), torch.arange(16) % 5) for _ in range(2)]
    >>> standing_statistics(gan.generator, batches).training
    False
    """
    norms = [m for m in generator.modules() if getattr(m, "running_mean", None) is not None]
    momenta = [norm.momentum for norm in norms]
    generator.eval()
    try:
        for norm in norms:
            norm.training = True  # it alone: the spectral norms of its linear maps stay as they are
        for i, inputs in enumerate(batches):
            for norm in norms:
                norm.momentum = 1 / (i + 1)  # type: ignore[assignment]  # the mean of all batches so far
            generator(*inputs)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        generator.eval()
    return generator


def truncated(size: Sequence[int], limit: float | None, generator: torch.Generator | None = None) -> Tensor:
    """Latents from N(0, 1) of which every component beyond ``limit`` is drawn again, not scaled; None: none is.

    >>> truncated((1000, 8), 0.5).abs().max() <= 0.5
    tensor(True)
    """
    if limit is not None and not limit > 0:
        raise ValueError(f"truncated: limit must be above 0, or None, got {limit}")
    z = torch.randn(*size, generator=generator)
    while limit is not None and (beyond := z.abs() > limit).any():
        z[beyond] = torch.randn(int(beyond.sum()), generator=generator)
    return z
