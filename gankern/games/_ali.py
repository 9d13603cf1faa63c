"""The networks of ALI for CIFAR-10 (Dumoulin 2016, arXiv 1606.00704): the game is BiGAN's, in bigan.py."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from gankern.models.layers import Layers
from gankern.nn.coupling import apart


@apart
class Maxout(nn.Module):
    """A layer of twice the features, and of each two the larger."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).unflatten(1, (-1, 2)).amax(2)


@apart
class Untied(nn.Module):
    """A bias for each channel and pixel, then tanh."""

    def __init__(self, *shape: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bias).tanh()


# (kernel, stride) of ALI's layers for 32x32, and how many times its narrowest width their features are.
ALI = ((5, 1, 1), (4, 2, 2), (4, 1, 4), (4, 2, 8), (4, 1, 16))


def ali_networks(
    channels: int, latent: int, width: int, layers: Layers
) -> tuple[nn.Module, nn.Module, tuple[nn.Module, nn.Module, nn.Module]]:
    """The generator, the encoder, which gives a mean and the logarithm of a standard deviation, and what the
    discriminator does with an image, with a latent, and with both; the paper's at ``width`` 512."""
    narrow = width // 16
    generator: list[nn.Module] = [nn.Unflatten(1, (latent, 1, 1))]
    encoder: list[nn.Module] = []
    image: list[nn.Module] = []
    maps = channels
    for i, (kernel, stride, times) in enumerate(ALI):
        outputs = times * narrow
        encoder += [layers.conv(maps, outputs, kernel, stride, bias=False), layers.batch_norm_act(outputs, 0.1)]
        image += [nn.Dropout(0.5 if i else 0.2), Maxout(layers.conv(maps, 2 * outputs, kernel, stride))]
        maps = outputs
    encoder += [layers.conv(width, width, 1, bias=False), layers.batch_norm_act(width, 0.1)]
    maps = latent
    for (kernel, stride, _), times in zip(ALI[::-1], (8, 4, 2, 1, 1)):
        outputs = times * narrow
        generator += [layers.conv_transpose(maps, outputs, kernel, stride, bias=False)]
        generator += [layers.batch_norm_act(outputs, 0.1)]
        maps = outputs
    generator += [layers.conv(maps, maps, 1, bias=False), layers.batch_norm_act(maps, 0.1)]
    generator += [layers.conv(maps, channels, 1, bias=False), Untied(channels, 32, 32)]

    def maxouts(*sizes: int) -> list[nn.Module]:
        return [m for i, o in pairwise(sizes) for m in (nn.Dropout(0.5), Maxout(layers.linear(i, 2 * o)))]

    return (
        nn.Sequential(*generator),
        nn.Sequential(*encoder, layers.conv(width, 2 * latent, 1), nn.Flatten()),
        (
            nn.Sequential(*image, nn.Flatten()),
            nn.Sequential(*maxouts(latent, width, width)[1:]),
            nn.Sequential(*maxouts(*[2 * width] * 3), nn.Dropout(0.5), layers.linear(2 * width, 1)),
        ),
    )
