"""Time and memory of minibatch discrimination, forward and backward, from N = 64 to 8192 at B = 100, C = 5.

    python benchmarks/plot_minibatch_discrimination.py [--out FILE.png] [--largest 8192] [--peers-to 1024]

Time is the median of several runs. Memory is how far the process's resident set rises above what it is before the call,
results included, each measured in a process of its own; the size of m is drawn for comparison. The peers are the
broadcast form and torch.cdist, in eager mode, for as long as they fit.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from gankern.measure.cases.minibatch_discrimination import _broadcast, _cdist, _make, _run

KERNELS, DIMS = 100, 5
FORMS = {"gankern": lambda inputs: _run(None, inputs), "cdist": _cdist, "broadcast": _broadcast}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(form: str, count: int) -> tuple[float, int]:
    """Median seconds of forward and backward, and the rise of the resident set in bytes."""
    torch.set_num_threads(2)
    inputs = _make(count, KERNELS, DIMS, None, torch.float32, "cpu")

    def step() -> None:
        torch.autograd.grad(FORMS[form](inputs).sum(), inputs)

    small = _make(8, KERNELS, DIMS, None, torch.float32, "cpu")
    torch.autograd.grad(FORMS[form](small).sum(), small)  # loads what has to be loaded
    before, highest, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident_bytes())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    step()
    once = time.perf_counter() - start
    done.set()
    watcher.join()
    times = [once]
    for _ in range(max(0, min(20, int(5 / once)))):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times), max(0, highest - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="minibatch_discrimination.png")
    parser.add_argument("--largest", type=int, default=8192)
    parser.add_argument("--peers-to", type=int, default=1024, help="the largest N for the peers")
    parser.add_argument("--one", nargs=2, metavar=("FORM", "N"), help="measure one point and print it")
    options = parser.parse_args()
    if options.one:
        print(*measure(options.one[0], int(options.one[1])))
        return

    counts = [64 * 2**k for k in range(20) if 64 * 2**k <= options.largest]
    rows: dict[str, list[tuple[int, float, float]]] = {}
    for form in FORMS:
        for count in counts:
            if form != "gankern" and count > options.peers_to:
                continue
            command = [sys.executable, __file__, "--one", form, str(count)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            rows.setdefault(form, []).append((count, float(printed[0]), float(printed[1])))
            print(f"{form:10} N={count:5} {1e3 * float(printed[0]):10.2f} ms {float(printed[1]) / 2**20:10.1f} MiB")

    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for form, points in rows.items():
        n, seconds, memory = zip(*points)
        left.loglog(n, [1e3 * s for s in seconds], "o-", label=form)
        right.loglog(n, [max(b, 1) / 2**20 for b in memory], "o-", label=form)
    right.loglog(counts, [4 * n * KERNELS * DIMS / 2**20 for n in counts], "k:", label="size of m")
    left.set(xlabel="N", ylabel="ms, forward and backward")
    right.set(xlabel="N", ylabel="MiB beyond the inputs")
    right.set_ylim(bottom=0.1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
