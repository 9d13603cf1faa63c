"""Mixtures of Gaussians: a density that can be written down, drawn from and fitted, which a GAN's cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gankern.core import extras
from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import whole
from gankern.theory._checks import distribution, numbers


@dataclass(frozen=True)
class GaussianMixture:
    """p(x) = Σ_k w_k N(x; μ_k, Σ_k): ``means`` [K, D], ``covariances`` [K, D, D], ``weights`` [K] of sum 1.

    Raises ``ValueError`` or ``TypeError`` where the shapes do not fit, the weights do not sum to 1, or a covariance is
    not symmetric and positive definite.

    >>> one = GaussianMixture(torch.zeros(1, 2), torch.eye(2)[None], torch.ones(1))
    >>> round(one.log_density(torch.zeros(1, 2)).item(), 6)  # −log 2π
    -1.837877
    """

    means: Tensor
    covariances: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        name = "GaussianMixture"
        means, covariances = numbers(name, "means", self.means, 2), numbers(name, "covariances", self.covariances, 3)
        weights = distribution(name, "weights", self.weights, ndim=1)
        number, dimensions = means.shape
        if covariances.shape != (number, dimensions, dimensions) or len(weights) != number:
            raise ValueError(
                f"{name}: means [K, D], covariances [K, D, D] and weights [K] are expected, got {tuple(means.shape)}, "
                f"{tuple(covariances.shape)} and {tuple(weights.shape)}"
            )
        _, failed = torch.linalg.cholesky_ex(covariances)
        if bool(failed.any()) or not torch.allclose(covariances, covariances.mT):
            raise ValueError(f"{name}: covariances must be symmetric and positive definite")
        for field, value in (("means", means), ("covariances", covariances), ("weights", weights)):
            object.__setattr__(self, field, value)

    def log_density(self, points: Tensor) -> Tensor:
        """log p(x) of ``points`` [N, D], [N] in fp64 nats."""
        x = numbers("log_density", "points", points, 2)
        if x.shape[1] != self.means.shape[1]:
            raise ValueError(f"log_density: points must be [N, {self.means.shape[1]}], got {tuple(x.shape)}")
        each = torch.distributions.MultivariateNormal(self.means, self.covariances).log_prob(x[:, None])
        return (each + self.weights.log()).logsumexp(1)

    def sample(self, number: int, seed: int = 0) -> Tensor:
        """``number`` points [number, D], fp64."""
        random = torch.Generator().manual_seed(check_seed("sample: seed", seed))
        chosen = torch.multinomial(self.weights, whole("sample: number", number, least=1), True, generator=random)
        noise = torch.randn(number, self.means.shape[1], generator=random, dtype=torch.float64)
        return self.means[chosen] + (torch.linalg.cholesky(self.covariances)[chosen] @ noise[..., None])[..., 0]


def fit_mixture(points: Tensor, components: int, seed: int = 0) -> GaussianMixture:
    """The mixture of so many Gaussians of largest likelihood, by expectation maximisation (scikit-learn, ten starts).

    EM finds a local maximum; the components come in the order of their means.

    Args:
        points: [N, D].
        components: K, at most N.

    Raises:
        TypeError, ValueError: points are not [N, D] finite numbers, or components are more than N. ImportError: there
        is no scikit-learn.

    >>> fit_mixture(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), 2).means.flatten().round(decimals=6).tolist()
    [0.5, 8.5]
    """
    x = numbers("fit_mixture", "points", points, 2)
    whole("fit_mixture: components", components, least=1, most=len(x))
    mixture = extras.load("sklearn.mixture", "fit_mixture")
    fitted = mixture.GaussianMixture(
        components, n_init=10, tol=1e-6, max_iter=500, random_state=check_seed("fit_mixture: seed", seed) % 2**32
    ).fit(x.numpy())
    means = torch.from_numpy(fitted.means_)
    order = torch.tensor(sorted(range(components), key=lambda k: means[k].tolist()))
    weights = torch.from_numpy(fitted.weights_)
    return GaussianMixture(means[order], torch.from_numpy(fitted.covariances_)[order], (weights / weights.sum())[order])
