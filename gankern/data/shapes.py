"""Coloured shapes at any resolution, whose factors are known: images that ship with the library.

Image i is a function of i alone: its factors come from a hash of the seed and i. At half the resolution it is, up to
the antialiasing, the same image with fewer pixels, so that a GAN can grow on it.
"""

from dataclasses import dataclass, fields
from math import cos, pi, sin

import torch
from torch import Tensor

from gankern.data.source import ImageSource

KINDS = ("circle", "square", "triangle", "ring", "cross")
LARGEST = 1024
PIXELS_AT_ONCE = 1 << 21  # bounds the memory of drawing


@dataclass(frozen=True)
class Factors:
    """What is in each of N images: tensors [N]. The image spans −1..1 to the right and downwards."""

    kind: Tensor  # index into KINDS
    hue: Tensor  # of the shape, 0..1
    x: Tensor  # its centre
    y: Tensor
    radius: Tensor
    angle: Tensor  # radians
    stripes: Tensor  # across the shape
    background: Tensor  # hue, 0..1

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, index) -> "Factors":
        return Factors(*(getattr(self, field.name)[index] for field in fields(self)))


# factor → its least and largest value; ``kind`` is drawn from KINDS.
RANGES = {
    "hue": (0.0, 1.0),
    "x": (-0.5, 0.5),
    "y": (-0.5, 0.5),
    "radius": (0.25, 0.5),
    "angle": (0.0, 2 * pi),
    "stripes": (2.0, 12.0),
    "background": (0.0, 1.0),
}


def draw(factors: Factors, size: int) -> Tensor:
    """Images [N, 3, size, size] in [−1, 1] of these factors, with antialiased edges.

    >>> draw(Shapes(size=8).factors(torch.arange(4)), size=32).shape
    torch.Size([4, 3, 32, 32])
    """
    images = torch.empty(len(factors), 3, size, size)
    at_once = max(1, PIXELS_AT_ONCE // size**2)
    for kind in range(len(KINDS)):
        for indices in (factors.kind == kind).nonzero()[:, 0].split(at_once):
            images[indices] = _draw_kind(KINDS[kind], factors[indices], size)
    return images


def _draw_kind(kind: str, factors: Factors, size: int) -> Tensor:
    pixel = 2.0 / size
    centres = torch.arange(size) * pixel + (pixel / 2 - 1.0)
    x = centres[None, None, :] - factors.x[:, None, None]
    y = centres[None, :, None] - factors.y[:, None, None]
    radius = factors.radius[:, None, None]
    turn_cos, turn_sin = factors.angle.cos()[:, None, None], factors.angle.sin()[:, None, None]
    u = (x * turn_cos + y * turn_sin) / radius
    v = (y * turn_cos - x * turn_sin) / radius
    # Half of a pixel whose centre is on the edge is covered, and the edge is one pixel wide.
    coverage = (0.5 - _distance(kind, u, v) * radius / pixel).clamp_(0.0, 1.0).unsqueeze(1)

    # Stripes of ±30 % brightness; a pixel's mean over them is less, by a sinc.
    frequency = factors.stripes[:, None, None] / 2
    brightness = 0.65 + 0.3 * torch.sinc(frequency * pixel / radius) * torch.sin(2 * pi * frequency * v)
    shape = _colour(factors.hue, saturation=0.85)[:, :, None, None] * brightness.unsqueeze(1)
    shade = 0.3 + 0.15 * centres[None, None, :, None]  # darker at the top
    background = _colour(factors.background, saturation=0.5)[:, :, None, None] * shade
    return torch.lerp(background.expand_as(shape), shape, coverage).mul_(2.0).sub_(1.0)


def _distance(kind: str, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance to the edge of the shape of radius 1, negative inside; the larger coordinate's at corners."""
    if kind == "circle":
        return torch.hypot(u, v) - 1.0
    if kind == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.75
    if kind == "triangle":
        edges = [u * cos(2 * pi * i / 3) + v * sin(2 * pi * i / 3) - 0.5 for i in range(3)]
        return torch.maximum(torch.maximum(edges[0], edges[1]), edges[2])
    if kind == "ring":
        return (torch.hypot(u, v) - 0.75).abs() - 0.25
    across, along = u.abs(), v.abs()
    bars = torch.maximum(across - 1.0, along - 0.3), torch.maximum(across - 0.3, along - 1.0)
    return torch.minimum(*bars)


def _colour(hue: Tensor, saturation: float) -> Tensor:
    """The RGB [N, 3] of a hue at full value."""
    position = (6.0 * hue[:, None] + torch.tensor([5.0, 3.0, 1.0])) % 6.0
    return 1.0 - saturation * torch.minimum(position, 4.0 - position).clamp(0.0, 1.0)


def _hash(keys: Tensor) -> Tensor:
    """A bijection of int64 that leaves no pattern (the finaliser of splitmix64)."""

    def shifted(z: Tensor, bits: int) -> Tensor:  # torch's >> copies the sign
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = keys * -0x61C8864680B583EB
    z = (z ^ shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ shifted(z, 31)


class Shapes(ImageSource):
    """``length`` images of one shape each, [3, size, size] with a size of 4 to 1024.

    >>> shapes = Shapes(size=64)
    >>> shapes[torch.tensor([0, 99_999])].shape, KINDS[shapes.factors(torch.tensor([0])).kind]
    (torch.Size([2, 3, 64, 64]), 'circle')
    """

    def __init__(self, size: int = 64, length: int = 100_000, seed: int = 0):
        if not 4 <= size <= LARGEST:
            raise ValueError(f"shapes: size must be from 4 to {LARGEST}, got {size}")
        if length < 1:
            raise ValueError(f"shapes: length must be at least 1, got {length}")
        self.shape = (length, 3, size, size)
        self.seed = seed

    def factors(self, indices: Tensor) -> Factors:
        """What is in the images of these indices, [N] int64."""
        names = ["kind", *RANGES]
        keys = _hash(torch.tensor(self.seed)) + indices[:, None] * len(names) + torch.arange(len(names))
        uniform = ((_hash(keys) >> 40) & 0xFFFFFF).float() / (1 << 24)  # [N, factors], 24 bits
        values = {name: low + (high - low) * uniform[:, names.index(name)] for name, (low, high) in RANGES.items()}
        return Factors(kind=(uniform[:, 0] * len(KINDS)).long(), **values)

    def read(self, indices: Tensor) -> Tensor:
        return draw(self.factors(indices), self.shape[2])
