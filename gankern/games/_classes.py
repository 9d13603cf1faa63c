"""What the games of SAGAN and BigGAN share: a generator against a discriminator on labels, of networks of their own."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gankern import losses, metrics
from gankern.games._game import Figures, Player, Run, Samples
from gankern.games._measures import read_classes
from gankern.games.adversarial import Adversarial
from gankern.models.biggan_deep import standing_statistics
from gankern.models.gan import GAN

STANDING_BATCH = 64


class OfClasses(Adversarial):
    """``make`` makes its networks. The discriminator learns ``DISCRIMINATOR_RATE`` times as fast as the generator."""

    family: ClassVar[str] = "codes and conditions"
    data: ClassVar[str] = "shapes"
    needs: ClassVar[str | None] = "labels"
    takes: ClassVar[frozenset[str]] = frozenset(
        {
            *("clip", "gradient_penalty", "drift", "zero_centered", "dragan", "r1", "r2", "penalty_every", "n_critic"),
            *("historical_average", "noisy_labels", "instance_noise", "instance_noise_steps", "augment"),
            *("conditioning", "evaluate_samples", "features"),
        }
    )
    DISCRIMINATOR_RATE: ClassVar[float] = 4.0

    @dataclass(frozen=True)
    class Options:
        orthogonal: float = 0.0  # weight of the orthogonal regularisation of both networks (BigGAN: 1e-4)
        diagonal: bool = False  # the original form, which holds the weights' norms at 1 too
        standing: int = 0  # batches that the statistics of batch norm are taken of before samples are drawn

    def __init__(self, run: Run) -> None:
        config = run.config
        if config.conditioning != "projection":
            raise ValueError(
                f"{config.model} judges by projection: conditioning must be projection, got {config.conditioning}"
            )
        super().__init__(run)
        if not self.options.orthogonal:
            self.refuse("diagonal", where="with orthogonal 0")
        self.players["d"] = Player(("discriminator",), "discriminator", lr=self.DISCRIMINATOR_RATE * config.lr)

    def build(self) -> GAN:
        config = self.config
        return self.make(size=config.side, channels=config.channels, latent=config.latent, width=config.width,
                         num_classes=config.num_classes, layers=self.run.side)  # fmt: skip

    def make(self, **options: Any) -> GAN:
        raise NotImplementedError

    def _regularised(self, loss: Callable[[slice], Tensor], network: nn.Module) -> Callable[[slice], Tensor]:
        weight, diagonal = self.options.orthogonal, self.options.diagonal
        if not weight:
            return loss
        embedded = {id(p) for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        weights = [p for p in network.parameters() if p.ndim > 1 and id(p) not in embedded]
        return lambda part: loss(part) + weight * losses.orthogonal_penalty(weights, diagonal)

    def _discriminator_loss(self, step: int) -> Callable[[slice], Tensor]:
        return self._regularised(super()._discriminator_loss(step), self.discriminator)

    def _generator_loss(self) -> Callable[[slice], Tensor]:
        return self._regularised(super()._generator_loss(), self.generator)

    def average(self) -> nn.Module:
        network = super().average()
        if not self.options.standing:
            return network
        network, config = deepcopy(network), self.config
        random = torch.Generator().manual_seed(config.seed)
        batches = [
            (
                torch.randn(STANDING_BATCH, config.latent, generator=random).to(self.run.device),
                torch.randint(config.num_classes, (STANDING_BATCH,), generator=random).to(self.run.device),
            )
            for _ in range(self.options.standing)
        ]
        return standing_statistics(network, batches)

    @classmethod
    def evaluator(cls, config: Any, samples: Samples, condition: Any = None) -> Callable[[Any], Figures]:
        of_samples = super().evaluator(config, samples, condition)
        return lambda game: of_samples(game) | game.figures()

    def figures(self) -> Figures:
        """``label_accuracy``: how often a classifier of real images sees the class that was asked for."""
        config = self.config
        asked = torch.arange(1000) % config.num_classes
        latents = torch.randn(1000, config.latent, generator=torch.Generator().manual_seed(config.seed))
        seen = read_classes(self.sample(latents, asked), config.data, config.side)
        return {"label_accuracy": metrics.label_accuracy(asked, seen)}
