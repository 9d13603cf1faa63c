"""The usual resampling filters for :func:`gankern.functional.upfirdn2d` and its kin: 1-D tensors of sum 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from gankern.core import extras
from gankern.core.names import look_up


def _scipy_signal() -> ModuleType:
    return extras.load("scipy.signal", "filters.fir: a 'lanczos' or 'kaiser' filter")


def _lanczos(factor: int, taps: int | None) -> list[float]:
    """sinc(t) sinc(t / a), t in samples of the coarser grid: a = 3 lobes on either side unless taps says otherwise."""
    signal = _scipy_signal()
    taps = taps or 6 * factor
    lowpass = signal.firwin(taps, 1 / factor, window="boxcar", scale=False) if factor > 1 else None
    window = signal.windows.lanczos(2 * taps + 1)[1::2]  # zero half a tap beyond the first and the last one
    return list(window if lowpass is None else lowpass * window)


def _kaiser(factor: int, taps: int | None) -> list[float]:
    """A low-pass at the coarser grid's highest frequency under a Kaiser window that attenuates by 60 dB."""
    signal = _scipy_signal()
    if factor == 1:
        raise ValueError("filters.fir: a 'kaiser' low-pass needs a factor of at least 2, got 1")
    return list(signal.firwin(taps or 6 * factor, 1 / factor, window=("kaiser", signal.kaiser_beta(60))))


# name: (function of factor and taps, whether it takes a number of taps)
_DESIGNS: dict[str, tuple[Callable[[int, int | None], Sequence[float]], bool]] = {
    "1331": (lambda factor, taps: [1, 3, 3, 1], False),
    "121": (lambda factor, taps: [1, 2, 1], False),
    "box": (lambda factor, taps: [1] * (taps or factor), True),
    "lanczos": (_lanczos, True),
    "kaiser": (_kaiser, True),
}
NAMES = tuple(_DESIGNS)


def fir(
    design: str | Sequence[float] | Tensor,
    *,
    factor: int = 2,
    taps: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """A filter by name, or from its taps; its sum is 1.

    Args:
        design: "1331" and "121", binomial filters; "box", the mean; "lanczos", a sinc under the Lanczos window, of
            three lobes on either side; "kaiser", a sinc under a Kaiser window that attenuates by 60 dB. Or the taps,
            [k] or [k_h, k_w], which are divided by their sum.
        factor: of the resampling: the low-pass of "lanczos" and "kaiser" ends at the coarser grid's highest frequency,
            and "box" is as long.
        taps: the number of taps of "box" (by default the factor), "lanczos" and "kaiser" (6 times the factor).
        dtype, device: of the result.

    Source: :func:`scipy.signal.firwin` and :mod:`scipy.signal.windows`.

    Raises:
        ValueError: naming the argument, what came and what is accepted; ImportError where SciPy is needed and missing.

    >>> fir("1331")
    tensor([0.1250, 0.3750, 0.3750, 0.1250])
    >>> fir([1, 2, 1])
    tensor([0.2500, 0.5000, 0.2500])
    >>> fir("kaiser").shape
    torch.Size([12])
    """
    name = "filters.fir"
    for argument, number in (("factor", factor), ("taps", taps)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name}: {argument} is {number!r}; it must be an integer of at least 1")
    if isinstance(design, str):
        make, takes_taps = look_up(_DESIGNS, design, "filter")
        if taps is not None and not takes_taps:
            raise ValueError(f"{name}: {design!r} has a fixed number of taps, and taps is {taps}")
        design = make(factor, taps)
    elif taps is not None:
        raise ValueError(f"{name}: taps is {taps}, and the filter's taps are given themselves")
    values = torch.as_tensor(design, dtype=torch.float64)
    if values.ndim not in (1, 2) or values.numel() == 0:
        raise ValueError(f"{name}: the taps have shape {tuple(values.shape)}; they must be [taps] or [rows, columns]")
    total = values.sum()
    if not total.isfinite() or total == 0:
        raise ValueError(f"{name}: the taps sum to {total.item()}; a filter of sum 1 cannot be made of them")
    return (values / total).to(device=device, dtype=dtype)
