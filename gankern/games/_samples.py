"""How the samples of a generator against a discriminator are drawn, shown and measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gankern.data import ImageFolder, Points
from gankern.games import _evaluation
from gankern.games._game import Figures, Game, Picture, Samples
from gankern.models.conditional import CONDITIONINGS

NAMED = 16  # classes that have a row each
DRAWN = {"images": 64, "points": 2000}  # in a picture


class DrawsSamples(Game):
    """A game whose generator makes samples of latents, and of labels or vectors where it is told those."""

    def sample(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples for ``latents`` [N, latent], on the CPU, from the averaged generator if there is one."""
        arguments = [x.to(self.run.device) for x in (latents, labels) if x is not None]
        with self.evaluating():
            return torch.cat([self.average()(*parts) for parts in zip(*(x.split(256) for x in arguments))]).cpu()

    def draw_classes(self, label: int | None, seed: int) -> Picture:
        """A class a column, a latent a row; or many of one class."""
        config = self.config
        if not config.conditioning or CONDITIONINGS[config.conditioning] != "labels":
            raise ValueError(f"{config.model} has classes to draw a grid of only where it was trained with labels")
        latents = torch.randn(8 if label is None else 64, config.latent, generator=torch.Generator().manual_seed(seed))
        if label is not None:
            return Picture(self.sample(latents, torch.full((64,), label)))
        classes = torch.arange(config.num_classes)
        images = self.sample(latents.repeat_interleave(len(classes), 0), classes.repeat(8))
        return Picture(images, len(classes))

    def pictures(self) -> dict[str, Picture]:
        config, points = self.config, self.config.size is None
        number = DRAWN["points" if points else "images"]
        latents = torch.randn(number, config.latent, generator=torch.Generator().manual_seed(config.seed))
        labels, rows = None, tuple[str, ...]()
        if config.conditioning and CONDITIONINGS[config.conditioning] != "labels":
            if self.run.condition is None:
                return {}  # the vectors that samples are drawn for are the data's
            labels = self.run.condition[torch.arange(number) % len(self.run.condition)]
        elif config.conditioning and config.num_classes <= NAMED:  # a row for each class, of the same eight latents
            labels = torch.arange(config.num_classes).repeat_interleave(8)
            latents = latents[:8].repeat(config.num_classes, 1)
            rows = self._class_names()
        elif config.conditioning:
            labels = torch.arange(number) % config.num_classes
        modes = getattr(self.run.samples, "modes", None)
        return {"samples": Picture(self.sample(latents, labels), modes=modes, rows=rows)}

    def _class_names(self) -> tuple[str, ...]:
        """Of a folder's class folders their names, of other data the numbers."""
        samples = self.run.samples
        names = samples.classes if isinstance(samples, ImageFolder) else range(self.config.num_classes)
        return tuple(map(str, names))

    @classmethod
    def evaluator(cls, config: Any, samples: Samples, condition: Any = None) -> Callable[[Any], Figures]:
        if isinstance(samples, Points):
            return _evaluation.OnPoints(config, samples, condition)
        return _evaluation.OnImages(config, samples, condition)
