"""Checks that the functions of this package share."""

import math

import torch
from torch import Tensor

from gankern.core.arguments import real, shown, tensor

MASS = 1e-5  # how far from 1 the mass of a distribution may be


def numbers(function: str, name: str, values: Tensor, ndim: int | None = None) -> Tensor:
    """Real finite numbers in fp64, detached, on the CPU; an error that names the argument otherwise."""
    if tensor(f"{function}: {name}", values).is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{function}: {name} must hold real numbers, got {shown(values)}")
    if values.numel() == 0 or (ndim is not None and values.ndim != ndim):
        wanted = "at least one number" if ndim is None else f"a tensor of {ndim} dimensions that is not empty"
        raise ValueError(f"{function}: {name} must be {wanted}, got {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{function}: {name} has values that are not finite")
    return values.detach().to("cpu", torch.float64)


def distribution(function: str, name: str, values: Tensor, dx: float = 1.0, ndim: int | None = None) -> Tensor:
    """Densities (or probabilities, dx = 1) of mass 1; an error that names the argument otherwise."""
    found = numbers(function, name, values, ndim)
    if bool((found < 0).any()):
        raise ValueError(f"{function}: {name} must not be negative, got {found.min().item():g}")
    if not (real(f"{function}: dx", dx) > 0 and math.isfinite(dx)):
        raise ValueError(f"{function}: dx must be a positive number, got {dx}")
    mass = found.sum().item() * dx
    if abs(mass - 1.0) > MASS:
        raise ValueError(f"{function}: {name} must have the mass 1 (sum times dx, within {MASS:g}), got {mass:.8g}")
    return found


def same_shape(function: str, **tensors: Tensor) -> None:
    (first, a), *others = tensors.items()
    for name, b in others:
        if a.shape != b.shape:
            raise ValueError(
                f"{function}: {first} and {name} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
            )
