"""What is drawn and measured of a game whose images follow a code: sweeps of it, and what it knows of labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from gankern import metrics
from gankern.core.names import look_up
from gankern.games._game import Figures, Game, Picture

ROWS = 8  # of a picture


class OfCodes(Game):
    """A game with ``generate(noise, classes, numbers)`` and the networks "trunk" and "q", images -> codes."""

    family: ClassVar[str] = "codes and conditions"
    generate: Callable[[Tensor, Tensor, Tensor], Tensor]

    def sweep(self, code: int | None = None, rows: int = ROWS, seed: int = 0) -> Picture:
        """Pictures of ``rows`` noises: a class a column; or one class a row, and the number ``code`` from -2 to 2."""
        options, columns = self.options, 10 if code is not None else self.options.classes
        random = torch.Generator().manual_seed(seed)
        noise = (2 * torch.rand(rows, self.config.latent, generator=random) - 1).repeat_interleave(columns, 0)
        numbers = torch.zeros(rows * columns, options.numbers)
        classes = torch.arange(columns).repeat(rows)
        if code is not None:
            classes = torch.arange(rows).repeat_interleave(columns) % options.classes
            numbers[:, code] = torch.linspace(-2, 2, columns).repeat(rows)
        with self.evaluating():
            images = self.generate(*(x.to(self.run.device) for x in (noise, classes, numbers))).cpu()
        return Picture(images, columns)

    def draw_sweep(self, code: str, seed: int) -> Picture:
        """c1 is the class, c2 and on the numbers."""
        known = {"c1": None, **{f"c{i + 2}": i for i in range(self.options.numbers)}}
        return self.sweep(look_up(known, code, "code"), seed=seed)

    def pictures(self) -> dict[str, Picture]:
        numbers = {f"number {i + 1}": self.sweep(i) for i in range(self.options.numbers)}
        return {"classes": self.sweep(), **numbers}

    def figures(self) -> Figures:
        """``information``: E log Q(c | x) + H(c) of the categorical code, in nats, at most log(classes);
        ``assignment_accuracy``: how often Q's class of a real image is the one that its label is assigned to, under the
        best assignment of codes to labels."""
        options = self.options
        random = torch.Generator().manual_seed(self.config.seed)
        noise = 2 * torch.rand(1000, self.config.latent, generator=random) - 1
        classes = torch.arange(1000) % options.classes
        numbers = 2 * torch.rand(1000, options.numbers, generator=random) - 1
        noise, classes, numbers = (x.to(self.run.device) for x in (noise, classes, numbers))
        q = nn.Sequential(self.networks["trunk"], self.networks["q"])
        with self.evaluating():
            logits = q(self.generate(noise, classes, numbers))[:, : options.classes]
        found = {"information": metrics.mutual_information_bound(logits, classes)}
        labels = self.run.known_labels()
        if labels is not None:
            guesses = self.quietly(q)(self.run.images[:])[:, : options.classes].argmax(1)
            found["assignment_accuracy"] = metrics.assignment_accuracy(guesses, labels)
        return found
