"""Sets that are drawn, or cut out of two photographs, for models that translate, read captions, predict or upscale.

As :mod:`gankern.data.shapes`: image i is a function of the seed and i alone, at any size, so that a run can be resumed
and two runs see the same.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.core import extras
from gankern.data.shapes import KINDS, Factors, Shapes, colour, coverage, draw, uniform
from gankern.data.source import ImageSource

LENGTH = 100_000


# ---- two domains, unpaired -------------------------------------------------------------------------------------------


class _Domain(Shapes):
    """Shapes of one domain; their condition "unpaired" is of the other, of which no image has the same factors."""

    def __init__(self, size: int, striped: bool):
        stripes = (4.0 if size <= 32 else 6.0) if striped else 0.0
        super().__init__(size, LENGTH, first=LENGTH * striped, fixed={"radius": 0.5, "stripes": stripes})
        self.striped = striped

    @property
    def conditions(self) -> dict[str, ImageSource]:
        return super().conditions | {"unpaired": _Domain(self.shape[2], not self.striped)}


def plain(size: int = 32) -> Shapes:
    """Large shapes without stripes. The other domain is :func:`striped`; no image of one is in the other."""
    return _Domain(size, False)


def striped(size: int = 32) -> Shapes:
    """Large shapes with stripes, 4 up to 32 pixels and 6 beyond: as many as can be seen."""
    return _Domain(size, True)


def with_stripes(images: Shapes, indices: Tensor) -> Tensor:
    """Plain images' hidden counterparts, the same shapes with stripes [N, 3, H, W]: for measuring only."""
    factors = images.factors(indices)
    count = striped(images.shape[2]).fixed["stripes"]
    return draw(replace(factors, stripes=torch.full_like(factors.stripes, count)), images.shape[2])


# ---- edges and what has them -----------------------------------------------------------------------------------------


class Outlined(Shapes):
    """Large shapes; their condition "edges" are the outlines [1, size, size], which do not tell the hue. As "pairs",
    from which a model translates, they are the same.

    >>> images = Outlined(32)
    >>> images.conditions["edges"][:2].shape
    torch.Size([2, 1, 32, 32])
    """

    def __init__(self, size: int = 32):
        super().__init__(size, LENGTH, fixed={"radius": 0.5})

    @property
    def conditions(self) -> dict[str, ImageSource]:
        return super().conditions | {"edges": _Edges(self), "pairs": _Edges(self)}


class _Edges(ImageSource):
    """2 (largest - least coverage of 3x3 pixels) - 1, in [-1, 1]."""

    def __init__(self, shapes: Shapes):
        self.shapes, self.shape = shapes, (len(shapes), 1, *shapes.shape[2:])

    def read(self, indices: Tensor) -> Tensor:
        covered = coverage(self.shapes.factors(indices), self.shape[2])
        largest, least = F.max_pool2d(covered, 3, 1, 1), -F.max_pool2d(-covered, 3, 1, 1)
        return 2.0 * (largest - least) - 1.0


# ---- captions --------------------------------------------------------------------------------------------------------

COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # hues k/6
NAMES = ("disc", "square", "triangle", "ring", "cross")  # of KINDS
SIZES = {"small": (0.22, 0.30), "large": (0.40, 0.50)}
RELATIONS = ("left of", "right of", "above", "below")
SYMBOLS = " abcdefghijklmnopqrstuvwxyz"
CAPTION_LENGTH = 64
CAPTIONS = 5  # of a scene

# Kinds and colours that are never seen together in training: the zero-shot split.
UNSEEN = tuple((kind, hue) for kind in range(len(KINDS)) for hue in range(len(COLOURS)) if (kind + hue) % 5 == 0)
SEEN = tuple((kind, hue) for kind in range(len(KINDS)) for hue in range(len(COLOURS)) if (kind + hue) % 5)

ONE = (
    "a {size} {colour} {kind}",
    "there is a {size} {colour} {kind}",
    "one {kind} that is {colour} and {size}",
    "the picture shows a {size} {colour} {kind}",
    "a {kind} of {colour} colour and {size} size",
)
TWO = (
    "a {colour} {kind} {relation} a {other_colour} {other_kind}",
    "there is a {colour} {kind} {relation} a {other_colour} {other_kind}",
    "{colour} {kind} {relation} {other_colour} {other_kind}",
    "a {kind} in {colour} {relation} a {other_kind} in {other_colour}",
    "the {colour} {kind} is {relation} the {other_colour} {other_kind}",
)


@dataclass(frozen=True)
class Scene:
    """What is in each of N pictures: tensors [N]. ``relation`` is -1 where there is one shape, of ``size``."""

    kind: Tensor
    colour: Tensor
    size: Tensor
    relation: Tensor
    other_kind: Tensor
    other_colour: Tensor


