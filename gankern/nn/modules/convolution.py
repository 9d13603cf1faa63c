"""Convolutions as layers: torch's two, those that change the resolution, and those with run-time scaling."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern.functional as GF
from gankern.functional import _checks
from gankern.functional.convolution import check_upsampling
from gankern.nn import init

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d (same arguments, initialisation and state_dict keys) by :func:`gankern.functional.conv2d`, which
    reads what ``padding_mode`` says without a padded copy where it can. ``implementation``: see
    :mod:`gankern.functional`.

    >>> Conv2d(8, 16, 3, padding=1)(torch.randn(2, 8, 32, 32)).shape
    torch.Size([2, 16, 32, 32])
    """

    weight_scale = 1.0
    implementation: str | None = None  # also of pickles that are older than it

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True, padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        implementation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.implementation = _checks.implementation(type(self).__name__, implementation)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return GF.conv2d(
            input, weight, bias, self.stride, self.padding, self.dilation, self.groups,
            padding_mode=self.padding_mode, weight_scale=self.weight_scale, implementation=self.implementation,
        )  # fmt: skip


_warned = False


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d (same arguments, initialisation and state_dict keys) by
    :func:`gankern.functional.conv_transpose2d`.

    Where the stride does not divide the kernel, some results are sums of more products than their neighbours, which
    shows as a checkerboard (Odena et al. 2016): the first such layer of the process warns. ``implementation``: see
    :mod:`gankern.functional`.

    >>> ConvTranspose2d(8, 16, 4, 2, 1)(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 16, 32, 32])
    """

    implementation: str | None = None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0, groups: int = 1, bias: bool = True,
        dilation: int | tuple[int, int] = 1, padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        implementation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding,
            output_padding, groups, bias, dilation, padding_mode, device, dtype,
        )  # fmt: skip
        self.implementation = _checks.implementation("ConvTranspose2d", implementation)
        global _warned
        uneven = any(k % s for k, s in zip(self.kernel_size, self.stride) if s > 1)
        if uneven and not _warned:
            _warned = True
            even = tuple(s * max(1, round(k / s)) for k, s in zip(self.kernel_size, self.stride))
            warnings.warn(
                f"ConvTranspose2d: kernel {self.kernel_size} and stride {self.stride} overlap unevenly, which draws "
                f"checkerboards; use a kernel that the stride divides, such as {even}, or gankern.nn.UpsampleConv2d "
                f"(said once)",
                stacklevel=2,
            )

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError(f"ConvTranspose2d: padding_mode is {self.padding_mode!r}; only 'zeros' is accepted")
        # torch annotates the first as TorchScript needs it, and the padding as of a convolution that is not transposed.
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation  # type: ignore[arg-type]
        )  # fmt: skip
        return GF.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding,  # type: ignore[arg-type]
            output_padding, self.groups, self.dilation, implementation=self.implementation,
        )  # fmt: skip


class _Resampling(nn.Conv2d):
    """What the two layers that change the resolution share: parameters as torch.nn.Conv2d has them."""

    weight_scale = 1.0
    implementation: str | None = None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int] = 3, bias: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        implementation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, padding="same", bias=bias, device=device, dtype=dtype)
        self.implementation = _checks.implementation(type(self).__name__, implementation)
        _check_odd(type(self).__name__, self.kernel_size)


def _check_odd(name: str, kernel_size: tuple[int, ...]) -> None:
    if any(k % 2 == 0 for k in kernel_size):
        raise ValueError(f'{name}: kernel_size is {kernel_size}; with "same" padding it must be odd')


class UpsampleConv2d(_Resampling):
    """Upsampling and a convolution of stride 1 in one: :func:`gankern.functional.upsample_conv2d`.

    Parameters, their initialisation and their names are those of torch.nn.Conv2d; a checkpoint of
    ``nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, d, 3, padding=1))`` has them under "1.".

    Args:
        in_channels, out_channels, kernel_size, bias, device, dtype: as in torch.nn.Conv2d; kernel_size is odd.
        scale_factor, mode, implementation: as in :func:`gankern.functional.upsample_conv2d`.

    >>> UpsampleConv2d(8, 16)(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 16, 32, 32])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int] = 3, bias: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, scale_factor: float = 2,
        mode: str = "nearest", implementation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, bias, device, dtype, implementation=implementation)
        check_upsampling("UpsampleConv2d", scale_factor, mode)
        self.scale_factor, self.mode = scale_factor, mode

    def forward(self, input: Tensor) -> Tensor:
        return GF.upsample_conv2d(
            input, self.weight, self.bias, scale_factor=self.scale_factor, mode=self.mode,
            weight_scale=self.weight_scale, implementation=self.implementation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_factor={self.scale_factor}, mode={self.mode!r}"


class ConvDownsample2d(_Resampling):
    """A convolution of stride 1 and the means of 2x2 pixels in one: :func:`gankern.functional.conv2d_downsample`.

    Parameters, their initialisation and their names are those of torch.nn.Conv2d; a checkpoint of
    ``nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.AvgPool2d(2))`` has them under "0.".

    Args:
        in_channels, out_channels, kernel_size, bias, device, dtype: as in torch.nn.Conv2d; kernel_size is odd.
        implementation: see :mod:`gankern.functional`.

    >>> ConvDownsample2d(8, 16)(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 16, 8, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        return GF.conv2d_downsample(
            input, self.weight, self.bias, weight_scale=self.weight_scale, implementation=self.implementation
        )


def _equalize(layer: _EqualizedConv | EqualizedConv2d | EqualizedLinear, fan_in: int, gain: float) -> None:
    _checks.number(type(layer).__name__, "gain", gain)
    layer.gain, layer.weight_scale = gain, gain / math.sqrt(fan_in)
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class EqualizedConv2d(Conv2d):
    r"""A convolution with an equalised learning rate: weights from N(0, 1), multiplied at run time with
    gain / sqrt(fan_in), fan_in = in_channels / groups * kernel height * width; biases unscaled, from 0.

    The scale is part of the convolution: no scaled copy of the weight is kept.

    Source: Karras et al. 2018, arXiv 1710.10196, section 4.1.

    Args:
        in_channels, ..., dtype: as in torch.nn.Conv2d.
        gain: He's sqrt(2); 1 for layers without an activation, such as a generator's last one.
        resample: None; "upsample" and "downsample" make it a :class:`UpsampleConv2d` and a :class:`ConvDownsample2d`
            (stride, dilation, groups and padding_mode then stay as they are by default, the kernel is odd, and
            padding is that of "same", which need not be said).
        implementation: see :mod:`gankern.functional`.

    >>> EqualizedConv2d(8, 16, 3, resample="upsample")(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 16, 32, 32])
    """

    gain: float

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True, padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, gain: float = math.sqrt(2),
        resample: str | None = None, implementation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype, implementation=implementation,
        )  # fmt: skip
        if resample not in (None, "upsample", "downsample"):
            raise ValueError(
                f"EqualizedConv2d: resample is {resample!r}; accepted are None, 'upsample' and 'downsample'"
            )
        if resample:
            if (self.stride, self.dilation, self.groups) != ((1, 1), (1, 1), 1):
                raise ValueError(f"EqualizedConv2d: resample={resample!r} takes no stride, dilation or groups")
            if self.padding_mode != "zeros":
                raise ValueError(
                    f"EqualizedConv2d: padding_mode is {self.padding_mode!r}; resample={resample!r} takes 'zeros'"
                )
            _check_odd("EqualizedConv2d", self.kernel_size)
            if self.padding not in ((0, 0), "same", tuple(k // 2 for k in self.kernel_size)):
                raise ValueError(
                    f"EqualizedConv2d: padding is {self.padding}; resample={resample!r} accepts that of 'same' alone"
                )
        self.resample = resample
        _equalize(self, self.weight[0].numel(), gain)

    def forward(self, input: Tensor) -> Tensor:
        if self.resample is None:
            return super().forward(input)
        function = GF.upsample_conv2d if self.resample == "upsample" else GF.conv2d_downsample
        return function(
            input, self.weight, self.bias, weight_scale=self.weight_scale, implementation=self.implementation
        )

    def extra_repr(self) -> str:
        resample = f", resample={self.resample!r}" if self.resample else ""
        return f"{super().extra_repr()}, gain={self.gain:.4g}{resample}"


class _EqualizedConv(nn.modules.conv._ConvNd):
    """Torch's convolution in one dimension or three, with a scaled weight: there are no kernels of ours for them."""

    gain: float
    weight_scale: float
    implementation: str | None = None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1, padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1, groups: int = 1, bias: bool = True, padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, gain: float = math.sqrt(2),
        implementation: str | None = None,
    ) -> None:  # fmt: skip
        sibling: Any = super()  # nn.Conv1d, nn.Conv3d
        sibling.__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        _checks.choice(type(self).__name__, "implementation", implementation, (None, "auto", "reference"))
        self.implementation = implementation
        _equalize(self, self.weight[0].numel(), gain)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gain={self.gain:.4g}"


