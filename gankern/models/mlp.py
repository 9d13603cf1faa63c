"""The first GAN (Goodfellow 2014, arXiv 1406.2661): fully connected, with a maxout discriminator under dropout."""

from math import prod
from typing import Any

from torch import Tensor, nn

from gankern.models import layers as layer_tables
from gankern.models._record import model
from gankern.models._sizes import check_positive
from gankern.models.conditional import Conditioning, Head
from gankern.models.gan import GAN
from gankern.models.layers import Layers
from gankern.nn.coupling import apart

PIECES = 5


@apart
class Maxout(nn.Module):
    """The largest of ``pieces`` linear functions, for each feature (Goodfellow 2013, arXiv 1302.4389)."""

    def __init__(self, in_features: int, out_features: int, layers: Layers, pieces: int = PIECES):
        super().__init__()
        self.linear = layers.linear(in_features, out_features * pieces)
        self.out_features, self.pieces = out_features, pieces
        _initialise(self.linear, 0.005)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(-1, self.out_features, self.pieces).amax(2)


@apart
class MLPGenerator(nn.Module):
    """[N, latent] → two hidden layers with ReLU → [N, *shape] in [−1, 1]."""

    def __init__(self, shape: tuple[int, int, int], latent: int, hidden: int, layers: Layers):
        super().__init__()
        self.main = nn.Sequential(
            layers.linear(latent, hidden),
            layers.relu(inplace=True),
            layers.linear(hidden, hidden),
            layers.relu(inplace=True),
            layers.linear(hidden, prod(shape)),
        )
        self.shape = shape
        for layer in list(self.main)[::2]:
            _initialise(layer, 0.05)

    def forward(self, latents: Tensor) -> Tensor:
        # The paper's sigmoid, for images in [−1, 1] instead of [0, 1].
        return self.main(latents).sigmoid().mul(2.0).sub(1.0).view(-1, *self.shape)


@apart
class MLPDiscriminator(nn.Module):
    """[N, C, H, W] → two maxout layers, each after dropout → logits [N]."""

    def __init__(self, inputs: int, hidden: int, layers: Layers, **head: Any):
        super().__init__()
        self.main = nn.Sequential(
            nn.Dropout(0.2),
            Maxout(inputs, hidden, layers),
            nn.Dropout(0.5),
            Maxout(hidden, hidden, layers),
            nn.Dropout(0.5),
        )
        self.head = Head(hidden, layers, **head)
        _initialise(self.head.linear, 0.005)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.main(images.flatten(1)), labels)


def _initialise(layer: nn.Module, bound: float) -> None:
    nn.init.uniform_(layer.get_parameter("weight"), -bound, bound)
    nn.init.zeros_(layer.get_parameter("bias"))


@model(loss="non_saturating", latent=100, width=600)
def gan(
    size: int = 32, channels: int = 1, latent: int = 100, width: int = 1200, layers: str = "torch", *,
    num_classes: int = 0, conditioning: str = "concatenation", minibatch_discrimination: int = 0,
) -> GAN:  # fmt: skip
    """The first GAN, for images of any size.

    ``width`` is the generator's hidden width, and five times the discriminator's. The paper's MNIST network: ReLU
    1200-1200 against maxout 240-240 of five pieces. ``num_classes``, ``conditioning`` and
    ``minibatch_discrimination``: see :mod:`gankern.models`.

    >>> import torch
    >>> model = gan(size=28)
    >>> model.discriminator(model.generator(torch.randn(4, 100))).shape
    torch.Size([4])
    """
    check_positive(size=size, channels=channels, latent=latent, width=width)
    table = layer_tables.get(layers)
    labels = Conditioning(num_classes, conditioning, conditional_norms=False)
    generator = MLPGenerator((channels, size, size), latent + labels.latent_classes, width, table)
    discriminator = MLPDiscriminator(
        (channels + labels.image_classes) * size * size,
        max(1, width // PIECES),
        table,
        num_classes=labels.head_classes,
        minibatch_discrimination=minibatch_discrimination,
    )
    return labels.wrap(GAN(generator, discriminator, latent))
