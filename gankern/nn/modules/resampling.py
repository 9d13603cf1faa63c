"""Upsampling, downsampling and blurring without checkerboards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gankern.functional as GF
from gankern import filters
from gankern.functional import _checks
from gankern.nn import init
from gankern.nn.modules.convolution import PaddingMode


class SubpixelConv2d(nn.Conv2d):
    r"""Upsamples by a convolution at low resolution that makes r * r channels for each of its outputs, which a pixel
    shuffle then spreads out: the convolution costs r * r times less than after upsampling.

    Source: Shi et al. 2016, arXiv 1609.05158; the initialisation is that of Aitken et al. 2017, arXiv 1707.02937,
    without which the r * r kernels start unequal and make a checkerboard pattern.

    Args:
        in_channels, out_channels, kernel_size: of the whole layer; the convolution makes out_channels * r * r channels.
        upscale_factor: r.
        padding, dilation, groups, bias, padding_mode, device, dtype: torch.nn.Conv2d's, at low resolution.
        icnr: start as a convolution followed by nearest-neighbour upsampling (:func:`gankern.nn.init.icnr_`); otherwise
            as torch.nn.Conv2d does.

    Shape: x is [N, in_channels, H, W], the result [N, out_channels, H' r, W' r], with H' and W' torch.nn.Conv2d's.

    Parameters: weight [out_channels * r * r, in_channels / groups, ...], bias [out_channels * r * r], as a
    torch.nn.Conv2d of that many outputs has.

    Gradient order: any.

    >>> SubpixelConv2d(8, 3, 3, padding=1)(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        upscale_factor: int = 2,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        icnr: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(upscale_factor, int) or upscale_factor < 1:
            raise ValueError(
                f"SubpixelConv2d: upscale_factor is {upscale_factor!r}; it must be an integer of at least 1"
            )
        self.upscale_factor = upscale_factor
        self.icnr = icnr
        super().__init__(
            in_channels,
            out_channels * upscale_factor**2,
            kernel_size,
            1,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.icnr:
            init.icnr_(self.weight, self.upscale_factor)
            if self.bias is not None:
                copies = self.upscale_factor**2
                with torch.no_grad():
                    self.bias.copy_(self.bias[::copies].repeat_interleave(copies))

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(super().forward(x), self.upscale_factor)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, upscale_factor={self.upscale_factor}, icnr={self.icnr}"


class _Filter(nn.Module):
    """A layer without parameters around a filter, which moves with the module and is not in its state_dict."""

    filter: Tensor

    def __init__(self, filter: str | Sequence[float] | Tensor, factor: int, implementation: str | None) -> None:
        super().__init__()
        _checks.whole(type(self).__name__, "scale_factor", factor)
        _checks.implementation(type(self).__name__, implementation)
        self.name = filter if isinstance(filter, str) else None
        self.implementation = implementation
        self.register_buffer("filter", filters.fir(filter, factor=factor), persistent=False)

    def extra_repr(self) -> str:
        return f"filter={self.name or self.filter.tolist()!r}"


class Blur2d(_Filter):
    r"""Filters each channel with a low-pass; zeros stand beyond the edges.

    Args:
        filter: a name or taps, see :func:`gankern.filters.fir`.
        implementation: see :mod:`gankern.functional`.

    Shape: [N, C, H, W], and the same of the result. Gradient order: any.

    >>> Blur2d()(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 8, 16, 16])
    """

    def __init__(self, filter: str | Sequence[float] | Tensor = "121", *, implementation: str | None = None) -> None:
        super().__init__(filter, 2, implementation)

    def forward(self, x: Tensor) -> Tensor:
        return GF.filter2d(x, self.filter, implementation=self.implementation)


class FIRUpsample2d(_Filter):
    r"""Upsamples by zero-insertion and a low-pass (:func:`gankern.functional.upsample2d`): what a transposed
    convolution ought to do, with a filter that is known to have no checkerboard.

    Args:
        scale_factor: an integer.
        filter: a name or taps, see :func:`gankern.filters.fir`.
        implementation: see :mod:`gankern.functional`.

    Shape: x is [N, C, H, W], the result [N, C, H * scale_factor, W * scale_factor]. Gradient order: any.

    >>> FIRUpsample2d()(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 8, 32, 32])
    """

    def __init__(
        self,
        scale_factor: int = 2,
        filter: str | Sequence[float] | Tensor = "1331",
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__(filter, scale_factor, implementation)
        self.scale_factor = scale_factor

    def forward(self, x: Tensor) -> Tensor:
        return GF.upsample2d(x, self.filter, self.scale_factor, implementation=self.implementation)

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}, {super().extra_repr()}"


class FIRDownsample2d(_Filter):
    r"""Downsamples by a low-pass and decimation (:func:`gankern.functional.downsample2d`), without the aliases of a
    strided convolution.

    Args:
        scale_factor: the integer to divide the size by.
        filter: a name or taps, see :func:`gankern.filters.fir`.
        implementation: see :mod:`gankern.functional`.

    Shape: x is [N, C, H, W], the result [N, C, H // scale_factor, W // scale_factor]. Gradient order: any.

    >>> FIRDownsample2d()(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self,
        scale_factor: int = 2,
        filter: str | Sequence[float] | Tensor = "1331",
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__(filter, scale_factor, implementation)
        self.scale_factor = scale_factor

    def forward(self, x: Tensor) -> Tensor:
        return GF.downsample2d(x, self.filter, self.scale_factor, implementation=self.implementation)

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}, {super().extra_repr()}"
