"""Gradient penalty of samples in plain PyTorch: differentiable to any order, for any floating dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_penalty(gradient: Tensor, target: float, one_sided: bool) -> Tensor:
    """f(norm of each sample's gradient), [N], in fp32 or better; see gankern.functional.gradient_penalty."""
    return penalty_and_norms(gradient, target, one_sided)[0]


def penalty_and_norms(gradient: Tensor, target: float, one_sided: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    squares = (
        gradient.to(wide).square().sum(list(range(1, gradient.ndim))) if gradient.ndim > 1 else gradient.to(wide) ** 2
    )
    # Where the gradient is zero the norm's subgradient is 0: the root, whose derivative is infinite, is not asked.
    zero = squares == 0
    norms = torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())
    if target == 0:
        return squares, norms
    excess = norms - target
    return (excess.clamp_min(0) if one_sided else excess).square(), norms


def direction(gradient: Tensor, norms: Tensor, weight: float, target: float, one_sided: bool) -> Tensor:
    """The derivative of weight * sum of the penalties by the gradient: weight f'(r)/r times the gradient."""
    factor = torch.where(norms == 0, float(target == 0), 1 - target / norms)
    if one_sided:
        factor = factor.clamp_min(0)
    factor = (2 * weight * factor).view(-1, *[1] * (gradient.ndim - 1))
    return (factor * gradient.to(norms.dtype)).to(gradient.dtype)
