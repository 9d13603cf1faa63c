"""The networks of VAE-GAN (Larsen 2016, arXiv 1512.09300): the game is in vaegan.py."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from gankern.models.layers import Layers

EPS = 1e-6  # of batch norm, as in the authors' code


def networks(
    channels: int, size: int, latent: int, width: int, hidden: int, kernel: int, layers: Layers
) -> dict[str, nn.Module]:
    """The paper's at ``width`` 256, ``hidden`` 1024 and ``kernel`` 5: three halvings, and no bias before batch norm."""
    start, thin, middle = size // 8, max(16, width // 8), width if size >= 64 else width * 3 // 4
    down: dict[str, Any] = {"stride": 2, "padding": (kernel - 1) // 2, "bias": False}
    up = down | {"output_padding": kernel % 2}

    def halvings(maps: tuple[int, ...], slope: float = 0.0) -> list[nn.Module]:
        pairs = pairwise(maps)
        return [
            m for i, o in pairs for m in (layers.conv(i, o, kernel, **down), layers.batch_norm_act(o, slope, eps=EPS))
        ]

    def dense(inputs: int, outputs: int) -> list[nn.Module]:
        return [layers.linear(inputs, outputs, bias=False), layers.batch_norm_act_1d(outputs, eps=EPS)]

    decoder = [*dense(latent, width * start**2), nn.Unflatten(1, (width, start, start))]
    for inputs, outputs in pairwise((width, middle, width // 2, thin)):
        decoder += [layers.conv_transpose(inputs, outputs, kernel, **up), layers.batch_norm_act(outputs, eps=EPS)]
    *features, last_norm = halvings((thin, width // 2, middle, width))
    return {
        "encoder": nn.Sequential(
            *halvings((channels, width // 4, width // 2, width)),
            nn.Flatten(),
            *dense(width * start**2, hidden),
            layers.linear(hidden, 2 * latent),
        ),
        "decoder": nn.Sequential(*decoder, layers.conv(thin, channels, 5, padding=2), nn.Tanh()),
        # Up to the third halving, before its batch norm.
        "features": nn.Sequential(layers.conv(channels, thin, 5, padding=2), layers.relu(inplace=True), *features),
        "head": nn.Sequential(
            last_norm, nn.Flatten(), *dense(width * start**2, hidden // 2), layers.linear(hidden // 2, 1)
        ),
    }
