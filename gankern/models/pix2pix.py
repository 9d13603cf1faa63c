"""The networks of pix2pix (Isola 2016, arXiv 1611.07004): a U-Net, and a discriminator of patches.

Down, 4x4 convolutions of stride 2 halve the map until it is one number a channel at 256 pixels; up, transposed ones
double it again, and each level is given the down path's map of its size besides. The U-Net of 256 pixels has
54,414,019 parameters, PatchGAN 70 for pairs of colour images 2,768,705.

What the down path hands over is its map before the LeakyReLU. The up path puts a ReLU before each of its convolutions,
and relu(y) = relu(leaky_relu(y)): so norms are computed with the activation behind them, once, and a skip is the ReLU
of what the next level down is given. (In the widely used code an in-place LeakyReLU changes what is handed over, with
the same result for the same reason.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from gankern.core.arguments import whole
from gankern.core.names import look_up
from gankern.models import layers as layer_tables
from gankern.models.dcgan import initialise
from gankern.models.layers import Layers
from gankern.nn.coupling import apart

WIDTHS = (64, 128, 256, 512, 512, 512, 512, 512)  # of 256 pixels
DROPOUT = 3  # levels from the innermost on that have it

Norm = Callable[..., nn.Module]


def norms(name: str, layers: Layers) -> Norm:
    """Constructors (channels, slope of the leaky ReLU behind) of "batch" or "instance" norm."""
    return look_up({"batch": layers.batch_norm_act, "instance": layers.instance_norm_act}, name, "norm")


@apart
class UNet(nn.Module):
    """Images [N, in_channels, H, W] → [N, out_channels, H, W] in [-1, 1].

    Args:
        in_channels, out_channels: of the images.
        widths: channels of the down path's maps, each half as large as the one before. H and W must be divisible by
            2 to the power of how many there are.
        dropout: how many of the up path's levels, from the innermost on, have a dropout of one half. It is the only
            noise there is, and stays on when images are made.
        norm: "batch" (at a batch of one: each image's own statistics) or "instance".
        layers: "torch" or "gankern".

    Raises:
        ValueError: naming the argument; in the forward, for an image that cannot be halved so often.

    >>> UNet(1, 3, (8, 16, 16))(torch.randn(2, 1, 16, 24)).shape
    torch.Size([2, 3, 16, 24])
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        dropout: int = DROPOUT,
        norm: str = "batch",
        layers: str | Layers = "gankern",
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            whole(f"UNet: {name}", value, least=1)
        if len(widths) < 2:
            raise ValueError(f"UNet: widths must be of two levels or more, got {tuple(widths)}")
        for width in widths:
            whole("UNet: widths", width, least=1)
        whole("UNet: dropout", dropout, least=0)
        table = layer_tables.get(layers) if isinstance(layers, str) else layers
        normed = norms(norm, table)
        biased = norm == "instance"  # batch norm has a bias of its own
        outer, *_, innermost = widths
        self.down = nn.ModuleList([nn.Sequential(table.conv(in_channels, outer, 4, 2, 1), table.leaky_relu(0.2))])
        for before, after in pairwise(widths[:-1]):
            self.down.append(nn.Sequential(table.conv(before, after, 4, 2, 1, bias=biased), normed(after, 0.2)))
        # The innermost map may be one number a channel, of which no norm leaves anything.
        self.inner = nn.Sequential(table.conv(widths[-2], innermost, 4, 2, 1, bias=biased), table.relu(inplace=True))
        self.up = nn.ModuleList()
        before = innermost
        for level in range(len(widths) - 2, -1, -1):
            level_up = [table.conv_transpose(before, widths[level], 4, 2, 1, bias=biased), normed(widths[level], 0.0)]
            if len(self.up) < dropout and level > 0:
                level_up.append(nn.Dropout(0.5))
            self.up.append(nn.Sequential(*level_up))
            before = 2 * widths[level]
        self.skip = table.relu()
        self.last = nn.Sequential(table.conv_transpose(before, out_channels, 4, 2, 1), nn.Tanh())
        self.halvings = len(widths)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        times = 2**self.halvings
        if x.ndim != 4 or x.shape[2] % times or x.shape[3] % times or 0 in x.shape[2:]:
            raise ValueError(
                f"UNet: x has shape {tuple(x.shape)}; it is halved {self.halvings} times, so height and width must be "
                f"multiples of {times}"
            )
        maps = []
        for level in self.down:
            x = level(x)
            maps.append(x)
        x = self.inner(x)
        for level in self.up:
            x = torch.cat([level(x), self.skip(maps.pop())], 1)
        return self.last(x)


def patchgan(
    in_channels: int,
    width: int = 64,
    strided: int = 3,
    norm: str = "batch",
    layers: str | Layers = "gankern",
) -> nn.Sequential:
    """A discriminator that says of each patch of [N, in_channels, H, W] whether it is real: a map of logits.

    ``strided`` 4x4 convolutions of stride 2, then two of stride 1; norm and LeakyReLU 0.2 behind all but the first and
    the last. A logit sees 16, 34, 70, 142, 286 or 574 pixels for 1, 2, 3, ... strided ones; for 0 it is the "pixel"
    discriminator, three 1x1 convolutions.

    >>> patchgan(6, 8)(torch.randn(1, 6, 256, 256)).shape
    torch.Size([1, 1, 30, 30])
    """
    table = layer_tables.get(layers) if isinstance(layers, str) else layers
    for name, value, least in (("in_channels", in_channels, 1), ("width", width, 1), ("strided", strided, 0)):
        whole(f"patchgan: {name}", value, least=least)
    normed, biased = norms(norm, table), norm == "instance"
    if strided == 0:
        network = nn.Sequential(
            table.conv(in_channels, width, 1),
            table.leaky_relu(0.2, inplace=True),
            table.conv(width, 2 * width, 1, bias=biased),
            normed(2 * width, 0.2),
            table.conv(2 * width, 1, 1),
        )
        return network.apply(initialise)
    widths = [width * min(2**level, 8) for level in range(strided + 1)]
    modules = [table.conv(in_channels, width, 4, 2, 1), table.leaky_relu(0.2, inplace=True)]
    for level, (before, after) in enumerate(pairwise(widths), 1):
        modules += [table.conv(before, after, 4, 2 if level < strided else 1, 1, bias=biased), normed(after, 0.2)]
    return nn.Sequential(*modules, table.conv(widths[-1], 1, 4, 1, 1)).apply(initialise)