class Scenes(ImageSource):
    """One shape or two on a dark background whose hue the text does not mention, and their captions in English.

    The condition "captions" is [5, 64]: five captions of each picture, as indices into ``SYMBOLS``, padded with spaces.
    Combinations of kind and colour in ``UNSEEN`` are in no picture, unless ``unseen``: then in every one.

    >>> scenes = Scenes(32)
    >>> scenes[:2].shape, scenes.conditions["captions"][:2].shape
    (torch.Size([2, 3, 32, 32]), torch.Size([2, 5, 64]))
    >>> read(scenes.conditions["captions"][0])[0] in describe(scenes.scenes(torch.tensor([0])), 0)
    True
    """

    def __init__(self, size: int = 32, length: int = LENGTH, seed: int = 0, *, unseen: bool = False):
        self.shape, self.seed, self.unseen = (length, 3, size, size), seed, unseen

    @property
    def conditions(self) -> dict[str, ImageSource]:
        return {"captions": _Captions(self)}

    def _drawn(self, indices: Tensor) -> Tensor:
        return uniform(self.seed + 1_000_003 * (1 + self.unseen), indices, 16)

    def scenes(self, indices: Tensor) -> Scene:
        """What is in the pictures of these indices, [N] int64."""
        drawn = self._drawn(indices)
        first = torch.tensor(UNSEEN if self.unseen else SEEN)[(drawn[:, 0] * (6 if self.unseen else 24)).long()]
        second = torch.tensor(SEEN)[(drawn[:, 1] * 24).long()]
        two = drawn[:, 2] >= 0.5
        relation = torch.where(two, (drawn[:, 3] * len(RELATIONS)).long(), -1)
        size = (drawn[:, 4] * len(SIZES)).long()
        return Scene(first[:, 0], first[:, 1], size, relation, second[:, 0], second[:, 1])

    def read(self, indices: Tensor) -> Tensor:
        scene, drawn, size = self.scenes(indices), self._drawn(indices), self.shape[2]
        two, n = scene.relation >= 0, len(indices)
        low, high = torch.tensor(list(SIZES.values()))[scene.size].unbind(1)
        radius = torch.where(two, 0.28 + 0.10 * drawn[:, 5], low + (high - low) * drawn[:, 5])
        # Along its axis the first shape is at -0.45 where it is left of the other or above it (y grows downwards).
        side = torch.tensor([-1.0, 1.0, -1.0, 1.0])[scene.relation.clamp(min=0)]
        along, across = side * 0.45 + 0.1 * (drawn[:, 6] - 0.5), 0.2 * (drawn[:, 7] - 0.5)
        vertical = scene.relation >= 2
        alone = 0.8 * (drawn[:, 8:10] - 0.5)
        x = torch.where(two, torch.where(vertical, across, along), alone[:, 0])
        y = torch.where(two, torch.where(vertical, along, across), alone[:, 1])
        zeros = torch.zeros(n)
        picture = 0.3 * colour(drawn[:, 10], saturation=0.5)[:, :, None, None].expand(n, 3, size, size)

        def put(
            picture: Tensor, kind: Tensor, hue: Tensor, x: Tensor, y: Tensor, radius: Tensor, turn: Tensor
        ) -> Tensor:
            covered = coverage(Factors(kind, zeros, x, y, radius, 2 * pi * turn, zeros, zeros), size)
            return torch.lerp(picture, colour(hue, saturation=0.85)[:, :, None, None].expand_as(picture), covered)

        hue = (scene.colour / 6 + 0.04 * (drawn[:, 11] - 0.5)) % 1.0
        picture = put(picture, scene.kind, hue, x, y, radius, drawn[:, 12])
        hue = (scene.other_colour / 6 + 0.04 * (drawn[:, 13] - 0.5)) % 1.0
        away = -side * 0.45 + 0.1 * (drawn[:, 9] - 0.5)
        x, y = (
            torch.where(vertical, 0.2 * (drawn[:, 8] - 0.5), away),
            torch.where(vertical, away, 0.2 * (drawn[:, 8] - 0.5)),
        )
        both = put(picture, scene.other_kind, hue, x, y, 0.28 + 0.10 * drawn[:, 14], drawn[:, 15])
        return torch.where(two[:, None, None, None], both, picture).mul(2.0).sub(1.0)


class _Captions(ImageSource):
    def __init__(self, scenes: Scenes):
        self.scenes, self.shape = scenes, (len(scenes), CAPTIONS, CAPTION_LENGTH)

    def read(self, indices: Tensor) -> Tensor:
        scene = self.scenes.scenes(indices)
        return torch.stack([torch.stack([spell(text) for text in describe(scene, i)]) for i in range(len(indices))])


def describe(scene: Scene, index: int) -> list[str]:
    """The five captions of one of the scenes."""
    words = {
        "kind": NAMES[scene.kind[index]],
        "colour": COLOURS[scene.colour[index]],
        "size": list(SIZES)[scene.size[index]],
        "relation": RELATIONS[scene.relation[index]],
        "other_kind": NAMES[scene.other_kind[index]],
        "other_colour": COLOURS[scene.other_colour[index]],
    }
    return [template.format(**words) for template in (TWO if scene.relation[index] >= 0 else ONE)]


