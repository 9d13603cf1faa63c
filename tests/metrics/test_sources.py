"""Metrics of images that are read when they are needed, networks that are left as they were, and wrong arguments."""

import pytest
import torch
from torch import nn

from gankern import data, metrics
from gankern.core.evaluation import evaluating

SHAPES = data.Shapes(size=16, length=300)
IMAGES = SHAPES[:]
OTHERS = data.Shapes(size=16, length=300, seed=5)


class Counted(data.ImageSource):
    """Says how many images were asked for at once."""

    def __init__(self, images):
        self.images, self.shape, self.largest = images, tuple(images.shape), 0

    def read(self, indices):
        self.largest = max(self.largest, len(indices))
        return self.images[indices]


def critic(x):
    return x.flatten(1).sum(1)


@pytest.mark.parametrize(
    "metric",
    [
        lambda real, fake: metrics.wasserstein_estimate(critic, real, fake),
        lambda real, fake: metrics.laplacian_swd(real, fake, patches=4, projections=8),
        lambda real, fake: [f.features for f in map(metrics.Extractor(nn.Flatten()), (real, fake))],
        lambda real, fake: metrics.laplacian_pyramid(real) + metrics.laplacian_pyramid(fake),
    ],
    ids=["wasserstein_estimate", "laplacian_swd", "Extractor", "laplacian_pyramid"],
)
def test_a_source_is_measured_as_its_tensor(metric):
    expected = metric(IMAGES, OTHERS[:])
    for real, fake in ((SHAPES, OTHERS), (IMAGES, OTHERS), (SHAPES, OTHERS[:])):
        found = metric(real, fake)
        if isinstance(expected, list):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        else:
            assert found == expected


def test_a_source_is_read_in_batches():
    source = Counted(IMAGES)
    metrics.wasserstein_estimate(critic, source, source)
    metrics.laplacian_swd(source, source, patches=1, projections=2)
    metrics.Extractor(nn.Flatten())(source)
    assert 1 < source.largest <= 256


def test_what_is_not_finite_in_a_source_is_refused():
    bad = IMAGES.clone()
    bad[250, 0, 3, 3] = float("nan")
    for metric in (
        lambda x: metrics.wasserstein_estimate(critic, IMAGES, x),
        lambda x: metrics.laplacian_swd(IMAGES, x, patches=1, projections=2),
        metrics.Extractor(nn.Flatten()),
    ):
        for images in (bad, Counted(bad)):
            with pytest.raises(ValueError, match="1 of the .* values of .* are not finite"):
                metric(images)


# ------------------------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    """A network whose norm stays in evaluation mode, however it is asked."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(256)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        self.switched = mode
        return self

    def forward(self, x):
        return self.norm(x.flatten(1))


def modes(network):
    return [module.training for module in network.modules()]


