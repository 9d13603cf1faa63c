"""The residual networks of WGAN-GP (Gulrajani 2017, arXiv 1704.00028) and SN-GAN (Miyato 2018, arXiv 1802.05957).

The two papers' networks are one: pre-activation blocks of two 3×3 convolutions, resampled inside (nearest upsampling in
the generator, 2×2 means in the discriminator), with a 1×1 shortcut where the shape changes. SN-GAN normalises the
discriminator's weights by their spectral norm and sums the last feature map over space where WGAN-GP takes the mean.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gankern.models.conditional import GeneratorNorms, Head, apply_norm_act
from gankern.models.layers import Layers
from gankern.nn.coupling import apart


@apart
class GeneratorBlock(nn.Module):
    """Batch norm → ReLU → nearest ×2 → 3×3 → batch norm → ReLU → 3×3, plus nearest ×2 → 1×1 of the input."""

    def __init__(self, before: int, after: int, norm_act: Callable[[int], nn.Module], layers: Layers):
        super().__init__()
        self.norm_act1 = norm_act(before)
        self.conv1 = layers.upsample_conv(before, after)
        self.norm_act2 = norm_act(after)
        self.conv2 = layers.conv(after, after, 3, padding=1)
        self.shortcut = layers.conv(before, after, 1)
        initialise(self.conv1, self.conv2)
        initialise(self.shortcut, gain=1.0)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        y = self.conv1(apply_norm_act(self.norm_act1, x, labels))
        y = self.conv2(apply_norm_act(self.norm_act2, y, labels))
        # A 1×1 convolution and nearest upsampling may change places: on a quarter of the pixels it costs a quarter.
        return y + F.interpolate(self.shortcut(x), scale_factor=2, mode="nearest")


@apart
class DiscriminatorBlock(nn.Module):
    """ReLU → 3×3 → ReLU → 3×3 [→ 2×2 means], plus the input [→ 2×2 means → 1×1].

    The ``first`` block of a network has no ReLU before its first convolution: it sees the image.
    """

    def __init__(
        self, before: int, after: int, layers: Layers, downsample: bool, first: bool = False, wide: bool = False
    ):
        super().__init__()
        # WGAN-GP's inner channels: those of the input where a block downsamples, except in the first block. A ``wide``
        # block, as SN-GAN's of ImageNet and SAGAN's are, has those of its result.
        inner = after if first or wide else before
        self.mean = layers.mean_of_four() if downsample else nn.Identity()
        self.relu1 = nn.Identity() if first else layers.relu()
        self.conv1 = layers.conv(before, inner, 3, padding=1)
        self.relu2 = layers.relu(inplace=True)
        self.conv2 = layers.conv_downsample(inner, after) if downsample else layers.conv(inner, after, 3, padding=1)
        initialise(self.conv1, self.conv2)
        self.shortcut: nn.Module = nn.Identity()
        if downsample or before != after:
            self.shortcut = layers.conv(before, after, 1)
            initialise(self.shortcut, gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu2(self.conv1(self.relu1(x))))
        # Means and a 1×1 convolution may change places too.
        return y + self.shortcut(self.mean(x))


@apart
class ResNetGenerator(nn.Module):
    """[N, latent] → 4×4×maps[0] → a block for each further entry of ``maps`` → [N, channels, size, size] in [−1, 1]."""

    def __init__(self, channels: int, latent: int, maps: list[int], norms: GeneratorNorms, layers: Layers):
        super().__init__()
        self.first_map = (maps[0], 4, 4)
        self.linear = layers.linear(latent, maps[0] * 16)
        self.blocks = nn.ModuleList(
            GeneratorBlock(before, after, norms.inner, layers) for before, after in itertools.pairwise(maps)
        )
        self.norm_act = norms.last(maps[-1])
        self.conv = layers.conv(maps[-1], channels, 3, padding=1)
        initialise(self.linear, self.conv, gain=1.0)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.linear(latents).view(-1, *self.first_map)
        for block in self.blocks:
            x = block(x, labels)
        return self.conv(self.norm_act(x)).tanh()


@apart
class ResNetDiscriminator(nn.Module):
    """[N, channels, size, size] → a block for each pair of ``maps`` → ReLU → mean or sum over space → logits [N].

    The first ``halvings`` blocks downsample.
    """

    def __init__(self, channels: int, maps: list[int], halvings: int, pooling: str, layers: Layers, **head: Any):
        super().__init__()
        befores = [channels, *maps]
        self.blocks = nn.Sequential(
            *(
                DiscriminatorBlock(befores[i], maps[i], layers, downsample=i < halvings, first=i == 0)
                for i in range(len(maps))
            )
        )
        self.relu = layers.relu(inplace=True)
        self.pooling = pooling
        self.head = Head(maps[-1], layers, **head)
        initialise(self.head.linear, gain=1.0)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.relu(self.blocks(images))
        return self.head(x.mean((2, 3)) if self.pooling == "mean" else x.sum((2, 3)), labels)


def initialise(*layers: nn.Module, gain: float = math.sqrt(2)) -> None:
    """Weights uniform in ±gain·√(6/(fan_in + fan_out)), biases 0: both papers, with gain 1 outside the blocks."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.get_parameter("weight"), gain)
        nn.init.zeros_(layer.get_parameter("bias"))
