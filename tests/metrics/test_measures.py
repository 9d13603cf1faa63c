"""Nearest examples, different bins, PSNR and SSIM, transport plans, labels: closed forms and independent values."""

from math import log, log10

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images

from gankern import data, metrics

# ------------------------------------------------------------------------------------------------------------
# Nearest training examples


def test_nearest_examples_against_all_distances():
    torch.manual_seed(0)
    samples, training = torch.randn(7, 2, 3, 3), torch.randn(600, 2, 3, 3)  # more than are looked at at once
    training[300] = samples[2]
    training[550] = samples[2]  # the first of two wins
    found = metrics.nearest_examples(samples, training)
    table = (samples.flatten(1)[:, None].double() - training.flatten(1)[None].double()).norm(dim=2)
    torch.testing.assert_close(found.distance, table.min(1).values)
    assert torch.equal(found.index, table.argmin(1)) and found.index[2] == 300 and found.distance[2] == 0.0
    picture = metrics.beside_nearest(samples, training)
    assert torch.equal(picture[0::2], samples) and torch.equal(picture[1::2], training[found.index])


def test_nearest_examples_of_images_that_are_read():
    shapes = data.Shapes(size=8, length=300)
    found = metrics.nearest_examples(shapes[torch.tensor([290, 7])], shapes)
    assert found.index.tolist() == [290, 7] and found.distance.tolist() == [0.0, 0.0]


def test_memorisation():
    torch.manual_seed(0)
    training, held_out, fresh = torch.randn(3, 400, 2)
    assert metrics.memorisation(training[:50], training, held_out) == 1.0
    assert metrics.memorisation(held_out, training, held_out) == 0.5  # ties count half
    assert abs(metrics.memorisation(fresh, training, held_out) - 0.5) < 0.05
    assert metrics.memorisation(fresh + 9, training, held_out) < 0.01
    pairs = [(0.0, 1.0), (0.0, 3.0), (2.0, 1.0), (2.0, 3.0), (1.0, 1.0), (1.0, 3.0)]  # (of a sample, of held out)
    right = sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    points = [torch.tensor(x)[:, None] for x in ([0.0, 2.0, 1.0], [0.0], [1.0, 3.0])]
    assert metrics.memorisation(*points) == pytest.approx(right)


# ------------------------------------------------------------------------------------------------------------
# Different bins


def test_two_proportion_test_by_hand():
    """1,000 and 500 samples; the first bin's shares 0.50 and 0.56 differ by 2.19 standard errors, 0.50 and 0.55 by
    1.83. Bins that are empty in both sets are equal."""
    real = torch.tensor([500, 500, 0])
    assert metrics.compare_histograms(real, torch.tensor([280, 220, 0])).ndb == 2
    found = metrics.compare_histograms(real, torch.tensor([275, 225, 0]))
    assert found.ndb == 0 and metrics.compare_histograms(real, torch.tensor([275, 225, 0]), level=0.07).ndb == 2
    p, q, h = (0.5, 0.5), (0.55, 0.45), (0.525, 0.475)
    right = 0.5 * sum(a * log(a / c) + b * log(b / c) for a, b, c in zip(p, q, h))
    assert found.js == pytest.approx(right, abs=1e-12) and found.share == 0.0
    apart = metrics.compare_histograms(torch.tensor([9, 0]), torch.tensor([0, 4]))
    assert apart.js == pytest.approx(log(2)) and apart.ndb == 2


def test_different_bins_of_equal_and_of_lost_modes():
    torch.manual_seed(0)
    ring = data.POINTS["8gaussians"]
    real, again = (ring.sample(4000, torch.Generator().manual_seed(i)) for i in (0, 1))
    same = metrics.different_bins(real, again, bins=40)
    assert same.share < 0.15 and same.js < 0.01 and same.real.sum() == same.fake.sum() == 4000
    half = metrics.different_bins(real, again[again[:, 0] > 0], bins=40)
    assert half.share > 0.5 and 0.15 < half.js < log(2)


# ------------------------------------------------------------------------------------------------------------
# PSNR and SSIM


def photographs():
    """Two uint8 images [60, 80, 3]: a crop, and the crop with noise."""
    crop = load_sample_images().images[0][100:160, 200:280]
    noise = np.random.RandomState(0).randint(-30, 31, crop.shape)
    return crop, np.clip(crop.astype(int) + noise, 0, 255).astype(np.uint8)


def as_tensor(image):
    return torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1.0