class EqualizedConv1d(_EqualizedConv, nn.Conv1d):
    """As :class:`EqualizedConv2d`, in one dimension: fan_in = in_channels / groups * kernel length.

    Args:
        in_channels, ..., dtype: as in torch.nn.Conv1d.
        gain: He's sqrt(2); 1 for layers without an activation.
        implementation: "reference" alone: it is torch's own convolution, and there are no kernels of ours.

    >>> EqualizedConv1d(8, 16, 3, padding=1)(torch.randn(2, 8, 20)).shape
    torch.Size([2, 16, 20])
    """


class EqualizedConv3d(_EqualizedConv, nn.Conv3d):
    """As :class:`EqualizedConv2d`, in three dimensions: fan_in = in_channels / groups * the kernel's three sizes.

    Args:
        in_channels, ..., dtype: as in torch.nn.Conv3d.
        gain: He's sqrt(2); 1 for layers without an activation.
        implementation: "reference" alone: it is torch's own convolution, and there are no kernels of ours.

    >>> EqualizedConv3d(4, 8, 3, padding=1)(torch.randn(2, 4, 5, 6, 7)).shape
    torch.Size([2, 8, 5, 6, 7])
    """


class EqualizedLinear(nn.Linear):
    """A linear layer with an equalised learning rate: as :class:`EqualizedConv2d`, fan_in = in_features.

    Args:
        in_features, ..., dtype: as in torch.nn.Linear.
        gain: He's sqrt(2); ProGAN has sqrt(2) / 4 in its first and 1 in its last layer.
        implementation: "reference" alone: it is torch's own matrix product, and there are no kernels of ours.

    >>> EqualizedLinear(8, 16)(torch.randn(2, 8)).shape
    torch.Size([2, 16])
    """

    gain: float
    weight_scale: float
    implementation: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gain: float = math.sqrt(2),
        implementation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        _checks.choice("EqualizedLinear", "implementation", implementation, (None, "auto", "reference"))
        self.implementation = implementation
        _equalize(self, self.in_features, gain)

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is None:
            return F.linear(input, self.weight) * self.weight_scale
        rows = input.flatten(0, -2) if input.ndim > 1 else input[None]
        y = torch.addmm(self.bias, rows, self.weight.t(), alpha=self.weight_scale)
        return y.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gain={self.gain:.4g}"


