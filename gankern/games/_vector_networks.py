"""The networks of the conditional GAN for MNIST (Mirza & Osindero 2014, arXiv 1411.1784)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from gankern.models.layers import Layers
from gankern.models.mlp import Maxout
from gankern.nn.coupling import apart


@apart
class PaperGenerator(nn.Module):
    """z -> 200 and y -> 1000, ReLU; both joined, dropout, -> images. ``deeper`` has one more layer of 1200, as the text
    may be read too."""

    def __init__(self, shape: tuple[int, int, int], latent: int, condition: int, deeper: bool, layers: Layers):
        super().__init__()
        self.of_z, self.of_y = layers.linear(latent, 200), layers.linear(condition, 1000)
        self.joined = nn.Sequential(layers.relu(), nn.Dropout(0.5))
        if deeper:
            self.joined.extend([layers.linear(1200, 1200), layers.relu(), nn.Dropout(0.5)])
        # The paper's sigmoid, for images in [-1, 1].
        self.joined.extend([layers.linear(1200, prod(shape)), nn.Tanh(), nn.Unflatten(1, shape)])

    def forward(self, latents: Tensor, y: Tensor) -> Tensor:
        return self.joined(torch.cat([self.of_z(latents), self.of_y(y)], 1))


@apart
class PaperDiscriminator(nn.Module):
    """x -> maxout 240 of 5 and y -> maxout 50 of 5; both joined, dropout, -> maxout 240 of 4 -> a logit."""

    def __init__(self, pixels: int, condition: int, layers: Layers):
        super().__init__()
        self.of_x, self.of_y = Maxout(pixels, 240, layers), Maxout(condition, 50, layers)
        self.joined = nn.Sequential(nn.Dropout(0.5), Maxout(290, 240, layers, pieces=4), layers.linear(240, 1))

    def forward(self, images: Tensor, y: Tensor) -> Tensor:
        return self.joined(torch.cat([self.of_x(images.flatten(1)), self.of_y(y)], 1)).flatten()