@pytest.mark.parametrize(
    "options, psnr, ssim",
    [
        ({"channels": "all"}, 23.346104660593795, 0.8122531505027876),
        ({}, 28.144887005178198, 0.9006961693791699),
        ({"border": 4}, 28.156155351669874, 0.9045143145588519),
    ],
)
def test_what_scikit_image_says(options, psnr, ssim):
    """scikit-image 0.26: peak_signal_noise_ratio, and structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False), data_range=255; on Y by the formula of `luma`."""
    a, b = map(as_tensor, photographs())  # float32, which rounding to 8 bits makes exact
    torch.testing.assert_close(metrics.psnr(b, a, **options).item(), psnr, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(metrics.ssim(b, a, **options).item(), ssim, rtol=1e-12, atol=0.0)


def test_ssim_against_scipys_filter():
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 1, 24, 30, dtype=torch.float64) * 2 - 1

    def smooth(z):
        return gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]

    for a, b, found in zip(x, y, metrics.ssim(x, y, channels="all", rounded=False)):
        a, b = ((z[0].numpy() + 1) * 127.5 for z in (a, b))
        ma, mb = smooth(a), smooth(b)
        va, vb, cov = smooth(a * a) - ma**2, smooth(b * b) - mb**2, smooth(a * b) - ma * mb
        c1, c2 = 2.55**2, 7.65**2
        right = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
        assert found.item() == pytest.approx(right.mean(), rel=1e-10)


@pytest.mark.parametrize(("side", "scales"), [(180, None), (180, 5), (50, None), (50, 2), (31, None)])
def test_ms_ssim_against_scipys_filter(side, scales):
    """By the formula of Wang 2003; 5 scales fit into 180 pixels, 3 into 50, 2 into 31, whose weights add up to 1."""
    torch.manual_seed(0)
    x = (torch.rand(2, 1, side, side + 2, dtype=torch.float64) * 2 - 1) * 0.7
    y = 0.8 * x + 0.2 * torch.rand_like(x)
    number = scales or {180: 5, 50: 3, 31: 2}[side]
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:number]
    weights = weights / weights.sum()

    def smooth(z):
        return gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]

    for a, b, found in zip(x, y, metrics.ms_ssim(x, y, channels="all", rounded=False, scales=scales)):
        a, b, right = (a[0].numpy() + 1) * 127.5, (b[0].numpy() + 1) * 127.5, 1.0
        for j, weight in enumerate(weights):
            ma, mb = smooth(a), smooth(b)
            va, vb, cov = smooth(a * a) - ma**2, smooth(b * b) - mb**2, smooth(a * b) - ma * mb
            structure = (2 * cov + 7.65**2) / (va + vb + 7.65**2)
            luminance = (2 * ma * mb + 2.55**2) / (ma**2 + mb**2 + 2.55**2)
            right *= (structure * luminance if j == number - 1 else structure).mean() ** weight
            height, width = (n // 2 * 2 for n in a.shape)
            a, b = (z[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3)) for z in (a, b))
        assert found.item() == pytest.approx(right, rel=1e-10)


def test_ms_ssim_at_its_ends():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 44, 44) - 0.5
    assert metrics.ms_ssim(x, x).tolist() == [1.0, 1.0]
    torch.testing.assert_close(metrics.ms_ssim(x, x.flip(0), scales=1), metrics.ssim(x, x.flip(0)))
    assert metrics.ms_ssim(x, -x, scales=2).tolist() == [0.0, 0.0]  # structure is negative: no root of it


def test_similarity_within_a_class():
    """Class 0 has one picture, class 1 two, so that a pair is always of these; class 2 one sample."""
    torch.manual_seed(0)
    images = torch.rand(7, 1, 16, 16) * 2 - 1
    images[1] = images[2] = images[0]
    classes = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    images[5] = images[3]
    alike = metrics.ms_ssim(images[3:4], images[4:5]).item()
    found = metrics.within_class_similarity(images, classes, pairs=3000)
    assert found == pytest.approx((1 + (1 + 2 * alike) / 3) / 2, abs=0.02)  # a third of class 1's pairs are equal
    assert metrics.within_class_similarity(images[[0, 1, 3, 4]], torch.tensor([0, 0, 1, 1]), 5) == pytest.approx(
        (1 + alike) / 2
    )


def test_four_statements_of_psnr():
    black, grey = torch.full((1, 3, 20, 20), -1.0), torch.full((1, 3, 20, 20), -1.0 + 10.4 / 127.5)
    assert metrics.psnr(grey, black, channels="all").item() == pytest.approx(
        20 * log10(255 / 10)
    )  # 10.4 is 10 in 8 bits
    assert metrics.psnr(grey, black, channels="all", rounded=False).item() == pytest.approx(
        20 * log10(255 / 10.4), abs=1e-4
    )
    # Y spans 219 of 255 levels: 1.32 dB.
    assert metrics.psnr(grey, black).item() == pytest.approx(20 * log10(255 / 10) + 1.322, abs=1e-3)
    frame = black.clone()
    frame[..., :3] = 1.0
    assert metrics.psnr(frame, black, border=3).item() == float("inf") > metrics.psnr(frame, black, border=2).item()
    white = metrics.luma(torch.full((1, 3, 1, 1), 255.0))
    torch.testing.assert_close(white, torch.full((1, 1, 1, 1), 235.0))
    torch.testing.assert_close(metrics.luma(torch.full((1, 1, 1, 1), 255.0)), white)


