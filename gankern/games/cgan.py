"""Conditional GAN: both players are told what to draw, by a label or a vector of numbers (Mirza & Osindero 2014,
arXiv 1411.1784; Gauthier 2014 on attributes of faces).

    min_G max_D  E log D(x | y) + E log(1 - D(G(z | y) | y))

The discriminator sees real images with their own y, and generated ones with the y that they were made from. The
generator has y beside z; the discriminator has it as constant planes beside the image. (An embedding of y that is
multiplied with z, as in much public code, is another model; where D is not told y, G may ignore it at no cost.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import losses, models
from gankern.data import Shapes
from gankern.games._game import Figures, Game, Loss, Picture, Player, Run, Samples
from gankern.games._measures import attribute_figures, read_classes
from gankern.games._vector_networks import PaperDiscriminator, PaperGenerator
from gankern.models._record import Preset
from gankern.models.conditional import CONDITIONINGS

ROWS = 8  # of the picture


class CGAN(Game):
    """Images of the attributes, or the class, that is asked for."""

    family: ClassVar[str] = "codes and conditions"
    needs: ClassVar[str | None] = "attributes"
    data: ClassVar[str] = "shapes"
    takes: ClassVar[frozenset[str]] = frozenset({"conditioning", "evaluate_samples"})
    preset = Preset(
        loss="non_saturating", conditioning="vector_concatenation", size=32, latent=32, width=16, lr=5e-4, steps=1500,
        checkpoint_every=500, evaluate=6,
    )  # fmt: skip
    same_work = True

    @dataclass(frozen=True)
    class Options:
        networks: str = "dcgan"  # or "sn_dcgan", or "mlp", the paper's for MNIST
        deeper: bool = False  # of "mlp": one more layer of 1200 in the generator

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, m = self.config, self.config.num_classes
        if config.conditioning is None or self.options.networks not in ("dcgan", "sn_dcgan", "mlp"):
            raise ValueError(
                f"cgan: conditioning must be one of {', '.join(CONDITIONINGS)}, and option networks dcgan, sn_dcgan "
                f"or mlp; got {config.conditioning} and {self.options.networks!r}"
            )
        self.of_labels = CONDITIONINGS[config.conditioning] == "labels"
        if self.of_labels:
            self.refuse("evaluate_samples", where="with labels, whose figure is of 1,000 samples")
        if self.options.networks == "mlp":
            self.refuse("width", where="with networks mlp, which are the paper's")
            shape = (config.channels, config.side, config.side)
            self.networks = {
                "generator": PaperGenerator(shape, config.latent, m, self.options.deeper, run.layers),
                "discriminator": PaperDiscriminator(prod(shape), m, run.layers),
            }
        else:
            self.refuse("deeper", where=f"with networks {self.options.networks}")
            how = "vector_" + config.conditioning.removeprefix("vector_")  # labels come as one-hot vectors
            shapes = {"size": config.side, "channels": config.channels, "latent": config.latent, "width": config.width}
            gan = models.build(self.options.networks, **shapes, layers=run.side, num_classes=m, conditioning=how)
            self.networks = {"generator": gan.generator, "discriminator": gan.discriminator}
        self.generate, self.judge = self.networks["generator"], self.networks["discriminator"]
        self.players = {"d": Player(("discriminator",), "discriminator"), "g": Player(("generator",), "generator")}
        self.loss = losses.get(config.loss, config.real_target)
        # What pictures are drawn of: one of each class, or the first vectors of the data, put there by `start`.
        self.examples = torch.eye(m) if self.of_labels else torch.zeros(ROWS, m)

    def start(self) -> None:
        if not self.of_labels:
            given: Any = self.run.condition
            self.examples = given[torch.arange(ROWS) % len(given)].cpu()

    def vectors(self, y: Tensor) -> Tensor:
        return F.one_hot(y, self.config.num_classes).to(torch.get_default_dtype()) if self.of_labels else y

    def moves(self) -> Iterator[tuple[str, Loss]]:
        run, latent = self.run, self.config.latent
        real, y = run.batch()
        y, asked = self.vectors(y).to(real.dtype), self.vectors(run.conditions()).to(real.dtype)
        with torch.no_grad():
            fake = self.generate(run.normal(latent), asked)
        yield "d", self.loss.discriminator(self.judge(real, y), self.judge(fake, asked))
        asked = self.vectors(run.conditions()).to(real.dtype)
        yield "g", self.loss.generator(self.judge(self.generate(run.normal(latent), asked), asked))

    def sample(self, y: Tensor, seed: int = 0) -> Tensor:
        """Images of the vectors [N, M], on the CPU."""
        latents = torch.randn(len(y), self.config.latent, generator=torch.Generator().manual_seed(seed))
        parts = zip(latents.to(self.run.device).split(256), y.to(self.run.device, latents.dtype).split(256))
        with self.evaluating():
            return torch.cat([self.generate(*part) for part in parts]).cpu()

    def draw_classes(self, label: int | None, seed: int) -> Picture:
        """Vectors of the data in the place of classes, where the game is played with those."""
        asked = self.examples if label is None else self.examples[label].expand(8, -1)
        rows = [self.sample(asked, seed + row) for row in range(ROWS)]
        return Picture(torch.cat(rows), len(asked))

    def pictures(self) -> dict[str, Picture]:
        """A class, or a vector of the data, a column; and on the way from one to the next."""
        number, way = len(self.examples), torch.linspace(0, 1, 8)[:, None]
        several = [self.sample(self.examples, self.config.seed + row) for row in range(ROWS)]
        rows = [torch.lerp(a, b, way) for a, b in zip(self.examples, self.examples.roll(-1, 0))]
        between = torch.cat([self.sample(row) for row in rows[:ROWS]])
        title = "one class a column" if self.of_labels else "one vector of attributes a column"
        if self.run.samples is not None and not self.of_labels:
            several[0] = self.run.images[torch.arange(ROWS) % len(self.run.images)].cpu()
            title += ", above it the image that has it"
        return {title: Picture(torch.cat(several), number), "from one to another": Picture(between)}

    @classmethod
    def evaluator(cls, config: Any, samples: Samples, condition: Any = None) -> Callable[[Any], Figures]:
        """``label_accuracy`` of labels. Of shapes: ``r2_x``, ``r2_y`` and ``r2_radius``, how well a regressor that was
        trained on real images reads what was asked for, for vectors that are in no training image; and ``permuted``,
        what it adds to the discriminator's loss on real images to be told another's vector."""
        if CONDITIONINGS[config.conditioning] == "labels":
            classes = torch.arange(1000) % config.num_classes
            return lambda game: {
                "label_accuracy": (
                    read_classes(game.sample(game.vectors(classes)), config.data, config.side) == classes
                ).float().mean().item()
            }  # fmt: skip
        return attribute_figures(config, samples, condition) if isinstance(samples, Shapes) else lambda game: {}

    def extra_state(self) -> dict[str, Any]:
        return {"examples": self.examples}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.examples = state["examples"]
