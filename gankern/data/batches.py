"""Batches without end: epoch after epoch in a new random order, from a seed, stopped and resumed anywhere."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import shown, tensor, whole
from gankern.data.source import ImageSource


def part_of(batch_size: int, share: tuple[int, int]) -> slice:
    """Where in a batch the i-th of n equal parts is, ``share`` = (i, n).

    >>> part_of(64, (1, 4))
    slice(16, 32, None)
    """
    index, number = share
    if not 0 <= index < number:
        raise ValueError(f"share must be (i, n) with i from 0 to n - 1, got {share}")
    if batch_size % number:
        raise ValueError(f"batch_size {batch_size} does not go evenly into {number} parts")
    size = batch_size // number
    return slice(index * size, (index + 1) * size)


Batch = Tensor | tuple[Tensor, Tensor]


class EndlessBatches:
    """Yields [batch_size, C, H, W] for ever: each epoch a new permutation, less its incomplete last batch.

    With ``labels`` [N] it yields pairs (images, labels). With ``share`` (i, n) it yields the i-th of n equal parts of
    every batch: what one of n processes sees of a batch that they share. It has a random stream of its own, so what
    else is drawn in a program does not move it. ``state_dict`` holds all that the following batches depend on. With
    ``workers`` so many threads read a batch, and the next one while this one is used: what is read must allow that.

    >>> batches = EndlessBatches(torch.arange(6.0).view(6, 1, 1, 1), batch_size=2, seed=0)
    >>> next(batches).shape
    torch.Size([2, 1, 1, 1])
    """

    def __init__(
        self,
        images: Tensor | ImageSource,
        batch_size: int,
        seed: int,
        labels: Tensor | ImageSource | None = None,
        share: tuple[int, int] = (0, 1),
        workers: int = 0,
    ):
        if not isinstance(images, Tensor | ImageSource):
            raise TypeError(f"images must be a tensor or an ImageSource, got {shown(images)}")
        batch_size = whole("batch_size", batch_size)
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch_size must be between 1 and the {len(images)} images there are, got {batch_size}")
        if not isinstance(labels, Tensor | ImageSource | None):
            raise TypeError(f"labels must be a tensor, an ImageSource or None, got {shown(labels)}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"there are {len(labels)} labels for {len(images)} images")
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.share = part_of(batch_size, share)
        workers = whole("workers", workers, least=0)
        self.pool = ThreadPoolExecutor(workers + 1, "gankern-reads") if workers else None
        self.workers = workers
        self.random = torch.Generator().manual_seed(check_seed("seed", seed))
        self._new_epoch()

    def _new_epoch(self) -> None:
        self.ahead: tuple[int, Future[Batch]] | None = None  # a batch's position, and the batch that is being read
        self.order = torch.randperm(len(self.images), generator=self.random)
        self.position = 0

    def __iter__(self) -> "EndlessBatches":
        return self

    def __next__(self) -> Batch:
        if self.position + self.batch_size > len(self.order):
            self._new_epoch()
        ahead, position = self.ahead, self.position
        self.position += self.batch_size
        batch = ahead[1].result() if ahead is not None and ahead[0] == position else self._read(position)
        if self.pool is not None and self.position + self.batch_size <= len(self.order):
            self.ahead = self.position, self.pool.submit(self._read, self.position)
        return batch

    def _read(self, position: int) -> Batch:
        chosen = self.order[position : position + self.batch_size][self.share]
        if self.pool is None:
            images = self.images[chosen]
        else:
            images = torch.cat(list(self.pool.map(self.images.__getitem__, chosen.chunk(self.workers))))
        return images if self.labels is None else (images, self.labels[chosen])

    def state_dict(self) -> dict:
        return {"order": self.order, "position": self.position, "random": self.random.get_state()}

    def load_state_dict(self, state: dict) -> None:
        order, number = tensor("the saved order", state["order"]), len(self.images)
        if len(order) != number:
            raise ValueError(f"the saved order is of {len(order)} images, here are {number}")
        if not torch.equal(order.sort().values, torch.arange(number)):
            raise ValueError(f"the saved order does not have each of the {number} images once")
        position = whole("the saved position", state["position"], 0, number)
        self.random.set_state(tensor("the saved random state", state["random"]))
        self.order, self.ahead = order.clone(), None
        self.position = position