def test_luma_of_what_is_no_image():
    with pytest.raises(TypeError, match="luma: images"):  # whole numbers, of which weights would be cut
        metrics.luma(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
    for shape in ((1, 2, 4, 4), (3, 4, 4)):
        with pytest.raises(ValueError, match="luma: images must be"):
            metrics.luma(torch.zeros(shape))


# ------------------------------------------------------------------------------------------------------------
# Transport plans


@pytest.mark.parametrize("n, m, dimensions", [(6, 6, 1), (6, 4, 1), (1, 3, 1), (7, 5, 2), (4, 4, 3)])
def test_plans_move_everything_at_the_least_cost(n, m, dimensions):
    torch.manual_seed(n * m)
    real, fake = torch.randn(n, dimensions, dtype=torch.float64), torch.randn(m, dimensions, dtype=torch.float64)
    distance, plan = metrics.earth_movers_distance(real, fake, plan=True)
    assert plan.shape == (n, m) and (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((m,), 1 / m, dtype=torch.float64))
    assert (plan * torch.cdist(real, fake)).sum().item() == pytest.approx(distance)
    assert metrics.earth_movers_distance(real, fake) == pytest.approx(distance)


def test_plan_with_ties_and_of_a_permutation():
    real = torch.tensor([[1.0], [1.0], [0.0]])
    distance, plan = metrics.earth_movers_distance(real, real[[2, 0, 1]], plan=True)
    assert distance == 0.0 and (plan * torch.cdist(real, real[[2, 0, 1]])).sum() == 0.0
    real = torch.randn(5, 2)
    order = torch.randperm(5)
    assert torch.equal(metrics.earth_movers_distance(real, real[order], plan=True)[1].argmax(1), order.argsort())


# ------------------------------------------------------------------------------------------------------------
# Labels and codes


def test_labels():
    assert metrics.label_accuracy(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])) == pytest.approx(2 / 3)
    torch.manual_seed(0)
    images, classes = torch.randn(40, 1, 4, 4, dtype=torch.float64), torch.arange(40) % 4
    right = np.mean([images[classes == c].numpy().std(0, ddof=1).mean() for c in range(4)])
    assert metrics.within_class_diversity(images, classes) == pytest.approx(right)
    assert metrics.within_class_diversity(images[:4].repeat(10, 1, 1, 1), classes) == pytest.approx(0.0, abs=1e-12)
    one_alone = metrics.within_class_diversity(torch.tensor([[0.0], [1.0], [7.0]]), torch.tensor([0, 0, 1]))
    assert one_alone == pytest.approx(0.5**0.5)


def test_bound_of_the_information():
    codes = torch.arange(12) % 4
    assert metrics.mutual_information_bound(torch.zeros(12, 4), codes) == pytest.approx(0.0, abs=1e-12)
    sure = 100 * torch.nn.functional.one_hot(codes, 4).double()
    assert metrics.mutual_information_bound(sure, codes) == pytest.approx(log(4))
    logits = torch.randn(12, 4, dtype=torch.float64)
    right = np.mean([logits[i].log_softmax(0)[codes[i]].item() for i in range(12)]) + 0.3
    assert metrics.mutual_information_bound(logits, codes, entropy=0.3) == pytest.approx(right)


def test_best_assignment():
    labels = torch.arange(10).repeat(5)
    assert metrics.assignment_accuracy((labels + 3) % 10, labels) == 1.0  # whatever the codes are called
    assert metrics.assignment_accuracy(torch.zeros_like(labels), labels) == 0.1
    assert metrics.assignment_accuracy(torch.tensor([10**12, 10**12, 4]), torch.tensor([0, 0, 1])) == 1.0


# ------------------------------------------------------------------------------------------------------------
# Bad input

