"""Batches without end: epoch after epoch in a new random order, from a seed, stopped and resumed anywhere."""

import torch
from torch import Tensor


def part_of(batch_size: int, share: tuple[int, int]) -> slice:
    """Where in a batch the i-th of n equal parts is, ``share`` = (i, n).

    >>> part_of(64, (1, 4))
    slice(16, 32, None)
    """
    index, number = share
    if batch_size % number:
        raise ValueError(f"batch_size {batch_size} does not go evenly into {number} parts")
    size = batch_size // number
    return slice(index * size, (index + 1) * size)


class EndlessBatches:
    """Yields [batch_size, C, H, W] for ever: each epoch a new permutation, less its incomplete last batch.

    With ``labels`` [N] it yields pairs (images, labels). With ``share`` (i, n) it yields the i-th of n equal parts of
    every batch: what one of n processes sees of a batch that they share. It has a random stream of its own, so what
    else is drawn in a program does not move it. ``state_dict`` holds all that the following batches depend on.

    >>> batches = EndlessBatches(torch.arange(6.0).view(6, 1, 1, 1), batch_size=2, seed=0)
    >>> next(batches).shape
    torch.Size([2, 1, 1, 1])
    """

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        seed: int,
        labels: Tensor | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch_size must be between 1 and the {len(images)} images there are, got {batch_size}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"there are {len(labels)} labels for {len(images)} images")
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.share = part_of(batch_size, share)
        self.random = torch.Generator().manual_seed(seed)
        self._new_epoch()

    def _new_epoch(self) -> None:
        self.order = torch.randperm(len(self.images), generator=self.random)
        self.position = 0

    def __iter__(self) -> "EndlessBatches":
        return self

    def __next__(self) -> Tensor | tuple[Tensor, Tensor]:
        if self.position + self.batch_size > len(self.order):
            self._new_epoch()
        chosen = self.order[self.position : self.position + self.batch_size][self.share]
        self.position += self.batch_size
        return self.images[chosen] if self.labels is None else (self.images[chosen], self.labels[chosen])

    def state_dict(self) -> dict:
        return {"order": self.order, "position": self.position, "random": self.random.get_state()}

    def load_state_dict(self, state: dict) -> None:
        if len(state["order"]) != len(self.images):
            raise ValueError(f"the saved order is of {len(state['order'])} images, here are {len(self.images)}")
        self.order = state["order"].clone()
        self.position = state["position"]
        self.random.set_state(state["random"])
