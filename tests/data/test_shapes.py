"""Shapes: images by index alone, the same picture at every resolution, with the factors they say."""

import pytest
import torch
import torch.nn.functional as F

from gankern.data import EndlessBatches, Shapes
from gankern.data.shapes import KINDS, RANGES, Factors, draw


def one(kind="circle", size=64, **factors):
    values = {"hue": 0.0, "x": 0.0, "y": 0.0, "radius": 0.5, "angle": 0.0, "stripes": 2.0, "background": 0.5} | factors
    return draw(
        Factors(kind=torch.tensor([KINDS.index(kind)]), **{k: torch.tensor([v]) for k, v in values.items()}), size
    )[0]


def covered(image):
    """Where the shape is: it is red on a cyan background."""
    return image[0] > image[1]


@pytest.mark.parametrize("size", [4, 8, 37, 64, 1024])
def test_sizes(size):
    images = Shapes(size=size)[:2]
    assert images.shape == (2, 3, size, size)
    assert images.dtype == torch.float32
    assert images.min() >= -1.0 and images.max() <= 1.0


def test_an_image_depends_on_its_index_alone():
    shapes = Shapes(size=16)
    batch = shapes[torch.tensor([5, 999, 0, 99_999])]
    assert torch.equal(shapes[999], batch[1])
    assert torch.equal(shapes[-1], batch[3])
    assert torch.equal(Shapes(size=16, length=1000)[999], batch[1])
    assert not torch.equal(Shapes(size=16, seed=1)[999], batch[1])


def test_images_differ():
    assert len(torch.unique(Shapes(size=8)[:2000].flatten(1), dim=0)) == 2000


def test_factors_are_uniform_and_independent():
    factors = Shapes().factors(torch.arange(50_000))
    counts = factors.kind.bincount(minlength=len(KINDS)).double()
    assert (counts / 50_000 - 1 / len(KINDS)).abs().max() < 0.01
    values = [(getattr(factors, name) - low) / (high - low) for name, (low, high) in RANGES.items()]
    for value in values:
        assert 0.0 <= value.min() < 0.01 and 0.99 < value.max() <= 1.0
        assert abs(value.mean().item() - 0.5) < 0.01
        assert abs(value.var().item() - 1 / 12) < 0.005
    correlation = torch.corrcoef(torch.stack([factors.kind.float(), *values])) - torch.eye(8)
    assert correlation.abs().max() < 0.02
    neighbours = torch.corrcoef(torch.stack([values[0][:-1], values[0][1:]]))
    assert neighbours[0, 1].abs() < 0.02


@pytest.mark.parametrize(
    ("kind", "area"),
    # In units of radius²: πr²; (1.5)²; equilateral with circumradius 1; ring of 0.5..1; two bars of 2×0.6 less their 0.6².
    [("circle", torch.pi), ("square", 2.25), ("triangle", 1.2990), ("ring", 0.75 * torch.pi), ("cross", 2.04)],
)
def test_areas(kind, area):
    image = one(kind, size=512, angle=0.3)
    assert covered(image).float().mean().item() * 4 == pytest.approx(area * 0.25, rel=0.01)


def test_position_and_radius():
    pixels = covered(one("circle", size=256, x=0.25, y=-0.5, radius=0.3)).nonzero().float()
    centre = (pixels.mean(0) + 0.5) / 128 - 1
    torch.testing.assert_close(centre, torch.tensor([-0.5, 0.25]), atol=0.01, rtol=0)
    assert ((pixels.amax(0) - pixels.amin(0) + 1) / 256).tolist() == pytest.approx([0.3, 0.3], abs=0.01)


def test_hue():
    middle = one("square", hue=1 / 3, stripes=2.0, size=64)[:, 28:36, 28:36].mean((1, 2))
    assert middle.argmax() == 1  # green


@pytest.mark.parametrize("size", [8, 32, 128])
def test_half_the_resolution_is_the_same_picture(size):
    """What ProGAN's growth needs: 2×2 means of an image are nearly the image of half the size."""
    fine, coarse = Shapes(size=2 * size)[:64], Shapes(size=size)[:64]
    assert (F.avg_pool2d(fine, 2) - coarse).abs().mean() < 0.01
    unrelated = Shapes(size=size, seed=1)[:64]
    assert (F.avg_pool2d(fine, 2) - unrelated).abs().mean() > 0.1


def test_batches_of_a_source_are_those_of_its_tensor():
    shapes = Shapes(size=8, length=50)
    source, tensor = EndlessBatches(shapes, 8, seed=1), EndlessBatches(shapes[:], 8, seed=1)
    for _ in range(10):
        assert torch.equal(next(source), next(tensor))


def test_refusals():
    with pytest.raises(ValueError, match="size must be from 4 to 1024, got 2048"):
        Shapes(size=2048)
    with pytest.raises(ValueError, match="length must be at least 1"):
        Shapes(length=0)
    with pytest.raises(IndexError):
        Shapes(length=10)[10]
