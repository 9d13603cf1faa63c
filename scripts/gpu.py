"""Everything that needs a GPU, in one go: tests, speed, and records of both. `make gpu` runs it.

    python scripts/gpu.py                       on a CUDA machine; records go to $OUT (default: runs/gpu)
    python scripts/gpu.py --stage device        one stage; repeat for several
    python scripts/gpu.py --dry-run-on-cpu      the same path on a machine without a GPU, on small tensors

It uses the Python that runs it, installs nothing and needs no network. It writes to $OUT and build/, and on a GPU to
gankern/devices: which block sizes, tiers and ways of convolutions were fastest. Commit that file, and they are used.

A machine may be lent for minutes, so each stage is a process with a limit, and all together take at most --limit
seconds (470). A stage writes its record as it goes, most telling first, so one that is stopped keeps what it has. A
stage that fails does not stop the later ones; the time that one leaves goes to the next. A process whose device is
lost, or in which one figure does not end, is started again behind that figure. Kernels take longer to compile than to
measure, so several processes compile them in advance, into caches in build/.

The stages (gpu_stages/), in their order:

    environment   versions and hardware
    tests         the GPU's tests in parallel processes
    device        device time of every primitive as replays of a CUDA graph, beside the peers' and the limit of memory
    host          what a call costs the host, on tiny tensors
    steps         whole training steps, eager and as graphs, and the kernels that they spend their time in
    variants      CUDA C++ beside Triton, and block sizes of kernels; writes the file of this device
    convolutions  convolutions in each memory format and dtype by each way; writes the fastest to that file too
    sanitizer     compute-sanitizer, where it is installed

The native build starts with the tests and runs beside what follows: CUDA C++ for this device, which takes half a
minute, and the CPU's library with the autograd nodes, which take some minutes. A library is used from the next stage
on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from gpu_stages.bars import bars, results
from gpu_stages.checks import build, environment, install_what_is_built, sanitizer, tests
from gpu_stages.choices import convolutions, variants
from gpu_stages.primitives import device, host
from gpu_stages.records import AGAIN, ROOT, Journal, Record
from gpu_stages.training import steps

# In their order, most telling first: the seconds of each, besides what the ones before it leave; 480 in all.
STAGES = {
    "environment": 10,
    "tests": 100,
    "device": 105,
    "host": 25,
    "steps": 95,
    "variants": 70,
    "convolutions": 30,
    "sanitizer": 45,
}
LOG_CHARACTERS = 200_000  # that are kept of the end of a stage's output
PATIENCE = 60  # seconds that one figure may take
RUN: dict[str, Callable[[Record, str], None]] = {
    stage.__name__: stage
    for stage in (environment, tests, device, host, steps, variants, convolutions, sanitizer, build)
}


def run_stage(name: str, out: Path, device: str, seconds: float) -> None:
    """One stage, in this process."""
    sys.path.insert(0, str(ROOT))
    record = Record(out, name, seconds)
    Journal.current = Journal(_journal(out, name))
    try:
        RUN[name](record, device)
    finally:
        native = sys.modules.get("gankern.core.native")
        if native is not None:  # what these figures were made with
            record.content["missing"] = {n: getattr(native, f"{n}_MISSING") for n in ("NATIVE", "NODES", "CUDA")}
        record.write()


def _journal(out: Path, stage: str) -> Path:
    return out / f".{stage}.journal"


def run_all(names: Sequence[str], out: Path, device: str, limit: float) -> int:
    """The stages, each in a process of its own and within its time; then the summary. 1 if a stage failed."""
    start = time.monotonic()
    states: dict[str, str] = {}
    logs: dict[str, str] = {}
    share = limit / sum(STAGES[name] for name in names)  # the part of its seconds in the table that a stage has
    with _beside(out, device) if "tests" in names else contextlib.nullcontext():
        for number, name in enumerate(names):
            left = limit - (time.monotonic() - start)
            seconds = left - share * sum(STAGES[later] for later in names[number + 1 :])
            if seconds < 5:
                states[name] = f"NOT RUN: the {limit:.0f} seconds are over"
                continue
            print(f"\n==== {name}", flush=True)
            begin = time.monotonic()
            states[name], logs[name] = _bounded(name, out, device, seconds)
            if states[name].startswith("passed"):
                states[name] += f" in {time.monotonic() - begin:.0f} s"
            install_what_is_built()
            _summarise(out, device, start, states, logs)  # so there is one, whenever this is ended
    met = _summarise(out, device, start, states, logs)
    for part in ("environment", "build"):
        (out / f"{part}.json").unlink(missing_ok=True)  # they are in the summary: at most eight files
    print(f"\n==== summary, records in {out}")
    for name, state in states.items():
        print(f"{name:14} {state}")
    for row in met:
        figure = "" if row["figure"] is None else f"{row['figure']:8.3f} of {row['least']:5.2f}"
        print(f"{'not measured' if not figure else 'met' if row['met'] else 'MISSED':12} {figure:17}  {row['bar']}")
    if device == "cpu":
        print("a dry run on the CPU: its figures say nothing")
    return int(any(not state.startswith("passed") for state in states.values()))


def _summarise(
    out: Path, device: str, start: float, states: dict[str, str], logs: dict[str, str]
) -> list[dict[str, Any]]:
    """Writes the summary, including what has no record of its own, and returns the bars."""
    met, facts = bars(out), {part: results(out, part) for part in ("environment", "build")}
    summary = {"device": device, **facts, "seconds": time.monotonic() - start, "stages": states, "bars": met}
    (out / "summary.json").write_text(json.dumps({**summary, "logs": logs}, indent=1))
    return met


def _started(name: str, out: Path, device: str, seconds: float, log: Path) -> subprocess.Popen[bytes]:
    """A stage in a process group of its own."""
    command = [sys.executable, __file__, "--only", name, "--device", device, "--seconds", f"{seconds:.1f}"]
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=_environment(out)
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and everything that it started, which may have outlived it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _beside(out: Path, device: str) -> Iterator[None]:
    """The native build, beside the block."""
    log = out / ".build.log"
    process = _started("build", out, device, math.inf, log)
    try:
        yield
    finally:
        _end(process)
        print(log.read_text(errors="replace")[-3000:], flush=True)
        log.unlink()
        _journal(out, "build").unlink(missing_ok=True)


def _bounded(name: str, out: Path, device: str, seconds: float) -> tuple[str, str]:
    """A stage within its time, started again where its process is lost: its state, and the end of its output."""
    log, journal = out / f".{name}.log", _journal(out, name)
    for old in (log, journal):
        old.unlink(missing_ok=True)
    end, again, state = time.monotonic() + seconds, 0, ""
    while not state:
        process = _started(name, out, device, end - time.monotonic(), log)
        try:
            state, reason = _watched(process, journal, end, seconds)
        finally:
            _end(process)
        if not state:
            again += 1
            Journal.write(journal, reason)
    if again:
        state += f", begun again {again} times"
    text = log.read_text(errors="replace")[-LOG_CHARACTERS:]
    for old in (log, journal):
        old.unlink(missing_ok=True)
    print(text[-3000:], flush=True)
    return state, text


def _watched(process: subprocess.Popen[bytes], journal: Path, end: float, seconds: float) -> tuple[str, str]:
    """Waits for a stage's process: its state, or an empty one and the reason why it is to be started again."""
    while True:
        status = process.poll()
        if status == 0:
            return "passed", ""
        if status is not None:
            if status == AGAIN:
                return "", "the device was lost"  # of an attempt that is on record
            if status < 0 and Journal.under_way(journal) is not None and time.monotonic() < end:
                return "", f"ended its process: status {status}"
            return f"FAILED with status {status}", ""
        if time.monotonic() > end:
            return f"FAILED: stopped after {seconds:.0f} s", ""
        waited = time.time() - journal.stat().st_mtime if journal.exists() else 0.0
        if waited > PATIENCE and Journal.under_way(journal) is not None:
            return "", f"did not come to an end within {PATIENCE} s"
        time.sleep(0.2)


def _environment(out: Path) -> dict[str, str]:
    # Compilers' caches would go to the home folder.
    build = ROOT / "build"
    caches = {"TRITON_CACHE_DIR": str(build / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(build / "inductor")}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **caches, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OUT": str(out)}


def main() -> int:
    """The command line."""
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all, in their order")
    parser.add_argument("--limit", type=float, default=470.0, help="seconds for all stages together")
    parser.add_argument("--dry-run-on-cpu", action="store_true", help="go through the motions without a GPU")
    parser.add_argument("--only", choices=[*STAGES, "build"], help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)  # that it has
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.only:
        try:
            run_stage(options.only, out, options.device, options.seconds)
        except Exception:
            traceback.print_exc()
            return 1
        return 0
    device = "cpu" if options.dry_run_on_cpu else "cuda"
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("gpu.py: this torch finds no GPU; --dry-run-on-cpu goes through the motions", file=sys.stderr)
            return 2
    names = [name for name in STAGES if not options.stage or name in options.stage]
    limit = options.limit if device == "cuda" else 4 * options.limit
    return run_all(names, out, device, limit - (time.monotonic() - begin))


if __name__ == "__main__":
    sys.exit(main())
