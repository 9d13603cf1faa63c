"""The figures that papers report, of two sets of images: FID, KID, Inception score, precision and recall.

FID and KID are torchmetrics'. They, and the Inception score, compare with published ones where the features are those
of the published Inception weights, which are given as a file; :func:`gankern.metrics.load` knows them, and what they
want images to be like. Precision and recall (Kynkäänniemi 2019, arXiv 1904.06991) are computed here.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gankern import data
from gankern.core import extras
from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import whole
from gankern.data import ImageSource
from gankern.metrics._checks import as_matrix, batches, check_same
from gankern.metrics.extractors import BATCH, Extractor
from gankern.metrics.features import inception_score
from gankern.metrics.swd import COARSEST, laplacian_swd

NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET, SPLITS = 100, 1000, 10


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """The share of the fake features near real ones, and that of the real ones near fake ones.

    A feature is near a set if for one of its points it is no farther than that point's ``k``-th nearest neighbour in
    the set (Kynkäänniemi 2019, arXiv 1904.06991, §2). ``real`` and ``fake`` are [N, D] and [M, D], with k below both.

    >>> x = torch.eye(8)
    >>> precision_recall(x, x), precision_recall(x, x + 100.0)
    ((1.0, 1.0), (0.0, 0.0))
    """
    real = as_matrix("precision_recall", "real", real, least=2)
    fake = as_matrix("precision_recall", "fake", fake, least=2)
    check_same("precision_recall", real, fake)
    k = whole("precision_recall: k", k, 1, min(len(real), len(fake)) - 1)
    return _near(real, fake, k), _near(fake, real, k)


def _near(points: Tensor, others: Tensor, k: int) -> float:
    """The share of ``others`` within the reach of one of the points."""
    # The nearest of a point's neighbours in its own set is itself.
    reach = torch.cat([_distances(part, points).kthvalue(k + 1, 1).values for part in points.split(BATCH)])
    return (
        torch.cat([(_distances(part, points) <= reach).any(1) for part in others.split(BATCH)]).double().mean().item()
    )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def image_figures(
    real: Tensor | ImageSource,
    fake: Tensor | ImageSource,
    extractor: Extractor | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Figures of two sets of images [N, C, H, W] and [M, C, H, W] in [-1, 1], read a batch at a time.

    With an extractor: ``fid``, ``kid`` and ``kid_std``, ``precision``, ``recall``, and ``inception_score`` and its
    ``_std`` where the network gives logits. Their names end with what the extractor is (``_own_classifier``,
    ``_own_features``) unless it is the published Inception: only its figures compare with those of papers. Always, for
    sets of one size: ``swd``, the mean of the sliced Wasserstein distances of the Laplacian pyramid, and ``swd_N`` of
    its bands; both sets are resized to the next power of two below, and have to have 16 pixels at least.

    Raises: ImportError where torchmetrics is missing, which only an extractor needs.
    """
    seed = check_seed("image_figures: seed", seed)
    figures: dict[str, float] = {}
    if extractor is not None:
        for name, images in (("real", real), ("fake", fake)):
            if len(images) < 2:  # a covariance is of two
                raise ValueError(f"image_figures: {name} must be [N, ...] with N at least 2, got {tuple(images.shape)}")
        found = _of_features(real, fake, extractor, seed)
        figures |= {f"{name}{extractor.suffix}": value for name, value in found.items()}
    number, size = min(len(real), len(fake)), min(*real.shape[2:], *fake.shape[2:])
    if size >= COARSEST and real.shape[1] == fake.shape[1]:
        size = 1 << (size.bit_length() - 1)
        sizes = [data.resize(x[torch.arange(number)].cpu(), size) for x in (real, fake)]
        bands = laplacian_swd(sizes[0], sizes[1], seed=seed)
        figures |= {"swd": sum(bands.values()) / len(bands)} | {f"swd_{band}": value for band, value in bands.items()}
    return figures


class _Given(nn.Module):
    """In the place of torchmetrics' network: the features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _of_features(
    real: Tensor | ImageSource, fake: Tensor | ImageSource, extractor: Extractor, seed: int
) -> dict[str, float]:
    extras.load("torchmetrics", "FID and its like")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    kept: dict[str, list[Tensor]] = {"real": [], "fake": []}
    logits: list[Tensor] = []
    fid: Any = None
    for which, images in (("real", real), ("fake", fake)):
        for batch in batches("image_figures", which, images, BATCH):
            found = extractor(batch)
            fid = fid or FrechetInceptionDistance(_Given(found.features.shape[1]))
            fid.update(found.features.double(), real=which == "real")
            kept[which].append(found.features)
            if which == "fake" and found.logits is not None:
                logits.append(found.logits.double())
    features = {which: torch.cat(parts) for which, parts in kept.items()}
    number = min(map(len, features.values()))
    figures = {"fid": fid.compute().item()}
    # torchmetrics draws from torch's own stream, and warns that it keeps the features that are kept here anyway.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric .* will save all extracted features", UserWarning)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too, for good
        subset = min(KID_SUBSET, number)
        kid = KernelInceptionDistance(_Given(len(features["real"][0])), subsets=KID_SUBSETS, subset_size=subset)
        for which, values in features.items():
            kid.update(values.double(), real=which == "real")
        figures["kid"], figures["kid_std"] = (x.item() for x in kid.compute())
        if logits:
            # Not torchmetrics', whose std is the sample's (none of one part), and whose parts may be fewer than asked.
            shuffled = torch.cat(logits)[torch.randperm(len(features["fake"]))]
            score = inception_score(shuffled, min(SPLITS, len(shuffled)))
            figures["inception_score"], figures["inception_score_std"] = score
    if number > NEIGHBOURS:
        figures["precision"], figures["recall"] = precision_recall(features["real"], features["fake"])
    return figures
