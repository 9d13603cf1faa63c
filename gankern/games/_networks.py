"""What several games are built of: small networks, and how a classifier reads their pictures."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from gankern import metrics
from gankern.data import ImageSource
from gankern.metrics.extractors import Classifier
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


def regressor(
    images: Tensor | ImageSource, targets: Tensor | ImageSource, columns: list[int], steps: int
) -> metrics.Extractor:
    """A small network that reads some columns of numbers [N, M] off images, trained now on (at most 5,000 of) the real
    ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chosen = torch.randperm(len(images))[:5000]
        images, targets = images[chosen].cpu(), targets[chosen][:, columns].cpu()
        network = Classifier(images.shape[-1], images.shape[1], targets.shape[1])
        optimiser = torch.optim.Adam(network.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
        for _ in range(steps):
            batch = torch.randint(len(images), (100,))
            loss = (network(images[batch])[1] - targets[batch]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    network.eval().requires_grad_(False)
    return metrics.Extractor(lambda x: network(x)[1])


def explained(found: Tensor, asked: Tensor) -> float:
    """The share of the variance of what was asked for [N] that was found (R squared).

    >>> explained(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
    1.0
    """
    return 1.0 - ((found - asked).square().mean() / asked.var(correction=0)).item()
