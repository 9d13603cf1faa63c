"""Upsampling, downsampling and blurring by a filter, without checkerboards: signals, images and volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

import gankern.functional as GF
from gankern.functional import _checks, filters


class _Filter(nn.Module):
    """A layer without parameters around a filter, which moves with the module and is not in its state_dict."""

    filter: Tensor
    function: ClassVar[Callable[..., Tensor]]  # of the tensor and the filter
    filter_axes: ClassVar[tuple[int, ...]] = (1,)  # how many a filter may have

    def __init__(self, filter: str | Sequence[float] | Tensor, factor: int, implementation: str | None) -> None:
        super().__init__()
        name = type(self).__name__
        _checks.whole(name, "scale_factor", factor)
        self.name = filter if isinstance(filter, str) else None
        self.implementation = _checks.implementation(name, implementation)
        taps = filters.fir(filter, factor=factor)
        if taps.ndim not in self.filter_axes:
            raise ValueError(f"{name}: filter has shape {tuple(taps.shape)}; it must be [k], for all axes")
        self.register_buffer("filter", taps, persistent=False)

    def extra_repr(self) -> str:
        return f"filter={self.name or self.filter.tolist()!r}"


class _Blur(_Filter):
    """A filter alone."""

    def __init__(self, filter: str | Sequence[float] | Tensor = "121", *, implementation: str | None = None) -> None:
        super().__init__(filter, 2, implementation)

    def forward(self, x: Tensor) -> Tensor:
        return type(self).function(x, self.filter, implementation=self.implementation)


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

    def forward(self, x: Tensor) -> Tensor:
        return type(self).function(x, self.filter, self.scale_factor, implementation=self.implementation)

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}, {super().extra_repr()}"


class Blur2d(_Blur):
    r"""Filters each channel with a low-pass; zeros stand beyond the edges (:func:`gankern.functional.filter2d`).

    Args:
        filter: a name or taps, see :func:`gankern.filters.fir`.
        implementation: see :mod:`gankern.functional`.

    Shape: [N, C, H, W], and the same of the result. Gradient order: any.

    >>> import torch
    >>> Blur2d()(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 8, 16, 16])
    """

    function = GF.filter2d
    filter_axes = (1, 2)


class Blur1d(_Blur):
    """As :class:`Blur2d`, of signals [N, C, L], with taps [k] (:func:`gankern.functional.filter1d`).

    >>> import torch
    >>> Blur1d()(torch.randn(2, 8, 100)).shape
    torch.Size([2, 8, 100])
    """

    function = GF.filter1d


class Blur3d(_Blur):
    """As :class:`Blur2d`, of volumes [N, C, D, H, W], with taps [k] along each axis
    (:func:`gankern.functional.filter3d`).

    >>> import torch
    >>> Blur3d()(torch.randn(2, 4, 8, 8, 8)).shape
    torch.Size([2, 4, 8, 8, 8])
    """

    function = GF.filter3d


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

    function = GF.upsample2d
    filter_axes = (1, 2)


class FIRUpsample1d(_Resampling):
    """As :class:`FIRUpsample2d`, of signals: [N, C, L] to [N, C, L * scale_factor], with taps [k]
    (:func:`gankern.functional.upsample1d`).

    >>> import torch
    >>> FIRUpsample1d(4, "kaiser")(torch.randn(2, 8, 25)).shape
    torch.Size([2, 8, 100])
    """

    function = GF.upsample1d


class FIRUpsample3d(_Resampling):
    """As :class:`FIRUpsample2d`, of volumes: [N, C, D, H, W] to scale_factor times each size, with taps [k] along each
    axis (:func:`gankern.functional.upsample3d`).

    >>> import torch
    >>> FIRUpsample3d()(torch.randn(2, 4, 4, 4, 4)).shape
    torch.Size([2, 4, 8, 8, 8])
    """

    function = GF.upsample3d


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

    function = GF.downsample2d
    filter_axes = (1, 2)


class FIRDownsample1d(_Resampling):
    """As :class:`FIRDownsample2d`, of signals: [N, C, L] to [N, C, L // scale_factor], with taps [k]
    (:func:`gankern.functional.downsample1d`).

    >>> import torch
    >>> FIRDownsample1d(4, "kaiser")(torch.randn(2, 8, 100)).shape
    torch.Size([2, 8, 25])
    """

    function = GF.downsample1d


class FIRDownsample3d(_Resampling):
    """As :class:`FIRDownsample2d`, of volumes: [N, C, D, H, W] to each size divided by scale_factor, with taps [k]
    along each axis (:func:`gankern.functional.downsample3d`).

    >>> import torch
    >>> FIRDownsample3d()(torch.randn(2, 4, 8, 8, 8)).shape
    torch.Size([2, 4, 4, 4, 4])
    """

    function = GF.downsample3d
