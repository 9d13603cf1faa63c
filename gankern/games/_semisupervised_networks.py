"""The networks of the classifier of K + 1 classes (Salimans 2016, arXiv 1606.03498): fully connected as for MNIST, and
convolutional as for CIFAR-10. The game is in semisupervised.py."""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gankern.games._networks import Draw, Noise
from gankern.models.layers import Layers
from gankern.nn.coupling import apart


@apart
class NormedLinear(nn.Module):
    """A linear layer whose rows of weights have length 1, or a trained length (Salimans & Kingma 2016, 1602.07868)."""

    def __init__(self, in_features: int, out_features: int, trained_scale: bool):
        super().__init__()
        self.direction = nn.Parameter(0.1 * torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = nn.Parameter(torch.ones(out_features)) if trained_scale else None

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.direction)
        return F.linear(x, weight if self.scale is None else weight * self.scale[:, None], self.bias)


@apart
class Classifier(nn.Module):
    """[N, C, H, W] -> features [N, F] and logits [N, K]; noise before each layer."""

    def __init__(self, sizes: tuple[int, ...], layers: Layers, draw: Draw):
        super().__init__()
        hidden: list[nn.Module] = [nn.Flatten(), Noise(0.3, draw)]
        for inputs, outputs in pairwise(sizes[:-1]):
            hidden += [NormedLinear(inputs, outputs, False), layers.relu(inplace=True), Noise(0.5, draw)]
        self.hidden, self.noise = nn.Sequential(*hidden[:-1]), hidden[-1]
        self.last = NormedLinear(sizes[-2], sizes[-1], True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.hidden(images)
        return features, self.last(self.noise(features))


def make_generator(sizes: tuple[int, ...], shape: tuple[int, ...], layers: Layers) -> nn.Sequential:
    """U(0, 1) -> linear, batch norm without gain, softplus, ... -> images in [-1, 1]."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        modules.append(layers.linear(inputs, outputs, bias=False))
        modules += [nn.BatchNorm1d(outputs, affine=False), layers.bias_act(outputs, "softplus")]
    return nn.Sequential(*modules, NormedLinear(sizes[-2], sizes[-1], True), nn.Tanh(), nn.Unflatten(1, shape))


@apart
class Normed(nn.Module):
    """Weight norm (Salimans & Kingma 2016, 1602.07868) of a convolution, as a parametrisation: what makes one output
    has a fixed length, or a trained one."""

    def __init__(self, outputs: int, dim: int, length: float | None):
        super().__init__()
        self.dims = [d for d in range(4) if d != dim]
        self.scale: Tensor | float
        if length is None:
            self.scale = nn.Parameter(torch.ones([outputs if d == dim else 1 for d in range(4)]))
        else:
            self.scale = length

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.scale / weight.square().sum(self.dims, keepdim=True).sqrt())


SLOPE = 0.2
# With it a layer's outputs are as large as its inputs; the paper finds lengths by the first 500 images.
LENGTH = (2 / (1 + SLOPE**2)) ** 0.5


@apart
class ConvolutionalClassifier(nn.Module):
    """[N, C, H, W] -> features [N, F], means over the map, and logits [N, K]. For CIFAR-10, at ``width`` 128, the
    paper's: three convolutions of 96 and three of 192, the last of each of stride 2, a valid one and two of 1x1."""

    def __init__(self, channels: int, width: int, classes: int, layers: Layers):
        super().__init__()
        few, many = 3 * width // 4, 3 * width // 2
        self.hidden, inputs = nn.Sequential(nn.Dropout(0.2)), channels
        for i, outputs in enumerate([few] * 3 + [many] * 6):
            kernel, stride, padding = 3 if i < 7 else 1, 2 if i in (2, 5) else 1, 1 if i < 6 else 0
            convolution = layers.conv(inputs, outputs, kernel, stride, padding)
            parametrize.register_parametrization(convolution, "weight", Normed(outputs, 0, LENGTH))
            self.hidden.extend([convolution, layers.leaky_relu(SLOPE, inplace=True)])
            if stride == 2:
                self.hidden.append(nn.Dropout(0.5))
            inputs = outputs
        self.last = NormedLinear(many, classes, True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.hidden(images).mean((2, 3))
        return features, self.last(features)


def doubling(inputs: int, outputs: int, bias: bool, layers: Layers) -> nn.Module:
    """The paper's transposed 5x5 convolution of stride 2."""
    with warnings.catch_warnings():  # of the uneven overlap: docs/models/semisupervised.md has it
        warnings.simplefilter("ignore", UserWarning)
        return layers.conv_transpose(inputs, outputs, 5, 2, 2, output_padding=1, bias=bias)


def convolutional_generator(channels: int, size: int, latent: int, width: int, layers: Layers) -> nn.Sequential:
    """U(0, 1) -> 4 width maps of an eighth of ``size`` -> 2 width -> width (batch norm without gain, ReLU) -> images;
    the paper's for CIFAR-10 at ``width`` 128."""
    start = size // 8
    first = 4 * width * start**2
    modules: list[nn.Module] = [
        layers.linear(latent, first, bias=False), nn.BatchNorm1d(first, affine=False), layers.bias_act(first, "relu"),
        nn.Unflatten(1, (4 * width, start, start)),
    ]  # fmt: skip
    for inputs, outputs in ((4 * width, 2 * width), (2 * width, width)):
        modules.append(doubling(inputs, outputs, False, layers))
        modules += [nn.BatchNorm2d(outputs, affine=False), layers.bias_act(outputs, "relu")]
    last = doubling(width, channels, True, layers)
    parametrize.register_parametrization(last, "weight", Normed(channels, 1, None))
    return nn.Sequential(*modules, last, nn.Tanh())
