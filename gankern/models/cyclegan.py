"""The networks of CycleGAN (Zhu 2017, arXiv 1703.10593): a translator of residual blocks; its discriminators are
:func:`gankern.models.pix2pix.patchgan` with instance norm.

Every norm is an instance norm without weights, so convolutions keep their biases. With 9 blocks, for 256 pixels, the
translator has 11,378,179 parameters; with 6, for 128 pixels, 7,837,699; PatchGAN 70 of one colour image 2,764,737.
"""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from gankern.models import layers as layer_tables
from gankern.models._sizes import check_translator
from gankern.models.dcgan import initialise
from gankern.models.layers import Layers
from gankern.nn.coupling import apart


@apart
class ResidualBlock(nn.Module):
    """x + [3x3 IN ReLU, 3x3 IN](x), edges mirrored."""

    def __init__(self, channels: int, table: Layers) -> None:
        super().__init__()
        self.main = nn.Sequential(
            table.conv(channels, channels, 3, 1, 1, padding_mode="reflect"),
            table.instance_norm_act(channels),
            table.conv(channels, channels, 3, 1, 1, padding_mode="reflect"),
            table.instance_norm_act(channels, None),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


def translator(
    channels: int = 3, width: int = 64, blocks: int = 9, upsample: str = "transposed", layers: str | Layers = "gankern"
) -> nn.Sequential:
    """Images [N, channels, H, W] → images of the other domain, in [-1, 1]; H and W divisible by 4.

    7x7, two 3x3 of stride 2, ``blocks`` residual blocks of 4 * width channels, and back, by transposed 3x3 convolutions
    as published, whose overlap is uneven, or by ``upsample="nearest"``: doubled pixels and a 3x3 convolution.

    >>> import torch
    >>> translator(3, 8, 1)(torch.randn(1, 3, 16, 24)).shape
    torch.Size([1, 3, 16, 24])
    """
    table = layer_tables.get(layers) if isinstance(layers, str) else layers
    check_translator("translator", channels, width, blocks)
    if upsample not in ("transposed", "nearest"):
        raise ValueError(f"translator: upsample is {upsample!r}; accepted are 'transposed', 'nearest'")

    def doubled(before: int, after: int) -> nn.Module:
        if upsample == "nearest":
            return table.upsample_conv(before, after, 3)
        with warnings.catch_warnings():  # of the uneven overlap: it is what was asked for, and said above
            warnings.simplefilter("ignore", UserWarning)
            return table.conv_transpose(before, after, 3, 2, 1, output_padding=1)

    norm = table.instance_norm_act
    network = nn.Sequential(
        DivisibleBy(4),
        table.conv(channels, width, 7, 1, 3, padding_mode="reflect"),
        norm(width),
        table.conv(width, 2 * width, 3, 2, 1),
        norm(2 * width),
        table.conv(2 * width, 4 * width, 3, 2, 1),
        norm(4 * width),
        *(ResidualBlock(4 * width, table) for _ in range(blocks)),
        doubled(4 * width, 2 * width),
        norm(2 * width),
        doubled(2 * width, width),
        norm(width),
        table.conv(width, channels, 7, 1, 3, padding_mode="reflect"),
        nn.Tanh(),
    )
    return network.apply(initialise)


@apart
class DivisibleBy(nn.Module):
    """Raises for an image [N, C, H, W] that cannot be halved and doubled again to its own size."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[2] % self.times or x.shape[3] % self.times or min(x.shape[2:]) < 2 * self.times:
            raise ValueError(
                f"translator: x has shape {tuple(x.shape)}; height and width must be multiples of {self.times}, from "
                f"{2 * self.times} on"
            )
        return x
