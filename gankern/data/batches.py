"""Batches without end: epoch after epoch in a new random order, from a seed, stopped and resumed anywhere."""

import torch
from torch import Tensor


class EndlessBatches:
    """Yields [batch_size, C, H, W] for ever: each epoch a new permutation, less its incomplete last batch.

    It has a random stream of its own, so what else is drawn in a program does not move it. ``state_dict``
    holds all that the following batches depend on.

    >>> batches = EndlessBatches(torch.arange(6.0).view(6, 1, 1, 1), batch_size=2, seed=0)
    >>> next(batches).shape
    torch.Size([2, 1, 1, 1])
    """

    def __init__(self, images: Tensor, batch_size: int, seed: int):
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch_size must be between 1 and the {len(images)} images there are, got {batch_size}")
        self.images = images
        self.batch_size = batch_size
        self.random = torch.Generator().manual_seed(seed)
        self._new_epoch()

    def _new_epoch(self) -> None:
        self.order = torch.randperm(len(self.images), generator=self.random)
        self.position = 0

    def __iter__(self) -> "EndlessBatches":
        return self

    def __next__(self) -> Tensor:
        if self.position + self.batch_size > len(self.order):
            self._new_epoch()
        chosen = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return self.images[chosen]

    def state_dict(self) -> dict:
        return {"order": self.order, "position": self.position, "random": self.random.get_state()}

    def load_state_dict(self, state: dict) -> None:
        if len(state["order"]) != len(self.images):
            raise ValueError(f"the saved order is of {len(state['order'])} images, here are {len(self.images)}")
        self.order = state["order"].clone()
        self.position = state["position"]
        self.random.set_state(state["random"])
