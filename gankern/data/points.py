"""Distributions in the plane: the toy sets of WGAN-GP (Gulrajani 2017, arXiv 1704.00028), and three simpler ones.

Each is without end: ``sample`` draws as many points as are asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import shown, tensor, whole
from gankern.data.batches import part_of


@dataclass(frozen=True)
class Points:
    """A distribution in the plane. ``modes`` [K, 2] and ``std`` describe a mixture of Gaussians; None where it is none.

    >>> EIGHT_GAUSSIANS.sample(100, torch.Generator().manual_seed(0)).shape
    torch.Size([100, 2])
    """

    sample: Callable[[int, torch.Generator | None], Tensor]
    modes: Tensor | None = None
    std: float | None = None


def _mixture(modes: Tensor, std: float) -> Points:
    def sample(number: int, random: torch.Generator | None = None) -> Tensor:
        chosen = torch.randint(len(modes), (number,), generator=random)
        return modes[chosen] + std * torch.randn(number, 2, generator=random)

    return Points(sample, modes, std)


def _swiss_roll(number: int, random: torch.Generator | None = None) -> Tensor:
    """scikit-learn's make_swiss_roll(noise=0.25), its columns 0 and 2, divided by 7.5."""
    angle = 1.5 * pi * (1.0 + 2.0 * torch.rand(number, generator=random))
    roll = torch.stack([angle * angle.cos(), angle * angle.sin()], 1)
    return (roll + 0.25 * torch.randn(number, 2, generator=random)) / 7.5


def _ring(number: int, random: torch.Generator | None = None) -> Tensor:
    """Radius 1.4, the angle uniform, noise of std 0.05."""
    angle = 2 * pi * torch.rand(number, generator=random)
    circle = 1.4 * torch.stack([angle.cos(), angle.sin()], 1)
    return circle + 0.05 * torch.randn(number, 2, generator=random)


def _line(number: int, random: torch.Generator | None = None) -> Tensor:
    """From (−1.4, −0.7) to (1.4, 0.7), uniform, noise of std 0.05."""
    along = 2.0 * torch.rand(number, 1, generator=random) - 1.0
    return along * torch.tensor([1.4, 0.7]) + 0.05 * torch.randn(number, 2, generator=random)


_turns = torch.arange(8) * (2 * pi / 8)
_steps = torch.arange(-2.0, 3.0)

# Radius 2 and std 0.02, all divided by 1.414; the grid 2·{−2..2}² and std 0.05, all divided by 2.828.
EIGHT_GAUSSIANS = _mixture(2.0 / 1.414 * torch.stack([_turns.cos(), _turns.sin()], 1), 0.02 / 1.414)
TWENTY_FIVE_GAUSSIANS = _mixture(2.0 / 2.828 * torch.cartesian_prod(_steps, _steps), 0.05 / 2.828)
SWISS_ROLL = Points(_swiss_roll)
RING, LINE, TWO_BLOBS = Points(_ring), Points(_line), _mixture(torch.tensor([[-1.0, -0.5], [1.0, 0.5]]), 0.25)

POINTS = {
    "8gaussians": EIGHT_GAUSSIANS,
    "25gaussians": TWENTY_FIVE_GAUSSIANS,
    "swiss_roll": SWISS_ROLL,
    "ring": RING,
    "line": LINE,
    "two_blobs": TWO_BLOBS,
}


class EndlessPoints:
    """Batches [batch_size, 2] of new points for ever, from a seed, stopped and resumed anywhere.

    ``share`` (i, n) yields the i-th of n equal parts of every batch, as ``EndlessBatches`` does.

    >>> next(EndlessPoints(SWISS_ROLL, 256, seed=0)).shape
    torch.Size([256, 2])
    """

    def __init__(self, points: Points, batch_size: int, seed: int, share: tuple[int, int] = (0, 1)):
        if not isinstance(points, Points):
            raise TypeError(f"points must be Points, got {shown(points)}")
        self.points = points
        self.batch_size = batch_size = whole("batch_size", batch_size, least=1)
        self.share = part_of(batch_size, share)
        self.random = torch.Generator().manual_seed(check_seed("seed", seed))

    def __iter__(self) -> "EndlessPoints":
        return self

    def __next__(self) -> Tensor:
        return self.points.sample(self.batch_size, self.random)[self.share]

    def state_dict(self) -> dict:
        return {"random": self.random.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.random.set_state(tensor("the saved random state", state["random"]))
