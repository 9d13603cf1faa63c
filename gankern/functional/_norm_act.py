"""What normalisations with an activation behind them share, whatever they normalise over: affine values and running
statistics, as csrc/autograd/norm.h has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern.core import activations
from gankern.core.dispatch import short
from gankern.core.torch_internals import functional, overwrite
from gankern.functional import _checks

HALF = (torch.float16, torch.bfloat16)


def check_options(name: str, momentum: float, eps: float, activation: str | None, negative_slope: float) -> None:
    _checks.number(name, "momentum", momentum)
    _checks.number(name, "eps", eps, least=0)
    _checks.activation(name, activation, negative_slope, (*activations.PIECEWISE, "prelu"))


def update_running(running_mean: Any, running_var: Any, stats: Tensor, momentum: float) -> None:
    """Takes mean and unbiased variance of ``stats``, [3, C], up into checked running statistics."""
    mean, _, var = stats.unbind()  # no gradient reaches them: no need for torch.no_grad()
    for kept, new in ((running_mean, mean), (running_var, var)):
        new = new if new.dtype == kept.dtype else new.to(kept.dtype)
        if functional():
            overwrite(kept, kept.lerp(new, momentum))
        else:
            kept.lerp_(new, momentum)


def affine(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both, checked; in float32 where x has it and they are narrower, as what autocast made of a condition is."""
    checked = _affine_value(op, x, "weight", weight), _affine_value(op, x, "bias", bias)
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)} and bias {tuple(bias.shape)}; they must have the same"
        )
    return checked


def _affine_value(op: str, x: Tensor, name: str, values: Tensor | None) -> Tensor | None:
    if values is None:
        return None
    _checks.floating(op, name, values)
    shape, given = x.shape, values.shape
    if given != shape[1:2] and given != shape[:2]:
        raise ValueError(
            f"{op}: {name} has shape {tuple(given)}; for x of shape {tuple(shape)} it must be "
            f"({shape[1]},), or ({shape[0]}, {shape[1]}) for each sample's own"
        )
    others = (torch.float32,) if x.dtype in HALF else HALF if x.dtype == torch.float32 else ()
    if values.device != x.device or values.dtype not in (x.dtype, *others):
        wanted = " or ".join(map(short, (x.dtype, *others)))
        raise ValueError(f"{op}: {name} is {short(values.dtype)} on {values.device}; x needs {wanted} on {x.device}")
    return values.float() if values.dtype in HALF and x.dtype == torch.float32 else values


def check_running(op: str, x: Tensor, mean: Tensor | None, var: Tensor | None, updated: bool) -> None:
    if (mean is None) != (var is None):
        missing = "running_mean" if mean is None else "running_var"
        raise ValueError(f"{op}: {missing} is None and the other is not; give both or neither")
    if mean is None:
        return
    values: Any
    for name, values in (("running_mean", mean), ("running_var", var)):
        _checks.floating(op, name, values)
        if values.shape != x.shape[1:2] or values.device != x.device:
            raise ValueError(
                f"{op}: {name} has shape {tuple(values.shape)} on {values.device}; for x of shape {tuple(x.shape)} "
                f"it must be ({x.shape[1]},) on {x.device}"
            )
        if updated:
            _checks.writable(op, name, values)
        if values.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} requires a gradient, and would get none, as torch's would not; detach it")
