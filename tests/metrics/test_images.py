"""Inception score, FID, KID and sliced Wasserstein distance against SciPy, NumPy and closed forms."""

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage, stats

from gankern import data, metrics
from gankern.metrics import Extractor

RANDOM = np.random.default_rng(0)


def tensor(array):
    return torch.from_numpy(np.asarray(array, dtype=np.float64))


def test_inception_score_by_its_definition():
    logits = RANDOM.normal(0, 3, size=(1000, 10))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = [
        np.exp(np.mean([stats.entropy(p, part.mean(0)) for p in part])) for part in np.array_split(probabilities, 10)
    ]
    mean, std = metrics.inception_score(tensor(logits))
    assert mean == pytest.approx(np.mean(scores), rel=1e-10)
    assert std == pytest.approx(np.std(scores), rel=1e-8)


def test_inception_score_at_its_ends():
    assert metrics.inception_score(torch.randn(1, 7).repeat(100, 1)) == pytest.approx((1.0, 0.0), abs=1e-6)
    certain = 1000.0 * torch.eye(7).repeat(20, 1)  # exp(−1000) is 0: 0·log 0 must be 0
    assert metrics.inception_score(certain, splits=2) == pytest.approx((7.0, 0.0), rel=1e-6)
    with pytest.raises(ValueError, match="splits must be from 1 to the 5"):
        metrics.inception_score(torch.randn(5, 3))


def test_frechet_distance_against_scipy():
    real = RANDOM.normal(size=(500, 20)) @ RANDOM.normal(size=(20, 20))
    fake = RANDOM.normal(0.3, 1.0, size=(400, 20)) @ RANDOM.normal(size=(20, 20))
    cov_real, cov_fake = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(
        cov_real + cov_fake - 2 * linalg.sqrtm(cov_real @ cov_fake).real
    )
    assert metrics.frechet_distance(tensor(real), tensor(fake)) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_gaussians():
    """One dimension: (μ₁ − μ₂)² + (σ₁ − σ₂)². Exact here, as the samples' own moments are made to fit."""
    x = RANDOM.normal(size=1000)
    x = (x - x.mean()) / x.std(ddof=1)
    assert metrics.frechet_distance(tensor(2 + 3 * x)[:, None], tensor(-1 + x)[:, None]) == pytest.approx(9 + 4)


def test_frechet_distance_where_covariances_are_singular():
    """Fewer samples than features: SciPy's root of the product turns complex or inexact there."""
    real = RANDOM.normal(size=(10, 50))
    assert metrics.frechet_distance(tensor(real), tensor(real)) == pytest.approx(0.0, abs=1e-5)
    assert metrics.frechet_distance(tensor(real), tensor(real + 1.0)) == pytest.approx(50.0, abs=1e-5)


def test_kernel_distance_by_its_definition():
    """One subset of everything: the unbiased estimator with explicit loops."""
    x, y = RANDOM.normal(size=(12, 5)), RANDOM.normal(0.5, 1.0, size=(12, 5))

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    within = [np.mean([kernel(s[i], s[j]) for i in range(12) for j in range(12) if i != j]) for s in (x, y)]
    between = np.mean([kernel(a, b) for a in x for b in y])
    mean, std = metrics.kernel_distance(tensor(x), tensor(y), subsets=1, subset_size=12)
    assert mean == pytest.approx(sum(within) - 2 * between, rel=1e-9)
    assert std == 0.0


def test_kernel_distance_is_unbiased():
    features = tensor(RANDOM.normal(size=(4000, 8)))
    mean, std = metrics.kernel_distance(features[:2000], features[2000:], subsets=200, subset_size=100)
    assert abs(mean) < 3 * std / np.sqrt(200 / 20)
    with pytest.raises(ValueError, match="subset_size must be from 2 to the 50 samples"):
        metrics.kernel_distance(features, features[:50])


# ------------------------------------------------------------------------------------------------------------


def test_laplacian_pyramid_against_scipy():
    """Bands as SciPy's binomial filter with mirrored edges gives them; and their sum is the image again."""
    image = RANDOM.normal(size=(64, 64))
    taps = np.array([1, 4, 6, 4, 1]) / 16

    def smooth(x, gain=1.0):
        for axis in (0, 1):
            x = ndimage.correlate1d(x, gain * taps, axis=axis, mode="mirror")
        return x

    expected, x = [], image
    while len(x) > 16:
        coarse = smooth(x)[::2, ::2]
        spread = np.zeros_like(x)
        spread[::2, ::2] = coarse
        expected.append(x - smooth(spread, 2.0))
        x = coarse
    bands = metrics.laplacian_pyramid(tensor(image)[None, None])
    for got, band in zip(bands, [*expected, x], strict=True):
        np.testing.assert_allclose(got[0, 0].numpy(), band, atol=1e-12)


