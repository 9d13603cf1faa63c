"""Minibatch standard deviation as a layer."""

from __future__ import annotations

from torch import Tensor, nn

import gankern.functional as GF
from gankern.functional import _checks
from gankern.functional.minibatch_stddev import check_options


class MinibatchStdDev(nn.Module):
    """Appends ``num_channels`` channels that say how much the samples of a group vary: the discriminator's layer of
    ProGAN and of what came after it, before the last convolution.

    Source: Karras et al. 2018, arXiv 1710.10196, section 3. Arguments, shapes, errors and gradient order (2) are those
    of :func:`gankern.functional.minibatch_stddev`. No parameters and no state.

    Shape: x is [N, C, ...], the result [N, C + num_channels, ...] of x's dtype and memory format.

    >>> import torch
    >>> layer = MinibatchStdDev(group_size=4)
    >>> layer(torch.randn(8, 512, 4, 4)).shape
    torch.Size([8, 513, 4, 4])
    """

    def __init__(
        self, group_size: int = 4, num_channels: int = 1, *, layout: str = "strided", unbiased: bool = False,
        on_indivisible: str = "raise", eps: float = 1e-8, implementation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_options("MinibatchStdDev", group_size, num_channels, layout, on_indivisible, eps)
        self.group_size, self.num_channels, self.layout = group_size, num_channels, layout
        self.unbiased, self.on_indivisible, self.eps = unbiased, on_indivisible, eps
        self.implementation = _checks.implementation("MinibatchStdDev", implementation)

    def forward(self, x: Tensor) -> Tensor:
        return GF.minibatch_stddev(
            x, group_size=self.group_size, num_channels=self.num_channels, layout=self.layout, unbiased=self.unbiased,
            on_indivisible=self.on_indivisible, eps=self.eps, implementation=self.implementation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = [f"group_size={self.group_size}, num_channels={self.num_channels}"]
        if self.layout != "strided":
            parts.append(f"layout={self.layout!r}")
        if self.unbiased:
            parts.append("unbiased=True")
        if self.on_indivisible != "raise":
            parts.append(f"on_indivisible={self.on_indivisible!r}")
        if self.eps != 1e-8:
            parts.append(f"eps={self.eps}")
        return ", ".join(parts)