def spell(text: str) -> Tensor:
    """A text as indices into ``SYMBOLS``, [64]; a ValueError names what cannot be spelt.

    >>> read(spell("a red ring")[None])
    ['a red ring']
    """
    text = text.lower()
    unknown = sorted(set(text) - set(SYMBOLS))
    if unknown or len(text) > CAPTION_LENGTH:
        raise ValueError(
            f"captions are of the letters a to z and spaces, {CAPTION_LENGTH} at most; got {len(text)} characters"
            + (f", {''.join(unknown)!r} among them" if unknown else "")
        )
    return torch.tensor([SYMBOLS.index(symbol) for symbol in text.ljust(CAPTION_LENGTH)])


def read(captions: Tensor) -> list[str]:
    """Captions [N, 64] as texts."""
    return ["".join(SYMBOLS[i] for i in caption).rstrip() for caption in captions.tolist()]


# ---- a future that is ambiguous --------------------------------------------------------------------------------------


class Turning(ImageSource):
    """A shape that turns by 12 degrees a frame; the sign of the last turn is drawn anew, so two futures are as likely.

    An image is the fifth frame; the condition "frames" is the four before it, [12, size, size]. As "pairs", from which
    a model translates, they are the same.

    >>> Turning(32).conditions["frames"][:2].shape
    torch.Size([2, 12, 32, 32])
    """

    TURN = pi / 15

    def __init__(self, size: int = 32, length: int = LENGTH, seed: int = 0):
        self.shapes = Shapes(size, length, seed)
        self.shape = self.shapes.shape

    @property
    def conditions(self) -> dict[str, ImageSource]:
        return {"frames": _Frames(self), "pairs": _Frames(self)}

    def _signs(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Of the turns before and of the last one: 1 or -1, [N]."""
        before, last = (2.0 * (uniform(self.shapes.seed + 7, indices, 2) >= 0.5).float() - 1.0).unbind(1)
        return before, last

    def _turned(self, indices: Tensor, turns: Tensor) -> Tensor:
        factors = self.shapes.factors(indices)
        return draw(replace(factors, angle=factors.angle + self.TURN * turns), self.shape[2])

    def frame(self, indices: Tensor, number: int) -> Tensor:
        """Frame 0 to 4, [N, 3, size, size]."""
        before, last = self._signs(indices)
        return self._turned(indices, before * min(number, 3) + (last if number == 4 else 0.0))

    def futures(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The two images that may follow: the shape turns on; it turns back. [N, 3, size, size] each."""
        before, _ = self._signs(indices)
        return self._turned(indices, 4.0 * before), self._turned(indices, 2.0 * before)

    def read(self, indices: Tensor) -> Tensor:
        return self.frame(indices, 4)


class _Frames(ImageSource):
    def __init__(self, turning: Turning):
        self.turning, self.shape = turning, (len(turning), 12, *turning.shape[2:])

    def read(self, indices: Tensor) -> Tensor:
        return torch.cat([self.turning.frame(indices, number) for number in range(4)], 1)


# ---- photographs -----------------------------------------------------------------------------------------------------


@cache
def _photographs() -> tuple[Tensor, ...]:
    """The two photographs that scikit-learn ships, [3, 427, 640] in [-1, 1]."""
    load_sample_image = extras.load("sklearn.datasets", "the data 'photos', which it ships,").load_sample_image
    names = ("china.jpg", "flower.jpg")
    return tuple(torch.tensor(load_sample_image(name)).permute(2, 0, 1) / 127.5 - 1.0 for name in names)


class Photos(ImageSource):
    """Crops of two photographs, half of them mirrored: of their left two thirds, or of the right third ``held_out``.

    >>> Photos(32)[:2].shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, size: int = 32, length: int = 10_000, seed: int = 0, *, held_out: bool = False):
        if not 4 <= size <= 192:
            raise ValueError(f"photos: size must be from 4 to 192, got {size}")
        self.shape, self.seed, self.held_out = (length, 3, size, size), seed, held_out

    def read(self, indices: Tensor) -> Tensor:
        size, crops = self.shape[2], []
        for drawn in uniform(self.seed, indices, 4):
            picture = _photographs()[int(drawn[0] * 2)]
            split = picture.shape[2] * 2 // 3
            picture = picture[:, :, split:] if self.held_out else picture[:, :, :split]
            top, left = (int(u * (extent - size + 1)) for u, extent in zip(drawn[1:3], picture.shape[1:]))
            crop = picture[:, top : top + size, left : left + size]
            crops.append(crop.flip(2) if drawn[3] >= 0.5 else crop)
        return torch.stack(crops) if crops else torch.empty(0, *self.shape[1:])
