"""The networks of SRGAN (Ledig 2016, arXiv 1609.04802): SRResNet, which enlarges by four, and its discriminator.

The generator has 1,547,350 parameters (one PReLU slope a layer; convolutions before a batch norm have no bias), the
discriminator for crops of 96 pixels 23,563,649. Sub-pixel convolutions start by ICNR, as doubled pixels would
(arXiv 1707.02937), so that no checkerboard has to be unlearnt; the whole generator starts as bilinear interpolation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gankern.nn as gnn
from gankern.core.arguments import whole
from gankern.models import layers as layer_tables
from gankern.models._sizes import check_translator
from gankern.models.layers import Layers
from gankern.nn.coupling import apart

SCALE = 4


@apart
class Residual(nn.Module):
    """x + main(x)."""

    def __init__(self, *main: nn.Module) -> None:
        super().__init__()
        self.main = nn.Sequential(*main)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


def srresnet(channels: int = 3, width: int = 64, blocks: int = 16, layers: str | Layers = "gankern") -> nn.Sequential:
    """Images [N, channels, H, W] in [0, 1] → [N, channels, 4 H, 4 W], about [-1, 1].

    >>> import torch
    >>> srresnet(3, 8, 1)(torch.rand(2, 3, 8, 12)).shape
    torch.Size([2, 3, 32, 48])
    """
    table = layer_tables.get(layers) if isinstance(layers, str) else layers
    check_translator("srresnet", channels, width, blocks)

    def block() -> nn.Module:
        return Residual(
            table.conv(width, width, 3, 1, 1, bias=False),
            table.batch_norm_prelu(width),
            table.conv(width, width, 3, 1, 1, bias=False),
            table.batch_norm_act(width, None),
        )

    enlarge: list[nn.Module] = []
    for _ in range(2):
        enlarge += [table.conv(width, 4 * width, 3, 1, 1), nn.PixelShuffle(2), table.prelu()]
    network = nn.Sequential(
        table.conv(channels, width, 9, 1, 4),
        table.prelu(),
        Residual(
            *(block() for _ in range(blocks)),
            table.conv(width, width, 3, 1, 1, bias=False),
            table.batch_norm_act(width, None),
        ),
        *enlarge,
        table.conv(width, channels, 9, 1, 4),
    )
    _start_as_bilinear(network, channels)
    return network


@torch.no_grad()
def _start_as_bilinear(network: Any, channels: int) -> None:
    """Weights with which an SRResNet interpolates: the image's channels go through the first features, residuals add
    nothing, the sub-pixel convolutions double pixels, and the last layer makes bilinear interpolation of that, from
    -1 to 1. From random weights, colours and places are most of what a short training learns."""
    head, _, trunk, *enlarge, tail = network
    through = min(channels, head.out_channels)  # a narrower network starts with the channels that there is room for
    head.weight[:through], head.bias[:through] = nn.init.dirac_(head.weight[:through].clone()), 0.0
    for residual in trunk.modules():
        if isinstance(residual, Residual):
            nn.init.zeros_(residual.get_parameter(f"main.{len(residual.main) - 1}.weight"))
    for convolution in enlarge[::3]:
        narrow = convolution.weight[::4].clone()
        gnn.init.icnr_(convolution.weight, 2)
        convolution.bias.zero_()
        convolution.weight[: 4 * through] = nn.init.dirac_(narrow)[:through].repeat_interleave(4, 0)
    filtered = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 1.0, 0.0, 0.0]) / 8
    tail.weight.zero_()
    tail.bias.fill_(-1.0)
    for i in range(through):
        tail.weight[i, i] = 2.0 * filtered[:, None] * filtered


def discriminator(
    size: int = 96, channels: int = 3, width: int = 64, features: int = 1024, layers: str | Layers = "gankern"
) -> nn.Sequential:
    """Images [N, channels, size, size] → logits [N, 1]: eight 3x3 convolutions, every other one of stride 2.

    >>> import torch
    >>> discriminator(32, 3, 8, 16)(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 1])
    """
    table = layer_tables.get(layers) if isinstance(layers, str) else layers
    for name, value in (("channels", channels), ("width", width), ("features", features)):
        whole(f"discriminator: {name}", value, least=1)
    if whole("discriminator: size", size, least=16) % 16:
        raise ValueError(f"discriminator: size must be a multiple of 16, which is halved four times; got {size}")
    modules: list[nn.Module] = [table.conv(channels, width, 3, 1, 1), table.leaky_relu(0.2, inplace=True)]
    before = width
    for after, stride in ((1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)):
        modules += [
            table.conv(before, after * width, 3, stride, 1, bias=False),
            table.batch_norm_act(after * width, 0.2),
        ]
        before = after * width
    return nn.Sequential(
        *modules,
        nn.Flatten(),
        table.linear(before * (size // 16) ** 2, features),
        table.leaky_relu(0.2, inplace=True),
        table.linear(features, 1),
    )