class _SubpixelConv(nn.modules.conv._ConvNd):
    """A convolution and a pixel shuffle in one, two or three dimensions."""

    dimensions: int
    implementation: str | None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...], upscale_factor: int = 2,
        padding: int | tuple[int, ...] | str = 0, dilation: int | tuple[int, ...] = 1, groups: int = 1,
        bias: bool = True, padding_mode: PaddingMode = "zeros", *, icnr: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, implementation: str | None = None,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        if not isinstance(upscale_factor, int) or isinstance(upscale_factor, bool) or upscale_factor < 1:
            raise ValueError(f"{name}: upscale_factor is {upscale_factor!r}; it must be an integer of at least 1")
        self.upscale_factor = upscale_factor
        self.icnr = icnr
        sibling: Any = super()  # the convolution of this many dimensions
        sibling.__init__(
            in_channels, out_channels * upscale_factor**self.dimensions, kernel_size, 1, padding, dilation, groups,
            bias, padding_mode, device, dtype,
        )  # fmt: skip
        if isinstance(self, Conv2d):
            self.implementation = _checks.implementation(name, implementation)
        else:
            _checks.choice(name, "implementation", implementation, (None, "auto", "reference"))
            self.implementation = implementation

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.icnr:
            init.icnr_(self.weight, self.upscale_factor)
            if self.bias is not None:
                copies = self.upscale_factor**self.dimensions
                with torch.no_grad():
                    self.bias.copy_(self.bias[::copies].repeat_interleave(copies))

    def forward(self, x: Tensor) -> Tensor:
        y, r, d = super().forward(x), self.upscale_factor, self.dimensions
        if d == 2:
            return F.pixel_shuffle(y, r)
        # [..., C r^d, *sizes] to [..., C, size 1, r, size 2, r, ...]: a channel's values are neighbours, as in torch's.
        first = y.ndim - d - 1
        y = y.unflatten(first, (-1, *[r] * d))
        y = y.permute(*range(first + 1), *(axis for i in range(1, d + 1) for axis in (first + d + i, first + i)))
        return y.reshape(*y.shape[: first + 1], *(n * r for n in y.shape[first + 1 :: 2]))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, upscale_factor={self.upscale_factor}, icnr={self.icnr}"