@pytest.mark.parametrize("mixed", [False, True])
def test_an_extractor_leaves_the_network_in_its_modes(mixed):
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Dropout()))
    if mixed:
        network[2][0].eval()
        network[0].eval()
    before, state = modes(network), [x.clone() for x in network.state_dict().values()]
    images = IMAGES[:, :1]
    found = metrics.Extractor(network)(images).features
    assert modes(network) == before
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), state))
    assert torch.equal(found, metrics.Extractor(network)(images).features)  # no dropout
    for wrong in (IMAGES, IMAGES[:, :1] * float("inf"), "images"):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            metrics.Extractor(network)(wrong)
        assert modes(network) == before
    with pytest.raises(ZeroDivisionError):
        metrics.Extractor(network, prepare=lambda x: 1 // 0)(images)
    assert modes(network) == before


def test_modes_are_put_back_by_the_network_s_own_train():
    network = Frozen().train()
    with pytest.raises(KeyError):
        with evaluating(network):
            assert not network.switched
            raise KeyError
    assert network.switched and network.training and not network.norm.training


def test_a_script_is_left_in_its_mode(tmp_path):
    torch.jit.script(nn.Sequential(nn.Flatten(), nn.Dropout())).save(tmp_path / "a.pt")
    extract = metrics.load(tmp_path / "a.pt")
    extract.network.train()
    assert torch.equal(extract(IMAGES).features, IMAGES.flatten(1))
    assert extract.network.training


# ------------------------------------------------------------------------------------------------------------

X = torch.randn(8, 3)
MATRICES = {
    "inception_score": lambda bad: metrics.inception_score(bad, splits=2),
    "frechet_distance": lambda bad: metrics.frechet_distance(X, bad),
    "kernel_distance": lambda bad: metrics.kernel_distance(bad, X, 2, 4),
    "mode_coverage": lambda bad: metrics.mode_coverage(bad, X, 0.1),
    "parzen_log_likelihood": lambda bad: metrics.parzen_log_likelihood(X, bad, 1.0),
    "sliced_wasserstein": lambda bad: metrics.sliced_wasserstein(X, bad, 4),
    "earth_movers_distance": lambda bad: metrics.earth_movers_distance(bad, X),
    "wasserstein_estimate": lambda bad: metrics.wasserstein_estimate(critic, bad, X),
    "laplacian_swd": lambda bad: metrics.laplacian_swd(bad, IMAGES, 1, 1),
    "laplacian_pyramid": lambda bad: metrics.laplacian_pyramid(bad),
    "Extractor": lambda bad: metrics.Extractor(nn.Flatten())(bad),
}


@pytest.mark.parametrize("bad", [None, "real", [1.0, 2.0], 3, torch.ones(1, 3, dtype=torch.complex64)], ids=repr)
@pytest.mark.parametrize("name", MATRICES)
def test_what_is_no_tensor_is_named(name, bad):
    with pytest.raises(TypeError, match=rf"^{name}: (logits|real|fake|samples|points|images) must (be a|hold real)"):
        MATRICES[name](bad)


@pytest.mark.parametrize("name", ["frechet_distance", "sliced_wasserstein", "earth_movers_distance", "inception_score"])
def test_metrics_of_features_say_so_of_images(name):
    for images in (SHAPES, IMAGES):
        with pytest.raises(ValueError, match=rf"{name}: .*(\[N, D\]|one kind).*\(300, 3, 16, 16\)"):
            MATRICES[name](images)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.inception_score(X, splits="2"), "splits must be an integer, got '2'"),
        (lambda: metrics.kernel_distance(X, X, subsets=None), "subset_size|subsets must be"),
        (lambda: metrics.kernel_distance(X, X, 2.0, 4), "subsets must be an integer, got 2.0"),
        (lambda: metrics.kernel_distance(X, X, 2, 4, seed=2**64), "seed must be from"),
        (lambda: metrics.mode_coverage(X, X, None), "std must be a number, got None"),
        (lambda: metrics.mode_coverage(X, X, 0.1, radius=float("inf")), "radius must be positive and finite"),
        (lambda: metrics.parzen_log_likelihood(X, X, "1"), "sigma must be a number, got '1'"),
        (lambda: metrics.parzen_log_likelihood(X, X, float("nan")), "sigma must be positive and finite"),
        (lambda: metrics.choose_sigma(X, X, 1.0), "candidates must be numbers, got 1.0"),
        (lambda: metrics.sliced_wasserstein(X, X, projections=None), "projections must be an integer"),
        (lambda: metrics.sliced_wasserstein(X, X * float("nan")), "fake are not finite"),
        (lambda: metrics.sliced_wasserstein(X.long(), X.long()), "real must hold floating-point"),
        (lambda: metrics.laplacian_swd(IMAGES, IMAGES, patches="4"), "patches must be an integer"),
        (lambda: metrics.laplacian_pyramid(IMAGES, coarsest=1), "coarsest must be at least 2"),
        (lambda: metrics.wasserstein_estimate(None, X, X), "critic must be a function of samples, got None"),
        (lambda: metrics.Extractor(None), "network must be a function of images, got None"),
        (lambda: metrics.Extractor(nn.Flatten(), prepare=2), "prepare must be a function"),
        (lambda: metrics.load(None), "path must be that of a TorchScript file, got None"),
        (lambda: metrics.train_classifier("digits", steps=0), "steps must be at least 1"),
        (lambda: metrics.train_classifier(None), "data must be a name"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()
