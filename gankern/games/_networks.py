"""What several games are built of: small networks."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.models.layers import Layers
from gankern.nn.coupling import apart


def fully_connected(sizes: Sequence[int], layers: Layers, slope: float, norm: bool) -> list[nn.Module]:
    """Linear layers from each size to the next, each followed by (batch norm and) a leaky ReLU; ReLU at slope 0."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules.append(layers.linear(inputs, outputs))
        modules.append(layers.batch_norm_act_1d(outputs, slope) if norm else layers.leaky_relu(slope, inplace=True))
    return modules


def small_generator(latent: int, channels: int, size: int, hidden: int, layers: Layers) -> nn.Sequential:
    """Latents -> hidden -> hidden (batch norm, ReLU) -> images [N, channels, size, size] in [-1, 1], for small ones."""
    return nn.Sequential(
        *fully_connected((latent, hidden, hidden), layers, 0.0, norm=True),
        layers.linear(hidden, channels * size * size),
        nn.Tanh(),
        nn.Unflatten(1, (channels, size, size)),
    )


Draw = Callable[[Callable[[], Tensor]], Tensor]  # Run.draw


def _now(draw: Callable[[], Tensor]) -> Tensor:
    return draw()


@apart
class Noise(nn.Module):
    """Adds N(0, std^2) while training. Drawn on the CPU, so that a seed means the same run on every device, and by
    ``draw``, so that a step can be replayed."""

    def __init__(self, std: float, draw: Draw):
        super().__init__()
        self.std, self.draw = std, draw

    def __getstate__(self) -> dict[str, Any]:
        """A copy draws for itself: a run, with all its data, is no part of a network."""
        return self.__dict__ | {"draw": _now}

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape, dtype, device = x.shape, x.dtype, x.device
        return x + self.std * self.draw(lambda: torch.randn(shape, dtype=dtype).to(device))


@apart
class WithClass(nn.Module):
    """Beside its maps [N, C, s, s] the network sees a plane that is a function of the class, if there are any."""

    def __init__(self, network: nn.Module, size: int, classes: int, layers: Layers):
        super().__init__()
        self.network, self.classes = network, classes
        if classes:
            self.plane = nn.Sequential(
                layers.linear(classes, size * size), layers.relu(), nn.Unflatten(1, (1, size, size))
            )

    def forward(self, maps: Tensor, *labels: Tensor) -> Tensor:
        planes = [self.plane(F.one_hot(y, self.classes).to(maps.dtype)) for y in labels]
        return self.network(torch.cat([maps, *planes], 1))
