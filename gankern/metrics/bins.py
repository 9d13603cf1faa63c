"""The number of statistically different bins: which parts of the data a generator has too often or too rarely."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from gankern.core import extras
from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import whole
from gankern.metrics._checks import as_matrix, check_finite, check_numbers, check_same


@dataclass(frozen=True)
class DifferentBins:
    """``ndb`` of the ``bins`` have a share of the samples that differs from their share of the data; ``js``, in nats,
    is the Jensen-Shannon divergence between the two histograms, ``real`` and ``fake`` [bins]."""

    bins: int
    ndb: int
    js: float
    real: Tensor  # how many of each lie in each bin
    fake: Tensor

    @property
    def share(self) -> float:
        """NDB/K: the level of the test, 0.05, for samples of the data's own distribution."""
        return self.ndb / self.bins


def different_bins(real: Tensor, fake: Tensor, bins: int = 100, level: float = 0.05, seed: int = 0) -> DifferentBins:
    """NDB of ``real`` [N, D] and ``fake`` [M, D] (Richardson & Weiss 2018, "On GANs and GMMs", arXiv 1805.12462).

    The bins are the cells of k-means on the real data (scikit-learn), and a sample lies in the cell whose centre is
    nearest. A bin differs if the two-proportion z-test says so at ``level``: with shares p and q, and r = (pN + qM) /
    (N + M) pooled, if \\|p − q\\| / √(r(1 − r)(1/N + 1/M)) is beyond the normal quantile of 1 − level/2. A bin that is
    empty in both, or full in both, is equal.

    >>> data = torch.linspace(0, 1, 1000)[:, None]
    >>> different_bins(data, data, bins=20).ndb, different_bins(data, data + 0.5, bins=20).ndb > 10
    (0, True)
    """
    real, fake = as_matrix("different_bins", "real", real), as_matrix("different_bins", "fake", fake)
    check_same("different_bins", real, fake)
    bins = whole("different_bins: bins", bins, least=2)
    if bins > len(real):
        raise ValueError(f"different_bins: bins must be at most the {len(real)} real samples, got {bins}")
    _check_level("different_bins", level)
    seed = check_seed("different_bins: seed", seed) % 2**32  # scikit-learn takes no larger ones
    cluster = extras.load("sklearn.cluster", "different_bins")
    means = cluster.KMeans(bins, n_init=1, random_state=seed).fit(real.cpu().numpy())
    cells = (torch.from_numpy(means.predict(x.cpu().numpy())).long() for x in (real, fake))
    of_real, of_fake = (cell.bincount(minlength=bins) for cell in cells)
    return compare_histograms(of_real, of_fake, level)


def compare_histograms(real: Tensor, fake: Tensor, level: float = 0.05) -> DifferentBins:
    """The same of two histograms, counts [K] of each bin, wherever the bins come from.

    >>> compare_histograms(torch.tensor([50, 50, 0]), torch.tensor([80, 20, 0])).ndb
    2
    """
    _check_level("compare_histograms", level)
    for name, counts in (("real", real), ("fake", fake)):
        check_numbers("compare_histograms", name, counts)
        check_finite("compare_histograms", name, counts)
        if counts.ndim != 1 or counts.shape != real.shape or len(counts) < 2 or (counts < 0).any() or counts.sum() == 0:
            raise ValueError(
                f"compare_histograms: {name} must be counts [K] of at least one sample, K alike and at least 2; "
                f"got {tuple(counts.shape)}"
            )
    a, b = real.double(), fake.double()  # the sum of two counts may be more than their own dtype holds
    n, m = a.sum(), b.sum()
    p, q = a / n, b / m
    pooled = (a + b) / (n + m)
    error = (pooled * (1 - pooled) * (1 / n + 1 / m)).sqrt()
    threshold = NormalDist().inv_cdf(1 - level / 2)
    differs = (p - q).abs() > threshold * error  # 0 > 0 where a bin is empty in both
    half = (p + q) / 2
    js = 0.5 * sum(torch.special.xlogy(x, x / half.where(half > 0, 1.0)).sum() for x in (p, q))
    return DifferentBins(len(real), int(differs.sum()), float(js), real, fake)


def _check_level(function: str, level: float) -> None:
    if not (isinstance(level, float) and 0.0 < level < 1.0):
        raise ValueError(f"{function}: level must be between 0 and 1, got {level!r}")
