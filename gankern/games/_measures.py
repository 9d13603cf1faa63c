"""How well games do what they are told: what classifiers and regressors of real images read off theirs."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import data, metrics
from gankern.data import ImageSource, Shapes
from gankern.games._game import Figures, evenly
from gankern.metrics.extractors import Classifier

READS, LONG = 0.95, 1000  # of held-out real images, and the steps of a reader that does not read so many after 250
PLACES = {"x": 9, "y": 10, "radius": 11}  # in the attributes of shapes
GRAIN = 0.2  # the largest standard deviation of the noise on what a regressor is trained on


@cache
def reader(name: str, size: int) -> metrics.Extractor:
    """A classifier of a data set that reads real images: where a short training does not get as far, a long one. Digits
    take 250 steps; of the kinds of ``shapes``, which are turned by any angle, 67 % are read after those, and 99 % after
    1,000. Kept for the life of the process."""
    network, accuracy = metrics.train_classifier(name, size, seed=1)
    return network if accuracy >= READS else metrics.train_classifier(name, size, LONG, seed=1)[0]


def read_classes(images: Tensor, name: str, size: int) -> Tensor:
    """What a classifier that was trained on the real images of a data set takes the images [N, C, H, W] for, [N]."""
    # A relative path is another folder from another place.
    network = reader(name if name in data.DATASETS else str(Path(name).resolve()), size)
    logits = network(images.clamp(-1.0, 1.0)).logits
    assert logits is not None
    return logits.argmax(1)


def regressor(
    images: Tensor | ImageSource, targets: Tensor | ImageSource, columns: list[int], steps: int
) -> metrics.Extractor:
    """A small network that reads some columns of numbers [N, M] off images, trained now on (at most 5,000 of) the real
    ones, with noise of some strength up to ``GRAIN``: a generator's images have a grain that real ones have not, and
    a reader who never saw any takes it for something that is larger or lies elsewhere."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the CPU alone
        chosen = torch.randperm(len(images))[:5000]
        images, targets = images[chosen].cpu(), targets[chosen][:, columns].cpu()
        network = Classifier(images.shape[-1], images.shape[1], targets.shape[1])
        optimiser = torch.optim.Adam(network.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
        for _ in range(steps):
            batch = torch.randint(len(images), (100,))
            real = images[batch]
            grainy = real + GRAIN * torch.rand(len(real), 1, 1, 1) * torch.randn_like(real)
            loss = (network(grainy)[1] - targets[batch]).square().mean()
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


def attribute_figures(config: Any, samples: Shapes, condition: Any) -> Callable[[Any], Figures]:
    """A function game -> figures, by ``game.sample(vectors)`` and ``game.judge(images, vectors)``."""
    places = list(PLACES.values())
    read = regressor(samples, condition, places, config.evaluate_samples // 2)
    other = data.Shapes(config.side, 1000, samples.seed + 1, fixed=samples.fixed)
    asked, real, y = other.conditions["attributes"][:], samples[:1000], condition[:1000]

    def figures(game: Any) -> Figures:
        found = read(game.sample(asked)).features
        told = {f"r2_{n}": explained(found[:, i], asked[:, p]) for i, (n, p) in enumerate(PLACES.items())}
        device = game.run.device
        with game.evaluating():
            right, wrong = (game.judge(real.to(device), z.to(device)) for z in (y, y.roll(1, 0)))
        return told | {"permuted": (F.softplus(-wrong).mean() - F.softplus(-right).mean()).item()}

    return figures


def band_figures(config: Any, samples: Any) -> Callable[[Any], Figures]:
    """A function game -> figures, by ``game.sample(number, seed)``, images of all sizes from the smallest on."""
    real = samples[evenly(config.evaluate_samples, len(samples))]

    def figures(game: Any) -> Figures:
        levels = game.sample(len(real), 1)
        single = F.interpolate(levels[0], size=(config.side, config.side), mode="bilinear", align_corners=False)
        found: Figures = {}
        for ending, images in (("", levels[-1]), ("_single", single)):
            distances = metrics.laplacian_swd(real, images.clamp(-1, 1).to(real.dtype), 32, 128)
            found |= {f"swd_{size}{ending}": distance for size, distance in distances.items()}
        return found

    return figures