NAN = torch.tensor([[0.0], [torch.nan]])
TWO = torch.zeros(2, 1)
IMAGES = torch.zeros(2, 3, 16, 16)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: metrics.nearest_examples(TWO, torch.zeros(3, 2)), r"samples and training .* \(2, 1\) and \(3, 2\)"),
        (lambda: metrics.nearest_examples(TWO[:0], TWO), "samples must be .* N at least 1"),
        (lambda: metrics.nearest_examples(NAN, TWO), "1 of the 2 values of samples are not finite"),
        (lambda: metrics.nearest_examples(TWO[:, 0], TWO[:, 0]), "a dimension of values"),
        (lambda: metrics.memorisation(TWO, TWO, torch.zeros(2, 3)), "samples and held_out"),
        (lambda: metrics.different_bins(TWO, TWO, bins=3), "at most the 2 real samples, got 3"),
        (lambda: metrics.different_bins(TWO, TWO, bins=2, level=5.0), "level must be between 0 and 1, got 5.0"),
        (lambda: metrics.different_bins(NAN, TWO, bins=2), "real are not finite"),
        (lambda: metrics.compare_histograms(torch.ones(3), torch.ones(2)), "fake must be counts"),
        (lambda: metrics.psnr(IMAGES, IMAGES, channels="y"), "channels .*y"),
        (lambda: metrics.psnr(IMAGES, IMAGES, border=8), "a border of 8 leaves nothing"),
        (lambda: metrics.psnr(IMAGES[:, :2], IMAGES[:, :2]), "with C 1 or 3"),
        (lambda: metrics.psnr(IMAGES, IMAGES[:, :1]), "of one kind"),
        (lambda: metrics.psnr(IMAGES, IMAGES[:1]), "images and reference must be as many, got 2 and 1"),
        (lambda: metrics.ms_ssim(IMAGES[:1], IMAGES), "ms_ssim: images and reference must be as many"),
        (
            lambda: metrics.image_figures(IMAGES, IMAGES[:1], metrics.Extractor(torch.nn.Flatten())),
            r"image_figures: fake must be \[N, ...\] with N at least 2",
        ),
        (lambda: metrics.ssim(IMAGES, IMAGES, border=3), "at least 11x11 .* got"),
        (lambda: metrics.ssim(IMAGES, IMAGES[..., :12]), "of one kind"),
        (lambda: metrics.ms_ssim(IMAGES, IMAGES, border=3), "ms_ssim: images must be at least 11x11 .* got"),
        (
            lambda: metrics.ms_ssim(IMAGES, IMAGES, scales=2),
            r"scales must be at most 1 for images of \(16, 16\), got 2",
        ),
        (lambda: metrics.ms_ssim(IMAGES, IMAGES, scales=6), "scales must be .* 5, got 6"),
        (lambda: metrics.within_class_similarity(IMAGES, torch.tensor([0, 1])), "no class of which there are two"),
        (lambda: metrics.within_class_similarity(TWO, torch.tensor([0, 0])), r"samples must be \[2, C, H, W\]"),
        (lambda: metrics.label_accuracy(torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long)), "seen"),
        (lambda: metrics.assignment_accuracy(torch.tensor([-1]), torch.tensor([0])), "codes must be 0 or more, got -1"),
        (lambda: metrics.within_class_diversity(TWO, torch.tensor([0, 1])), "no class of which there are two"),
        (lambda: metrics.mutual_information_bound(TWO, torch.tensor([0, 1])), r"logits must be \[2, K\]"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_wrong_types():
    with pytest.raises(TypeError, match="labels must be whole numbers, got torch.float32"):
        metrics.assignment_accuracy(torch.tensor([0]), torch.tensor([0.5]))
    with pytest.raises(TypeError, match="samples must be a tensor or an ImageSource"):
        metrics.nearest_examples([1.0], TWO)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16])
def test_histograms_of_narrow_counts_are_added_in_wide_ones(dtype):
    real, fake = torch.tensor([200, 200]), torch.tensor([176, 224])  # z = 1.70; 376 is 120 in 8 bits
    assert metrics.compare_histograms(real, fake).ndb == 0
    if dtype == torch.float16:
        real, fake = 150 * real, 150 * fake  # each is a number of fp16, and their sums are beyond it
    found = metrics.compare_histograms(real.to(dtype), fake.to(dtype))
    assert found.ndb == (2 if dtype == torch.float16 else 0)
    p, q = np.array([0.5, 0.5]), np.array([0.44, 0.56])
    js = 0.5 * sum((x * np.log(2 * x / (p + q))).sum() for x in (p, q))
    assert found.js == pytest.approx(js, rel=1e-9 if dtype != torch.float16 else 1e-2)


@pytest.mark.parametrize("level", [0.0, 1.0, 2.0, float("nan"), "0.05"])
def test_the_level_of_histograms_is_a_probability(level):
    with pytest.raises(ValueError, match="compare_histograms: level must be between 0 and 1"):
        metrics.compare_histograms(torch.ones(3), torch.ones(3), level=level)


def test_training_a_classifier_leaves_the_random_streams_of_gpus_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    extractor, _ = metrics.train_classifier((images, torch.arange(40) % 2), steps=1)
    metrics.image_figures(images[:20], images[20:], extractor)
    assert not seeded and torch.equal(torch.get_rng_state(), before)
