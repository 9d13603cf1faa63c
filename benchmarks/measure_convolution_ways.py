"""Measures every way of every kind of convolution, and writes gankern/ops/ways/<machine>.json: what "auto" decides by.

    python benchmarks/measure_convolution_ways.py [--kinds upsample,same] [--keep --seconds 50]

Of each shape, pass and memory format all ways run in turn, in one process, fp32, with glibc told to keep freed memory;
the table holds the least milliseconds of each. Kinds that are not named keep what the file has of them; with ``--keep``
those that are do too, and only what is missing is measured, for ``--seconds``: run it again until nothing is left.
Ways that cannot win are left out: "direct" and "exchanged" of many channels on both sides, "product" and "streamed" of
large images.
"""

from __future__ import annotations

import argparse
import json
import re
import time

import torch
import torch.nn.functional as F

import gankern
from gankern.ops import convolution as ops
from gankern.ops import convolution_choice as choice

FILE = choice.WAYS / f"{choice.machine()}.json"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Kind: (images, channels in, channels out, height and width of the smaller image). First ordinary layers at ordinary
# batches, then small products: few images, few channels, small maps.
SHAPES = {
    "upsample": [
        (16, 512, 512, 4), (16, 512, 512, 8), (16, 512, 256, 16), (16, 256, 128, 32), (8, 128, 64, 64),
        (8, 64, 32, 128), (4, 32, 16, 256), (64, 128, 128, 4), (64, 128, 128, 16), (4, 128, 128, 4), (16, 16, 16, 16),
        (16, 64, 3, 32), (16, 4, 16, 32),
        (4, 16, 16, 4), (4, 16, 16, 8), (4, 16, 16, 16), (4, 64, 64, 4), (4, 64, 64, 8), (1, 64, 64, 4),
        (1, 128, 64, 16), (1, 256, 128, 32), (1, 512, 512, 4), (2, 32, 32, 32), (1, 8, 8, 8),
    ],
    "same": [
        (16, 512, 512, 4), (16, 512, 512, 8), (16, 256, 256, 16), (16, 128, 128, 32), (16, 64, 64, 64),
        (8, 32, 32, 128), (4, 16, 16, 256), (64, 128, 128, 8), (4, 128, 128, 4), (16, 16, 16, 16), (16, 3, 64, 32),
        (16, 64, 3, 32), (16, 3, 16, 128),
        (4, 16, 16, 4), (4, 16, 16, 8), (4, 16, 16, 16), (4, 16, 16, 32), (4, 64, 64, 4), (4, 64, 64, 8),
        (1, 64, 64, 4), (4, 3, 16, 32), (4, 16, 3, 32), (4, 1, 4, 8), (1, 64, 64, 32), (1, 256, 256, 16),
        (1, 256, 256, 32), (1, 512, 512, 4), (1, 8, 8, 8),
        (4, 32, 3, 128), (4, 3, 32, 96), (4, 64, 3, 128), (64, 64, 3, 32), (64, 3, 64, 32), (16, 16, 3, 32),
        (4, 128, 3, 64), (4, 64, 8, 32), (4, 8, 64, 32), (16, 3, 3, 32),
    ],
    "same_of_four": [
        (1, 256, 512, 31), (1, 512, 1, 30), (1, 256, 512, 15), (1, 512, 1, 14), (16, 64, 128, 16), (16, 16, 32, 8),
        (4, 64, 128, 4), (1, 64, 128, 4), (16, 128, 1, 8), (16, 32, 1, 8), (4, 16, 16, 8), (16, 3, 16, 32),
    ],
    "same_of_five": [
        (16, 64, 128, 16), (4, 16, 16, 8), (16, 64, 3, 32), (16, 3, 64, 32), (4, 64, 128, 4), (1, 64, 128, 4),
        (4, 16, 3, 32), (4, 3, 16, 32), (64, 32, 1, 28), (64, 1, 32, 28),
    ],
    "same_of_seven": [
        (1, 64, 3, 128), (1, 3, 64, 128), (4, 64, 64, 32), (4, 16, 16, 8), (4, 64, 128, 4), (1, 64, 128, 4),
        (16, 16, 3, 32), (16, 3, 16, 32), (4, 32, 3, 128), (4, 3, 32, 128), (1, 64, 3, 256), (1, 3, 64, 256),
    ],
    "same_of_nine": [
        (4, 64, 3, 96), (4, 3, 64, 24), (4, 64, 64, 32), (4, 16, 16, 8), (4, 64, 128, 4), (1, 64, 128, 4),
        (16, 16, 3, 48), (16, 3, 16, 12), (16, 64, 3, 96), (16, 3, 64, 24),
    ],
    "pointwise": [
        (4, 64, 40, 64), (4, 64, 8, 64), (4, 64, 16, 64), (4, 16, 64, 64), (4, 32, 16, 128), (4, 512, 128, 8),
        (4, 128, 512, 8), (4, 128, 32, 32), (4, 32, 128, 32), (64, 256, 256, 8), (16, 128, 128, 16), (4, 64, 128, 4),
        (1, 64, 128, 4), (4, 16, 16, 8), (16, 64, 3, 32), (16, 3, 64, 32), (4, 512, 128, 4), (64, 128, 128, 16),
        (4, 64, 128, 64),
    ],
    "strided": [
        (64, 3, 64, 32), (64, 64, 128, 16), (64, 128, 256, 8), (64, 256, 512, 4), (64, 512, 1024, 4),
        (16, 128, 256, 8), (16, 32, 64, 32), (4, 64, 128, 16), (4, 256, 512, 4), (16, 8, 16, 16),
        (4, 3, 16, 32), (4, 16, 32, 16), (4, 32, 64, 8), (4, 64, 128, 4), (1, 64, 128, 4), (4, 3, 8, 16),
        (4, 8, 16, 8), (4, 16, 32, 4), (16, 3, 64, 16), (1, 3, 64, 128), (1, 64, 128, 64), (1, 128, 256, 32),
        (1, 256, 512, 16), (1, 512, 512, 8), (1, 512, 512, 4), (1, 512, 512, 2), (1, 512, 512, 1), (1, 256, 1024, 8),
        (1, 512, 1024, 8), (1, 512, 1024, 4), (1, 512, 1024, 2), (1, 256, 1024, 16), (1, 128, 512, 32),
        (1, 64, 256, 64), (1, 6, 64, 128), (1, 3, 128, 128),
    ],
    "strided_of_three": [
        (16, 64, 64, 48), (16, 128, 128, 24), (16, 256, 256, 12), (16, 512, 512, 6), (1, 64, 128, 64),
        (1, 128, 256, 32), (16, 8, 16, 16), (64, 64, 128, 16),
        (4, 16, 32, 16), (4, 32, 64, 8), (4, 64, 128, 4), (1, 64, 128, 4), (4, 3, 16, 32), (4, 8, 16, 8),
        (1, 512, 512, 4),
    ],
}  # fmt: skip
SHAPES["transposed_of_three"] = [(n, d, c, h) for n, c, d, h in SHAPES["strided_of_three"]]
SHAPES["downsample"] = [(n, d, c, h) for n, c, d, h in SHAPES["upsample"]]
SHAPES["transposed"] = [(n, d, c, h) for n, c, d, h in SHAPES["strided"]]


