"""How images are laid out in a picture."""

import torch
from torch import Tensor


def alternating(*several: Tensor, columns: int = 8) -> Tensor:
    """Sets of as many images [N, C, H, W], each below its counterpart of the set before: ``columns`` of the first set,
    below them those of the second and of any others, then the next of the first.

    >>> above, below = torch.arange(4).view(4, 1, 1, 1), torch.arange(10, 14).view(4, 1, 1, 1)
    >>> alternating(above, below, columns=2).flatten().tolist()
    [0, 1, 10, 11, 2, 3, 12, 13]
    """
    return torch.cat([row for rows in zip(*(images.cpu().split(columns) for images in several)) for row in rows])
