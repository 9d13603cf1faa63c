"""Checks of the arguments of plain functions: each error names the argument, what came and what is accepted."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

SEEDS = (-(2**63), 2**64 - 1)  # what torch's generators take


def shown(value: Any) -> str:
    """A value for a message, never longer than a line."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if value is None or isinstance(value, str | int | float | bool):
        return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    return f"a {type(value).__name__}"


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """An integer of at least ``least`` and at most ``most``; a TypeError or ValueError that names the argument.

    >>> whole("steps", "5", least=1)
    Traceback (most recent call last):
    TypeError: steps must be an integer, got '5'
    """
    if isinstance(value, bool) or not hasattr(type(value), "__index__") or isinstance(value, Tensor):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    number = operator.index(value)
    if (least is not None and number < least) or (most is not None and number > most):
        accepted = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {accepted}, got {number}")
    return number


def seed(name: str, value: Any) -> int:
    """A seed that torch's generators take."""
    return whole(name, value, *SEEDS)


def real(name: str, value: Any) -> float:
    """A number, as it is; a TypeError that names the argument otherwise."""
    a_number = isinstance(value, Real) and not isinstance(value, bool)
    if not a_number:
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    return value


def tensor(name: str, value: Any) -> Tensor:
    """A tensor; a TypeError that names the argument otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(value)}")
    return value


def floats(name: str, value: Any) -> Tensor:
    """A tensor of floating-point numbers; a TypeError that names the argument otherwise."""
    if not tensor(name, value).is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {shown(value)}")
    return value


def labels(name: str, value: Any, number: int | None = None, classes: int | None = None) -> Tensor:
    """Class labels [N] of integers, as int64: ``number`` of them, from 0 to ``classes`` − 1, where those are known.

    Values are looked at on the CPU alone: elsewhere that would wait for the device.

    >>> labels("labels", torch.tensor([0, 3]), classes=3)
    Traceback (most recent call last):
    ValueError: labels must be from 0 to 2, got 3
    """
    tensor(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {shown(value)}")
    if value.ndim != 1 or (number is not None and value.shape[0] != number):
        wanted = "[N] integers" if number is None else f"{number} integers, one a sample"
        raise ValueError(f"{name} must be {wanted}, got {tuple(value.shape)} of {value.dtype}")
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = value[(value < 0) if classes is None else (value < 0) | (value >= classes)]
        if len(wrong):
            accepted = "0 or more" if classes is None else f"from 0 to {classes - 1}"
            raise ValueError(f"{name} must be {accepted}, got {int(wrong[0])}")
    return value.long()
