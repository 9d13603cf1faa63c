"""The toy distributions against their recipes, and scikit-learn's Swiss roll."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import make_swiss_roll

from gankern import data
from gankern.data import POINTS, EndlessPoints


def draw(name, number, seed=0):
    return POINTS[name].sample(number, torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(
    ("name", "modes", "std"),
    [
        (
            "8gaussians",
            [(2 * np.cos(k * np.pi / 4) / 1.414, 2 * np.sin(k * np.pi / 4) / 1.414) for k in range(8)],
            0.02 / 1.414,
        ),
        ("25gaussians", [(2 * i / 2.828, 2 * j / 2.828) for i in range(-2, 3) for j in range(-2, 3)], 0.05 / 2.828),
        ("two_blobs", [(-1.0, -0.5), (1.0, 0.5)], 0.25),
    ],
)
def test_mixtures(name, modes, std):
    points = POINTS[name]
    assert points.std == pytest.approx(std)
    assert len({tuple(np.round(mode, 6)) for mode in modes}) == len(modes)
    assert torch.cdist(points.modes.double(), torch.tensor(modes, dtype=torch.float64)).amin(0).max() < 1e-6
    samples = draw(name, 40_000)
    distances = torch.cdist(samples, points.modes.double())
    nearest = distances.argmin(1)
    counts = nearest.bincount(minlength=len(modes)).numpy()
    assert stats.chisquare(counts).pvalue > 1e-4  # modes are equally likely
    residual = (samples - points.modes.double()[nearest]).flatten().numpy() / std
    assert stats.kstest(residual, "norm").pvalue > 1e-4


def test_swiss_roll_is_scikit_learns():
    ours = draw("swiss_roll", 20_000).numpy()
    theirs = make_swiss_roll(20_000, noise=0.25, random_state=1)[0][:, [0, 2]] / 7.5
    for project in (lambda p: p[:, 0], lambda p: p[:, 1], lambda p: np.hypot(*p.T), lambda p: p.sum(1)):
        assert stats.ks_2samp(project(ours), project(theirs)).pvalue > 1e-3


def test_the_ring_and_the_line():
    ring, line = draw("ring", 20_000), draw("line", 20_000)
    around = torch.atan2(ring[:, 1], ring[:, 0]) / (2 * np.pi) + 0.5
    assert stats.kstest(around.numpy(), "uniform").pvalue > 1e-4
    # The noise is round, so the radius is Rice distributed.
    assert stats.kstest(ring.norm(dim=1).numpy(), stats.rice(1.4 / 0.05, scale=0.05).cdf).pvalue > 1e-4
    direction = torch.tensor([1.4, 0.7]).double() / np.hypot(1.4, 0.7)
    across = line @ torch.stack([-direction[1], direction[0]])
    assert stats.kstest(across.numpy() / 0.05, "norm").pvalue > 1e-4
    assert (line @ direction).abs().quantile(0.5).item() == pytest.approx(0.5 * np.hypot(1.4, 0.7), rel=0.03)


@pytest.mark.parametrize("name", POINTS)
def test_batches_resume(name):
    torch.manual_seed(1)
    straight, resumed = EndlessPoints(POINTS[name], 16, seed=3), EndlessPoints(POINTS[name], 16, seed=4)
    first = next(straight)
    assert first.shape == (16, 2)
    assert first.dtype == torch.float32
    resumed.load_state_dict(straight.state_dict())
    torch.manual_seed(2)  # what others draw does not matter
    assert torch.equal(next(straight), next(resumed))


def test_refusal():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        EndlessPoints(data.points.SWISS_ROLL, 0, seed=0)
