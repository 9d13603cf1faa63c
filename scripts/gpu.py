"""Everything that needs a GPU, in one go: tests, speed, and records of both. `make gpu` runs it.

    python scripts/gpu.py                       on a CUDA machine; records go to $OUT (default: runs/gpu)
    python scripts/gpu.py --stage device        one stage; repeat for several
    python scripts/gpu.py --dry-run-on-cpu      the same path on a machine without a GPU, on small tensors

It uses the Python that runs it, installs nothing, needs no network, and writes to $OUT and to build/ alone; and on a
GPU to gankern/devices, which block sizes, tiers and ways of convolutions were best: commit that file, and they are what
runs. A machine may be lent for minutes, so each stage is a process with a limit, all together take at most --limit
seconds (470), and each writes its record as it goes, most telling first: what is stopped keeps what it has. A stage
that fails does not stop the later ones; what one leaves of its time, the next one has. A process whose device is lost,
or in which one figure does not come to an end, is begun again behind that figure. What kernels compile, which
takes longer than to measure them, is compiled before by several processes at once, into caches in build/.

    environment   versions and hardware
    tests         the GPU's tests in parallel processes
    device        device time of every primitive as replays of a CUDA graph, beside the peers' and the limit of memory
    host          what a call costs the host, on tiny tensors
    steps         whole training steps, eager and as graphs, and the kernels that they spend their time in
    variants      CUDA C++ beside Triton, and block sizes of kernels; writes the file of this device
    convolutions  convolutions in each memory format and dtype by each way; writes the fastest to that file too
    sanitizer     compute-sanitizer, where it is installed

With the tests the native build begins, and goes on beside what follows: CUDA C++ for this device, which takes half a
minute, and the CPU's library with the autograd nodes, which take some. Each library is there from the next stage on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

sys.path.append(str(Path(__file__).resolve().parent))
from gpu_bars import (
    IN_CUDA,
    LAYER_MODES,
    LAYER_SIZES,
    LAYERS,
    NOT_SLOWER,
    OF_THEIR_OWN,
    SANITIZERS,
    bars,
    is_fine,
    results,
)

ROOT = Path(__file__).resolve().parent.parent
# In the order in which they run, most telling first: seconds that each has, and what the ones before leave; 480 in all.
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
CUDA_TESTS = ["tests/gpu/test_every_primitive.py", "-k-cuda"]  # by the name of the tier in their names
LOG_CHARACTERS = 200_000  # of a stage's output that is kept, its end
MAX_BYTES = 16 << 20  # of a record
PATIENCE = 60  # seconds that one figure may take
AGAIN = 75  # status of a stage's process that is to be begun again


class Record:
    """A JSON file that is written anew whenever something is added."""

    def __init__(self, out: Path, stage: str, seconds: float = math.inf) -> None:
        self.path = out / f"{stage}.json"
        self.content: dict[str, Any] = {"stage": stage, "results": []}
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that the stage still has."""
        return self.end - time.monotonic()

    def add(self, **row: Any) -> None:
        """A row more; the file is complete after each."""
        self.content["results"].append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        """The file, by way of another one: a process that is killed leaves a whole record."""
        text = json.dumps(self.content, indent=1)
        if len(text) > MAX_BYTES:
            raise RuntimeError(f"{self.path}: the record is larger than {MAX_BYTES} bytes")
        beside = self.path.with_suffix(".part")
        beside.write_text(text)
        beside.replace(self.path)


def attempt(function: Callable[[], Any]) -> Any:
    """What the function returns, or the first line of what it raised: one contender's failure is a result. In a stage's
    process it is kept in the journal: what is returned must be JSON."""
    return _tried(function) if Journal.current is None else Journal.current.attempt(function)


