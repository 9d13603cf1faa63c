"""Checks that the metrics share, and how they go through a set of images."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gankern.core.arguments import real, shown, tensor
from gankern.data import ImageSource


def as_matrix(function: str, name: str, values: Tensor, least: int = 1) -> Tensor:
    """[N, D] in fp64, detached; an error if it is anything else, has fewer than ``least`` rows or a NaN."""
    if not isinstance(values, ImageSource):  # whose shape says what is wrong with it
        check_numbers(function, name, values)
    if len(values.shape) != 2 or len(values) < least or values.shape[1] == 0:
        raise ValueError(f"{function}: {name} must be [N, D] with N at least {least}, got {tuple(values.shape)}")
    check_finite(function, name, values)
    return values.detach().to(torch.float64)


def check_numbers(function: str, name: str, values: Tensor) -> None:
    if tensor(f"{function}: {name}", values).is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{function}: {name} must hold real numbers, got {shown(values)}")


def check_finite(function: str, name: str, values: Tensor) -> None:
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{function}: {bad} of the {values.numel()} values of {name} are not finite")


def check_same(function: str, real: Tensor | ImageSource, fake: Tensor | ImageSource) -> None:
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(
            f"{function}: real and fake must be of one kind, got {tuple(real.shape)} and {tuple(fake.shape)}"
        )


def check_positive(function: str, name: str, value: Any) -> None:
    if not (real(f"{function}: {name}", value) > 0 and math.isfinite(value)):
        raise ValueError(f"{function}: {name} must be positive and finite, got {value}")


def check_samples(function: str, name: str, samples: Any) -> None:
    """Raises unless these are samples: a tensor [N, ...] of real numbers or an ImageSource, N at least 1."""
    if not isinstance(samples, Tensor | ImageSource):
        raise TypeError(f"{function}: {name} must be a tensor or an ImageSource, got {shown(samples)}")
    if isinstance(samples, Tensor):
        check_numbers(function, name, samples)
    if len(samples.shape) < 1 or len(samples) == 0:
        raise ValueError(f"{function}: {name} must be [N, ...] with N at least 1, got {tuple(samples.shape)}")


def batches(function: str, name: str, samples: Tensor | ImageSource, size: int) -> Iterator[Tensor]:
    """``size`` samples at a time, read when they are needed; a ValueError at the first that is not finite."""
    for start in range(0, len(samples), size):
        batch = samples[start : start + size]
        check_finite(function, name, batch)
        yield batch
