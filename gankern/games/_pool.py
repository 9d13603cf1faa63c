"""A pool of a generator's last images, for its discriminator (Shrivastava 2017, arXiv 1612.07828)."""

from __future__ import annotations

import torch
from torch import Tensor


class ImagePool:
    """The last images that were put in, of which old ones are given back for new ones."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.images: Tensor | None = None

    def exchange(self, images: Tensor, coins: Tensor, places: Tensor) -> Tensor:
        """For each image itself, or an old one in whose place it is put: where the pool is full and its coin, from
        [0, 1), is below one half, the one at its place."""
        if self.size == 0:
            return images
        given = []
        for image, coin, place in zip(images.detach(), coins.tolist(), places.tolist(), strict=True):
            kept = 0 if self.images is None else len(self.images)
            if kept < self.size:
                self.images = image[None].clone() if self.images is None else torch.cat([self.images, image[None]])
                given.append(image)
            elif coin < 0.5:
                assert self.images is not None  # it is full
                given.append(self.images[place].clone())
                self.images[place] = image
            else:
                given.append(image)
        return torch.stack(given)
