"""Images that are made or read when they are asked for: what a set is that does not fit into memory."""

import copy
from typing import Self

import torch
from torch import Tensor

from gankern.core.arguments import shown


class ImageSource:
    """Stands where an image tensor [N, C, H, W] may stand: ``len``, ``shape``, ``to``, and ``[indices]``.

    What else there is of each image (attributes, captions, the other half of a pair) are sources of their own, of any
    shape [N, ...]: ``conditions``, by their kind.

    A subclass says its ``shape`` and how to ``read`` one batch. Indexing is by an integer, a slice, or a list or tensor
    [n] of indices, as a tensor's first dimension is; the result is float32 in [−1, 1], on the device that ``to`` named.
    """

    shape: tuple[int, ...]
    device = torch.device("cpu")

    @property
    def conditions(self) -> dict[str, "ImageSource"]:
        return {}

    def read(self, indices: Tensor) -> Tensor:
        """[n] int64 → [n, C, H, W]."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Tensor:
        if isinstance(index, tuple) or index is None or index is ... or (torch.is_tensor(index) and index.ndim > 1):
            raise TypeError(
                "images that are read when they are asked for are indexed by an integer, a slice, or a list or tensor "
                f"[n] of indices, got {shown(index)}"
            )
        everything = torch.arange(len(self))
        chosen = everything[index.cpu() if torch.is_tensor(index) else index]
        images = self.read(chosen.reshape(-1)).to(self.device)
        return images if chosen.ndim else images[0]

    def to(self, device: torch.device | str) -> Self:
        """The same images, given on ``device``; this source goes on as it is."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved
