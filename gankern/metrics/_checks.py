"""Checks that the metrics share."""

import torch
from torch import Tensor


def as_matrix(function: str, name: str, values: Tensor, least: int = 1) -> Tensor:
    """[N, D] in fp64, detached; a ValueError if it is anything else, has fewer than ``least`` rows or a NaN."""
    if values.ndim != 2 or len(values) < least or values.shape[1] == 0:
        raise ValueError(f"{function}: {name} must be [N, D] with N at least {least}, got {tuple(values.shape)}")
    check_finite(function, name, values)
    return values.detach().to(torch.float64)


def check_finite(function: str, name: str, values: Tensor) -> None:
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{function}: {bad} of the {values.numel()} values of {name} are not finite")


def check_same(function: str, real: Tensor, fake: Tensor) -> None:
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(
            f"{function}: real and fake must be of one kind, got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
