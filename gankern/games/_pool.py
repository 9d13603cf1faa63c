"""A pool of a generator's last images, for its discriminator (Shrivastava 2017, arXiv 1612.07828)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImagePool(nn.Module):
    """The last ``size`` images that were put in, of which old ones are given back for new ones. ``like`` is a batch.

    What is exchanged is decided on the host (:meth:`decide`) and done on the device, by as much work each time, so
    that a step may be a CUDA graph.
    """

    images: Tensor  # [size + N, C, H, W]: those that are kept, and the batch at hand behind them

    def __init__(self, size: int, like: Tensor) -> None:
        super().__init__()
        self.size, self.kept = size, 0
        self.register_buffer("images", like.new_zeros(size + len(like), *like.shape[1:]))

    def decide(self, coins: Tensor, places: Tensor) -> Tensor:
        """For :meth:`exchange`, [3, N], from random numbers [N] on the CPU. Until the pool is full each image is kept
        and given. Then an image whose coin, from [0, 1), is below one half is put in the place of an old one, which is
        given for it; others are given themselves."""
        given = list(range(self.size, self.size + len(coins)))
        put: dict[int, int] = {}  # the last image of the batch in each place
        changed = [*given]
        for i, (coin, place) in enumerate(zip(coins.tolist(), places.tolist(), strict=True)):
            if self.kept < self.size:
                place = self.kept
                self.kept += 1
            elif coin < 0.5 and self.size:
                given[i] = put.get(place, place)
            else:
                continue
            changed[i] = place
            put[place] = self.size + i
        return torch.tensor([given, changed, [put.get(place, place) for place in changed]])

    def exchange(self, images: Tensor, decided: Tensor) -> Tensor:
        """The images [N, C, H, W] that are given for these."""
        given, changed, into = decided
        self.images[self.size :] = images.detach()
        result = self.images[given]
        self.images[changed] = self.images[into]
        return result

    def state(self) -> Tensor:
        """The images that are kept."""
        return self.images[: self.kept].clone()

    def load_state(self, images: Tensor) -> None:
        self.kept = len(images)
        self.images[: self.kept] = images.to(self.images)
