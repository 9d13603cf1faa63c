"""Differentiable augmentation of what a discriminator sees (Zhao 2020, arXiv 2006.10738): colour, translation, cutout.

Real and generated images go through the same kinds of changes before the discriminator, in its moves and in the
generator's, so that few images are not learnt by heart and the changes do not come into the samples.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gankern.core.names import look_up

SHIFT, HOLE = 1 / 8, 1 / 2  # of the side of an image


def _colour(images: Tensor, u: Tensor) -> Tensor:
    """Brightness by up to a half, saturation to between 0 and 2 times, contrast to between a half and 3/2."""
    brightness, saturation, contrast = u.to(images).view(-1, 3, 1, 1, 1).unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2.0 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _translation(images: Tensor, u: Tensor) -> Tensor:
    """By whole pixels, up to an eighth of the side; what comes in from outside is 0."""
    for dim, part in zip((2, 3), u.unbind(1)):
        side = images.shape[dim]
        most = int(side * SHIFT + 0.5)
        shift = (part.to(images.device) * (2 * most + 1)).long().clamp(max=2 * most) - most
        place = torch.arange(side, device=images.device) + shift[:, None]
        inside = ((place >= 0) & (place < side)).to(images.dtype)
        shape = (len(images), 1, side, 1) if dim == 2 else (len(images), 1, 1, side)
        index = place.clamp(0, side - 1).view(shape).expand_as(images)
        images = images.gather(dim, index) * inside.view(shape)
    return images


def _cutout(images: Tensor, u: Tensor) -> Tensor:
    """A square of half the side becomes 0; its centre is anywhere, so that parts of it may lie outside."""
    keep = torch.ones_like(images[:, :1], dtype=torch.bool)
    for dim, part in zip((2, 3), u.unbind(1)):
        side = images.shape[dim]
        hole = int(side * HOLE + 0.5)
        start = (part.to(images.device) * (side + 1 - hole % 2)).long().clamp(max=side - hole % 2) - hole // 2
        place = torch.arange(side, device=images.device)
        inside = (place >= start[:, None]) & (place < start[:, None] + hole)
        keep = keep & inside.view((-1, 1, side, 1) if dim == 2 else (-1, 1, 1, side))
    return images * (~keep).to(images.dtype)


# Name -> (what it does with images [N, C, H, W] and uniform random numbers [N, n], how many of those).
AUGMENTATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "color": (_colour, 3),
    "translation": (_translation, 2),
    "cutout": (_cutout, 2),
}


def parse(text: str) -> tuple[str, ...]:
    """The augmentations of a list with commas; a ValueError with the nearest names for one that there is not.

    >>> parse("color,cutout")
    ('color', 'cutout')
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        look_up(AUGMENTATIONS, name, "augmentation")
    return names


def draw(names: tuple[str, ...], uniform: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """The random numbers of one batch: ``uniform(n)`` gives [N, n] of them, from 0 to 1."""
    return {name: uniform(AUGMENTATIONS[name][1]) for name in names}


def augment(images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """Images [N, C, H, W] changed as :func:`draw` says, one after the other. Differentiable, to any order.

    >>> numbers = {"translation": torch.full((1, 2), 0.5)}  # the middle of the range: nothing moves
    >>> x = torch.rand(1, 1, 8, 8)
    >>> torch.equal(augment(x, numbers), x)
    True
    """
    for name, numbers in drawn.items():
        images = AUGMENTATIONS[name][0](images, numbers)
    return images