def test_bands_of_a_constant_are_zero():
    bands = metrics.laplacian_pyramid(torch.full((1, 3, 64, 64), 0.7))
    for band in bands[:-1]:
        torch.testing.assert_close(band, torch.zeros_like(band), atol=1e-6, rtol=0)
    torch.testing.assert_close(bands[-1], torch.full((1, 3, 16, 16), 0.7))


def test_sliced_distance_of_a_shift():
    """Along direction d a shift by s moves everything by ⟨d, s⟩; its mean over the circle is 2|s|/π."""
    points = tensor(RANDOM.normal(size=(50, 2)))
    shift = torch.tensor([3.0, 4.0], dtype=torch.float64)
    distance = metrics.sliced_wasserstein(points, points + shift, projections=20_000)
    assert distance == pytest.approx(5 * 2 / np.pi, rel=0.02)


def test_sliced_distance_in_one_dimension_is_the_earth_movers():
    x, y = tensor(RANDOM.normal(size=(80, 1))), tensor(RANDOM.normal(1, 2, size=(80, 1)))
    assert metrics.sliced_wasserstein(x, y, 3) == pytest.approx(stats.wasserstein_distance(x[:, 0], y[:, 0]))


def test_laplacian_swd_sees_at_which_scale_images_differ():
    random = torch.Generator().manual_seed(0)
    shapes = data.Shapes(size=64)
    real, also_real = shapes[:64], shapes[64:128]
    noisy = also_real + 0.1 * torch.randn(also_real.shape, generator=random)
    same, fine = (metrics.laplacian_swd(real, other, patches=32, projections=64) for other in (also_real, noisy))
    assert list(same) == [64, 32, 16]
    assert fine[64] > 3 * same[64]  # noise is in the finest band most of all
    assert fine[16] < 1.5 * same[16]
    assert metrics.laplacian_swd(real, real, patches=8, projections=16, seed=1) != same
    assert metrics.laplacian_swd(real, noisy, 32, 64) == fine  # one seed, one number


def test_laplacian_swd_refuses():
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="as many images"):
        metrics.laplacian_swd(images, images[:1])
    for size in (8, 24):
        small = torch.zeros(2, 3, size, size)
        with pytest.raises(ValueError, match=f"power of two from 16 up, got {size}x{size}"):
            metrics.laplacian_swd(small, small)
    with pytest.raises(ValueError, match="fake are not finite"):
        metrics.laplacian_swd(images, images / 0.0)


# ------------------------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    def forward(self, images):
        flat = images.flatten(1)
        return flat, flat[:, :3]


def test_extractor_of_a_torchscript_file(tmp_path):
    torch.jit.script(Network()).save(tmp_path / "network.pt")
    images = torch.randn(250, 1, 4, 4)
    result = metrics.load(tmp_path / "network.pt", prepare=lambda x: 2 * x)(images)
    assert torch.equal(result.features, 2 * images.flatten(1))
    assert torch.equal(result.logits, 2 * images.flatten(1)[:, :3])


def test_extractor_of_a_module_in_evaluation_mode():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5))
    images = torch.randn(120, 1, 2, 2)
    result = Extractor(network)(images)
    assert torch.equal(result.features, images.flatten(1))
    assert result.logits is None


def test_extractor_of_a_lazy_source():
    shapes = data.Shapes(size=8, length=230)
    assert torch.equal(Extractor(torch.nn.Flatten())(shapes).features, shapes[:].flatten(1))


def test_extractor_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"must return features \[4, D\] .* got \(4, 1, 2, 2\)"):
        Extractor(torch.nn.Identity())(torch.zeros(4, 1, 2, 2))
    with pytest.raises(ValueError, match="no images"):
        Extractor(torch.nn.Flatten())(torch.zeros(0, 1, 2, 2))
    with pytest.raises(FileNotFoundError, match="missing"):
        metrics.load(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt is not a TorchScript file"):
        metrics.load(tmp_path / "text.pt")


def test_trained_classifier():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    extractor, accuracy = metrics.train_classifier("digits")
    assert accuracy > 0.95
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers are touched
    again, _ = metrics.train_classifier("digits")
    images = data.load("digits")
    features = extractor(images)
    assert torch.equal(features.features, again(images).features)
    assert features.features.shape == (1797, 64) and features.logits.shape == (1797, 10)

    # Real digits look like real digits, noise does not.
    halves = features.features[::2], features.features[1::2]
    noise = extractor(torch.rand(900, 1, 8, 8) * 2 - 1)
    assert metrics.frechet_distance(*halves) < 0.05 * metrics.frechet_distance(halves[0], noise.features)
    assert metrics.inception_score(features.logits[torch.randperm(1797)])[0] > 7
    assert metrics.inception_score(noise.logits)[0] < 4


def test_trained_is_kept():
    assert metrics.trained("digits") is metrics.trained("digits")
