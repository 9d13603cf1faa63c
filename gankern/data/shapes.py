"""Coloured shapes at any resolution, whose factors are known: images that ship with the library.

Image i is a function of i alone: its factors come from a hash of the seed and i. At half the resolution it is, up to
the antialiasing, the same image with fewer pixels, so that a GAN can grow on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import cos, pi, sin

import torch
from torch import Tensor

from gankern.core.arguments import shown, tensor, whole
from gankern.core.names import look_up
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

    def __getitem__(self, index: int | slice | Tensor) -> "Factors":
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
    size = whole("draw: size", size, least=1)
    if not isinstance(factors, Factors):
        raise TypeError(f"draw: factors must be Factors, got {shown(factors)}")
    wrong = factors.kind[(factors.kind < 0) | (factors.kind >= len(KINDS))]
    if len(wrong):
        raise ValueError(f"draw: factors.kind must be from 0 to {len(KINDS) - 1}, got {int(wrong[0])}")
    images = torch.empty(len(factors), 3, size, size)
    at_once = max(1, PIXELS_AT_ONCE // size**2)
    for kind in range(len(KINDS)):
        for indices in (factors.kind == kind).nonzero()[:, 0].split(at_once):
            images[indices] = _draw_kind(KINDS[kind], factors[indices], size)
    return images


def coverage(factors: Factors, size: int) -> Tensor:
    """How much of each pixel its shape covers, [N, 1, size, size] in [0, 1]."""
    covered = torch.empty(len(factors), 1, size, size)
    for kind in range(len(KINDS)):
        for indices in (factors.kind == kind).nonzero()[:, 0].split(max(1, PIXELS_AT_ONCE // size**2)):
            covered[indices] = _place(KINDS[kind], factors[indices], size)[0]
    return covered


def _place(kind: str, factors: Factors, size: int) -> tuple[Tensor, Tensor]:
    """The coverage [N, 1, size, size], and the coordinate [N, size, size] along which stripes lie across the shape."""
    pixel, centres = 2.0 / size, _centres(size)
    x = centres[None, None, :] - factors.x[:, None, None]
    y = centres[None, :, None] - factors.y[:, None, None]
    radius = factors.radius[:, None, None]
    turn_cos, turn_sin = factors.angle.cos()[:, None, None], factors.angle.sin()[:, None, None]
    u = (x * turn_cos + y * turn_sin) / radius
    v = (y * turn_cos - x * turn_sin) / radius
    # Half of a pixel whose centre is on the edge is covered, and the edge is one pixel wide.
    return (0.5 - _distance(kind, u, v) * radius / pixel).clamp_(0.0, 1.0).unsqueeze(1), v


def _centres(size: int) -> Tensor:
    return torch.arange(size) * (2.0 / size) + (1.0 / size - 1.0)


def _draw_kind(kind: str, factors: Factors, size: int) -> Tensor:
    covered, v = _place(kind, factors, size)
    pixel, radius = 2.0 / size, factors.radius[:, None, None]
    # Stripes of ±30 % brightness; a pixel's mean over them is less, by a sinc.
    frequency = factors.stripes[:, None, None] / 2
    brightness = 0.65 + 0.3 * torch.sinc(frequency * pixel / radius) * torch.sin(2 * pi * frequency * v)
    shape = colour(factors.hue, saturation=0.85)[:, :, None, None] * brightness.unsqueeze(1)
    shade = 0.3 + 0.15 * _centres(size)[None, None, :, None]  # darker at the top
    background = colour(factors.background, saturation=0.5)[:, :, None, None] * shade
    return torch.lerp(background.expand_as(shape), shape, covered).mul_(2.0).sub_(1.0)


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


def colour(hue: Tensor, saturation: float) -> Tensor:
    """The RGB [N, 3] of a hue at full value."""
    position = (6.0 * hue[:, None] + torch.tensor([5.0, 3.0, 1.0])) % 6.0
    return 1.0 - saturation * torch.minimum(position, 4.0 - position).clamp(0.0, 1.0)


def uniform(seed: int, indices: Tensor, number: int) -> Tensor:
    """``number`` values from [0, 1) for each index, [N, number], functions of the seed and the index alone: 24 bits."""
    keys = _hash(torch.tensor(seed)) + indices[:, None] * number + torch.arange(number)
    return ((_hash(keys) >> 40) & 0xFFFFFF).float() / (1 << 24)


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

    ``fixed`` sets factors to one value for all images; ``first`` is the index of the first image, so that two sets can
    have no image in common.

    >>> shapes = Shapes(size=64)
    >>> shapes[torch.tensor([0, 99_999])].shape, KINDS[shapes.factors(torch.tensor([0])).kind]
    (torch.Size([2, 3, 64, 64]), 'circle')
    """

    def __init__(
        self,
        size: int = 64,
        length: int = 100_000,
        seed: int = 0,
        *,
        first: int = 0,
        fixed: Mapping[str, float] | None = None,
    ):
        size = whole("shapes: size", size, 4, LARGEST)
        self.shape = (whole("shapes: length", length, least=1), 3, size, size)
        for name in fixed or {}:
            look_up(RANGES, name, "factor of shapes")
        self.seed = whole("shapes: seed", seed, -(2**63), 2**63 - 1)
        self.first, self.fixed = whole("shapes: first", first, least=0), dict(fixed or {})

    @property
    def conditions(self) -> dict[str, ImageSource]:
        """What there is beside the images: "attributes", [13] numbers each."""
        return {"attributes": Attributes(self)}

    def factors(self, indices: Tensor) -> Factors:
        """What is in the images of these indices, [N] int64."""
        if tensor("shapes: indices", indices).ndim != 1 or indices.dtype != torch.int64:
            raise ValueError(f"shapes: indices must be [N] int64, got {tuple(indices.shape)} of {indices.dtype}")
        names = ["kind", *RANGES]
        drawn = uniform(self.seed, indices + self.first, len(names))
        values = {name: low + (high - low) * drawn[:, names.index(name)] for name, (low, high) in RANGES.items()}
        values |= {name: torch.full((len(indices),), float(value)) for name, value in self.fixed.items()}
        return Factors(kind=(drawn[:, 0] * len(KINDS)).long(), **values)

    def read(self, indices: Tensor) -> Tensor:
        return draw(self.factors(indices), self.shape[2])


class Attributes(ImageSource):
    """The factors of shapes as vectors [13] in [-1, 1], for a model that is conditional on them: the kind one-hot
    (-1 and 1), cosine and sine of the hue and of the background's hue (a circle each), then x, y, radius and stripes,
    from their ranges to [-1, 1]. The angle is left out: a disc has none.

    >>> Attributes(Shapes())[torch.arange(2)].shape
    torch.Size([2, 13])
    """

    def __init__(self, shapes: Shapes):
        self.shapes, self.shape = shapes, (len(shapes), 13)

    def read(self, indices: Tensor) -> Tensor:
        return as_attributes(self.shapes.factors(indices))


def as_attributes(factors: Factors) -> Tensor:
    """Factors of N shapes as :class:`Attributes`, [N, 13]."""
    kind = 2.0 * torch.nn.functional.one_hot(factors.kind, len(KINDS)).float() - 1.0
    turns = [f(2 * pi * hue) for hue in (factors.hue, factors.background) for f in (torch.cos, torch.sin)]
    rest = []
    for name in ("x", "y", "radius", "stripes"):
        low, high = RANGES[name]
        rest.append(2.0 * (getattr(factors, name) - low) / (high - low) - 1.0)
    return torch.cat([kind, torch.stack([*turns, *rest], 1)], 1)