def problems(kinds: list[str]):
    for kind in kinds:
        for which in choice.PASSES:
            for layout in LAYOUTS:
                for shape in SHAPES[kind]:
                    yield kind, which, layout, shape


def steps(kind: str, which: str, layout: str, shape: tuple[int, int, int, int]):
    n, c, d, small = shape
    generator = torch.Generator().manual_seed(0)
    info = choice.KINDS[kind]
    padding = (info.taps - 1) // 2
    height = small * (2 if kind.startswith("strided") or kind == "downsample" else 1)
    height += info.stride == 1 and info.taps % 2 == 0  # a convolution of an even kernel has a row less
    result = choice.result_size(kind, padding, height, height)
    x = torch.randn(n, c, height, height, generator=generator).contiguous(memory_format=LAYOUTS[layout])
    g = torch.randn(n, d, *result, generator=generator).contiguous(memory_format=LAYOUTS[layout])
    w = torch.randn(*((c, d) if info.swap else (d, c)), info.taps, info.taps, generator=generator)

    def step(way: str):
        options = (kind, padding, 1.0, "medium", way, 0)
        if way == "reference":
            if kind == "upsample":
                return lambda: F.conv2d(F.interpolate(x, scale_factor=2), w, padding=1)
            return lambda: F.avg_pool2d(F.conv2d(x, w, padding=1), 2)
        if which == "forward":
            return lambda: ops._convolve(options, False, *result, x, w, None)
        if which == "transpose":
            return lambda: ops._convolve(options, True, height, height, g, w, None)
        return lambda: ops._weight_gradient(options, x, g)

    return {way: step(way) for way in ways_of(kind, which, shape)}


