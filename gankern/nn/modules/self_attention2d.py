"""Self-attention over the positions of a feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gankern.functional as GF
from gankern.functional import _checks


class SelfAttention2d(nn.Module):
    """SAGAN's and BigGAN's attention: see :func:`gankern.functional.self_attention2d`.

    ``theta``, ``phi`` [channels // 8], ``g`` [channels // 2] (each at least 1) and ``out`` are 1x1 convolutions without
    a bias, so that spectral norm finds them; ``gamma`` is one number, 0 at the start: 1.25 channels^2 + 1 parameters,
    of channels that 8 divides.

    >>> layer = SelfAttention2d(64)
    >>> sum(p.numel() for p in layer.parameters()), layer(torch.randn(2, 64, 8, 8)).shape
    (5121, torch.Size([2, 64, 8, 8]))
    """

    def __init__(
        self, channels: int, device: Any = None, dtype: torch.dtype | None = None, *, implementation: str | None = None
    ) -> None:
        super().__init__()
        _checks.whole("SelfAttention2d", "channels", channels)
        self.implementation = _checks.implementation("SelfAttention2d", implementation)
        keys, values = max(1, channels // 8), max(1, channels // 2)

        def layer(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 1, bias=False, device=device, dtype=dtype)

        self.theta, self.phi = layer(channels, keys), layer(channels, keys)
        self.g, self.out = layer(channels, values), layer(values, channels)
        self.gamma = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g, out = (layer.weight for layer in (self.theta, self.phi, self.g, self.out))
        return GF.self_attention2d(x, theta, phi, g, out, self.gamma, implementation=self.implementation)
