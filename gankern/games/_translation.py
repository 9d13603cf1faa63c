"""What games that make images of images are measured by: colours, details, and outlines."""

from math import pi
from typing import Any

import torch
from torch import Tensor

from gankern import metrics
from gankern.data.drawn import LENGTH, _Domain, with_stripes
from gankern.data.shapes import coverage
from gankern.games._measures import read_classes


def saturation(images: Tensor, covered: Tensor) -> Tensor:
    """The mean of (largest - smallest) / largest of the three colours inside the shapes."""
    colours = (images.clamp(-1, 1) + 1) / 2
    largest, smallest = colours.amax(1, keepdim=True), colours.amin(1, keepdim=True)
    inside = covered > 0.5
    return ((largest - smallest) / largest.clamp(min=1e-3))[inside].mean()


def detail(images: Tensor) -> Tensor:
    """The mean square of the finest band of the Laplacian pyramid."""
    return metrics.laplacian_pyramid(images, min(images.shape[2:]) // 2)[0].square().mean()


def foreground_iou(images: Tensor, covered: Tensor) -> Tensor:
    """Overlap of the shape with what is nearer to the mean colour inside it than to that of its background, the mean
    over the images."""
    inside = covered > 0.5
    outside = ~inside

    def mean(where: Tensor) -> Tensor:
        return (images * where).sum((2, 3), keepdim=True) / where.sum((2, 3), keepdim=True).clamp(min=1)

    distance = [(images - mean(where)).square().sum(1, keepdim=True) for where in (inside, outside)]
    found = distance[0] < distance[1]
    union = (found | inside).sum((1, 2, 3)).clamp(min=1)
    return ((found & inside).sum((1, 2, 3)) / union).mean()


def hue_distance(images: Tensor, others: Tensor, covered: Tensor) -> Tensor:
    """The mean distance between the hues of the mean colours inside the shapes; a circle is 1."""
    inside = (covered > 0.9).to(images.dtype)

    def hue(x: Tensor) -> Tensor:
        red, green, blue = ((x * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)).unbind(1)
        return torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue) / (2 * pi)

    distance = (hue(images) - hue(others)).abs() % 1.0
    return torch.minimum(distance, 1.0 - distance).mean()


def hidden_pairs(images: Any, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """(plain, striped, coverage, kind) of the same shapes, never trained on; None where the data are not ``plain``."""
    if not isinstance(images, _Domain) or images.striped:
        return None
    indices = torch.arange(2 * LENGTH, 2 * LENGTH + number)
    factors = images.factors(indices)
    return images.read(indices), with_stripes(images, indices), coverage(factors, images.shape[2]), factors.kind


def stripe_figures(
    to_b: Tensor, to_a: Tensor, plain: Tensor, striped: Tensor, covered: Tensor, kind: Tensor
) -> dict[str, float]:
    """Of plain shapes with stripes made on them, ``to_b``, and of striped ones without, ``to_a``: the energy of the
    finest Laplacian band, as a share of what striped and plain ones have (``stripes_of_b``, ``stripes_of_a``); how
    often a classifier of real images sees the kind that was there (``kind_as_b``, ``kind_as_a``); and the mean distance
    of hues, of a circle of 1 (``hue_error``)."""
    side = plain.shape[-1]
    found = {
        "stripes_of_b": detail(to_b) / detail(striped),
        "stripes_of_a": detail(to_a) / detail(plain),
        "kind_as_b": (read_classes(to_b, "striped", side) == kind).float().mean(),
        "kind_as_a": (read_classes(to_a, "plain", side) == kind).float().mean(),
        "hue_error": 0.5 * (hue_distance(to_b, plain, covered) + hue_distance(to_a, striped, covered)),
    }
    return {name: float(value) for name, value in found.items()}
