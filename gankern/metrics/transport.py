"""Distances between distributions that are costs of transport: Wasserstein-1, exactly, and as a critic estimates it."""

from collections.abc import Callable
from typing import Literal, overload

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

    >>> wasserstein_estimate(lambda x: x.sum(1), torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.5], [0.0, 1.5]]))
    2.0
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


@overload
def earth_movers_distance(real: Tensor, fake: Tensor, plan: Literal[False] = False) -> float: ...
@overload
def earth_movers_distance(real: Tensor, fake: Tensor, plan: Literal[True]) -> tuple[float, Tensor]: ...
def earth_movers_distance(real: Tensor, fake: Tensor, plan: bool = False) -> float | tuple[float, Tensor]:
    """The Wasserstein-1 distance between two sets of points [N, D] and [M, D], exactly, by Euclidean distance.

    All points of a set weigh the same. For D = 1 it is the area between the two distribution functions, in N·log N
    time; else a linear program (the package POT), in about N³ time: a few thousand points take seconds.

    With ``plan`` a pair: the distance, and the best plan γ [N, M], fp64, how much of real point i is moved to fake
    point j. Its rows sum to 1/N, its columns to 1/M, and the distance is Σ_ij γ_ij ‖x_i − y_j‖.

    >>> earth_movers_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[6.0], [5.0]]))
    5.0
    >>> earth_movers_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[6.0], [5.0]]), plan=True)[1]
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]], dtype=torch.float64)
    """
    real = as_matrix("earth_movers_distance", "real", real)
    fake = as_matrix("earth_movers_distance", "fake", fake)
    check_same("earth_movers_distance", real, fake)
    if real.shape[1] == 1:
        distance = _one_dimensional(real[:, 0], fake[:, 0]).item()
        return (distance, _one_dimensional_plan(real[:, 0], fake[:, 0])) if plan else distance
    distance, moved = _linear_program(real, fake)
    return (distance, moved) if plan else distance


def _one_dimensional(real: Tensor, fake: Tensor) -> Tensor:
    points = torch.cat([real, fake]).sort().values
    below_real = torch.searchsorted(real.sort().values, points[:-1], right=True).double() / len(real)
    below_fake = torch.searchsorted(fake.sort().values, points[:-1], right=True).double() / len(fake)
    return ((below_real - below_fake).abs() * points.diff()).sum()


def _one_dimensional_plan(real: Tensor, fake: Tensor) -> Tensor:
    """What is at a quantile of one goes to that quantile of the other; a point of weight 1/N is M parts of 1/(N·M)."""
    n, m = len(real), len(fake)
    borders = torch.cat([torch.arange(0, n * m, m), torch.arange(0, n * m, n)]).unique().to(real.device)
    parts = torch.cat([borders, borders.new_tensor([n * m])]).diff()
    moved = real.new_zeros(n, m)
    moved[real.argsort()[borders // m], fake.argsort()[borders // n]] = parts.double() / (n * m)
    return moved


def _linear_program(real: Tensor, fake: Tensor) -> tuple[float, Tensor]:
    ot = extras.load("ot", f"earth_movers_distance in {real.shape[1]} dimensions")
    cost = torch.cdist(real, fake, compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
    moved, log = ot.emd([], [], cost, numItermax=100 * max(100_000, cost.size), log=True)
    if log["warning"]:
        raise RuntimeError(f"earth_movers_distance: the linear program was not solved: {log['warning']}")
    return float(log["cost"]), torch.from_numpy(moved).to(real.device)
