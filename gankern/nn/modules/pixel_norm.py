"""Pixelwise normalisation as a layer, alone and behind bias and activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gankern.functional as GF
from gankern.functional import _checks
from gankern.functional.pixel_norm import check_options
from gankern.nn.modules.bias_act import Biased


class PixelNorm(nn.Module):
    r"""Normalises the channels of each pixel to a mean square of 1: :func:`gankern.functional.pixel_norm`. Has no
    parameters. ``implementation``: see :mod:`gankern.functional`.

    >>> PixelNorm()(torch.tensor([[3.0, 4.0]]))
    tensor([[0.8485, 1.1314]])
    """

    implementation: str | None = None

    def __init__(self, eps: float = 1e-8, dim: int = 1, *, implementation: str | None = None) -> None:
        super().__init__()
        self.implementation = _checks.implementation("PixelNorm", implementation)
        _checks.number("PixelNorm", "eps", eps, least=0)
        _checks.whole("PixelNorm", "dim", dim, least=-64)  # of up to 64 dimensions
        self.eps, self.dim = eps, dim

    def forward(self, input: Tensor) -> Tensor:
        return GF.pixel_norm(input, eps=self.eps, dim=self.dim, implementation=self.implementation)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, dim={self.dim}"


class BiasActPixelNorm(Biased):
    r"""The tail of a layer of ProGAN's generator in one pass: bias, leaky ReLU, pixel norm;
    :func:`gankern.functional.bias_act_pixel_norm` with a bias of its own, which starts at zero.

    Arguments and shapes: :class:`gankern.nn.BiasAct`'s, with ``eps``, the function's, for ``clamp``.

    >>> BiasActPixelNorm(8)(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self, num_channels: int, activation: str | None = "leaky_relu", *, negative_slope: float = 0.2,
        gain: float = 1.0, eps: float = 1e-8, bias: bool = True, implementation: str | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_channels, bias, implementation, device, dtype)
        check_options("BiasActPixelNorm", activation, negative_slope, gain, eps)
        self.activation, self.negative_slope, self.gain, self.eps = activation, negative_slope, gain, eps

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        return GF.bias_act_pixel_norm(
            input, self.bias, activation=self.activation, negative_slope=self.negative_slope, gain=self.gain,
            eps=self.eps, implementation=self.implementation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"{self.num_channels}, {self.activation}{slope}, gain={self.gain}, eps={self.eps}"
