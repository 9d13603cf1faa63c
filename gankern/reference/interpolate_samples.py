"""Points between samples in plain PyTorch: differentiable to any order, for any floating dtype and device."""

from __future__ import annotations

from torch import Tensor


def interpolate_samples(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """real + alpha (fake - real) with an alpha a sample; see gankern.functional.interpolate_samples."""
    return real.lerp(fake, alpha.to(real.dtype).view(-1, *[1] * (real.ndim - 1)))
