"""How well samples cover a mixture of Gaussians whose modes are known."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gankern.metrics._checks import as_matrix, check_positive


@dataclass(frozen=True)
class ModeCoverage:
    """``covered`` of the ``modes`` have a high-quality sample; ``counts`` [K] says how many each has."""

    modes: int
    covered: int
    high_quality: float  # share of all samples
    counts: Tensor


def mode_coverage(samples: Tensor, modes: Tensor, std: float, radius: float = 3.0, at_least: int = 1) -> ModeCoverage:
    """Coverage of ``modes`` [K, D], each a Gaussian of ``std`` in every direction, by ``samples`` [N, D].

    A sample is of high quality if its nearest mode is at most ``radius`` standard deviations away; a mode is covered if
    ``at_least`` so many high-quality samples are nearest to it. In the plane 98.9 % of the true distribution's own
    samples are of high quality at the usual radius of 3 (1 − e^−4.5).

    >>> from gankern.data import POINTS
    >>> ring = POINTS["8gaussians"]
    >>> mode_coverage(ring.modes[:3], ring.modes, ring.std).covered
    3
    """
    samples = as_matrix("mode_coverage", "samples", samples)
    modes = as_matrix("mode_coverage", "modes", modes).to(samples.device)
    if samples.shape[1] != modes.shape[1]:
        raise ValueError(
            f"mode_coverage: samples of {samples.shape[1]} dimensions, modes of {modes.shape[1]}: they must be equal"
        )
    for name, value in (("std", std), ("radius", radius), ("at_least", at_least)):
        check_positive("mode_coverage", name, value)
    distance, nearest = torch.cdist(samples, modes, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    good = distance <= radius * std
    counts = nearest[good].bincount(minlength=len(modes))
    return ModeCoverage(len(modes), int((counts >= at_least).sum()), good.double().mean().item(), counts)
