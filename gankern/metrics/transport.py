"""Distances between distributions that are costs of transport: Wasserstein-1, exactly, and as a critic estimates it."""

from collections.abc import Callable

import torch
from torch import Tensor

from gankern.core import extras
from gankern.core.arguments import shown
from gankern.data import ImageSource
from gankern.metrics._checks import as_matrix, batches, check_same, check_samples

BATCH = 256


@torch.no_grad()
def wasserstein_estimate(
    critic: Callable[[Tensor], Tensor], real: Tensor | ImageSource, fake: Tensor | ImageSource
) -> float:
    """E[critic(real)] − E[critic(fake)]: what a Wasserstein critic says the distance is, as progress of a training.

    It is the Wasserstein-1 distance times the critic's Lipschitz constant, if the critic is optimal, and less otherwise
    (Arjovsky 2017, arXiv 1701.07875, §3). ``real`` and ``fake`` are [N, ...] and [M, ...], or sources of
    images; the critic, which is evaluated in the mode it is in, returns one number a sample.
    """
    if not callable(critic):
        raise TypeError(f"wasserstein_estimate: critic must be a function of samples, got {shown(critic)}")
    for name, samples in (("real", real), ("fake", fake)):
        check_samples("wasserstein_estimate", name, samples)
    check_same("wasserstein_estimate", real, fake)
    means = []
    for name, samples in (("real", real), ("fake", fake)):
        values = torch.cat([critic(b).flatten() for b in batches("wasserstein_estimate", name, samples, BATCH)])
        if len(values) != len(samples):
            raise ValueError(f"wasserstein_estimate: the critic gave {len(values)} values for {len(samples)} samples")
        means.append(values.double().mean().item())
    return means[0] - means[1]


def earth_movers_distance(real: Tensor, fake: Tensor) -> float:
    """The Wasserstein-1 distance between two sets of points [N, D] and [M, D], exactly, by Euclidean distance.

    All points of a set weigh the same. For D = 1 it is the area between the two distribution functions, in N·log N
    time; else a linear program (the package POT), in about N³ time: a few thousand points take seconds.

    >>> earth_movers_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [6.0]]))
    5.0
    """
    real = as_matrix("earth_movers_distance", "real", real)
    fake = as_matrix("earth_movers_distance", "fake", fake)
    check_same("earth_movers_distance", real, fake)
    if real.shape[1] == 1:
        return _one_dimensional(real[:, 0], fake[:, 0]).item()
    return _linear_program(real, fake)


def _one_dimensional(real: Tensor, fake: Tensor) -> Tensor:
    points = torch.cat([real, fake]).sort().values
    below_real = torch.searchsorted(real.sort().values, points[:-1], right=True).double() / len(real)
    below_fake = torch.searchsorted(fake.sort().values, points[:-1], right=True).double() / len(fake)
    return ((below_real - below_fake).abs() * points.diff()).sum()


def _linear_program(real: Tensor, fake: Tensor) -> float:
    ot = extras.load("ot", f"earth_movers_distance in {real.shape[1]} dimensions")
    cost = torch.cdist(real, fake, compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
    distance, log = ot.emd2([], [], cost, numItermax=100 * max(100_000, cost.size), log=True)
    if log["warning"]:
        raise RuntimeError(f"earth_movers_distance: the linear program was not solved: {log['warning']}")
    return float(distance)
