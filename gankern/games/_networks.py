"""What several games are built of: small networks, and how a classifier reads their pictures."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from gankern import metrics
from gankern.models.layers import Layers


def fully_connected(sizes: Sequence[int], layers: Layers, slope: float, norm: bool) -> list[nn.Module]:
    """Linear layers from each size to the next, each followed by (batch norm and) a leaky ReLU; ReLU at slope 0."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules.append(layers.linear(inputs, outputs))
        modules.append(layers.batch_norm_act_1d(outputs, slope) if norm else layers.leaky_relu(slope, inplace=True))
    return modules


def small_generator(latent: int, channels: int, size: int, layers: Layers) -> nn.Sequential:
    """Latents -> 128 -> 128 (batch norm, ReLU) -> images [N, channels, size, size] in [-1, 1], for small images."""
    return nn.Sequential(
        *fully_connected((latent, 128, 128), layers, 0.0, norm=True),
        layers.linear(128, channels * size * size),
        nn.Tanh(),
        nn.Unflatten(1, (channels, size, size)),
    )


def read_classes(images: Tensor, data: str, size: int, seed: int = 1) -> Tensor:
    """What a classifier that was trained on the real images of ``data`` takes the images [N, C, H, W] for, [N]."""
    logits = metrics.trained(data, size, seed)(images.clamp(-1.0, 1.0)).logits
    assert logits is not None
    return logits.argmax(1)
