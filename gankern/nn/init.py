"""torch.nn.init, and initialisations beyond it in its conventions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gankern.core.arguments import floats
from gankern.core.torch_names import stand_in

if TYPE_CHECKING:
    from torch.nn.init import *  # noqa: F403

__getattr__, __dir__, __all__ = stand_in(__name__, nn.init, ["icnr_"])


def _conv_default_(weight: Tensor) -> Tensor:
    """What torch.nn.Conv2d draws."""
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


SHUFFLED = {2: 2, 3: 1, 4: 2, 5: 3}  # how many dimensions a pixel shuffle spreads to, by a weight's


@torch.no_grad()
def icnr_(
    weight: Tensor, upscale_factor: int = 2, initializer: Callable[[Tensor], Tensor | None] = _conv_default_
) -> Tensor:
    """Initialises a convolution that a pixel shuffle follows such that the two first do what a convolution followed by
    nearest-neighbour upsampling does: the kernels of one output channel are equal, r of them in one dimension, r * r in
    two, r * r * r in three. No checkerboard at the start. (A bias must be equal within a channel too.)

    Source: Aitken et al. 2017, arXiv 1707.02937.

    Args:
        weight: of a convolution in d = 1, 2 or 3 dimensions, [out_channels * r ** d, in_channels, d sizes], changed in
            place; [out_channels * r * r, in_channels] is one of d = 2 with kernel size 1.
        upscale_factor: r, of the pixel shuffle.
        initializer: draws the kernels, [out_channels, in_channels, ...], in place; by default as torch.nn.Conv2d does.

    Returns:
        ``weight``.

    Raises:
        ValueError: naming the argument, what came and what is accepted.

    >>> conv = torch.nn.Conv2d(8, 3 * 4, 3, padding=1, bias=False)
    >>> w = icnr_(conv.weight)
    >>> y = torch.nn.functional.pixel_shuffle(conv(torch.randn(1, 8, 5, 5)), 2)
    >>> torch.equal(y[:, :, ::2, ::2], y[:, :, 1::2, 1::2])
    True
    """
    floats("icnr_: weight", weight)
    if isinstance(upscale_factor, bool) or not isinstance(upscale_factor, int) or upscale_factor < 1:
        raise ValueError(f"icnr_: upscale_factor is {upscale_factor!r}; it must be an integer of at least 1")
    if weight.ndim not in SHUFFLED:
        raise ValueError(
            f"icnr_: weight has shape {tuple(weight.shape)}; it must be that of a convolution in 1, 2 or 3 dimensions, "
            f"or [out_channels * r * r, in_channels] of one with kernel size 1"
        )
    copies = upscale_factor ** SHUFFLED[weight.ndim]
    if weight.shape[0] % copies:
        raise ValueError(
            f"icnr_: weight has shape {tuple(weight.shape)}; its first dimension must be a multiple of {copies}, "
            f"upscale_factor to the power of {SHUFFLED[weight.ndim]}"
        )
    if not callable(initializer):
        raise TypeError(f"icnr_: initializer must be a function of a tensor, got {initializer!r}")
    kernels = weight.new_empty(weight.shape[0] // copies, *weight.shape[1:])
    initializer(kernels)
    # A pixel shuffle takes the values of a channel from neighbouring channels, in any number of dimensions.
    return weight.copy_(kernels.repeat_interleave(copies, 0))
