"""Which kind of convolution a call is, and which way it goes: the one place that answers.

A *kind* is what the engine can compute, a *way* is how: a row of the engine's table (csrc/cpu/convolution_rows.h),
"torch", its direct convolution (for the two kinds that resample with the 4x4 kernel that both steps collapse into),
"exchanged", of stride 1 a gradient by torch's kernels for another pass, "product", a product of matrices, with the
pixels that each tap reads side by side in one, "phases", of a kind that resamples the pass to the larger image as one
convolution of 2x2 taps for its four phases, or "reference", both steps one after the other. Which way is fastest was
measured: ``ways/`` has a file a machine, written by benchmarks/measure_convolution_ways.py; of a GPU,
``gankern/devices/`` has it (:mod:`gankern.core.devices`), written by scripts/gpu.py.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gankern.core import devices, precision

Ints = int | Sequence[int]


@dataclass(frozen=True)
class Row:
    """A pair of rows of the C++ table: of a map and of its transpose."""

    forward: int
    transpose: int
    precision: str  # the highest one that allows it


@dataclass(frozen=True)
class Kind:
    """What is computed, as torch's own convolution of ``taps``, ``stride`` and ``transposed`` (with the collapsed
    weight where it is ``collapsed``). The weight is [out, in, taps, taps], or with ``swap`` [in, out, taps, taps]."""

    taps: int
    rows: dict[str, Row]
    stride: int = 2
    transposed: bool = False
    swap: bool = False
    flip: bool = True  # whether the transpose reads the taps back to front
    scale: float = 1.0  # from the rows' result to this kind's
    collapsed: bool = False
    zeros: bool = False  # torch's form is a pooling, with a second derivative of zeros by its input: see core.zeros


DIRECT = Row(12, 12, "highest")
KINDS = {
    "upsample": Kind(3, {"nine": Row(0, 1, "highest")}, transposed=True, collapsed=True),
    "downsample": Kind(3, {"nine": Row(1, 0, "highest")}, scale=0.25, collapsed=True, zeros=True),
    "pointwise": Kind(1, {"direct": DIRECT, "panels": Row(17, 17, "highest")}, stride=1),
    "same": Kind(3, {"direct": DIRECT, "tiles2": Row(2, 2, "highest"), "tiles4": Row(3, 3, "high")}, stride=1),
    "same_of_four": Kind(
        4,
        {
            "direct": DIRECT,
            "tiles2": Row(10, 10, "highest"),
            "tiles4": Row(18, 18, "highest"),
            "tiles3": Row(11, 11, "high"),
        },
        stride=1,
    ),
    "same_of_five": Kind(5, {"direct": DIRECT}, stride=1),
    "same_of_seven": Kind(7, {"direct": DIRECT}, stride=1),
    "same_of_nine": Kind(9, {"direct": DIRECT}, stride=1),
    "strided": Kind(
        4,
        {
            "direct": Row(13, 14, "highest"),
            "streamed": Row(15, 16, "highest"),
            "tiles2": Row(4, 6, "highest"),
            "tiles4": Row(5, 7, "medium"),
        },
        flip=False,
    ),
    "transposed": Kind(
        4,
        {
            "direct": Row(14, 13, "highest"),
            "streamed": Row(16, 15, "highest"),
            "tiles2": Row(6, 4, "highest"),
            "tiles4": Row(7, 5, "medium"),
        },
        transposed=True,
        swap=True,
        flip=False,
    ),
    "strided_of_three": Kind(3, {"tiles2": Row(8, 9, "highest")}, flip=False),
    "transposed_of_three": Kind(3, {"tiles2": Row(9, 8, "highest")}, transposed=True, swap=True, flip=False),
}
PASSES = ("forward", "transpose", "weight")
OTHERS = {
    "torch": -1,
    "reference": -2,
    "exchanged": -3,
    "product": -4,
    "phases": -5,
}  # ways that are no rows, as the C++ nodes know them
ON_DEVICE = ("torch", "phases", "reference")  # on a GPU, of a kind that resamples
OF_STRIDE_ONE = {kind.taps: name for name, kind in KINDS.items() if kind.stride == 1}


# The engine's rows for a kind that a precision allows, the one with the fewest products last.
ALLOWED = {
    (name, level): tuple(
        way
        for way, row in kind.rows.items()
        if precision.PRECISIONS.index(row.precision) <= precision.PRECISIONS.index(level)
    )
    for name, kind in KINDS.items()
    for level in precision.PRECISIONS
}


# ---- which kind -----------------------------------------------------------------------------------------


def _pair(value: Ints | str) -> tuple[int, int] | None:
    """The two values of an argument of torch's convolutions; None for what it is not."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, str) or not 1 <= len(value) <= 2:
        return None
    return value[0], value[-1]


