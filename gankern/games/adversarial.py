"""A generator against a discriminator (Goodfellow 2014, arXiv 1406.2661): the game of all models in gankern.models.

Each step the discriminator moves ``n_critic`` times, then the generator once. What the discriminator minimises is
computed as people write it on torch's layers, and by ``penalties.critic_step`` on gankern's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

import gankern.nn as gnn
from gankern import data as data_sets
from gankern import losses, models
from gankern.data import Points
from gankern.games import _evaluation, _growth
from gankern.games._critic import DISCRIMINATOR_LOSSES, Objective
from gankern.games._game import Figures, Game, Loss, Picture, Player, Run, Samples

REFERENCE = 64  # samples of virtual batch norm's reference batch
DRAWN = {"images": 64, "points": 2000}  # in a picture


class Adversarial(Game):
    """One model of :mod:`gankern.models`, in training."""

    data: ClassVar[str] = "mnist5k"
    accumulates: ClassVar[bool] = True
    averaged: ClassVar[str | None] = "generator"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        gan = models.build(config.model, layers=run.side, **config.architecture())
        self.generator, self.discriminator = gan.generator, gan.discriminator
        self.networks = {"generator": self.generator, "discriminator": self.discriminator}
        self.players = {"d": Player(("discriminator",), "discriminator"), "g": Player(("generator",), "generator")}
        self.loss = losses.get(config.loss, config.real_target)
        self.objective = Objective(self.loss, config.gradient_penalty, config.drift)
        self.discriminator_loss = DISCRIMINATOR_LOSSES[run.side]

    def start(self) -> None:
        """Sets the batches that virtual batch norm's statistics are of, if there is such a layer."""
        config, labels = self.config, self.run.condition
        for network, norm in ((self.generator, config.generator_norm), (self.discriminator, config.discriminator_norm)):
            # At 8×8, DCGAN's discriminator has no layer that is normalised.
            if norm != "virtual" or not any(isinstance(m, gnn.VirtualBatchNorm2d) for m in network.modules()):
                continue
            images = self.run.images
            chosen = torch.randint(len(images), (REFERENCE,))
            drawn = torch.randn(REFERENCE, config.latent) if network is self.generator else images[chosen]
            classes = () if labels is None else (labels[chosen].to(self.run.device),)
            gnn.set_reference_batch(network, drawn.to(self.run.device), *classes)

    def begin(self, step: int) -> bool:
        """The resolution of the coming step; a new one begins with optimisers that remember nothing (Karras 2018)."""
        if not self.config.grow_steps:
            return False
        resolution, alpha = _growth.stage(step, self.config.grow_steps, self.config.side)
        grows = resolution != self.discriminator.resolution
        growing: list[Any] = [self.generator, self.discriminator, getattr(self.shown, "module", None)]
        for network in filter(None, growing):
            network.resize(resolution, alpha)
        return grows

    def moves(self) -> Iterator[tuple[str, Loss]]:
        for _ in range(self.config.n_critic):
            yield "d", self._discriminator_loss()
            if self.config.clip is not None:
                losses.clip_weights_(self.discriminator.parameters(), self.config.clip)
        yield "g", self._generator_loss()

    def _discriminator_loss(self) -> Callable[[slice], Tensor]:
        config, run = self.config, self.run
        real, *labels = run.batch()
        if config.grow_steps:
            growing: Any = self.discriminator
            real = models.fade(data_sets.resize(real, growing.resolution), growing.alpha)
        latents = run.normal(config.latent)
        alpha = run.uniform() if config.gradient_penalty else None

        def loss(part: slice) -> Tensor:
            labels_, alpha_ = tuple(x[part] for x in labels), None if alpha is None else alpha[part]
            with torch.no_grad():
                fake = self.generator(latents[part], *labels_).to(real.dtype)
            return self.discriminator_loss(self.discriminator, real[part], fake, alpha_, labels_, self.objective)

        return loss

    def _generator_loss(self) -> Callable[[slice], Tensor]:
        run = self.run
        latents = run.normal(self.config.latent)
        labels = [] if run.condition is None else [run.conditions()]

        def loss(part: slice) -> Tensor:
            labels_ = tuple(x[part] for x in labels)
            return self.loss.generator(self.discriminator(self.generator(latents[part], *labels_), *labels_))

        return loss

    def sample(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples for ``latents`` [N, latent], on the CPU, from the averaged generator if there is one."""
        arguments = [x.to(self.run.device) for x in (latents, labels) if x is not None]
        with self.evaluating():
            return torch.cat([self.average()(*parts) for parts in zip(*(x.split(256) for x in arguments))]).cpu()

    def pictures(self) -> dict[str, Picture]:
        config, points = self.config, self.config.size is None
        number = DRAWN["points" if points else "images"]
        latents = torch.randn(number, config.latent, generator=torch.Generator().manual_seed(config.seed))
        labels, columns = None, 8
        if config.conditioning:
            labels = torch.arange(number) % config.num_classes
            columns = config.num_classes if config.num_classes <= 16 else columns  # a column for each class
        return {"samples": Picture(self.sample(latents, labels), columns, getattr(self.run.samples, "modes", None))}

    @classmethod
    def evaluator(cls, config: Any, samples: Samples, condition: Any = None) -> Callable[[Any], Figures]:
        if isinstance(samples, Points):
            return _evaluation.OnPoints(config, samples, condition)
        return _evaluation.OnImages(config, samples, condition)
