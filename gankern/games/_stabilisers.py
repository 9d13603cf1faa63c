"""What is put on top of a generator against a discriminator so that they keep their balance: noise, augmentation,
historical averaging, feature matching and virtual batch norm's reference batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import gankern.nn as gnn
from gankern import losses
from gankern.data.augment import augment, draw, parse
from gankern.games._game import Run
from gankern.models.conditional import Head

REFERENCE = 64  # samples of virtual batch norm's reference batch


class Stabilisers:
    """Those that a run's configuration asks for, each of them nothing where it does not."""

    def __init__(self, run: Run, networks: Mapping[str, nn.Module]) -> None:
        """``networks``: the network of each player."""
        self.run, self.config, self.discriminator = run, run.config, networks["d"]
        self.step = 0  # the coming one, or the one under way
        self.averages: dict[str, losses.HistoricalAverage] = {}
        if self.config.historical_average:
            for player, network in networks.items():
                self.averages[player] = losses.HistoricalAverage(network.to(run.device).parameters())
        if self.config.feature_matching and not any(isinstance(m, Head) for m in self.discriminator.modules()):
            raise ValueError(
                f"feature_matching: which features of {self.config.model}'s discriminator to match is not known"
            )

    def noise_std(self) -> float:
        """The standard deviation of the step's instance noise."""
        steps = self.config.instance_noise_steps
        return self.config.instance_noise * (max(0.0, 1.0 - self.step / steps) if steps else 1.0)

    def noises(self, like: Tensor) -> list[Tensor]:
        """Instance noise of the step, for two sets of samples; none where there is none."""
        size = self.config.batch_size, *like.shape[1:]

        def noise() -> Tensor:  # in a graph, of later steps too
            return self.noise_std() * self.run.own(torch.randn(size))

        return [self.run.draw(noise) for _ in range(2)] if self.noise_std() else []

    def augmentation(self) -> dict[str, Tensor]:
        """The random numbers of the augmentation of a batch; none where there is none."""
        names = () if self.config.augment is None else parse(self.config.augment)
        return draw(names, self.run.uniform)

    def historical(self, player: str) -> Callable[[], Tensor | float]:
        """The weighted distance of a player's parameters to the average of all that they were before his moves."""
        if player not in self.averages:
            return lambda: 0.0
        self.averages[player].update()
        return lambda: self.config.historical_average * self.averages[player].penalty()

    @contextmanager
    def features(self) -> Iterator[list[Tensor]]:
        """What the discriminator's last layer is given in each call within: the features that are matched."""
        features: list[Tensor] = []
        (head,) = (m for m in self.discriminator.modules() if isinstance(m, Head))
        hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            yield features
        finally:
            hook.remove()


def augmented(images: Tensor, drawn: Mapping[str, Tensor], part: slice) -> Tensor:
    """The images of a part of the batch, with that part of the random numbers."""
    return augment(images, {name: numbers[part] for name, numbers in drawn.items()})


def set_reference_batches(run: Run, generator: nn.Module, discriminator: nn.Module) -> None:
    """Draws the batches that the statistics of virtual batch norm are of, for the networks that have such layers."""
    config, labels = run.config, run.condition
    for network, norm in ((generator, config.generator_norm), (discriminator, config.discriminator_norm)):
        if norm != "virtual":
            continue
        chosen = torch.randint(len(run.images), (REFERENCE,))
        drawn = torch.randn(REFERENCE, config.latent) if network is generator else run.images[chosen]
        classes = () if labels is None else (labels[chosen].to(run.device),)
        gnn.set_reference_batch(network, drawn.to(run.device), *classes)
