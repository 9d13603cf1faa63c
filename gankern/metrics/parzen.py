"""Log-likelihood under a Parzen window, as the first GAN papers report it (Goodfellow 2014, arXiv 1406.2661, §5)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gankern.core.arguments import shown
from gankern.metrics._checks import as_matrix, check_positive, check_same

BATCH = 256


def parzen_log_likelihood(points: Tensor, samples: Tensor, sigma: float) -> Tensor:
    """log of the mean over the samples μ of N(x; μ, σ²): one number, in nats, for each of the points x.

    log-mean-exp over μ of −½‖(x − μ)/σ‖² − d·log(σ√(2π)). ``points`` is [N, d], ``samples`` [M, d] from the generator,
    the result [N] in fp64. The mean over test points is the figure of the papers, and its standard error their ±. In
    high dimensions it says little about the quality of samples (Theis 2016, arXiv 1511.01844).

    >>> round(parzen_log_likelihood(torch.zeros(1, 1), torch.zeros(5, 1), sigma=1.0).item(), 4)
    -0.9189
    """
    points = as_matrix("parzen_log_likelihood", "points", points)
    samples = as_matrix("parzen_log_likelihood", "samples", samples)
    check_same("parzen_log_likelihood", points, samples)
    check_positive("parzen_log_likelihood", "sigma", sigma)
    centre = samples.mean(0)  # torch.cdist takes x² − 2xμ + μ², which far from 0 leaves nothing of a distance
    points, samples = points - centre, samples - centre
    constant = math.log(len(samples)) + points.shape[1] * math.log(sigma * math.sqrt(2 * math.pi))
    return torch.cat(
        [
            torch.logsumexp(-0.5 * (torch.cdist(batch, samples) / sigma).square(), 1) - constant
            for batch in points.split(BATCH)
        ]
    )


def choose_sigma(validation: Tensor, samples: Tensor, candidates: Iterable[float] | None = None) -> float:
    """The σ of the candidates under which a validation set [N, d] is likeliest; by default 10 from 0.1 to 1.

    Choose it on other data than the likelihood is reported on.

    >>> choose_sigma(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]]), [0.1, 1.0, 10.0])
    1.0
    """
    if candidates is not None and (isinstance(candidates, str) or not isinstance(candidates, Iterable)):
        raise TypeError(f"choose_sigma: candidates must be numbers, got {shown(candidates)}")
    candidates = list(candidates) if candidates is not None else torch.logspace(-1, 0, 10).tolist()
    if not candidates:
        raise ValueError("choose_sigma: candidates is empty")
    return max(candidates, key=lambda sigma: parzen_log_likelihood(validation, samples, sigma).mean().item())
