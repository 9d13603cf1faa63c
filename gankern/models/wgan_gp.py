"""WGAN-GP (Gulrajani 2017, arXiv 1704.00028): the residual network for images, and the MLP for points in the plane.

The critic has no batch normalisation: the penalty is on the gradient of each sample by itself.
"""

import itertools

from torch import Tensor, nn

from gankern.models import layers as layer_tables
from gankern.models._record import model
from gankern.models._sizes import check_positive, check_size
from gankern.models.conditional import Conditioning, generator_norms
from gankern.models.gan import GAN
from gankern.models.layers import Layers
from gankern.models.resnet import ResNetDiscriminator, ResNetGenerator
from gankern.nn.coupling import apart


@model(loss="wasserstein", latent=128, width=32, lr=1e-4, beta1=0.0, beta2=0.9, n_critic=5, gradient_penalty=10.0)
def wgan_gp(
    size: int = 32, channels: int = 3, latent: int = 128, width: int = 128, layers: str = "torch", *,
    num_classes: int = 0, conditioning: str = "projection", minibatch_discrimination: int = 0,
    generator_norm: str = "batch",
) -> GAN:  # fmt: skip
    """The residual WGAN-GP for images of ``size`` × ``size``: 8, 16, 32, ...; every feature map has ``width`` channels.

    The generator doubles 4×4 up to the size; the critic halves the size down to 8×8, then has two blocks that do not.
    1,204,483 + 1,053,825 parameters at the defaults. ``num_classes``, ``conditioning``,
    ``minibatch_discrimination`` and ``generator_norm``: see :mod:`gankern.models`.

    >>> sum(p.numel() for p in wgan_gp().discriminator.parameters())
    1053825
    """
    doublings = check_size(size, 8)
    check_positive(channels=channels, latent=latent, width=width)
    table = layer_tables.get(layers)
    labels = Conditioning(num_classes, conditioning, conditional_norms=generator_norm == "batch")
    halvings = max(1, doublings - 1)
    generator = ResNetGenerator(
        channels,
        latent + labels.latent_classes,
        [width] * (doublings + 1),
        generator_norms(generator_norm, labels, table),
        table,
    )
    critic = ResNetDiscriminator(
        channels + labels.image_classes,
        [width] * (halvings + 2),
        halvings,
        "mean",
        table,
        num_classes=labels.head_classes,
        minibatch_discrimination=minibatch_discrimination,
    )
    return labels.wrap(GAN(generator, critic, latent))


@apart
class MLP(nn.Module):
    """[N, inputs] → three hidden layers of ``width`` with ReLU → [N, outputs], or [N] where there is one output."""

    def __init__(self, inputs: int, outputs: int, width: int, layers: Layers):
        super().__init__()
        widths = [inputs, width, width, width]
        blocks = []
        for before, after in itertools.pairwise(widths):
            blocks += [layers.linear(before, after), layers.relu(inplace=True)]
        self.main = nn.Sequential(*blocks, layers.linear(width, outputs))
        self.outputs = outputs

    def forward(self, points: Tensor) -> Tensor:
        result = self.main(points)
        return result.squeeze(1) if self.outputs == 1 else result


@model(
    for_points=True, loss="wasserstein", latent=2, width=512, lr=1e-4, beta1=0.5, beta2=0.9, n_critic=5,
    gradient_penalty=0.1, batch_size=256, evaluate=1, evaluate_samples=10_000,
)  # fmt: skip
def wgan_gp_toy(dimensions: int = 2, latent: int = 2, width: int = 512, layers: str = "torch") -> GAN:
    """The paper's network for 8 and 25 Gaussians and the Swiss roll: points [N, dimensions] in place of images.

    527,874 + 527,361 parameters at the defaults.

    >>> sum(p.numel() for p in wgan_gp_toy().generator.parameters())
    527874
    """
    check_positive(dimensions=dimensions, latent=latent, width=width)
    table = layer_tables.get(layers)
    return GAN(MLP(latent, dimensions, width, table), MLP(dimensions, 1, width, table), latent)
