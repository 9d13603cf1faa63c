"""Upsampling, downsampling and blurring by a filter, without checkerboards."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import gankern.functional as GF
from gankern.functional import _checks, filters


class _Filter(nn.Module):
    """A layer without parameters around a filter, which moves with the module and is not in its state_dict."""

    filter: Tensor

    def __init__(self, filter: str | Sequence[float] | Tensor, factor: int, implementation: str | None) -> None:
        super().__init__()
        _checks.whole(type(self).__name__, "scale_factor", factor)
        self.name = filter if isinstance(filter, str) else None
        self.implementation = _checks.implementation(type(self).__name__, implementation)
        self.register_buffer("filter", filters.fir(filter, factor=factor), persistent=False)

    def extra_repr(self) -> str:
        return f"filter={self.name or self.filter.tolist()!r}"


class Blur2d(_Filter):
    r"""Filters each channel with a low-pass; zeros stand beyond the edges.

    Args:
        filter: a name or taps, see :func:`gankern.filters.fir`.
        implementation: see :mod:`gankern.functional`.

    Shape: [N, C, H, W], and the same of the result. Gradient order: any.

    >>> import torch
    >>> Blur2d()(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 8, 16, 16])
    """

    def __init__(self, filter: str | Sequence[float] | Tensor = "121", *, implementation: str | None = None) -> None:
        super().__init__(filter, 2, implementation)

    def forward(self, x: Tensor) -> Tensor:
        return GF.filter2d(x, self.filter, implementation=self.implementation)


class _Resampling(_Filter):
    """A filter, and by which factor the resolution changes."""

    def __init__(
        self,
        scale_factor: int = 2,
        filter: str | Sequence[float] | Tensor = "1331",
        *,
        implementation: str | None = None,
    ) -> None:
        super().__init__(filter, scale_factor, implementation)
        self.scale_factor = scale_factor

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}, {super().extra_repr()}"


class FIRUpsample2d(_Resampling):
    r"""Upsamples by zero-insertion and a low-pass (:func:`gankern.functional.upsample2d`): what a transposed
    convolution ought to do, with a filter that is known to have no checkerboard.

    Args:
        scale_factor: an integer.
        filter: a name or taps, see :func:`gankern.filters.fir`.
        implementation: see :mod:`gankern.functional`.

    Shape: x is [N, C, H, W], the result [N, C, H * scale_factor, W * scale_factor]. Gradient order: any.

    >>> import torch
    >>> FIRUpsample2d()(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 8, 32, 32])
    """

    def forward(self, x: Tensor) -> Tensor:
        return GF.upsample2d(x, self.filter, up=self.scale_factor, implementation=self.implementation)


class FIRDownsample2d(_Resampling):
    r"""Downsamples by a low-pass and decimation (:func:`gankern.functional.downsample2d`), without the aliases of a
    strided convolution.

    Args:
        scale_factor: the integer to divide the size by.
        filter: a name or taps, see :func:`gankern.filters.fir`.
        implementation: see :mod:`gankern.functional`.

    Shape: x is [N, C, H, W], the result [N, C, H // scale_factor, W // scale_factor]. Gradient order: any.

    >>> import torch
    >>> FIRDownsample2d()(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 8, 8, 8])
    """

    def forward(self, x: Tensor) -> Tensor:
        return GF.downsample2d(x, self.filter, down=self.scale_factor, implementation=self.implementation)
