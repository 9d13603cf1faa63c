"""Distances in the features of a classifier: Inception score, FID and KID, with any classifier.

The published scores are with the ImageNet Inception network and compare with nothing else: scores with another network
compare with one another alone. What is computed from the features is the same.
"""

import torch
from torch import Tensor

from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import whole
from gankern.metrics._checks import as_matrix, check_same


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) ‖ p(y)), of each of ``splits`` parts of the samples: mean, population std.

    Source: Salimans 2016, arXiv 1606.03498, §4. ``logits`` [N, classes] are the classifier's, in random order. From 1
    (every sample looks alike) to the number of classes.

    >>> round(inception_score(100.0 * torch.eye(4).repeat(10, 1), splits=2)[0], 6)
    4.0
    """
    logits = as_matrix("inception_score", "logits", logits)
    if not 1 <= whole("inception_score: splits", splits) <= len(logits):
        raise ValueError(f"inception_score: splits must be from 1 to the {len(logits)} samples, got {splits}")
    scores = []
    for part in logits.tensor_split(splits):
        given = part.log_softmax(1)
        marginal = given.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64).log().to(given)
        divergence = (given.exp() * (given - marginal)).sum(1)
        scores.append(divergence.mean().exp())
    return _mean_and_std(scores)


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½) between Gaussians fitted to features [N, D] and [M, D]: FID.

    Source: Heusel 2017, arXiv 1706.08500. Σ are the unbiased covariances. The trace of the root is the sum of the roots
    of the eigenvalues of the symmetric Σ₁^½·Σ₂·Σ₁^½, which stays real where Σ is singular: with fewer samples than
    features, say. With few samples the distance is too large: compare at equal numbers alone.

    >>> real = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    >>> round(frechet_distance(real, real + 3.0), 4)  # the same covariance
    18.0
    """
    real = as_matrix("frechet_distance", "real", real, least=2)
    fake = as_matrix("frechet_distance", "fake", fake, least=2)
    check_same("frechet_distance", real, fake)
    cov_real, cov_fake = (torch.cov(features.T).reshape(2 * features.shape[1:]) for features in (real, fake))
    values, vectors = torch.linalg.eigh(cov_real)
    root = vectors * values.clamp_min(0.0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_fake @ root).clamp_min(0.0).sqrt().sum()
    distance = (real.mean(0) - fake.mean(0)).square().sum() + cov_real.trace() + cov_fake.trace() - 2.0 * overlap
    return max(0.0, distance.item())


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: the unbiased squared maximum mean discrepancy of features [N, D] and [M, D], kernel (x·y/D + 1)³.

    Source: Bińkowski 2018, arXiv 1801.01401. Mean and population std over ``subsets`` random subsets of
    ``subset_size`` samples of each; the std says how sure the mean is. Unbiased: it can be slightly negative, and does
    not depend on the number of samples.

    >>> random = torch.Generator().manual_seed(0)
    >>> real, other = torch.randn(2, 200, 4, generator=random)
    >>> same, far = (kernel_distance(real, x, 10, 100)[0] for x in (other, other + 2))
    >>> abs(same) < 0.2, far > 10
    (True, True)
    """
    real = as_matrix("kernel_distance", "real", real, least=2)
    fake = as_matrix("kernel_distance", "fake", fake, least=2)
    check_same("kernel_distance", real, fake)
    fewest = min(len(real), len(fake))
    if not 2 <= whole("kernel_distance: subset_size", subset_size) <= fewest:
        raise ValueError(
            f"kernel_distance: subset_size must be from 2 to the {fewest} samples of the smaller set, got {subset_size}"
        )
    whole("kernel_distance: subsets", subsets, least=1)
    random = torch.Generator().manual_seed(check_seed("kernel_distance: seed", seed))
    values = []
    for _ in range(subsets):
        x = real[torch.randperm(len(real), generator=random)[:subset_size]]
        y = fake[torch.randperm(len(fake), generator=random)[:subset_size]]
        values.append(_squared_discrepancy(x, y))
    return _mean_and_std(values)


def _mean_and_std(values: list[Tensor]) -> tuple[float, float]:
    stacked = torch.stack(values)
    return stacked.mean().item(), stacked.std(correction=0).item()


def _squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def mean_of_pairs(square: Tensor) -> Tensor:  # without a sample's similarity to itself
        return (square.sum() - square.trace()) / (len(square) * (len(square) - 1))

    return mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2.0 * kernel(x, y).mean()
