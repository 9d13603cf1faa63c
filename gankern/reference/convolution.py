"""Convolutions of GANs in plain PyTorch: the definition of right."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale_factor: float = 2, mode: str = "nearest"
) -> Tensor:
    """conv2d(interpolate(x), weight, bias) with "same" padding: zeros around the larger image."""
    return F.conv2d(F.interpolate(x, scale_factor=scale_factor, mode=mode), weight, bias, padding="same")


def conv2d_downsample(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The means of each 2 by 2 pixels of conv2d(x, weight, bias) with "same" padding; an odd last row or column of the
    convolution has no part in them."""
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding="same"), 2)
