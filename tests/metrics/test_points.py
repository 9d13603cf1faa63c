"""Transport distances, mode coverage and Parzen windows against SciPy, scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from sklearn.neighbors import KernelDensity

from gankern import metrics
from gankern.data import POINTS

RANDOM = np.random.default_rng(0)


def tensor(array):
    return torch.from_numpy(np.asarray(array, dtype=np.float64))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (50, 31), (1, 20), (400, 1000)])
def test_earth_movers_distance_in_one_dimension(n, m):
    x, y = RANDOM.normal(size=n), RANDOM.normal(1, 2, size=m)
    expected = stats.wasserstein_distance(x, y)
    assert metrics.earth_movers_distance(tensor(x)[:, None], tensor(y)[:, None]) == pytest.approx(expected, rel=1e-10)


def test_ties_in_one_dimension():
    x, y = RANDOM.integers(0, 4, 30), RANDOM.integers(0, 4, 20)
    expected = stats.wasserstein_distance(x, y)
    assert metrics.earth_movers_distance(tensor(x)[:, None], tensor(y)[:, None]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dimensions", [2, 5])
def test_earth_movers_distance_is_the_best_assignment(dimensions):
    x, y = RANDOM.normal(size=(40, dimensions)), RANDOM.normal(0.5, 1.5, size=(40, dimensions))
    cost = np.linalg.norm(x[:, None] - y[None], axis=2)
    rows, columns = optimize.linear_sum_assignment(cost)
    assert metrics.earth_movers_distance(tensor(x), tensor(y)) == pytest.approx(cost[rows, columns].mean(), rel=1e-9)


def test_earth_movers_distance_of_sets_of_different_sizes():
    """Against the linear program itself, by SciPy."""
    x, y = RANDOM.normal(size=(6, 3)), RANDOM.normal(size=(4, 3))
    cost = np.linalg.norm(x[:, None] - y[None], axis=2)
    leaves = np.kron(np.eye(6), np.ones(4))
    arrives = np.kron(np.ones(6), np.eye(4))
    plan = optimize.linprog(
        cost.ravel(), A_eq=np.vstack([leaves, arrives]), b_eq=np.r_[np.full(6, 1 / 6), np.full(4, 1 / 4)]
    )
    assert metrics.earth_movers_distance(tensor(x), tensor(y)) == pytest.approx(plan.fun, rel=1e-8)


def test_earth_movers_distance_of_a_shift():
    points = tensor(RANDOM.normal(size=(100, 3)))
    shift = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    assert metrics.earth_movers_distance(points, points + shift) == pytest.approx(5.0)
    assert metrics.earth_movers_distance(points, points[torch.randperm(100)]) == pytest.approx(0.0, abs=1e-12)


def test_earth_movers_distance_refuses():
    points = torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"fake must be \[N, D\]"):
        metrics.earth_movers_distance(points, torch.randn(5))
    with pytest.raises(ValueError, match="of one kind"):
        metrics.earth_movers_distance(points, torch.randn(5, 3))
    with pytest.raises(ValueError, match="1 of the 10 values of real are not finite"):
        points[2, 1] = float("nan")
        metrics.earth_movers_distance(points, torch.randn(5, 2))


def test_wasserstein_estimate():
    """An optimal critic of two point sets on a line, apart from each other, is the identity."""
    real, fake = torch.rand(700, 1) + 5.0, torch.rand(300, 1)
    estimate = metrics.wasserstein_estimate(torch.nn.Identity(), real, fake)
    assert estimate == pytest.approx(metrics.earth_movers_distance(real, fake), rel=1e-5)
    with pytest.raises(ValueError, match="gave 1400 values for 700 samples"):
        metrics.wasserstein_estimate(lambda x: torch.cat([x, x], 1), real, fake)


# ------------------------------------------------------------------------------------------------------------


def test_true_samples_cover_all_modes():
    """In the plane the share within 3 standard deviations is 1 − exp(−9/2)."""
    for name in ("8gaussians", "25gaussians"):
        points = POINTS[name]
        samples = points.sample(50_000, torch.Generator().manual_seed(0))
        coverage = metrics.mode_coverage(samples, points.modes, points.std)
        assert coverage.covered == coverage.modes == len(points.modes)
        assert coverage.high_quality == pytest.approx(1 - math.exp(-4.5), abs=0.002)
        assert coverage.counts.sum() == round(coverage.high_quality * 50_000)


def test_coverage_by_hand():
    modes = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    samples = torch.tensor([[0.0, 3.0], [0.0, 3.1], [9.0, 1.0], [5.0, 5.0]])
    coverage = metrics.mode_coverage(samples, modes, std=1.0)
    assert (coverage.covered, coverage.high_quality, coverage.counts.tolist()) == (2, 0.5, [1, 1, 0])
    assert metrics.mode_coverage(samples, modes, std=1.0, radius=3.2).counts.tolist() == [2, 1, 0]
    assert metrics.mode_coverage(samples, modes, std=1.0, radius=3.2, at_least=2).covered == 1


def test_collapse_is_seen():
    ring = POINTS["8gaussians"]
    coverage = metrics.mode_coverage(ring.modes[:1].repeat(1000, 1), ring.modes, ring.std)
    assert (coverage.covered, coverage.high_quality) == (1, 1.0)


def test_coverage_refuses():
    modes = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="samples of 3 dimensions, modes of 2"):
        metrics.mode_coverage(torch.zeros(2, 3), modes, 1.0)
    with pytest.raises(ValueError, match="std must be positive"):
        metrics.mode_coverage(torch.zeros(2, 2), modes, 0.0)
    with pytest.raises(ValueError, match="not finite"):
        metrics.mode_coverage(torch.full((2, 2), float("nan")), modes, 1.0)


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("dimensions", [1, 3, 64])
def test_parzen_is_a_kernel_density(sigma, dimensions):
    samples, points = RANDOM.normal(size=(300, dimensions)), RANDOM.normal(size=(600, dimensions))
    got = metrics.parzen_log_likelihood(tensor(points), tensor(samples), sigma).numpy()
    squares = ((points[:, None] - samples[None]) ** 2).sum(2)
    densities = special.logsumexp(-squares / (2 * sigma**2), axis=1)
    np.testing.assert_allclose(
        got, densities - np.log(300) - dimensions * np.log(sigma * np.sqrt(2 * np.pi)), rtol=1e-9, atol=1e-10
    )
    # scikit-learn's tree is only right where some sample is near.
    estimate = KernelDensity(kernel="gaussian", bandwidth=sigma).fit(samples).score_samples(points)
    near = squares.min(1) < (4 * sigma) ** 2
    np.testing.assert_allclose(got[near], estimate[near], rtol=1e-6, atol=1e-6)


def test_parzen_of_one_sample_is_a_gaussian():
    got = metrics.parzen_log_likelihood(tensor([[1.0, 2.0]]), tensor([[0.0, 0.0]]), 0.5)
    assert got.item() == pytest.approx(stats.multivariate_normal([0, 0], 0.25 * np.eye(2)).logpdf([1, 2]))


def test_sigma_is_the_likeliest():
    samples, validation = tensor(RANDOM.normal(size=(2000, 1))), tensor(RANDOM.normal(size=(500, 1)))
    candidates = [0.001, 0.03, 0.3, 3.0, 30.0]
    assert metrics.choose_sigma(validation, samples, candidates) == 0.3
    assert 0.1 <= metrics.choose_sigma(validation, samples) <= 1.0
    with pytest.raises(ValueError, match="candidates is empty"):
        metrics.choose_sigma(validation, samples, [])
    with pytest.raises(ValueError, match="sigma must be positive"):
        metrics.parzen_log_likelihood(validation, samples, 0.0)


def test_parzen_does_not_depend_on_where_the_points_are():
    random = torch.Generator().manual_seed(0)
    points, samples = (torch.randn(n, 3, generator=random, dtype=torch.float64) for n in (40, 50))
    gaps = (points[:, None] - samples[None]).square().sum(2)
    expected = (-0.5 * gaps / 0.01).logsumexp(1) - np.log(50) - 3 * np.log(0.1 * np.sqrt(2 * np.pi))
    for offset in (0.0, 1e6):
        got = metrics.parzen_log_likelihood(points + offset, samples + offset, 0.1)
        assert (got - expected).abs().max() < 1e-4
