"""One H200 on a machine without a GPU, for a torch that is built for CUDA: `device.cpp` stands for CUDA's runtime and driver.

    python -m tests.standin.device scripts/gpu.py --stage host     any program of Python, with its arguments

What runs on the host is real: torch's dispatcher, allocator, streams and graphs, torch.compile, Triton's compiler and
launcher, gankern's plans. What runs on the device does not run: kernels, cuBLAS and cuDNN are counted, their results hold
whatever was in memory before, zeros for the most part, and nothing takes time there. So this shows what a step costs the
host, without the driver's share, and whether calls and captures go through; of values it shows nothing, and a program
that decides by them decides anything. (scripts/gpu.py writes a file for a device called a stand-in: remove it.)

It needs the CUDA build of torch, which is the one that pip takes on Linux, with Triton, a C++ compiler, and the native
part of gankern built for them, of which CUDA C++ may be left out:

    python3.12 -m venv cuda
    cuda/bin/pip install torch==2.11.0 triton==3.6.0 numpy rich typer filelock setuptools cmake ninja pybind11
    GANKERN_BUILD_CUDA=0 PATH=$PWD/cuda/bin:$PATH cuda/bin/python setup.py build_ext --inplace
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARY = "libcuda.so.1"  # under the driver's name, by which it is asked for
FLAGS = ["-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-Wl,-soname,{LIBRARY}"]
HEADERS = ("nvidia/cu13/include", "nvidia/cudnn/include", "triton/backends/nvidia/include")  # of what torch requires


def build() -> Path:
    """The folder of the library, which is kept for a source that stays the same."""
    packages = Path(importlib.util.find_spec("torch").origin).parents[1]
    missing = [name for name in HEADERS if not (packages / name).is_dir()]
    compiler = next(filter(shutil.which, (*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")), None)
    if missing or compiler is None:
        sys.exit(f"{packages} has no {missing[0]}: a torch for CUDA 13, with Triton, is needed" if missing else
                 "no C++ compiler was found: install one, or set CXX")  # fmt: skip
    folder = ROOT / "build" / f"standin-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    if not (folder / LIBRARY).exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{os.getpid()}.part"
        headers = [f"-isystem{packages / name}" for name in HEADERS]
        subprocess.run([compiler, *FLAGS, *headers, SOURCE, "-o", part, "-ldl"], check=True)
        part.replace(folder / LIBRARY)
    return folder


def environment() -> dict[str, str]:
    """This process's, with the device: for a process that has not begun."""
    folder = build()
    others = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / LIBRARY),
        "TRITON_LIBCUDA_PATH": str(folder),  # where Triton finds what its own C is linked to
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(ROOT / "build" / "standin-triton")),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *others]),
    }


def is_there() -> bool:
    """Whether this process has the device."""
    return hasattr(ctypes.CDLL(None), "standin_counts")


def start(*arguments: str) -> None:
    """Python with these arguments and the device, in this process's place."""
    os.execve(sys.executable, [sys.executable, *arguments], environment())


def launches() -> int:
    """How many kernels there were in this process, those of cuBLAS and cuDNN among them; one for each of their calls."""
    counts = (ctypes.c_uint64 * 4)()
    ctypes.CDLL(None).standin_counts(counts)
    return counts[0] + counts[1]


@contextlib.contextmanager
def nothing_moves() -> Iterator[None]:
    """Within the block memory is not copied or set either: what a device does meanwhile takes the host no time."""
    library = ctypes.CDLL(None)
    library.standin_moves(0)
    try:
        yield
    finally:
        library.standin_moves(1)


def kernels() -> dict[str, int]:
    """How often each was launched in this process."""
    library = ctypes.CDLL(None)
    library.standin_kernels.restype = ctypes.c_size_t
    size = library.standin_kernels(None, ctypes.c_size_t(0))
    text = ctypes.create_string_buffer(size + 4096)
    library.standin_kernels(text, ctypes.c_size_t(len(text)))
    return {name: int(count) for count, name in (line.split(" ", 1) for line in text.value.decode().splitlines())}


if __name__ == "__main__":
    start(*sys.argv[1:])