def kind_of(
    weight: Sequence[int],
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
    transposed: bool = False,
    output_padding: Ints = 0,
) -> tuple[str | None, int]:
    """The engine's kind of torch's conv2d, or conv_transpose2d, with these arguments and a weight of this shape, and
    its padding; None where it is of none.

    >>> kind_of((8, 4, 3, 3), 1, 1, 1, 1), kind_of((8, 4, 5, 5), 2, 1, 1, 1)
    (('same', 1), (None, 0))
    >>> kind_of((3, 64, 9, 9), 1, 4, 1, 1)
    ('same_of_nine', 4)
    """
    if groups != 1 or len(weight) != 4 or _pair(dilation) != (1, 1):
        return None, 0
    strides, pads, taps, more = _pair(stride), _pair(padding), tuple(weight[2:]), _pair(output_padding)
    if taps == (3, 3) and strides == (2, 2) and pads == (1, 1):
        if transposed:
            return ("transposed_of_three", 1) if more == (1, 1) else (None, 0)
        return "strided_of_three", 1
    if more != (0, 0):
        return None, 0
    if padding == "valid":
        pads = (0, 0)
    if padding == "same":
        pads = (taps[0] // 2, taps[1] // 2) if taps[0] % 2 and taps[1] % 2 else None
    if taps == (4, 4) and strides == (2, 2) and pads == (1, 1):
        return "transposed" if transposed else "strided", 1
    if pads is None or transposed or strides != (1, 1) or taps[0] != taps[1] or pads[0] != pads[1]:
        return None, 0
    if taps[0] in OF_STRIDE_ONE and 0 <= pads[0] < taps[0]:
        return OF_STRIDE_ONE[taps[0]], pads[0]
    return None, 0


def result_size(kind: str, padding: int, height: int, width: int) -> tuple[int, int]:
    """Of an image of height times width."""
    if KINDS[kind].stride == 1:
        more = 2 * padding - KINDS[kind].taps + 1
        return height + more, width + more
    if kind in ("strided", "downsample"):
        return height // 2, width // 2
    if kind == "strided_of_three":
        return (height + 1) // 2, (width + 1) // 2
    return 2 * height, 2 * width


# ---- which way ------------------------------------------------------------------------------------------

Shape = tuple[int, int, int]  # channels in, channels out, pixels of the smaller image times images
WAYS = Path(__file__).with_name("ways")
# By torch's CPU capability ("" any other), of what was never measured on the machine at hand: the last that has it. A
# table made with vectors as wide is the nearer guess, whoever made the processor.
FALLBACKS = {"AVX2": ("amd-epyc-avx512", "amd-epyc-avx2"), "": ("amd-epyc-avx512",)}


def machine() -> str:
    """This machine's name, as its file in ``ways`` is called: processor and vector instructions."""
    try:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        model = None
    words = f"{model[1] if model else 'unknown'} {torch.backends.cpu.get_cpu_capability()}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


Measured = dict[tuple[str, str, str], dict[Shape, dict[str, float]]]


def read_ways(file: Path) -> Measured:
    """For each kind, pass and memory format of a file the milliseconds of each way, by shape."""
    return {
        (kind, which, memory_format): {(row[0], row[1], row[2]): row[3] for row in rows}
        for kind, passes in json.loads(file.read_text())["measured"].items()
        for which, formats in passes.items()
        for memory_format, rows in formats.items()
    }


@functools.cache
def measured_ways() -> Measured:
    """The same of this machine; kinds that were not measured on it are FALLBACKS'."""
    fallbacks = FALLBACKS.get(torch.backends.cpu.get_cpu_capability(), FALLBACKS[""])
    files = [WAYS / f"{name}.json" for name in (*fallbacks, machine())]
    measured: Measured = {}
    for file in files:
        measured |= read_ways(file) if file.is_file() else {}
    return measured


def _of_channels(shape: Sequence[int], measured: Shape) -> float:
    return abs(math.log2(max(shape[0], 1) / measured[0])) + abs(math.log2(max(shape[1], 1) / measured[1]))


def _of_pixels(shape: Shape, measured: Shape) -> float:
    return abs(math.log2(max(shape[2], 1) / measured[2])) / 2


def _distance(shape: Shape, measured: Shape) -> float:
    """In powers of two; of the number of pixels half as much counts."""
    return _of_channels(shape, measured) + _of_pixels(shape, measured)


@functools.lru_cache(maxsize=256)
def _by_channels(measured: tuple[Shape, ...], channels: tuple[int, int]) -> list[tuple[float, int, Shape]]:
    """How far the channels are, the place in the table and the shape, nearest first."""
    return sorted((_of_channels(channels, each), i, each) for i, each in enumerate(measured))


@functools.lru_cache(maxsize=4096)
def _nearest(measured: tuple[Shape, ...], shape: Shape) -> Shape:
    """The first of the nearest ones. A network's channels stay what they are, its sizes may be new each time; and all
    passes of a kind were measured at the same shapes."""
    nearest = math.inf, 0, shape
    for of_channels, i, each in _by_channels(measured, shape[:2]):
        if of_channels > nearest[0]:
            break
        nearest = min(nearest, (of_channels + _of_pixels(shape, each), i, each))
    return nearest[2]


@functools.lru_cache(maxsize=4096)
def is_known(kind: str, channels_in: int, channels_out: int, pixels: int) -> bool:
    """Whether the measured table tells which way is fastest: with few channels only near a shape in it."""
    known = measured_ways().get((kind, "forward", "contiguous"))
    if known is None:  # by the machine whose table it is
        return False
    if min(channels_in, channels_out) >= 8:
        return True
    shape = (channels_in, channels_out, pixels)
    return _distance(shape, _nearest(tuple(known), shape)) < 1


def _times(kind: str, which: str, channels_last: bool, shape: Shape) -> tuple[Shape, dict[str, float]] | None:
    """What was measured nearest to this shape."""
    measured = measured_ways().get((kind, which, "channels_last" if channels_last else "contiguous"))
    if measured is None or shape[2] < 1:
        return None
    nearest = _nearest(tuple(measured), shape)
    return nearest, measured[nearest]


@functools.lru_cache(maxsize=4096)
def way_for(
    kind: str, which: str, level: str, channels_last: bool, channels_in: int, channels_out: int, pixels: int
) -> str:
    """The way that was fastest where it was measured nearest to this shape: one of OTHERS or a row's name.

    ``which`` is one of PASSES, ``pixels`` are those of the smaller of the two images times the number of images.
    """
    shape = (channels_in, channels_out, pixels)
    found = _times(kind, which, channels_last, shape)
    if found is None:
        return "torch"
    _, times = found
    # The collapsed form's errors are up to 2.7 times those of direct convolution: too much for the highest precision.
    collapsed = KINDS[kind].collapsed and level == "highest"
    allowed = {"reference", *ALLOWED[kind, level], *(() if collapsed else OTHERS)}
    if "torch" in allowed and not is_known(kind, *shape):
        return "torch"
    return min(allowed & times.keys(), key=times.__getitem__)


@functools.lru_cache(maxsize=4096)
def saved(
    kind: str, level: str, channels_last: bool, channels_in: int, channels_out: int, pixels: int, backward: bool
) -> float:
    """The microseconds at least that the fastest ways are faster than plain PyTorch, in the forward or in all three
    passes: what was measured nearest to this shape, less where there are fewer products. The peer of a kind that
    resamples is both steps one after the other, where that was measured, else their collapsed form."""
    shape = (channels_in, channels_out, pixels)
    total = 0.0
    for which in PASSES if backward else PASSES[:1]:
        found = _times(kind, which, channels_last, shape)
        if found is not None:
            nearest, times = found
            way = way_for(kind, which, level, channels_last, *shape)
            faster = times["reference" if "reference" in times else "torch"] - times[way]
            total += 1e3 * faster * min(1.0, math.prod(shape) / math.prod(nearest))
    return total


@functools.lru_cache(maxsize=4096)
def way_on_device(
    kind: str,
    dtype: torch.dtype,
    device: int,
    channels_last: bool,
    channels_in: int,
    channels_out: int,
    pixels: int,
) -> str:
    """Of a kind that resamples, on a GPU: "torch" (the collapsed form), "phases" or "reference", whichever was fastest
    forward and backward at the measured shape nearest to this one; "torch" where nothing was measured."""
    name = torch.cuda.get_device_name(device) if devices.any_measured() else None
    layout = "channels_last" if channels_last else "contiguous"
    rows = devices.measured(name).get("convolutions", {}).get(kind, {}).get(f"{str(dtype)[6:]} {layout}", [])
    shape = (channels_in, channels_out, pixels)
    nearest = min(rows, key=lambda row: _distance(shape, tuple(row[:3])), default=None)
    times = {way: ms for way, ms in nearest[3].items() if way in ON_DEVICE} if nearest else {}
    return min(times, key=times.__getitem__, default="torch")


def ways_on_device(
    kind: str, dtype: torch.dtype, device: int, channels_in: int, channels_out: int, pixels: int
) -> list[list[int]]:
    """For the C++ nodes, as :func:`rows_for`: the same number for every pass, of which those without phases are by
    torch's own convolution."""
    ways = [
        OTHERS[way_on_device(kind, dtype, device, last, channels_in, channels_out, pixels)] for last in (False, True)
    ]
    return [ways] * len(PASSES)


def rows_for(kind: str, level: str, channels_in: int, channels_out: int, pixels: int) -> list[list[int]]:
    """For the C++ nodes: of each pass, for contiguous and channels_last images, its row, or its number in OTHERS."""

    def number(which: str, way: str) -> int:
        if way not in KINDS[kind].rows:
            return OTHERS[way]
        row = KINDS[kind].rows[way]
        return row.transpose if which == "transpose" else row.forward

    return [
        [number(which, way_for(kind, which, level, last, channels_in, channels_out, pixels)) for last in (False, True)]
        for which in PASSES
    ]
