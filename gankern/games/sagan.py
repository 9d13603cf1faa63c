"""SAGAN: self-attention in both networks (Zhang 2018, arXiv 1805.08318), on labels.

The hinge, judged by projection; the discriminator learns four times as fast as the generator. Of a map x, a position's
query is held against the keys of all positions (pooled by 2x2), and their values are added as the keys fit it:

    x + gamma W_o (g softmax(theta^T phi)),    gamma 0 at first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.data import Shapes
from gankern.data.shapes import coverage
from gankern.games._classes import OfClasses
from gankern.games._game import Figures, Picture
from gankern.games._pictures import alternating
from gankern.models._record import Preset
from gankern.models.gan import GAN
from gankern.models.sagan import sagan

MEASURED = 200  # images


class SAGAN(OfClasses):
    preset: ClassVar[Preset] = Preset(
        loss="hinge", conditioning="projection", size=32, latent=128, width=16, batch_size=16, lr=1e-4, beta1=0.0,
        beta2=0.9, steps=1000, checkpoint_every=500,
    )  # fmt: skip

    @dataclass(frozen=True)
    class Options(OfClasses.Options):
        attention: bool = True  # false: the same networks without, which it is held against

    def make(self, **options: Any) -> GAN:
        return sagan(**options, attention=self.options.attention)

    def looks(self, number: int) -> tuple[Tensor, Tensor]:
        """The first images [N, C, H, W] of the data, and where the discriminator looks from each position of each:
        softmax of queries by keys [N, h, w, h / 2, w / 2], on the CPU."""
        images, labels = (x[torch.arange(number)].to(self.run.device) for x in (self.run.images, self.run.labels))
        layer: Any = self.discriminator.attention
        given: list[Tensor] = []
        with self.evaluating():
            hook = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
            self.discriminator(images.to(next(self.discriminator.parameters())), labels)
            hook.remove()
            queries, keys = layer.theta(given[0]), F.max_pool2d(layer.phi(given[0]), 2)
            table = (queries.flatten(2).mT @ keys.flatten(2)).softmax(2)
        return images.cpu(), table.unflatten(2, keys.shape[2:]).unflatten(1, queries.shape[2:]).cpu()

    def pictures(self) -> dict[str, Picture]:
        """Classes; and images, and below each where a position looks that is bright: that of shapes' middle."""
        drawn = super().pictures()
        if self.options.attention and self.run.samples is not None:
            images, table = self.looks(16)
            height, width = table.shape[1:3]
            place = torch.full((len(images), 2), 0.5)
            if isinstance(self.run.samples, Shapes):
                factors = self.run.samples.factors(torch.arange(len(images)))
                place = 0.5 + 0.5 * torch.stack([factors.y, factors.x], 1)
            rows, columns = (place * torch.tensor([height, width])).long().unbind(1)
            seen = table[torch.arange(len(images)), rows, columns][:, None]
            seen = F.interpolate(2 * seen / seen.amax((2, 3), keepdim=True) - 1, images.shape[2:])
            maps = alternating(images, seen.expand_as(images).to(images.dtype))
            drawn["where it looks from the middle"] = Picture(maps)
        return drawn

    def figures(self) -> Figures:
        """``label_accuracy``; of shapes also ``attention_on_shape``: what positions on the shape give to the shape's
        keys, as a multiple of what evenly spread attention would."""
        found = super().figures()
        if self.options.attention and isinstance(self.run.samples, Shapes):
            table = self.looks(MEASURED)[1]
            covered = coverage(self.run.samples.factors(torch.arange(MEASURED)), self.config.side)
            _, height, width, rows, columns = table.shape
            sizes = (height, width), (rows, columns)
            from_shape, on_shape = (F.adaptive_avg_pool2d(covered, size)[:, 0].to(table) for size in sizes)
            given = (table * on_shape[:, None, None]).sum((3, 4)) / on_shape.mean((1, 2))[:, None, None]
            found["attention_on_shape"] = ((given * from_shape).sum() / from_shape.sum()).item()
        return found