def ways_of(kind: str, which: str, shape: tuple[int, int, int, int]) -> list[str]:
    """Those that may be the fastest."""
    n, c, d, small = shape
    info = choice.KINDS[kind]
    few = min(c, d) <= 8
    left_out = set() if few or len(info.rows) == 1 else {"direct"}
    if n * small**2 > 64:
        left_out.add("streamed")
    ways = ["torch", *(row for row in info.rows if row not in left_out)]
    if info.stride == 1 and which != "forward" and few:
        ways.append("exchanged")
    if not info.collapsed and (n * small**2 <= 1024 or info.taps == 1):
        ways.append("product")
    if info.collapsed and which == "forward":
        ways.append("reference")
    return ways


def least(functions: dict, seconds: float = 0.4) -> dict[str, float]:
    for function in functions.values():
        function()
    times = dict.fromkeys(functions, float("inf"))
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 60):
        # The order changes: what ran before decides what is in the caches.
        ways = list(functions)
        for way in ways[rounds % len(ways) :] + ways[: rounds % len(ways)]:
            function = functions[way]
            begin = time.perf_counter()
            function()
            times[way] = min(times[way], time.perf_counter() - begin)
        rounds += 1
    return {way: float(f"{t * 1e3:.3g}") for way, t in times.items()}


def write(table: dict) -> None:
    measured: dict = {}
    for (kind, which, layout), shapes in table.items():
        rows = [[*shape, times] for shape, times in sorted(shapes.items())]
        measured.setdefault(kind, {}).setdefault(which, {})[layout] = rows
    about = {
        "machine": choice.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "unit": "milliseconds, the least; of [channels in, channels out, pixels of the smaller image times images]",
        "measured": measured,
    }
    text = json.dumps(about, indent=2)
    FILE.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+\{\s+([^}]*?)\s+\}\s+\]", _row, text) + "\n")


def _row(found: re.Match) -> str:
    """A shape and its ways in one line."""
    return f"[{found[1]}, {found[2]}, {found[3]}, {{{' '.join(found[4].split())}}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(SHAPES), help="comma-separated")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--keep", action="store_true", help="measure only what the file does not have")
    arguments = parser.parse_args()
    gankern.keep_freed_memory()
    keep = arguments.keep and FILE.is_file()
    kinds = arguments.kinds.split(",")
    known = choice.read_ways(FILE) if FILE.is_file() else {}
    table = {key: dict(shapes) for key, shapes in known.items() if keep or key[0] not in kinds}
    begin, left = time.perf_counter(), 0
    with torch.no_grad():
        for kind, which, layout, shape in problems(kinds):
            key = (shape[1], shape[2], shape[0] * shape[3] ** 2)
            shapes = table.setdefault((kind, which, layout), {})
            if key in shapes and shapes[key].keys() >= set(ways_of(kind, which, shape)):
                continue
            if time.perf_counter() - begin > arguments.seconds:
                left += 1
                continue
            shapes[key] = least(steps(kind, which, layout, shape))
    if not arguments.keep and left:
        raise SystemExit("--seconds is for --keep: a table with holes decides nothing")
    write(table)
    print(f"{left} left")


if __name__ == "__main__":
    main()
