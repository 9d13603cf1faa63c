"""A generator against a discriminator (Goodfellow 2014, arXiv 1406.2661): the game of all models in gankern.models.

Each step the discriminator moves ``n_critic`` times, then the generator once. What the discriminator minimises is
computed as people write it on torch's layers, and by ``penalties.critic_step`` on gankern's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from gankern import data as data_sets
from gankern import games, losses, models
from gankern.games import _growth
from gankern.games._critic import DISCRIMINATOR_LOSSES, DRAGAN_NOISE, Objective
from gankern.games._game import Loss, Player, Run
from gankern.games._samples import DrawsSamples
from gankern.games._stabilisers import Stabilisers, augmented, set_reference_batches


class Adversarial(DrawsSamples):
    """One model of :mod:`gankern.models`, in training."""

    data: ClassVar[str] = "mnist5k"
    accumulates: ClassVar[bool] = True
    takes: ClassVar[frozenset[str]] = games.ADVERSARIAL_OPTIONS
    averaged: ClassVar[str | None] = "generator"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        gan = self.build()
        self.generator, self.discriminator = gan.generator, gan.discriminator
        self.networks = {"generator": self.generator, "discriminator": self.discriminator}
        self.players = {"d": Player(("discriminator",), "discriminator"), "g": Player(("generator",), "generator")}
        self.loss = losses.get(config.loss, config.real_target)
        weights = config.gradient_penalty, config.drift, config.zero_centered, config.dragan, config.r1, config.r2
        self.objective = Objective(self.loss, *weights)
        self.discriminator_loss = DISCRIMINATOR_LOSSES[run.side]
        self.step = 0
        self.seen: list[Tensor] = []  # the real samples of the last move of the discriminator, and their labels
        self.stabilisers = Stabilisers(run, {"d": self.discriminator, "g": self.generator})

    def build(self) -> models.GAN:
        return models.build(self.config.model, layers=self.run.side, **self.config.architecture())

    def start(self) -> None:
        """Sets the batches that virtual batch norm's statistics are of, if there is such a layer."""
        set_reference_batches(self.run, self.generator, self.discriminator)

    def begin(self, step: int) -> bool:
        """The resolution of the coming step; a new one begins with optimisers that remember nothing (Karras 2018)."""
        self.step = self.stabilisers.step = step
        if not self.config.grow_steps:
            return False
        resolution, alpha = _growth.stage(step, self.config.grow_steps, self.config.side)
        grows = resolution != self.discriminator.resolution
        growing: list[Any] = [self.generator, self.discriminator, getattr(self.shown, "module", None)]
        for network in filter(None, growing):
            network.resize(resolution, alpha)
        return grows

    def work(self) -> Hashable | None:
        """Which moves have penalties, whether samples are noisy, and how far the networks have grown."""
        config = self.config
        if config.noisy_labels or config.historical_average:
            return None  # coins, and a number that changes with each step
        moves = range(self.step * config.n_critic, (self.step + 1) * config.n_critic)
        growth = tuple(getattr(self.discriminator, name, None) for name in ("resolution", "alpha"))
        return tuple(i % config.penalty_every == 0 for i in moves), self.stabilisers.noise_std() > 0, growth

    def moves(self) -> Iterator[tuple[str, Loss]]:
        for i in range(self.config.n_critic):
            yield "d", self._discriminator_loss(self.step * self.config.n_critic + i)
            if self.config.clip is not None:
                losses.clip_weights_(self.discriminator.parameters(), self.config.clip)
        yield "g", self._generator_loss()

    def _discriminator_loss(self, step: int) -> Callable[[slice], Tensor]:
        config, run = self.config, self.run
        objective = self.objective.in_turn(step, config.penalty_every)
        real, *labels = run.batch()
        if config.grow_steps:
            growing: Any = self.discriminator
            real = models.fade(data_sets.resize(real, growing.resolution), growing.alpha)
        latents = run.normal(config.latent)
        self.seen = [real, *labels]
        weights = objective.penalties()
        draws = {f"{name}_alpha": run.uniform() for name in weights if name not in ("r1", "r2")}
        if "dragan" in weights:
            draws["noise"] = DRAGAN_NOISE * real.std() * run.uniform(*real.shape[1:])
        if config.noisy_labels and torch.rand(()) < config.noisy_labels:
            objective = objective.swapped()
        noises = self.stabilisers.noises(real)
        augments = [self.stabilisers.augmentation() for _ in range(2)]
        historical = self.stabilisers.historical("d")

        def loss(part: slice) -> Tensor:
            labels_ = tuple(x[part] for x in labels)
            with torch.no_grad():
                fake = self.generator(latents[part], *labels_).to(real.dtype)
            pair = [augmented(x, drawn, part) for x, drawn in zip((real[part], fake), augments)]
            if noises:
                pair = [x + noise[part] for x, noise in zip(pair, noises)]
            drawn = {name: x[part] for name, x in draws.items()}
            return self.discriminator_loss(self.discriminator, *pair, drawn, labels_, objective) + historical()

        return loss

    def _generator_loss(self) -> Callable[[slice], Tensor]:
        run = self.run
        latents = run.normal(self.config.latent)
        labels = [] if run.condition is None else [run.conditions()]
        real, *of_real = self.seen or [latents]  # which only what is seen with real samples looks at
        noises = self.stabilisers.noises(real)
        augments = [self.stabilisers.augmentation() for _ in range(2 if self.config.feature_matching else 1)]
        historical = self.stabilisers.historical("g")

        def loss(part: slice) -> Tensor:
            labels_ = tuple(x[part] for x in labels)
            fake = augmented(self.generator(latents[part], *labels_), augments[0], part)
            if noises:
                fake = fake + noises[0][part]
            if not self.config.feature_matching:
                return self.loss.generator(self.discriminator(fake, *labels_)) + historical()
            with self.stabilisers.features() as features:
                with torch.no_grad():
                    seen = augmented(real[part], augments[1], part)
                    seen = seen + noises[1][part] if noises else seen
                    self.discriminator(seen, *(x[part] for x in of_real))
                logits = self.discriminator(fake, *labels_)
            matched = self.config.feature_matching * losses.feature_matching(*features)
            return self.loss.generator(logits) + matched + historical()

        return loss

    def extra_state(self) -> dict[str, Any]:
        return {f"{player}_average": average.state_dict() for player, average in self.stabilisers.averages.items()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        for player, average in self.stabilisers.averages.items():
            average.load_state_dict(state[f"{player}_average"])