class SubpixelConv2d(_SubpixelConv, Conv2d):
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
        implementation: see :mod:`gankern.functional`.

    Shape: x is [N, in_channels, H, W], the result [N, out_channels, H' r, W' r], with H' and W' torch.nn.Conv2d's.

    Parameters: weight [out_channels * r * r, in_channels / groups, ...], bias [out_channels * r * r], as a
    torch.nn.Conv2d of that many outputs has.

    Gradient order: any.

    >>> SubpixelConv2d(8, 3, 3, padding=1)(torch.randn(2, 8, 16, 16)).shape
    torch.Size([2, 3, 32, 32])
    """

    dimensions = 2


class SubpixelConv1d(_SubpixelConv, nn.Conv1d):
    """As :class:`SubpixelConv2d`, of signals: [N, in_channels, L] to [N, out_channels, L' r] by a convolution of
    out_channels * r channels, torch's own (``implementation`` is "reference" alone).

    Source: the sub-pixel layer of audio super-resolution, Kuleshov et al. 2017, arXiv 1708.00853.

    >>> SubpixelConv1d(8, 2, 9, upscale_factor=4, padding=4)(torch.randn(2, 8, 25)).shape
    torch.Size([2, 2, 100])
    """

    dimensions = 1


class SubpixelConv3d(_SubpixelConv, nn.Conv3d):
    """As :class:`SubpixelConv2d`, of volumes: [N, in_channels, D, H, W] to [N, out_channels, D' r, H' r, W' r] by a
    convolution of out_channels * r ** 3 channels, torch's own (``implementation`` is "reference" alone).

    >>> SubpixelConv3d(4, 2, 3, padding=1)(torch.randn(1, 4, 5, 6, 7)).shape
    torch.Size([1, 2, 10, 12, 14])
    """

    dimensions = 3
