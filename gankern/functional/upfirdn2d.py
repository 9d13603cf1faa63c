"""Up, FIR filter, down, and the resampling filters made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from gankern.core.native import nodes
from gankern.functional import _checks
from gankern.ops.upfirdn2d import taps_of
from gankern.ops.upfirdn2d import upfirdn2d as _upfirdn2d

Pair = int | Sequence[int]


def upfirdn2d(
    x: Tensor,
    filter: Tensor,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    implementation: str | None = None,
) -> Tensor:
    r"""Inserts zeros, pads or crops, filters and decimates each channel of a batch of images.

    1. Each sample is followed by ``up`` - 1 zeros on each axis: :math:`h \to h \cdot up`.
    2. Zeros are added at the edges, or samples removed where ``padding`` is negative.
    3. That is convolved with the filter of k taps, where the filter lies inside: :math:`h \to h - k + 1`.
    4. Every ``down``-th sample is kept, from the first one on, and multiplied by ``gain``.

    On one axis, with z the result of the second step, :math:`y_o = gain \sum_j f_j\, z_{o \cdot down + k - 1 - j}`. It
    is done in one pass that touches no inserted zero. The operator is linear, and its gradient is itself with ``up``
    and ``down`` exchanged and the filter flipped.

    Source: multirate filtering; what :func:`scipy.signal.upfirdn` does on one axis, with the edges chosen by
    ``padding``.

    Args:
        x: [N, C, H, W], float64, float32, bfloat16 or float16, any strides; sums are in float32 (float64 for float64).
        filter: [k], used on both axes, or [k_h, k_w], of any of these dtypes, on x's device. :mod:`gankern.filters`
            makes the usual ones.
        up, down: one factor, or (vertical, horizontal); at least 1.
        padding: in samples after the first step: one number for all edges, (vertical, horizontal), or (left, right,
            top, bottom) as :func:`torch.nn.functional.pad` has them. Negative numbers crop.
        flip_filter: correlate with the filter as it stands, as torch's convolutions do.
        gain: a factor of the result.
        implementation: see :mod:`gankern.functional`.

    Returns:
        [N, C, (H * up + padding - k) // down + 1, ...] of x's dtype; channels_last for channels_last x.

    Gradient order: any, for x. The filter is a constant, and has a gradient for "reference" only.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> import torch
    >>> f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    >>> upfirdn2d(torch.ones(1, 1, 4, 4), f, up=2, padding=(2, 1, 2, 1), gain=4).shape
    torch.Size([1, 1, 8, 8])
    """
    if not is_dynamo_compiling():
        y = nodes.upfirdn2d(x, filter, up, down, padding, flip_filter, gain, "upfirdn2d", implementation)
        if y is not NotImplemented:
            return y
    return _run("upfirdn2d", x, filter, up, down, padding, None, flip_filter, gain, implementation)


def upfirdn1d(
    x: Tensor,
    filter: Tensor,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    implementation: str | None = None,
) -> Tensor:
    r""":func:`upfirdn2d` of signals, by its kernels: an image of one row.

    Args:
        x: [N, C, L].
        filter: [k].
        up, down: a factor, at least 1.
        padding: one number for both ends, or (before, after); negative numbers crop.
        flip_filter, gain, implementation: as in :func:`upfirdn2d`.

    Returns:
        [N, C, (L * up + padding - k) // down + 1].

    Gradient order: any, for x. Raises ValueError and TypeError as :func:`upfirdn2d`.

    >>> import torch
    >>> upfirdn1d(torch.tensor([[[1.0, 2.0]]]), torch.tensor([1.0, 1.0]), up=2, padding=(1, 0))
    tensor([[[1., 1., 2., 2.]]])
    """
    return _along_axes("upfirdn1d", 1, x, filter, up, down, padding, None, flip_filter, gain, implementation)


def upfirdn3d(
    x: Tensor,
    filter: Tensor,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    implementation: str | None = None,
) -> Tensor:
    r""":func:`upfirdn2d` of volumes with one filter along each of the three axes, by its kernels: the planes first,
    then along the depth.

    Args:
        x: [N, C, D, H, W].
        filter: [k], used on all axes.
        up, down: one factor, or (depth, vertical, horizontal); at least 1.
        padding: one number for all faces, (depth, vertical, horizontal), or (left, right, top, bottom, front, back) as
            :func:`torch.nn.functional.pad` has them. Negative numbers crop.
        flip_filter, gain, implementation: as in :func:`upfirdn2d`.

    Returns:
        [N, C, (D * up + padding - k) // down + 1, ...].

    Gradient order: any, for x. Raises ValueError and TypeError as :func:`upfirdn2d`.

    >>> import torch
    >>> upfirdn3d(torch.ones(1, 2, 4, 4, 4), torch.tensor([0.5, 0.5]), up=2, padding=(1, 0, 1, 0, 1, 0), gain=8).shape
    torch.Size([1, 2, 8, 8, 8])
    """
    return _along_axes("upfirdn3d", 3, x, filter, up, down, padding, None, flip_filter, gain, implementation)


_AXES = {1: ("samples",), 3: ("planes", "rows", "columns")}


def _along_axes(
    name: str,
    axes: int,
    x: Tensor,
    filter: Tensor,
    up: Pair,
    down: Pair,
    padding: Pair,
    keeps_place: Callable[[int, int, int], tuple[int, int]] | None,
    flip_filter: bool,
    gain: float,
    implementation: str | None,
) -> Tensor:
    """One filter along the one axis of signals or the three of volumes; ``keeps_place`` of (taps, up, down) is padding
    that is added, and multiplies the gain by the factors."""
    _checks.floating(name, "x", x)
    _checks.floating(name, "filter", filter)
    _checks.number(name, "gain", gain)
    _checks.implementation(name, implementation)
    _same_device(name, x, filter)
    if x.ndim != axes + 2 or 0 in x.shape[2:]:
        wanted = "[N, C, L]" if axes == 1 else "[N, C, D, H, W]"
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}; it must be {wanted}, not empty along its {', '.join(_AXES[axes])}"
        )
    if filter.ndim != 1 or len(filter) == 0:
        raise ValueError(f"{name}: filter has shape {tuple(filter.shape)}; it must be [k], with a tap or more")
    ups, downs = _factors(name, "up", up, axes), _factors(name, "down", down, axes)
    ends = _ends(name, padding, axes)
    if keeps_place is not None:
        extra = [keeps_place(len(filter), u, d) for u, d in zip(ups, downs)]
        ends = [(before + b, after + a) for (before, after), (b, a) in zip(ends, extra)]
        gain = gain * math.prod(ups)
    for axis, n, u, (before, after) in zip(_AXES[axes], x.shape[2:], ups, ends):
        _leaves_something(name, axis, n * u, len(filter), before, after)
    if axes == 1:
        y = upfirdn2d(
            x.unsqueeze(2), filter[None], (1, *ups), (1, *downs), (*ends[0], 0, 0), flip_filter, gain,
            implementation=implementation,
        )  # fmt: skip
        return y.squeeze(2)
    # The planes first, then along the depth: images whose columns are a plane's pixels.
    planes = upfirdn2d(
        x.flatten(1, 2), filter, ups[1:], downs[1:], (*ends[2], *ends[1]), flip_filter, gain,
        implementation=implementation,
    )  # fmt: skip
    lines = planes.unflatten(1, x.shape[1:3]).flatten(3)
    y = upfirdn2d(
        lines, filter[:, None], (ups[0], 1), (downs[0], 1), (0, 0, *ends[0]), flip_filter,
        implementation=implementation,
    )  # fmt: skip
    return y.unflatten(3, planes.shape[2:])


def _factors(name: str, argument: str, value: Pair, axes: int) -> tuple[int, ...]:
    values = _integers(value)
    if len(values) not in (1, axes) or min(values) < 1:
        accepted = "an integer of at least 1" if axes == 1 else f"one of at least 1, or {axes} of them"
        raise ValueError(f"{name}: {argument} is {value}; it must be {accepted}")
    return values * (axes // len(values))


def _ends(name: str, padding: Pair, axes: int) -> list[tuple[int, int]]:
    """(before, after) of each axis, the first one first: torch.nn.functional.pad has them the other way round."""
    values = _integers(padding)
    if len(values) not in {1, axes, 2 * axes}:
        raise ValueError(f"{name}: padding is {padding}; it must be 1, {axes} or {2 * axes} integers")
    if len(values) < 2 * axes:
        return [(n, n) for n in values * (axes // len(values))]
    return list(zip(values[::2], values[1::2]))[::-1]


def _place_of_upsampling(taps: int, up: int, down: int) -> tuple[int, int]:
    return (taps + up - 1) // 2, (taps - up) // 2


def _place_of_downsampling(taps: int, up: int, down: int) -> tuple[int, int]:
    return (taps - down + 1) // 2, (taps - down) // 2


def _place_of_filtering(taps: int, up: int, down: int) -> tuple[int, int]:
    return taps // 2, (taps - 1) // 2


def upsample2d(
    x: Tensor, filter: Tensor, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, *,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    r"""Upsamples by an integer factor with a FIR filter: [N, C, H, W] to [N, C, H * up, W * up].

    :func:`upfirdn2d` whose padding keeps pictures in place (a sample's response is centred on the ``up`` samples that
    it becomes; for an odd k - up, half a sample after it) and whose gain is multiplied by the factors, so that a filter
    of sum 1 keeps the mean. ``padding`` is added to that. Other arguments, gradient order and errors are
    :func:`upfirdn2d`'s.

    >>> import torch
    >>> f = torch.tensor([1.0, 1.0]) / 2
    >>> upsample2d(torch.tensor([[[[1.0, 2.0]]]]), f)  # a box of two is nearest-neighbour upsampling
    tensor([[[[1., 1., 2., 2.],
              [1., 1., 2., 2.]]]])
    """
    name = "upsample2d"
    if not is_dynamo_compiling():
        y = nodes.upfirdn2d(x, filter, up, 1, padding, flip_filter, gain, name, implementation)
        if y is not NotImplemented:
            return y
    factors = _pair(name, "up", up)
    _checks.number(name, "gain", gain)
    extra = [_place_of_upsampling(k, u, 1) for k, u in zip(_taps(name, filter), factors)]
    return _run(name, x, filter, up, 1, padding, extra, flip_filter, gain * factors[0] * factors[1], implementation)


def downsample2d(
    x: Tensor, filter: Tensor, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, *,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    r"""Downsamples by an integer factor with a FIR filter: [N, C, H, W] to [N, C, H // down, W // down].

    :func:`upfirdn2d` whose padding keeps pictures in place (each sample of the result is centred on the ``down``
    samples that it stands for; for an odd k - down, half a sample before). ``padding`` is added to that. Other
    arguments, gradient order and errors are :func:`upfirdn2d`'s.

    >>> import torch
    >>> f = torch.tensor([1.0, 1.0]) / 2
    >>> downsample2d(torch.arange(4.0).reshape(1, 1, 2, 2), f)  # a box of two is the mean
    tensor([[[[1.5000]]]])
    """
    name = "downsample2d"
    if not is_dynamo_compiling():
        y = nodes.upfirdn2d(x, filter, 1, down, padding, flip_filter, gain, name, implementation)
        if y is not NotImplemented:
            return y
    extra = [_place_of_downsampling(k, 1, d) for k, d in zip(_taps(name, filter), _pair(name, "down", down))]
    return _run(name, x, filter, 1, down, padding, extra, flip_filter, gain, implementation)


def filter2d(
    x: Tensor,
    filter: Tensor,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    implementation: str | None = None,
) -> Tensor:
    r"""Filters each channel with a FIR filter, zeros beyond the edges: [N, C, H, W] to the same shape.

    :func:`upfirdn2d` whose padding keeps pictures in place (for an even number of taps, half a sample before).
    ``padding`` is added to that. Other arguments, gradient order and errors are :func:`upfirdn2d`'s.

    >>> import torch
    >>> filter2d(torch.ones(1, 1, 1, 4), torch.tensor([[1.0, 2.0, 1.0]]) / 4)
    tensor([[[[0.7500, 1.0000, 1.0000, 0.7500]]]])
    """
    name = "filter2d"
    if not is_dynamo_compiling():
        y = nodes.upfirdn2d(x, filter, 1, 1, padding, flip_filter, gain, name, implementation)
        if y is not NotImplemented:
            return y
    extra = [_place_of_filtering(k, 1, 1) for k in _taps(name, filter)]
    return _run(name, x, filter, 1, 1, padding, extra, flip_filter, gain, implementation)


def upsample1d(
    x: Tensor, filter: Tensor, up: int = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, *,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    r""":func:`upsample2d` of signals: [N, C, L] to [N, C, L * up], with one filter [k] along each axis.

    :func:`upfirdn1d` with :func:`upsample2d`'s padding and gain. Gradient order and errors are :func:`upfirdn1d`'s.

    >>> import torch
    >>> f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    >>> upsample1d(torch.tensor([[[0.0, 8.0, 0.0]]]), f)
    tensor([[[0., 2., 6., 6., 2., 0.]]])
    """
    return _along_axes(
        "upsample1d", 1, x, filter, up, 1, padding, _place_of_upsampling, flip_filter, gain, implementation
    )


def downsample1d(
    x: Tensor, filter: Tensor, down: int = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, *,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    r""":func:`downsample2d` of signals: [N, C, L] to [N, C, L // down], with one filter [k] along each axis.

    :func:`upfirdn1d` with :func:`downsample2d`'s padding. Gradient order and errors are :func:`upfirdn1d`'s.

    >>> import torch
    >>> downsample1d(torch.arange(6.0).reshape(1, 1, 6), torch.tensor([1.0, 1.0]) / 2)  # a box of two is the mean
    tensor([[[0.5000, 2.5000, 4.5000]]])
    """
    return _along_axes(
        "downsample1d", 1, x, filter, 1, down, padding, _place_of_downsampling, flip_filter, gain, implementation
    )


def filter1d(
    x: Tensor, filter: Tensor, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, *,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    r""":func:`filter2d` of signals: [N, C, L] to the same shape, with one filter [k] along each axis.

    :func:`upfirdn1d` with :func:`filter2d`'s padding. Gradient order and errors are :func:`upfirdn1d`'s.

    >>> import torch
    >>> filter1d(torch.ones(1, 1, 4), torch.tensor([1.0, 2.0, 1.0]) / 4)
    tensor([[[0.7500, 1.0000, 1.0000, 0.7500]]])
    """
    return _along_axes("filter1d", 1, x, filter, 1, 1, padding, _place_of_filtering, flip_filter, gain, implementation)


def upsample3d(
    x: Tensor, filter: Tensor, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, *,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    r""":func:`upsample2d` of volumes: [N, C, D, H, W] to [N, C, D * up, ...], with one filter [k] along each axis.

    :func:`upfirdn3d` with :func:`upsample2d`'s padding and gain. Gradient order and errors are :func:`upfirdn3d`'s.

    >>> import torch
    >>> f = torch.tensor([1.0, 1.0]) / 2
    >>> upsample3d(torch.ones(1, 2, 4, 4, 4), f).shape  # a box of two is nearest-neighbour upsampling
    torch.Size([1, 2, 8, 8, 8])
    """
    return _along_axes(
        "upsample3d", 3, x, filter, up, 1, padding, _place_of_upsampling, flip_filter, gain, implementation
    )


def downsample3d(
    x: Tensor, filter: Tensor, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, *,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    r""":func:`downsample2d` of volumes: [N, C, D, H, W] to [N, C, D // down, ...], with one filter [k] along each axis.

    :func:`upfirdn3d` with :func:`downsample2d`'s padding. Gradient order and errors are :func:`upfirdn3d`'s.

    >>> import torch
    >>> downsample3d(torch.arange(8.0).reshape(1, 1, 2, 2, 2), torch.tensor([1.0, 1.0]) / 2)
    tensor([[[[[3.5000]]]]])
    """
    return _along_axes(
        "downsample3d", 3, x, filter, 1, down, padding, _place_of_downsampling, flip_filter, gain, implementation
    )


def filter3d(
    x: Tensor, filter: Tensor, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, *,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    r""":func:`filter2d` of volumes: [N, C, D, H, W] to the same shape, with one filter [k] along each axis.

    :func:`upfirdn3d` with :func:`filter2d`'s padding. Gradient order and errors are :func:`upfirdn3d`'s.

    >>> import torch
    >>> filter3d(torch.ones(1, 1, 3, 3, 3), torch.tensor([1.0, 2.0, 1.0]) / 4)[0, 0, 1]
    tensor([[0.5625, 0.7500, 0.5625],
            [0.7500, 1.0000, 0.7500],
            [0.5625, 0.7500, 0.5625]])
    """
    return _along_axes("filter3d", 3, x, filter, 1, 1, padding, _place_of_filtering, flip_filter, gain, implementation)


def _of_convolution(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, filter: Tensor, argument: str, factor: int
) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """Taps of the filter, factor, and kernel size of checked arguments."""
    taps, (checked, _) = _taps(name, filter), _one(name, argument, factor)
    size = _kernel(name, x, weight)
    _checks.bias_of(name, bias, x, weight.shape[0])
    return taps, checked, size


def fir_upsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, filter: Tensor, *, up: int = 2, implementation: str | None = None
) -> Tensor:
    r"""Upsamples with a FIR filter and then convolves, [N, C, H, W] to [N, K, H * up, W * up], in the order that costs
    least.

    Filter and convolution commute: the convolution meets the zero-inserted samples first, as a transposed convolution
    of up * up times fewer multiply-adds, and the filter, one pass, smooths its result. That is :func:`upsample2d`,
    whose response is not cut off at the edges, followed by a convolution at the same size.

    Args:
        x, filter, implementation: :func:`upfirdn2d`'s.
        weight, bias: torch.nn.functional.conv2d's, [K, C, k_h, k_w] and [K] or None; x's dtype.
        up: one integer factor.

    Gradient order: any, for x, weight and bias. Errors are :func:`upfirdn2d`'s.

    >>> import torch
    >>> f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    >>> fir_upsample_conv2d(torch.randn(2, 8, 16, 16), torch.randn(4, 8, 3, 3), None, f).shape
    torch.Size([2, 4, 32, 32])
    """
    name = "fir_upsample_conv2d"
    taps, up, size = _of_convolution(name, x, weight, bias, filter, "up", up)
    y = F.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=up)
    before = [(k + up - 1) // 2 - (w - 1) // 2 for k, w in zip(taps, size)]
    extra = [(b, up - w - b + k - 1) for b, k, w in zip(before, taps, size)]
    y = _run(name, y, filter, 1, 1, 0, extra, False, up * up, implementation)
    return y if bias is None else y + bias[:, None, None]


def fir_downsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, filter: Tensor, *, down: int = 2, implementation: str | None = None
) -> Tensor:
    r"""Convolves and then downsamples with a FIR filter, [N, C, H, W] to [N, K, H // down, W // down], in the order
    that costs least.

    Filter and convolution commute: the filter comes first, and the convolution then is a strided one, of down * down
    times fewer multiply-adds. That is a convolution whose result is not cut off at the edges, followed by
    :func:`downsample2d`.

    Arguments, gradient order and errors are :func:`fir_upsample_conv2d`'s, with ``down``, an integer, for ``up``.

    >>> import torch
    >>> f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    >>> fir_downsample_conv2d(torch.randn(2, 8, 16, 16), torch.randn(4, 8, 3, 3), None, f).shape
    torch.Size([2, 4, 8, 8])
    """
    name = "fir_downsample_conv2d"
    taps, down, size = _of_convolution(name, x, weight, bias, filter, "down", down)
    extra = []
    for k, w, n in zip(taps, size, x.shape[2:]):
        before = (k - down + 1) // 2 + w // 2
        extra.append((before, (n // down - 1) * down + w - n - before + k - 1))
    y = _run(name, x, filter, 1, 1, 0, extra, False, 1, implementation)
    return F.conv2d(y, weight, bias, stride=down)


def _run(
    name: str,
    x: Tensor,
    filter: Tensor,
    up: Pair,
    down: Pair,
    padding: Pair,
    extra: Sequence[tuple[int, int]] | None,  # padding that is added: (before, after) of the rows and of the columns
    flip_filter: bool,
    gain: float,
    implementation: str | None,
) -> Tensor:
    _checks.floating(name, "x", x)
    _checks.number(name, "gain", gain)
    taps = _taps(name, filter)
    if x.ndim != 4 or 0 in x.shape[2:]:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}; it must be [N, C, H, W] with at least one row and column"
        )
    _same_device(name, x, filter)
    up, down = _pair(name, "up", up), _pair(name, "down", down)
    edges = _edges(name, padding)
    if extra is not None:
        (top, bottom), (left, right) = extra
        edges = edges[0] + left, edges[1] + right, edges[2] + top, edges[3] + bottom
    for axis, n, u, k, before, after in (
        ("rows", x.shape[2], up[0], taps[0], *edges[2:]),
        ("columns", x.shape[3], up[1], taps[1], *edges[:2]),
    ):
        _leaves_something(name, axis, n * u, k, before, after)
    return _upfirdn2d(x, filter, up, down, edges, bool(flip_filter), float(gain), implementation)


def _same_device(name: str, x: Tensor, filter: Tensor) -> None:
    if filter.device != x.device:
        raise ValueError(f"{name}: filter is on {filter.device}, x on {x.device}; they must share a device")


def _leaves_something(name: str, axis: str, size: int, taps: int, before: int, after: int) -> None:
    if max(-before, 0) + max(-after, 0) >= size or size + before + after < taps:
        raise ValueError(
            f"{name}: padding of ({before}, {after}) leaves nothing of {size} {axis} for a filter of {taps} taps"
        )


def _taps(name: str, filter: Tensor) -> tuple[int, int]:
    _checks.floating(name, "filter", filter)
    if filter.ndim not in (1, 2):
        raise ValueError(f"{name}: filter has shape {tuple(filter.shape)}; it must be [taps] or [rows, columns]")
    if filter.numel() == 0:
        raise ValueError(f"{name}: filter has shape {tuple(filter.shape)}; it must not be empty")
    return taps_of(filter)


def _integers(value: Pair) -> tuple[int, ...]:
    """The numbers in it; none where something else is among them."""
    numbers = tuple(value) if isinstance(value, Sequence) else (value,)
    return numbers if all(isinstance(n, int) and not isinstance(n, bool) for n in numbers) else ()


def _pair(name: str, argument: str, value: Pair) -> tuple[int, int]:
    numbers = _integers(value)
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"{name}: {argument} is {value!r}; accepted are an integer of at least 1, or two of them")
    return numbers[0], numbers[-1]


def _one(name: str, argument: str, value: int) -> tuple[int, int]:
    pair = _pair(name, argument, value)
    if pair[0] != pair[1]:
        raise ValueError(f"{name}: {argument} is {value!r}; it must be one integer of at least 1")
    return pair


def _kernel(name: str, x: Tensor, weight: Tensor) -> tuple[int, int]:
    for argument, tensor in (("x", x), ("weight", weight)):
        _checks.floating(name, argument, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name}: {argument} has shape {tuple(tensor.shape)}; it must be 4-D")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: x has {x.shape[1]} channels (shape {tuple(x.shape)}), weight takes {weight.shape[1]} (shape "
            f"{tuple(weight.shape)})"
        )
    return weight.shape[2], weight.shape[3]


def _edges(name: str, padding: Pair) -> tuple[int, int, int, int]:
    numbers = _integers(padding)
    if len(numbers) == 1:
        return numbers * 4
    if len(numbers) == 2:
        vertical, horizontal = numbers
        return horizontal, horizontal, vertical, vertical
    if len(numbers) == 4:
        return numbers
    raise ValueError(
        f"{name}: padding is {padding!r}; accepted are an integer, (vertical, horizontal) or (left, right, top, bottom)"
    )
