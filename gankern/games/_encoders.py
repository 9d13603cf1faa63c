"""What the games with an encoder share: which images are looked at, and the picture of what comes back of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from gankern import metrics
from gankern.games._game import Figures, Game, Picture
from gankern.games._measures import read_classes
from gankern.games._pictures import alternating

FROM, TO = 0, 3  # the classes of the attribute vector: of shapes, from the circle to the ring


class Encodes(Game):
    """A game with an encoder and a decoder of codes [N, latent]."""

    family: ClassVar[str] = "encoders"

    def coding(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Images -> codes and codes -> images, made by ``quietly``."""
        raise NotImplementedError

    def drawn(self, number: int) -> Tensor:
        """Latents as samples are made of, N(0, I) [number, latent]: always the same."""
        return torch.randn(number, self.config.latent, generator=torch.Generator().manual_seed(self.config.seed))

    def looked_at(self, number: int) -> Tensor:
        """Which images are measured and shown: of those that are held out, of a game that holds out some."""
        return self.run.held_out(self.held_out)[1][:number] if self.held_out else self.run.spread(number)

    def seen(self, number: int) -> Tensor:
        """Images that are measured and shown, [number, C, H, W] on the CPU."""
        return self.run.images[self.looked_at(number)].cpu()

    def pictures(self) -> dict[str, Picture]:
        encode, decode = self.coding()
        drawn = {"samples": Picture(decode(self.drawn(64)))}
        if self.run.samples is not None:
            images, which = self.seen(32), "held-out images" if self.held_out else "images"
            again = decode(encode(images))
            drawn[f"{which} and reconstructions"] = Picture(alternating(images, again))
        return drawn


class EncodesClasses(Encodes):
    """The same, and what the codes say of classes, where the data have some."""

    def vector(self, labels: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The codes of images of the class FROM, and the mean code of the class TO less theirs; None where none of the
        images is known to be of one of the two."""
        if labels is None:
            return None
        number, encode = self.config.evaluate_samples, self.coding()[0]
        images, labels = self.seen(number), labels[self.looked_at(number)]
        before, after = (images[labels == kind] for kind in (FROM, TO))
        if not len(before) or not len(after):
            return None
        codes = encode(before)
        return codes, encode(after).mean(0) - codes.mean(0)

    def pictures(self) -> dict[str, Picture]:
        drawn = super().pictures()
        labels = None if self.run.samples is None else self.run.known_labels()
        found = self.vector(labels)
        if found is not None:
            codes, vector = found
            path = codes[:8, None] + torch.linspace(0.0, 1.5, 8)[:, None] * vector
            moved = Picture(self.coding()[1](path.flatten(0, 1)))
            drawn[f"from class {FROM} towards {TO}"] = moved
        return drawn

    def figures(self) -> Figures:
        """Of images' reconstructions: ``high_frequency``, the energy of the finest Laplacian band as a share of
        the images'; ``class_kept``, how often a classifier sees the right class; ``pixel_error``, the mean square. And
        ``flipped``: how often it sees the class TO in images of FROM whose codes had the vector added."""
        config, images, labels = self.config, self.seen(self.config.evaluate_samples), self.run.known_labels()
        encode, decode = self.coding()
        again = decode(encode(images))
        fine, real = (metrics.laplacian_pyramid(x)[0].square().mean().item() for x in (again, images))
        found = {"high_frequency": fine / real, "pixel_error": (again - images).square().mean().item()}
        if labels is not None:
            kept = read_classes(again, config.data, config.side) == labels[self.looked_at(config.evaluate_samples)]
            found["class_kept"] = kept.float().mean().item()
        between = self.vector(labels)
        if between is not None:
            codes, vector = between
            moved = read_classes(decode(codes + vector), config.data, config.side)
            found["flipped"] = (moved == TO).float().mean().item()
        return found