def _tried(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # a peer may fail in any way, and the others are still worth their figures
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


class Journal:
    """What each attempt of a stage came to, in their order, which is the same each time: a file of a line for each
    begin, [number], and each end, [number, number of the next one, what came of it]. Where the process was lost, its
    successor takes from here what there is; the attempt that was under way has the reason, [reason], for its result."""

    current: ClassVar[Journal | None] = None

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, 0
        self.ended: dict[int, tuple[int, Any]] = {}
        self.lost, self.reason = self.under_way(path), ""
        for line in self._lines(path):
            if len(line) == 3:
                self.ended[line[0]] = line[1], line[2]
            elif isinstance(line[0], str):
                self.reason = line[0]

    @staticmethod
    def _lines(path: Path) -> list[Any]:
        found = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # one that was cut, and the empty ones between
                found.append(json.loads(line))
        return found

    @classmethod
    def under_way(cls, path: Path) -> int | None:
        """The number of the innermost attempt that has not come to an end."""
        lines = cls._lines(path)
        ended = {line[0] for line in lines if len(line) == 3}
        begun = [line[0] for line in lines if len(line) == 1 and isinstance(line[0], int)]
        return max((number for number in begun if number not in ended), default=None)

    @staticmethod
    def write(path: Path, *line: Any) -> None:
        """Adds a line, behind whatever there is of one."""
        with path.open("a") as file:
            file.write(f"\n{json.dumps(line)}\n")

    def attempt(self, function: Callable[[], Any]) -> Any:
        number, self.number = self.number, self.number + 1
        if number in self.ended:
            self.number, result = self.ended[number]
            return result
        self.write(self.path, number)
        result = self.reason if number == self.lost else _tried(function)
        self.write(self.path, number, self.number, result)
        if isinstance(result, str) and number != self.lost and _device_is_lost():
            print(f"the device is lost to this process: {result}", flush=True)
            os._exit(AGAIN)
        return result


def _device_is_lost() -> bool:
    """Whether nothing runs on the GPU any more in this process, as behind a kernel that wrote out of bounds."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized() and isinstance(_tried(torch.cuda.synchronize), str)


# ---- stages ------------------------------------------------------------------------------------------------------


def environment(record: Record, device: str) -> None:
    """Versions and hardware. Whatever cannot be asked is recorded as the reason why."""
    import torch

    def ask(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            return f"unknown: {error}"

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    gpus = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "multiprocessors": facts.multi_processor_count,
                "memory_bytes": facts.total_memory,
                "l2_bytes": getattr(facts, "L2_cache_size", None),
            }
        )
    query = "name,driver_version,clocks.max.sm,clocks.max.memory,power.limit,ecc.mode.current"
    record.add(
        gpus=gpus,
        nvidia_smi=ask("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") if gpus else None,
        nvcc=ask("nvcc", "--version"),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        packages={n: version(n) for n in ("torch", "triton", "numpy", "pytest", "cmake", "ninja", "pybind11")},
        python=platform.python_version(),
        platform=platform.platform(),
        processors=os.cpu_count(),
        commit=ask("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
    )


def tests(record: Record, device: str) -> None:
    """The GPU's tests and those of the kernels on their own, dealt out to processes, each of which goes on record as it
    ends; and behind them those of CUDA C++, which has been built meanwhile."""
    cores = os.cpu_count() or 1
    processes = max(1, min(14, cores - 2))
    begin = time.monotonic()
    # What needs no GPU is compiled for minutes: test_aot.py.
    chosen = ["tests/gpu", "tests/triton", "--ignore", "tests/triton/test_aot.py"]
    if device == "cpu":
        chosen, processes = ["tests/gpu", "tests/triton/test_aot.py", "-k", "spill"], min(2, processes)

    def run(what: str, arguments: Sequence[str], seconds: float) -> bool:
        fine = True
        for row in _dealt_out(arguments, processes, seconds):
            record.add(what=what, seconds=time.monotonic() - begin, **row)
            fine = fine and is_fine(row)
        return fine

    fine = {"tests": run("tests", chosen, min(95, record.left() - 25))}
    install_what_is_built()
    if (ROOT / "gankern" / "libgankern_cuda.so").exists():
        fine["tests of CUDA C++"] = run("tests of CUDA C++", CUDA_TESTS, record.left() - 3)
    if not all(fine.values()):
        raise RuntimeError("not all passed: " + "; ".join(what for what, passed in fine.items() if not passed))


READY = ROOT / "build" / "ready"  # libraries that are whole, and not beside the sources yet


def install_what_is_built() -> None:
    """Puts the libraries that are ready beside the sources, each at once: no process loads one that is half written."""
    for library in READY.glob("*.so"):
        try:
            library.replace(ROOT / "gankern" / library.name)
        except OSError as error:
            print(f"{library.name} is built, and cannot be put beside the sources: {error}", flush=True)


def build(record: Record, device: str) -> None:
    """What a GPU needs of the native libraries, CUDA C++ for this device alone and the autograd nodes with the library
    that they stand on: both at once, in folders of their own. No stage: it runs beside them, and nothing waits for it.
    """
    import pybind11

    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake") or "cmake"
    shutil.rmtree(READY, ignore_errors=True)
    READY.mkdir(parents=True)

    def built(what: str, jobs: int, targets: Sequence[str], *options: str) -> None:
        folder, begin = ROOT / "build" / f"gpu-{what}", time.monotonic()
        given = (f"-DPython_EXECUTABLE={sys.executable}", f"-DGANKERN_PYBIND11_DIR={pybind11.get_cmake_dir()}")
        log = folder.with_suffix(".log")
        make = ["--build", str(folder), "--parallel", str(jobs), "--target", *targets, "--", "-k", "0"]
        with log.open("w") as file:
            for command in (["-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *given, *options], make):
                status = subprocess.run([cmake, *command], stdout=file, stderr=file, env=environment).returncode
                if device == "cpu":
                    break  # a dry run
        for library in folder.glob("*.so"):
            shutil.copy2(library, READY / f"{library.name}.part")
            (READY / f"{library.name}.part").replace(READY / library.name)
        output = log.read_text(errors="replace")[-4_000:]
        record.add(what=what, seconds=time.monotonic() - begin, status=status, output=output)

    path = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]  # where nvcc may be
    environment = {**os.environ, "PATH": os.pathsep.join(path)}
    if device == "cuda":
        import torch

        environment["CUDAARCHS"] = "{}{}-real".format(*torch.cuda.get_device_capability())
    cores = os.cpu_count() or 1
    kinds: dict[str, tuple[Any, ...]] = {"nodes": (max(2, cores // 2), ["gankern_autograd", "gankern_ops"])}
    if device == "cuda":
        kinds = {"cuda": (4, ["gankern_cuda"], "-DGANKERN_CUDA=ON"), **kinds}
    with concurrent.futures.ThreadPoolExecutor(len(kinds)) as pool:
        for done in [pool.submit(built, what, *given) for what, given in kinds.items()]:
            done.result()


def _dealt_out(
    arguments: Sequence[str], processes: int, seconds: float, under: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """What each of several processes of pytest found, as it ends; together they run the tests that the arguments
    choose, each process ``under`` such a command. Whatever runs longer than that is stopped, and has a row that says
    so."""
    pytest = [sys.executable, "-m", "pytest", "-rfE", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}  # read below
    command = [*pytest, "-q", "--collect-only", *arguments]
    listed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    names = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith(("FAILED", "ERROR"))]
    if listed.returncode not in (0, 5):
        yield {"status": listed.returncode, "failures": ["collection"], "output": listed.stdout[-4_000:]}
    logs = ROOT / "build" / "tests" / "-".join(under).replace("/", "_")
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[int, tuple[subprocess.Popen[bytes], Path]] = {}
    for number in range(min(processes, len(names))):
        log = logs / f"{number}.log"
        with log.open("w") as file:
            command = [*under, *pytest, "-v", *names[number::processes]]
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            running[number] = process, log
    end = time.monotonic() + seconds
    while running:
        for number, (process, log) in list(running.items()):
            status: int | str | None = process.poll()
            if status is None and time.monotonic() > end:
                process.kill()
                process.wait()
                status = "stopped"
            if status is None:
                continue
            del running[number]
            text = log.read_text(errors="replace")
            print(text[-3_000:])
            found = re.findall(r"(\d+) (passed|failed|skipped|errors?|xfailed)", text)
            failures = re.findall(r"^(?:FAILED|ERROR) (.*)", text, re.M)[:50]
            if status == "stopped":
                failures += [f"did not come to an end: {line}" for line in text.splitlines()[-1:]]
            yield {"status": status, **{what: int(n) for n, what in found}, "failures": failures}
        time.sleep(0.2)


def _compiled_before(function: Callable[..., Any], work: Sequence[tuple[Any, ...]], seconds: float) -> dict[str, Any]:
    """As :func:`_in_processes`, once for a stage that is begun again."""
    found = attempt(partial(_in_processes, function, work, seconds))
    return found if isinstance(found, dict) else {"errors": [found]}


def _in_processes(function: Callable[..., Any], work: Sequence[tuple[Any, ...]], seconds: float) -> dict[str, Any]:
    """Calls the function with each of the arguments in several processes, for so many seconds at most: how long it
    took, how many calls ended, and what failed. For what is kept in caches, so that no failure matters."""
    begin, done, errors = time.monotonic(), 0, []
    count = max(1, min(12, (os.cpu_count() or 1) - 2, len(work)))
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        for pending in [pool.apply_async(function, given) for given in work]:
            try:
                pending.get(max(0.0, begin + seconds - time.monotonic()))
                done += 1
            except multiprocessing.TimeoutError:
                continue
            except Exception as error:  # of a process: it will be seen where the same is measured
                errors.append(f"{type(error).__name__}: {str(error)[:200]}")
    return {"seconds": time.monotonic() - begin, "calls": len(work), "done": done, "errors": errors[:10]}


def _tiny_cases() -> Iterator[tuple[Any, str]]:
    """A case a primitive with peers, the one of the smallest inputs: in host time, sizes do not matter."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gankern.measure.cases import all_cases

    smallest: dict[str, tuple[int, Any]] = {}
    for case in all_cases():
        if case.peers:
            with FakeTensorMode():  # sizes alone: making the values of all cases would take longer than the stage
                size = sum(x.numel() for x in case.make(torch.float32, "cpu"))
            if case.primitive not in smallest or size < smallest[case.primitive][0]:
                smallest[case.primitive] = size, case
    for primitive, (_, case) in sorted(smallest.items()):
        yield case, primitive


def host(record: Record, device: str) -> None:
    """µs a call, gankern and the fastest eager peer."""
    import torch

    from gankern.measure import device as measured
    from gankern.measure.benchmark import MODES, candidates_of, step_of

    def cost(run: Callable[..., Any], case: Any, mode: str) -> float:
        step = step_of(run, case, torch.float32, device, mode)
        return measured.host_microseconds(step, device, *((3, 2) if device == "cpu" else (100, 5)))

    for case, primitive in _tiny_cases():
        for mode in MODES:
            candidates = candidates_of(case, mode, compiled=False)
            row = {name: attempt(partial(cost, run, case, mode)) for name, run in candidates.items()}
            record.add(primitive=primitive, case=case.name, mode=mode, microseconds=row)


def _device_cases(device: str) -> list[tuple[str, Any, int]]:
    """(name, what makes a case's contenders and inputs, least passes over the first input forward and backward)."""
    import torch
    import torch.nn.functional as F

    import gankern.functional as GF

    big = (64, 256, 64, 64) if device == "cuda" else (4, 4, 8, 8)
    small = (16, 128, 8, 8) if device == "cuda" else (4, 4, 4, 4)

    def bias_act(x: Any, b: Any, implementation: str | None = None) -> Any:
        return GF.bias_act(x, b, activation="leaky_relu", implementation=implementation)

    def eager_bias_act(x: Any, b: Any) -> Any:
        return F.leaky_relu(x + b[:, None, None], 0.2)

    def eager_pixel_norm(x: Any, b: Any) -> Any:
        a = F.leaky_relu(x + b[:, None, None], 0.2)
        return a * (a.square().mean(1, keepdim=True) + 1e-8).rsqrt()

    def eager_batch_norm(x: Any, b: Any) -> Any:
        return F.leaky_relu(F.batch_norm(x, None, None, b, b, True), 0.2)

    def eager_stddev(x: Any, b: Any) -> Any:
        y = x.view(4, -1, *x.shape[1:]).float().var(0, correction=0).add(1e-8).sqrt().mean((1, 2, 3)).to(x.dtype)
        y = y.view(-1, 1, 1, 1).repeat(4, 1, *x.shape[2:])
        return torch.cat([x, y], 1)

    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=device) / 8

    def eager_instance_norm(x: Any, b: Any) -> Any:
        return F.leaky_relu(F.instance_norm(x, None, None, b, b), 0.2)

    def groups(x: Any) -> int:  # of eight channels
        return max(1, x.shape[1] // 8)

    def eager_group_norm(x: Any, b: Any) -> Any:
        return F.leaky_relu(F.group_norm(x, groups(x), b, b), 0.2)

    def eager_penalty(x: Any, b: Any) -> Any:
        return (torch.linalg.vector_norm(x, dim=(1, 2, 3)) - 1).square()

    def virtual_batch_norm(x: Any, b: Any, implementation: str | None = None) -> Any:
        m = mean[: x.shape[1]]
        return GF.virtual_batch_norm(x, m, m + 1, 64, b, b, activation="leaky_relu", implementation=implementation)

    def eager_up(x: Any, b: Any) -> Any:
        c = x.shape[1]
        kernel = (torch.outer(taps, taps) * 4).to(x.dtype).expand(c, 1, 4, 4)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=c)

    def eager_down(x: Any, b: Any) -> Any:
        c = x.shape[1]
        return F.conv2d(x, torch.outer(taps, taps).to(x.dtype).expand(c, 1, 4, 4), stride=2, padding=1, groups=c)

    def eager_same(x: Any, b: Any) -> Any:
        c = x.shape[1]
        return F.conv2d(F.pad(x, (2, 1, 2, 1)), torch.outer(taps, taps).to(x.dtype).expand(c, 1, 4, 4), groups=c)

    mean = torch.zeros(big[1], device=device)
    cases = []
    for shape, label in ((big, "large"), (small, "small")):
        half = (shape[0] // 2, shape[1] // 2, *shape[2:])
        wide = (*half[:2], 2 * shape[2], 2 * shape[3])
        cases += [
            (f"bias_act {label}", shape, bias_act, eager_bias_act, 5),
            (f"bias_act_pixel_norm {label}", shape, GF.bias_act_pixel_norm, eager_pixel_norm, 5),
            (f"batch_norm_act {label}", shape,
             lambda x, b: GF.batch_norm_act(x, None, None, b, b, True, activation="leaky_relu"), eager_batch_norm, 5),
            (f"minibatch_stddev {label}", shape, lambda x, b: GF.minibatch_stddev(x, group_size=4), eager_stddev, 5),
            (f"virtual_batch_norm {label}", shape, virtual_batch_norm,
             partial(virtual_batch_norm, implementation="reference"), 5),
            (f"upfirdn2d up {label}", half,
             lambda x, b: GF.upfirdn2d(x, taps, up=2, padding=(2, 1, 2, 1), gain=4), eager_up, 10),
            (f"upfirdn2d down {label}", wide,
             lambda x, b: GF.upfirdn2d(x, taps, down=2, padding=(1, 1, 1, 1)), eager_down, 2.5),
            (f"upfirdn2d same {label}", wide,
             lambda x, b: GF.upfirdn2d(x, taps, padding=(2, 1, 2, 1)), eager_same, 4),
            (f"instance_norm_act {label}", shape,
             lambda x, b: GF.instance_norm_act(x, None, None, b, b, activation="leaky_relu"), eager_instance_norm, 5),
            (f"group_norm_act {label}", shape,
             lambda x, b: GF.group_norm_act(x, groups(x), b, b, activation="leaky_relu"), eager_group_norm, 5),
            (f"gradient_penalty {label}", shape, lambda x, b: GF.gradient_penalty(x), eager_penalty, 3),
        ]  # fmt: skip
    return cases


def device(record: Record, where: str) -> None:
    """Milliseconds of gankern, torch eager and torch compiled, each as replays of a CUDA graph, and the limit of
    memory: the least passes over the input at the measured copy bandwidth."""
    import torch

    from gankern.core import devices
    from gankern.measure import benchmark
    from gankern.measure import device as measured

    if where == "cuda":  # of this process: what `auto` takes is Triton, beside which CUDA C++ is measured
        devices.TIERS.pop(torch.cuda.get_device_name(), None)
    quick = {"seconds": 0.05, "rounds": 3} if where == "cuda" else {"seconds": 0.0, "rounds": 1}
    bandwidth = benchmark.copy_bandwidth(where, 256 if where == "cuda" else 8)
    record.content["copy_bandwidth"] = bandwidth
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    kinds = [(dtype, layout) for dtype in (torch.float32, torch.bfloat16) for layout in layouts]

    def measure(
        runs: dict[str, Callable[..., Any]], dtype: Any, layout: str, name: str, shape: Any, passes: float
    ) -> None:
        inputs = _inputs(shape, dtype, layout, where)
        x = inputs[0]
        row = {who: attempt(partial(_times, measured, run, inputs, where, quick)) for who, run in runs.items()}
        limit = passes * x.nbytes / bandwidth * 1e3
        record.add(case=name, dtype=str(dtype)[6:], layout=layout, limit_ms=limit, contenders=row)

    cases = _device_cases(where)
    large = [(number, *kind) for kind in kinds for number in range(len(cases)) if "large" in cases[number][0]]
    # Small maps in one kind alone: there launches count, which are the same in all.
    small = [(number, *kinds[0]) for number in range(len(cases)) if "large" not in cases[number][0]]
    own = _cases_of_their_own(where)
    bare = [case for case in own if any(f"{case.primitive} {case.name}".startswith(row[0]) for row in OF_THEIR_OWN)]
    if where == "cuda":
        work = [(*one, False) for one in large + small] + [(*one, True) for one in large]
        record.add(what="compiled", **_compiled_before(_compile_case, work, 40))

    def measure_cases(work: Sequence[tuple[int, Any, str]], who: str) -> None:
        for number, dtype, layout in work:
            name, shape, ours, peer, passes = cases[number]
            if who == "compiled":
                torch._dynamo.reset()
            runs = {"gankern": ours, IN_CUDA: partial(_in_cuda, ours), "eager": peer, "compiled": torch.compile(peer)}
            measure({who: runs[who]}, dtype, layout, name, shape, passes)

    def measure_own(work: Sequence[Any], modes: Sequence[str], compiled: bool) -> None:
        for case, mode in itertools.product(work, modes):
            candidates = benchmark.candidates_of(case, mode, compiled)
            if compiled:
                runs = {who: run for who, run in candidates.items() if who.endswith(benchmark.COMPILED)}
            else:
                runs = candidates | {f"gankern, {tier}": partial(case.run, tier) for tier in _tiers(case, where)}
            row = {who: attempt(partial(_replayed, run, case, mode, where, **quick)) for who, run in runs.items()}
            record.add(case=f"{case.primitive} {case.name}", mode=mode, dtype="float32", contenders=row)

    # What bars are of comes first; and of these last what takes seconds a peer where it is in no cache yet.
    measure_cases(large, "gankern")
    measure_cases([one for one in large if cases[one[0]][0].split()[0] in _with_cuda(where)], IN_CUDA)
    measure_own(bare, benchmark.MODES[1:], False)
    if where == "cuda":
        measure_cases(large, "compiled")
        measure_own(bare, benchmark.MODES[1:2], True)
    measure_cases(large, "eager")
    for who in ("gankern", "eager"):
        measure_cases(small, who)
    measure_own(own, benchmark.MODES[:1], False)
    measure_own([case for case in own if case not in bare], benchmark.MODES[1:], False)


def _in_cuda(run: Callable[..., Any], *inputs: Any) -> Any:
    """By CUDA C++, where `auto` may take Triton still: which of them is faster, the file of the device does not say
    yet."""
    import gankern

    with gankern.use_implementation("cuda"):
        return run(*inputs)


def _with_cuda(where: str) -> list[str]:
    """The primitives that CUDA C++ runs here."""
    import torch

    import gankern.functional  # noqa: F401 (declares the primitives)
    from gankern.core.dispatch import Primitive

    having = [p for p in Primitive.registry.values() if any(tier.name == "cuda" for tier in p.implementations)]
    return [p.name for p in having if where == "cuda" and p.refusals(where, torch.float32)["cuda"] is None]


def _cases_of_their_own(where: str) -> list[Any]:
    """What is measured as `gankern bench` has it, and spectral norm of a discriminator that is too large for others."""
    from gankern.measure.cases import Case, all_cases, spectral_norm

    names = ("spectral_norm", "minibatch_discrimination", "gradient_penalty")
    if where == "cpu":
        return [case for case, primitive in _tiny_cases() if primitive in names]
    found = [case for case in all_cases() if case.primitive in names and case.bench and case.along is None]
    peers = {"torch parametrization": spectral_norm.torch_parametrization}
    return [
        *found,
        Case("spectral_norm", BIGGAN, _biggan_weights, spectral_norm.grouped, peers, spectral_norm.work),
    ]


BIGGAN = "BigGAN-128 discriminator, grouped"
BIGGAN_WIDTHS = (3, 96, 192, 384, 768, 1536, 1536)


def _biggan_weights(dtype: Any, device: str, widths: Sequence[int] = BIGGAN_WIDTHS, classes: int = 1000) -> list[Any]:
    """Weights of 96 channels a block's width, u and v, made on the device: they are 350 MB."""
    import torch
    import torch.nn.functional as F

    shapes: list[tuple[int, ...]] = []
    for given, width in itertools.pairwise(widths):
        shapes += [(width, given, 3, 3), (width, width, 3, 3)]
        shapes += [(width, given, 1, 1)] if width != given else []
    width = widths[1]  # of the attention, behind the first block
    shapes += [
        (width // 8, width, 1, 1),
        (width // 8, width, 1, 1),
        (width // 2, width, 1, 1),
        (width, width // 2, 1, 1),
    ]
    shapes += [(1, widths[-1]), (classes, widths[-1])]
    weights = [(torch.randn(shape, device=device, dtype=dtype) / shape[0] ** 0.5).requires_grad_() for shape in shapes]
    us = [F.normalize(torch.randn(shape[0], device=device, dtype=dtype), dim=0) for shape in shapes]
    with torch.no_grad():
        vs = [F.normalize(w.flatten(1).T @ u, dim=0) for w, u in zip(weights, us)]
    return [*weights, *us, *vs]


def _inputs(shape: Any, dtype: Any, layout: str, where: str) -> tuple[Any, Any]:
    """A map and a bias, leaves both."""
    import torch

    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(shape, device=where, dtype=dtype).contiguous(memory_format=memory_format)
    return x.requires_grad_(), torch.randn(shape[1], device=where, dtype=dtype).requires_grad_()


def _compile_case(number: int, dtype: Any, layout: str, peer: bool) -> None:
    """Runs a case of the device stage once, ours or the compiled peer, so that its kernels are in the caches."""
    sys.path.insert(0, str(ROOT))
    import torch

    _, shape, ours, eager, _ = _device_cases("cuda")[number]
    for step in _modes(torch.compile(eager) if peer else ours, _inputs(shape, dtype, layout, "cuda")).values():
        attempt(step)


def _replayed(
    run: Callable[..., Any],
    case: Any,
    mode: str,
    where: str,
    seconds: float = 0.05,
    rounds: int = 3,
    dtype: str = "float32",
) -> float:
    """Milliseconds of a case's mode as replays of a graph."""
    import torch

    from gankern.measure import benchmark
    from gankern.measure import device as measured

    step = benchmark.step_of(run, case, getattr(torch, dtype), where, mode)
    return measured.milliseconds(measured.graph_of(step, where), where, seconds, rounds)


def _tiers(case: Any, where: str) -> list[str]:
    """The implementations of a case's primitive on this device that somebody wrote, where there is more than one."""
    import torch

    from gankern.core.dispatch import Primitive

    refusals = Primitive.registry[case.primitive].refusals(where, torch.float32)
    able = [name for name, reason in refusals.items() if reason is None and name != "reference"]
    return able if len(able) > 1 else []


def _modes(run: Callable[..., Any], inputs: Sequence[Any]) -> dict[str, Callable[[], None]]:
    """Forward, forward + backward, double backward."""
    import torch

    def forward() -> None:
        with torch.no_grad():
            run(*inputs)

    cotangent = torch.ones_like(run(*inputs)).requires_grad_()
    gradients = torch.autograd.grad(run(*inputs).sum(), inputs, allow_unused=True)
    used = [x for x, gradient in zip(inputs, gradients) if gradient is not None]

    def backward() -> None:
        torch.autograd.grad(run(*inputs), used, cotangent)

    def double_backward() -> None:
        grads = torch.autograd.grad(run(*inputs), used, cotangent, create_graph=True)
        torch.autograd.grad(grads, [*used, cotangent], [torch.ones_like(g) for g in grads], allow_unused=True)

    return {"f": forward, "f+b": backward, "double backward": double_backward}


def _times(measured: Any, run: Callable[..., Any], inputs: Sequence[Any], where: str, quick: dict) -> dict[str, Any]:
    """The milliseconds of each mode, and the memory of forward + backward."""
    modes = _modes(run, inputs)
    timed = {
        mode: attempt(lambda step=step: measured.milliseconds(measured.graph_of(step, where), where, **quick))
        for mode, step in modes.items()
    }
    return timed | {"peak_mb": attempt(lambda: measured.peak_megabytes(modes["f+b"], where))}


def _steps(where: str) -> list[Any]:
    """The whole steps that are measured, those with a bar first."""
    from gankern.measure import steps as whole

    Step = whole.Step
    if where == "cpu":
        return [Step("DCGAN-16, batch 4", "dcgan", 4, "non_saturating", options={"size": 16, "width": 8})]
    progan = {"loss": "wasserstein", "penalty": True, "drift": 1e-3, "lr": 1e-3, "betas": (0.0, 0.99)}
    return [
        next(s for s in whole.STEPS if s.model == "wgan_gp"),
        next(s for s in whole.STEPS if s.model == "sngan"),
        next(s for s in whole.STEPS if s.model == "dcgan"),
        Step("ProGAN-64, batch 4", "progan", 4, options={"size": 64}, **progan),
        Step("ProGAN-256, batch 4", "progan", 4, options={"size": 256}, **progan),
        Step("DCGAN-64, batch 256", "dcgan", 256, "non_saturating", options={"size": 64}),
    ]


def steps(record: Record, where: str) -> None:
    """Whole steps: torch, accelerated and gankern, as CUDA graphs and without; fp32 with TF32, and bfloat16 in
    channels_last. What `accelerate` does to layers one by one, the kernels that a step takes the most time in,
    accelerated steps, and at the end torch compiled, which may take longer than all else."""
    import torch

    from gankern.core import devices
    from gankern.measure import device as measured
    from gankern.measure import steps as whole
    from gankern.measure.benchmark import ACCELERATED, OURS

    wanted = _steps(where)
    modes = sorted(whole.modes_of(where), key=lambda mode: not mode.endswith("graphed"))
    order = [(fast, mode, number) for mode in modes for fast in (False, True) for number in range(len(wanted))]
    if where == "cuda":
        variants = sorted({v for mode in modes for v in whole.variants_of(mode, compiled=False).values()})
        eager = [v for v in variants if "graphed" not in v and v != "torch"]
        work = [(n, v, where, fast) for fast in (False, True) for n in range(len(wanted)) for v in eager]
        record.add(what="compiled", **_compiled_before(_compile_step, work, 30))

    def measure(fast: bool, mode: str, step: Any, variants: dict[str, str]) -> None:
        for name, variant in variants.items():  # a row each: what is stopped keeps those before
            time_of = partial(_step_time, measured, whole, step, variant, where, fast)
            record.add(step=step.name, mode=mode, fast=fast, contenders={name: attempt(time_of)})

    def measure_all(accelerated: bool) -> None:
        for fast, mode, number in order:
            variants = whole.variants_of(mode, compiled=False)
            chosen = {name: v for name, v in variants.items() if (name == ACCELERATED) == accelerated}
            measure(fast, mode, wanted[number], chosen)

    # Of this process: penalties by the method that the device's file will name, and all that accelerate has, of which
    # what is worth it goes to that file.
    penalties(record, where)
    if where == "cuda":
        worth = worth_accelerating(record.content["results"])
        devices.ACCELERATED[torch.cuda.get_device_name()] = {**dict.fromkeys(DECIDED, 0), **worth}
    measure_all(accelerated=False)  # what bars are of
    accelerated_layers(record, where)
    for step in wanted[:4]:
        for variant in ("torch", OURS):
            record.add(
                step=step.name,
                variant=variant,
                kernels=attempt(lambda s=step, v=variant: measured.top_kernels(whole.make_step(s, v, where), where)),
            )
    measure_all(accelerated=True)
    for step in wanted if where == "cuda" else []:
        for mode in modes:
            others = whole.variants_of(mode, compiled=False)
            compiled = {n: v for n, v in whole.variants_of(mode, compiled=True).items() if n not in others}
            measure(False, mode, step, compiled)


# By which layers a device's file decides on what `accelerate` does there, and by the values of what: a map's, or those
# of the weight of a convolution.
DECIDED: dict[str, tuple[tuple[str, ...], Callable[[Sequence[int]], int]]] = {
    "pairs": (("Upsample Conv2d", "Conv2d AvgPool2d"), math.prod),
    "second derivative": (
        ("LeakyReLU", "BatchNorm2d LeakyReLU", "InstanceNorm2d ReLU", "GroupNorm LeakyReLU", "Conv2d LeakyReLU",
         "ConvTranspose2d BatchNorm2d ReLU"), math.prod),
    "spectral norm": (
        ("SpectralNorm LeakyReLU", "HookedSpectralNorm LeakyReLU"), lambda shape: 9 * shape[1] ** 2),
}  # fmt: skip


def _layers(names: str, channels: int, where: str) -> Any:
    from torch import nn

    def convolution() -> Any:
        return nn.Conv2d(channels, channels, 3, padding=1)

    made = {
        "LeakyReLU": lambda: nn.LeakyReLU(0.2),
        "ReLU": nn.ReLU,
        "BatchNorm2d": lambda: nn.BatchNorm2d(channels),
        "InstanceNorm2d": lambda: nn.InstanceNorm2d(channels, affine=True),
        "GroupNorm": lambda: nn.GroupNorm(max(1, channels // 8), channels),
        "Conv2d": convolution,
        "ConvTranspose2d": lambda: nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False),
        "Upsample": lambda: nn.Upsample(scale_factor=2),
        "AvgPool2d": lambda: nn.AvgPool2d(2),
        "SpectralNorm": lambda: nn.utils.parametrizations.spectral_norm(convolution()),
        "HookedSpectralNorm": lambda: nn.utils.spectral_norm(convolution()),
    }
    return nn.Sequential(*(made[name]() for name in names.split())).to(where)


# Samples of critics whose penalty is measured without a graph, by both methods.
CRITICS = {"64 of 32x32": (64, 3, 32, 32), "64 of 64x64": (64, 3, 64, 64), "16 of 256x256": (16, 3, 256, 256)}
DRY = {"seconds": 0.0, "rounds": 1}


def _critic(channels: int, side: int, where: str) -> Any:
    from torch import nn

    import gankern.nn as gnn

    layers: list[Any] = []
    while side > 4:
        width = min(512, 1024 // side * 32)
        layers += [gnn.Conv2d(channels, width, 3, padding=1), gnn.LeakyReLU(0.2), nn.AvgPool2d(2)]
        channels, side = width, side // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, 1)).to(where)


def _layer_milliseconds(model: Any, x: Any, mode: str, where: str) -> float:
    import torch

    from gankern.measure import device as measured

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def backward() -> None:
        torch.autograd.grad(model(x).sum(), [x, *model.parameters()])

    def penalty() -> None:
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), [x, *model.parameters()], allow_unused=True)

    step = {"forward": forward, "penalty": penalty}.get(mode, backward)
    quick = {"seconds": 0.02, "rounds": 3} if where == "cuda" else DRY
    return measured.milliseconds(measured.graph_of(step, where) if "graphed" in mode else step, where, **quick)


def penalties(record: Record, where: str) -> None:
    """Milliseconds of a penalty without a graph by double backward, and by the tangent form, which costs the host more:
    from how many values of the samples on it is worth that is what the device's file says."""
    import torch

    from gankern.measure import device as measured
    from gankern.penalties import gradient_penalty

    def measure(shape: Sequence[int], method: str) -> float:
        critic = _critic(shape[1], shape[2], where)
        real, fake = torch.rand(2, *shape, device=where)

        def step() -> None:
            loss = gradient_penalty(critic, real, fake, method=method)
            torch.autograd.grad(loss, [*critic.parameters()], allow_unused=True)

        return measured.milliseconds(step, where, **({"seconds": 0.1, "rounds": 3} if where == "cuda" else DRY))

    for name, shape in CRITICS.items():
        at = shape if where == "cuda" else (2, 3, 16, 16)
        row = {method: attempt(partial(measure, at, method)) for method in ("double_backward", "tangent")}
        record.add(critic=name, contenders=row)


def accelerated_layers(record: Record, where: str) -> None:
    """Milliseconds of layers as they are and as `accelerate` makes them with all that it has, of small maps, which the
    host decides, and of large ones. Whatever is slower is left as it was by this device's file."""
    import torch

    import gankern

    def measure(names: str, shape: Sequence[int], mode: str, who: str) -> float:
        # Layers of their own: what one keeps of a call on the default stream keeps a later one from being captured.
        x = torch.randn(shape if where == "cuda" else (2, 8, 8, 8), device=where).requires_grad_()
        model = _layers(names, x.shape[1], where)
        if who == "accelerated":
            gankern.accelerate(model)
        return _layer_milliseconds(model, x, mode, where)

    for (size, shape), names in itertools.product(LAYER_SIZES.items(), LAYERS):
        for mode in LAYER_MODES:
            row = {who: attempt(partial(measure, names, shape, mode, who)) for who in ("original", "accelerated")}
            record.add(layers=names, size=size, mode=mode, contenders=row)
    keep_choices(record, where, accelerate=worth_accelerating(record.content["results"]))


def worth_accelerating(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Of all that `accelerate`, and penalties, decide by a device's file: the values of a map, weight or samples from
    which on none was slower in any mode, at any size; nothing of what was slower at the largest, or not measured."""
    ratios = {}
    for row in rows:
        times = row.get("contenders", {})
        if "layers" in row and all(isinstance(times.get(who), float) for who in ("original", "accelerated")):
            ratios[row["layers"], row["size"], row["mode"]] = times["original"] / times["accelerated"]
    found: dict[str, int] = {}
    for what, (layers, values) in DECIDED.items():
        for size, shape in sorted(LAYER_SIZES.items(), key=lambda entry: -math.prod(entry[1])):
            if any(ratios.get((one, size, mode), 0.0) < NOT_SLOWER for one in layers for mode in LAYER_MODES):
                break
            found[what] = values(shape)
    critics = {row["critic"]: row["contenders"] for row in rows if "critic" in row}
    for name, shape in sorted(CRITICS.items(), key=lambda entry: -math.prod(entry[1])):
        times = [critics.get(name, {}).get(method) for method in ("tangent", "double_backward")]
        if not all(isinstance(ms, float) for ms in times) or times[0] > times[1]:
            break
        found["tangent form"] = math.prod(shape)
    return found


def _compile_step(number: int, variant: str, where: str, fast: bool) -> None:
    """One step of training, so that its kernels are in the caches."""
    sys.path.insert(0, str(ROOT))
    from gankern.measure import steps as whole

    _with_tf32()
    whole.make_step(_steps(where)[number], variant, where, fast)()


def _with_tf32() -> None:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def _step_time(measured: Any, whole: Any, step: Any, variant: str, where: str, fast: bool) -> dict[str, Any]:
    _with_tf32()
    train = whole.make_step(step, variant, where, fast)
    return {
        "ms": measured.milliseconds(train, where, seconds=0.2, rounds=3),
        "peak_mb": measured.peak_megabytes(train, where),
    }


def _in_triton(run: Callable[..., Any], *inputs: Any) -> Any:
    """By Triton, whatever the file of the device says since."""
    import gankern

    with gankern.use_implementation("triton"):
        return run(*inputs)


def _variant_cases(where: str) -> dict[str, list[tuple[str, Callable[..., Any], tuple[int, ...]]]]:
    """What launches each kernel that has variants: cases of the device stage, with what runs on which shape."""
    import gankern.functional as GF

    large = [(name, ours, shape) for name, shape, ours, _, _ in _device_cases(where) if "large" in name]
    kernels = {"bias_act_pixel_norm": "pixel_norm"}
    found: dict[str, list[tuple[str, Callable[..., Any], tuple[int, ...]]]] = {}
    for case in large:
        primitive = case[0].split()[0]
        if primitive != "gradient_penalty":
            found.setdefault(kernels.get(primitive, primitive), []).append(case)
    points = (256, 100, 5) if where == "cuda" else (8, 2, 5)
    found["minibatch_discrimination"] = [("minibatch_discrimination", lambda m, b: GF.l1_similarity(m), points)]
    found["upfirdn2d"] = found.pop("upfirdn2d")  # has the most variants
    return found


def _variant_steps(name: str, where: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Forward and backward of what launches a kernel, in each dtype and memory format that it comes in, by the names
    that bars have."""
    import torch

    for case, run, shape in _variant_cases(where)[name]:
        for dtype, layout in itertools.product((torch.float32, torch.bfloat16), ("contiguous", "channels_last")):
            if len(shape) == 4 or (dtype, layout) == (torch.float32, "contiguous"):
                step = _modes(partial(_in_triton, run), _inputs(shape, dtype, layout, where))["f+b"]
                yield f"{case}, {str(dtype)[6:]}, {layout}", step


def _compile_variant(name: str, number: int, where: str) -> None:
    """Runs a variant once in a process of its own: its kernels are then in Triton's cache."""
    sys.path.insert(0, str(ROOT))

    blocks = _blocks_of(name)
    with blocks.use(blocks.variants[number]):
        for _, step in _variant_steps(name, where):
            step()


def _blocks_of(name: str) -> Any:
    from gankern.triton import launch

    importlib.import_module(f"gankern.triton.{name}")  # which knows its variants
    return launch.Blocks.known[name]


def variants(record: Record, where: str) -> None:
    """CUDA C++ beside Triton; then each variant of a kernel's block sizes, forward and backward, on the large maps that
    bars are of. The best go to the device's file, as soon as they are known. What the variants compile, which takes the
    longest, is compiled in parallel before."""
    if where == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from gankern.measure import device as measured

    tiers = _fastest_tiers(record, where)
    keep_choices(record, where, tiers=tiers)
    blocks = {name: _blocks_of(name) for name in _variant_cases(where)}
    work = [(name, number, where) for name, own in blocks.items() for number in range(len(own.variants))]
    if where == "cpu":
        work = work[:1]  # there is nothing to compile
    record.add(what="compiled", **_compiled_before(_compile_variant, work, 30 if where == "cuda" else 120))

    def replayed(step: Callable[[], None]) -> float:
        return measured.milliseconds(measured.graph_of(step, where), where, 0.02, 3)

    def row_of(name: str, variant: dict[str, int]) -> dict[str, float]:
        with blocks[name].use(variant):
            return {label: attempt(partial(replayed, step)) for label, step in _variant_steps(name, where)}

    best = {}
    for name, own in blocks.items():
        times: dict[int, float] = {}
        # The interpreter is slow, and of variants it tells nothing.
        for number, variant in enumerate(own.variants[: 1 if where == "cpu" else None]):
            row = attempt(partial(row_of, name, variant))
            given = list(row.values()) if isinstance(row, dict) else [row]
            fine = all(isinstance(ms, float) for ms in given)
            times[number] = math.prod(given) ** (1 / len(given)) if fine else math.inf
            record.add(kernel=name, variant=variant, ms=row)
        # A change of the default must be worth it in the mean over types and layouts.
        fastest = min(times, key=times.__getitem__)
        best[name] = own.variants[fastest if times[fastest] < 0.97 * times[0] else 0]
        keep_choices(record, where, blocks=best)


def keep_choices(record: Record, where: str, **choices: dict[str, Any]) -> None:
    """Writes choices to the device's file, whose other ones stay, and to the record: from a lent machine $OUT alone
    comes back."""
    import torch

    from gankern.core import devices

    name = torch.cuda.get_device_name() if where == "cuda" else "CPU"
    path = devices.device_file(name)
    before = json.loads(path.read_text()) if where == "cuda" and path.exists() else {"blocks": {}, "tiers": {}}
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    record.content["device_file"] = content = {**before, "device": name, **versions, **choices}
    record.write()
    if where == "cuda":
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            print(f"{path} cannot be written, the record has what belongs there: {error}", flush=True)


def _fastest_tiers(record: Record, where: str) -> dict[str, str]:
    """For each primitive with kernels in CUDA C++ and in Triton: "cuda" where it is a tenth faster in the mean over
    cases, modes and types, and nowhere slower by more than a twentieth."""
    import gankern.functional  # noqa: F401 (declares the primitives)
    from gankern.core.dispatch import Primitive
    from gankern.measure import benchmark
    from gankern.measure.cases import all_cases

    chosen = {}
    having = [n for n, p in Primitive.registry.items() if any(t.name == "cuda" for t in p.implementations)]
    for primitive in having:
        ratios = []
        dtypes = ("float32", "bfloat16") if primitive == "upfirdn2d" else ("float32",)  # maps come in both
        for case in all_cases():
            if case.primitive != primitive or not case.bench or case.along is not None:
                continue
            if not {"triton", "cuda"} <= {*_tiers(case, where)}:
                continue
            for mode, dtype in itertools.product(benchmark.MODES[:2], dtypes):
                row = {}
                for tier in ("triton", "cuda"):
                    run = partial(case.run, tier)
                    row[tier] = attempt(partial(_replayed, run, case, mode, where, 0.02, 3, dtype))
                record.add(tiers_of=primitive, case=case.name, mode=mode, dtype=dtype, ms=row)
                fine = all(isinstance(ms, float) for ms in row.values())
                ratios.append(row["triton"] / row["cuda"] if fine else 0.0)
        if is_worth(ratios):
            chosen[primitive] = "cuda"
    return chosen


def is_worth(ratios: Sequence[float]) -> bool:
    """Whether what is so many times as fast, case by case, is taken in another one's place. A failure is a 0."""
    return bool(ratios) and min(ratios) > 0.95 and math.prod(ratios) ** (1 / len(ratios)) >= 1.1


def convolutions(record: Record, where: str) -> None:
    """Convolutions that resample, forward and backward, by each way that there is on a GPU, whose times go to the
    device's file; and plain ones, beside torch's own."""
    import torch
    import torch.nn.functional as F

    import gankern.functional as GF
    from gankern.measure import device as measured
    from gankern.ops import convolution, convolution_choice

    def resize_convolution(x: Any, w: Any) -> Any:
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), w, padding=1)

    def convolution_pool(x: Any, w: Any) -> Any:
        return F.avg_pool2d(F.conv2d(x, w, padding=1), 2)

    def forced(kind: str, way: str) -> Callable[..., Any]:
        def run(x: Any, w: Any) -> Any:
            size = convolution_choice.result_size(kind, 1, *x.shape[2:])
            return convolution._run((kind, 1, 1.0, "highest", way, 0), *size, x, w, None)

        return run

    plain = {"upsample": resize_convolution, "downsample": convolution_pool}
    # (images, channels in, channels out, pixels each way of the smaller image), of generators and discriminators
    shapes = [
        (16, 512, 512, 4), (16, 512, 256, 8), (64, 256, 256, 8), (64, 256, 128, 16), (16, 128, 128, 32),
        (4, 512, 512, 16), (4, 128, 64, 64), (4, 32, 16, 128),
    ]  # fmt: skip
    if where == "cpu":
        shapes = [(2, 4, 3, 4)]

    def replayed(run: Callable[..., Any], leaves: Sequence[Any]) -> float:
        step = measured.graph_of(lambda: torch.autograd.grad(run(*leaves).sum(), leaves), where)
        return measured.milliseconds(step, where, 0.02, 3)

    found: dict[str, dict[str, list[Any]]] = {kind: {} for kind in plain}
    kinds = itertools.product((torch.float32, torch.bfloat16), ("contiguous", "channels_last"))
    for (dtype, layout), kind in itertools.product(kinds, [*plain, "same"]):
        for n, c, out, side in shapes:
            size = 2 * side if kind == "downsample" else side
            memory_format = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
            x = torch.randn(n, c, size, size, device=where, dtype=dtype).contiguous(memory_format=memory_format)
            w = torch.randn(out, c, 3, 3, device=where, dtype=dtype).contiguous(memory_format=memory_format)
            leaves = x.requires_grad_(), w.requires_grad_()
            if kind == "same":
                runs = {"gankern": partial(GF.conv2d, padding=1), "torch": partial(F.conv2d, padding=1)}
            else:
                runs = {way: forced(kind, way) for way in convolution_choice.ON_DEVICE if way != "reference"}
                runs["reference"] = plain[kind]
            row = {name: attempt(partial(replayed, run, leaves)) for name, run in runs.items()}
            record.add(kind=kind, shape=[n, c, out, side], dtype=str(dtype)[6:], layout=layout, ms=row)
            times = {way: round(ms, 5) for way, ms in row.items() if isinstance(ms, float)}
            if kind != "same" and times:
                rows = found[kind].setdefault(f"{str(dtype)[6:]} {layout}", [])
                rows.append([c, out, n * side * side, times])
                keep_choices(record, where, convolutions=found)


def sanitizer(record: Record, device: str) -> None:
    """Reads and writes out of bounds, and races within a program: both tools at once, each dealt out to half of the
    processes. A process ends with status 9 where a tool found something."""
    cores = os.cpu_count() or 1
    chosen = ["-m", "gpu", "tests/gpu/test_every_primitive.py", "-k", "same_bits"]
    if device == "cpu" or shutil.which("compute-sanitizer") is None:
        record.add(skipped="compute-sanitizer is not installed, or there is no GPU")
        return

    def checked(tool: str) -> list[dict[str, Any]]:
        under = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        return list(_dealt_out(chosen, max(1, min(7, cores // 2 - 1)), STAGES["sanitizer"] - 5, under))

    failed = []
    with concurrent.futures.ThreadPoolExecutor(len(SANITIZERS)) as pool:
        for tool, rows in zip(SANITIZERS, pool.map(checked, SANITIZERS)):
            for row in rows:
                record.add(tool=tool, **row)
            failed += [tool] if not all(is_fine(row) for row in rows) else []
    if failed:
        raise RuntimeError(f"{' and '.join(failed)} failed, or did not come to an end")


# ---- running the stages -------------------------------------------------------------------------------------------


def run_stage(name: str, out: Path, device: str, seconds: float) -> None:
    """One stage, in this process."""
    sys.path.insert(0, str(ROOT))
    record = Record(out, name, seconds)
    Journal.current = Journal(_journal(out, name))
    try:
        globals()[name](record, device)
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
    share = limit / sum(STAGES[name] for name in names)  # of its time in the table that a stage has
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
            _summarise(out, device, start, states, logs)  # whoever ends this, there is one
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
    """Writes the summary, with what has no record of its own; the bars."""
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
    """Ends the process and all that it started, which may have outlived it."""
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
    """A stage within its time, begun again where its process is lost: its state, and the end of its output."""
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
    """Waits for a stage's process: its state, or an empty one and the reason where it is to be begun again."""
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
