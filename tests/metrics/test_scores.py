"""Figures that papers report: torchmetrics' beside our own formulas, precision and recall beside loops, the Inception."""

import sys
import types

import pytest
import torch
from torch import Tensor, nn

from gankern import data, metrics
from gankern.metrics import scores
from gankern.metrics.extractors import as_bytes

pytest.importorskip("torchmetrics")


def images(number, shift, size=32, channels=3):
    random = torch.Generator().manual_seed(number)
    return (torch.randn(number, channels, size, size, generator=random) * 0.2 + shift).clamp(-1, 1)


REAL, FAKE = images(120, 0.1), images(110, -0.1)


class Two(nn.Module):
    """Features and logits of images."""

    def forward(self, x):
        features = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return features, 20 * features[:, :5]


def test_figures_are_the_formulas():
    extractor = metrics.Extractor(Two(), name="Inception")
    found = metrics.image_figures(REAL, FAKE, extractor)
    real, fake = extractor(REAL), extractor(FAKE)
    assert found["fid"] == pytest.approx(metrics.frechet_distance(real.features, fake.features), rel=1e-3)
    # With subsets of all of the smaller set the draws are of the larger one alone.
    expected, deviation = metrics.kernel_distance(real.features, fake.features, 100, 110)
    assert found["kid"] == pytest.approx(expected, abs=0.2 * abs(expected) + 3 * deviation / 10)
    score = [metrics.inception_score(fake.logits[torch.randperm(110)])[0] for _ in range(20)]
    assert min(score) * 0.9 < found["inception_score"] < max(score) * 1.1
    assert (found["precision"], found["recall"]) == metrics.precision_recall(real.features, fake.features)
    swd = metrics.laplacian_swd(REAL[:110], FAKE)
    assert {f"swd_{band}": value for band, value in swd.items()}.items() <= found.items()
    assert found["swd"] == pytest.approx(sum(swd.values()) / 2)
    state = torch.get_rng_state()
    assert metrics.image_figures(REAL, FAKE, extractor) == found and torch.equal(torch.get_rng_state(), state)


class Level(nn.Module):
    """Two classes, by how bright an image is."""

    def forward(self, x):
        features = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return features, torch.stack([40 * features[:, 0], -40 * features[:, 0]], 1)


@pytest.mark.parametrize("splits", [1, 2])
def test_the_spread_of_the_inception_score_is_the_populations(splits, monkeypatch):
    """As `inception_score` has it. Of two parts one has the odd image, wherever it falls, and the other has a score of
    1: the mean is (s + 1) / 2 and the std (s - 1) / 2. Of one part there is no spread."""
    monkeypatch.setattr(scores, "SPLITS", splits)
    odd = torch.cat([images(6, 0.5), images(1, -0.5)])
    found = metrics.image_figures(REAL[:20], odd, metrics.Extractor(Level(), name="Inception"))
    mean, std = found["inception_score"], found["inception_score_std"]
    assert mean > 1.2 and std == pytest.approx(mean - 1 if splits == 2 else 0.0)


def test_what_the_figures_are_called():
    for name, ending in (("own features", "_own_features"), ("own classifier", "_own_classifier"), ("Inception", "")):
        found = metrics.image_figures(REAL[:20], FAKE[:20], metrics.Extractor(Two(), name=name))
        assert f"fid{ending}" in found and f"kid_std{ending}" in found and "swd" in found
    assert metrics.image_figures(REAL[:20], FAKE[:20]).keys() == {"swd", "swd_32", "swd_16"}
    assert metrics.image_figures(images(9, 0.0, 40), images(9, 0.0, 40)).keys() == {"swd", "swd_32", "swd_16"}
    assert metrics.image_figures(images(9, 0.0, 8), images(9, 0.0, 8)) == {}


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall(k):
    random = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, generator=random, dtype=torch.float64)
    fake = torch.randn(50, 3, generator=random, dtype=torch.float64) * 0.7 + 0.6

    def share(points, others):
        near = 0
        for x in others:
            for i, p in enumerate(points):
                reach = sorted((p - q).norm().item() for j, q in enumerate(points) if j != i)[k - 1]
                if (x - p).norm().item() <= reach + 1e-12:
                    near += 1
                    break
        return near / len(others)

    assert metrics.precision_recall(real, fake, k) == pytest.approx((share(real, fake), share(fake, real)))
    for wrong in (0, 40, 2.5):
        with pytest.raises((ValueError, TypeError), match="k must be"):
            metrics.precision_recall(real, fake, wrong)


class Inception(nn.Module):
    """The calling conventions of StyleGAN's file, and its demands: bytes, three channels."""

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        assert img.dtype == torch.uint8 and img.shape[1] == 3
        features = nn.functional.adaptive_avg_pool2d(img.float() - 128.0, 2).flatten(1) / 32.0
        if return_features:
            return features
        logits = features[:, :6]
        return (logits if no_output_bias else logits + 3.0 * torch.arange(6)).softmax(1)


def test_the_published_torchscript_file_is_known(tmp_path):
    torch.jit.script(Inception()).save(tmp_path / "renamed.pt")
    extractor = metrics.load(tmp_path / "renamed.pt")
    assert extractor.name == "Inception"
    grey = images(12, 0.0, 8, 1)
    found = extractor(grey)
    expected = Inception()(as_bytes(grey), return_features=True)
    torch.testing.assert_close(found.features, expected)
    torch.testing.assert_close(found.logits.softmax(1), expected[:, :6].softmax(1))  # without the bias
    levels = torch.arange(256.0).view(1, 1, 16, 16) / 127.5 - 1.0
    assert (as_bytes(levels)[0, 0].flatten() == torch.arange(256)).all()


def test_the_published_weights_are_known(tmp_path, monkeypatch):
    """pytorch-fid's file: the network is torch-fidelity's, which is asked for in one sentence where it is missing."""
    keys = ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight")
    weights = {**{key: torch.zeros(1) for key in keys}, "fc.weight": torch.zeros(1008, 2048)}
    torch.save(weights, tmp_path / "w.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"needs torch-fidelity: pip install 'gankern\[fidelity\]'"):
        metrics.load(tmp_path / "w.pth")
    called = []

    class Extractor(nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            called.append((name, features_list, feature_extractor_weights_path))

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            return x.float().mean((2, 3)), x.float().mean((2, 3))

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    extractor = metrics.load(tmp_path / "w.pth")
    assert extractor.name == "Inception" and extractor(images(3, 0.0, 8, 1)).features.shape == (3, 3)
    assert called == [("inception-v3-compat", ["2048", "logits_unbiased"], str(tmp_path / "w.pth"))]


def test_files_that_are_no_inception(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"not those of the Inception of FID: it is published as inception-2015"):
        metrics.load(tmp_path / "other.pth")
    keys = ("Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight")
    torch.save({**{key: torch.zeros(1) for key in keys}, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "tv.pth")
    with pytest.raises(ValueError, match=r"an Inception with 1000 classes, torchvision's"):
        metrics.load(tmp_path / "tv.pth")
    (tmp_path / "text.pt").write_text("a text")
    with pytest.raises(ValueError, match=r"not a TorchScript file"):
        metrics.load(tmp_path / "text.pt")


def test_a_source_is_read_a_batch_at_a_time():
    source = data.wrap(list(REAL[:20]), value_range=(-1, 1))
    found = metrics.image_figures(source, FAKE[:20], metrics.Extractor(Two(), name="Inception"))
    assert found == metrics.image_figures(REAL[:20], FAKE[:20], metrics.Extractor(Two(), name="Inception"))
