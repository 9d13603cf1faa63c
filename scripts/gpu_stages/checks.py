"""The stages that measure nothing: versions and hardware, tests, the native build, compute-sanitizer."""

from __future__ import annotations

import concurrent.futures
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_stages.bars import SANITIZERS, is_fine
from gpu_stages.records import ROOT, Record

CUDA_TESTS = ["tests/gpu/test_every_primitive.py", "-k-cuda"]  # by the name of the tier in their names


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
    """The GPU's tests and those of the kernels alone, dealt out to processes, each recorded as it ends; then the tests
    of CUDA C++, which has been built meanwhile."""
    cores = os.cpu_count() or 1
    processes = max(1, min(14, cores - 2))
    begin = time.monotonic()
    # Without test_aot.py, which needs no GPU and compiles for minutes.
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


READY = ROOT / "build" / "ready"  # libraries that are complete, but not beside the sources yet


def install_what_is_built() -> None:
    """Moves the libraries that are ready beside the sources, so that no process loads one that is half written."""
    for library in READY.glob("*.so"):
        try:
            library.replace(ROOT / "gankern" / library.name)
        except OSError as error:
            print(f"{library.name} is built, and cannot be put beside the sources: {error}", flush=True)


def build(record: Record, device: str) -> None:
    """The native libraries that a GPU needs: CUDA C++ for this device alone, and the autograd nodes with the library
    that they stand on. Both at once, in folders of their own. This is no stage: it runs beside them, and nothing waits
    for it.
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
    """Runs the tests that the arguments choose in several processes of pytest, each ``under`` such a command, and
    yields what each process found, as it ends. One that runs longer than ``seconds`` is stopped, and has a row that
    says so."""
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


def sanitizer(record: Record, device: str) -> None:
    """compute-sanitizer: accesses out of bounds, and races within a program. Both tools at once, each with half of the
    processes. A process ends with status 9 where a tool found something."""
    cores = os.cpu_count() or 1
    chosen = ["-m", "gpu", "tests/gpu/test_every_primitive.py", "-k", "same_bits"]
    if device == "cpu" or shutil.which("compute-sanitizer") is None:
        record.add(skipped="compute-sanitizer is not installed, or there is no GPU")
        return

    def checked(tool: str) -> list[dict[str, Any]]:
        under = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        return list(_dealt_out(chosen, max(1, min(7, cores // 2 - 1)), record.left() - 5, under))

    failed = []
    with concurrent.futures.ThreadPoolExecutor(len(SANITIZERS)) as pool:
        for tool, rows in zip(SANITIZERS, pool.map(checked, SANITIZERS)):
            for row in rows:
                record.add(tool=tool, **row)
            failed += [tool] if not all(is_fine(row) for row in rows) else []
    if failed:
        raise RuntimeError(f"{' and '.join(failed)} failed, or did not come to an end")
