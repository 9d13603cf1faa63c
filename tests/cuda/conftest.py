"""The CUDA C++ kernels, whose threads are fibers here (csrc/cuda/emulate.h), as operators on CPU tensors."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gankern.core.dispatch import Primitive

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


@pytest.fixture(scope="session")
def emulated_library() -> None:
    """Builds the library and loads it. The build folder is kept, so only a first run takes long."""
    if os.environ.get("GANKERN_PTX") == "1":  # what nvcc compiles, emulated: tests/ptx/emulator.py
        importlib.import_module("emulator").load_cuda()
        return
    if torch.cuda.is_available():
        pytest.skip("the kernels themselves run here: tests/gpu")
    pybind11 = pytest.importorskip("pybind11", reason="the build needs it")
    cmake, ninja = tool("cmake"), tool("ninja")
    if not cmake or not ninja or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("cmake, ninja and a C++ compiler are needed")
    folder = ROOT / "build" / "cuda-emulated"
    folder.mkdir(parents=True, exist_ok=True)
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DGANKERN_CUDA=OFF"]
    configure += [f"-DGANKERN_PYBIND11_DIR={pybind11.get_cmake_dir()}"]
    build = [cmake, "--build", str(folder), "--target", "gankern_cuda_emulated"]
    with (folder / "lock").open("w") as lock:  # processes of one test run
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, build):
            ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert ran.returncode == 0, ran.stdout[-4000:]
    torch.ops.load_library(str(folder / "libgankern_cuda_emulated.so"))


@pytest.fixture
def emulated(emulated_library, monkeypatch):
    """``implementation="cuda"`` takes CPU tensors."""
    for primitive in Primitive.registry.values():
        tiers = [
            dataclasses.replace(tier, devices=("cpu",), missing=None) if tier.name == "cuda" else tier
            for tier in primitive.implementations
        ]
        monkeypatch.setattr(primitive, "implementations", tuple(tiers))
        monkeypatch.setattr(primitive, "_chosen", {})
