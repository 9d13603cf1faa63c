"""Points between samples."""

from __future__ import annotations

import torch
from torch import Tensor

from gankern.dispatch import short
from gankern.functional import _checks
from gankern.ops.interpolate_samples import interpolate_samples as _interpolate_samples


def interpolate_samples(real: Tensor, fake: Tensor, alpha: Tensor, *, implementation: str | None = None) -> Tensor:
    r"""One point on the line between each pair of samples: :math:`r_n + \alpha_n (f_n - r_n)`, in one pass.

    Exactly real where alpha is 0 and exactly fake where it is 1.

    Source: Gulrajani et al. 2017, arXiv 1704.00028, algorithm 1.

    Args:
        real, fake: [N, ...], of one shape, dtype and device; float64, float32, bfloat16 or float16, any strides.
        alpha: one number a sample, [N] or [N, 1, ...], floating point.
        implementation: see the module.

    Returns:
        As real.

    Gradient order: 2, to all three (any order for "reference").

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> interpolate_samples(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.25, 1.0]))
    tensor([[0.2500, 0.2500, 0.2500],
            [1.0000, 1.0000, 1.0000]])
    """
    name = "interpolate_samples"
    for argument, x in (("real", real), ("fake", fake), ("alpha", alpha)):
        _checks.floating(name, argument, x)
    if real.ndim == 0 or real.shape != fake.shape:
        raise ValueError(
            f"{name}: real has shape {tuple(real.shape)} and fake {tuple(fake.shape)}; they must be "
            f"equal, [samples, ...]"
        )
    if real.dtype != fake.dtype or real.device != fake.device or real.device != alpha.device:
        raise ValueError(
            f"{name}: real and fake must share dtype and device, and alpha the device; got {short(real.dtype)} on "
            f"{real.device}, {short(fake.dtype)} on {fake.device} and alpha on {alpha.device}"
        )
    samples = real.shape[0]
    if alpha.ndim == 0 or alpha.shape[0] != samples or alpha.numel() != samples:
        raise ValueError(
            f"{name}: alpha has shape {tuple(alpha.shape)}; it must be one number a sample, [{samples}] or "
            f"{(samples, *[1] * (real.ndim - 1))}"
        )
    alpha = alpha.reshape(samples).to(torch.promote_types(real.dtype, torch.float32))
    return _interpolate_samples(real, fake, alpha, implementation)
