"""The native build: what it says of itself, which instruction set it takes, and life without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gankern.functional as GF
from gankern.core import native

ROOT = Path(__file__).resolve().parents[2]
ISAS = ["baseline", "avx2", "avx512"]  # worst first

needs_native = pytest.mark.skipif(native.NATIVE_MISSING is not None, reason=str(native.NATIVE_MISSING))


def python(code: str, folder: Path, **environment: str | None) -> subprocess.CompletedProcess:
    """Runs code in a fresh process; None takes a variable out of its environment."""
    changed = {**os.environ, "TRITON_INTERPRET": None, "GANKERN_IMPLEMENTATION": None, **environment}
    clean = {key: value for key, value in changed.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=clean, capture_output=True, text=True)


@needs_native
def test_build_facts():
    from gankern import _C

    built = _C.instruction_sets.split()
    assert built == ISAS[: len(built)]
    assert _C.instruction_set() in built
    assert _C.compiler.split()[0] in ("GNU", "Clang", "AppleClang", "IntelLLVM")
    assert _C.build_type in ("Release", "RelWithDebInfo", "Debug", "MinSizeRel")
    assert tuple(map(int, _C.torch_version.split("+")[0].split(".")[:2])) >= (2, 11)


def results(weights, u, v):
    """Forward, and gradients of first and second order, of the CPU kernels."""
    normalized = [GF.spectral_norm(w, u.clone(), v.clone(), implementation="cpu") for w in weights]
    grads = torch.autograd.grad(sum(x.pow(2).sum() for x in normalized), weights, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(3).sum() for g in grads), weights)
    return [x.detach() for x in (*normalized, *grads, *second)]


@needs_native
@pytest.mark.parametrize(("capability", "isa"), [("default", "baseline"), ("avx2", "avx2")])
def test_capability_is_honoured(capability, isa, tmp_path):
    from gankern import _C

    # Through a file: torch's random numbers may depend on the instruction set as well.
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(33, 70, generator=generator).to(t) + 0.5 for t in (torch.float64, torch.float32, torch.bfloat16)
    ]
    u, v = torch.randn(33, generator=generator), torch.randn(70, generator=generator)
    torch.save((weights, u, v), tmp_path / "inputs.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_build import results
from gankern import _C
weights, u, v = torch.load("inputs.pt")
torch.save((_C.instruction_set(), results([w.requires_grad_() for w in weights], u, v)), "results.pt")
"""
    process = python(code, tmp_path, ATEN_CPU_CAPABILITY=capability)
    assert process.returncode == 0, process.stderr
    used, theirs = torch.load(tmp_path / "results.pt")
    assert used == min(isa, _C.instruction_set(), key=ISAS.index)
    ours = results([w.requires_grad_() for w in weights], u, v)
    for x, y in zip(ours, theirs):
        # Another width of vectors adds up in another order: the sums of 2310 terms differ by rounding.
        unit = torch.finfo(x.dtype).eps
        assert (x - y).abs().max() <= 32 * unit * x.abs().max()


def test_works_without_the_native_library(tmp_path):
    """What GANKERN_BUILD_NATIVE=0 installs: the package without its libraries."""
    shutil.copytree(ROOT / "gankern", tmp_path / "gankern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = """
import torch, gankern, gankern.functional as GF
print(gankern.__file__)
w, u, v = torch.randn(4, 6, requires_grad=True), torch.randn(4), torch.randn(6)
GF.spectral_norm(w, u, v).sum().backward()
print(gankern.last_implementation("spectral_norm"), w.grad.shape == w.shape)
GF.spectral_norm(w, u, v, implementation="cpu")
"""
    process = python(code, tmp_path, PYTHONPATH=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    file, ran = process.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert ran == "reference True"
    assert process.returncode != 0
    message = process.stderr[process.stderr.index("ValueError: ") :]
    assert "implementation 'cpu' cannot take these inputs" in message
    assert "cpu: the native library was not built" in message
    assert "reference: can" in message


@pytest.mark.parametrize("named", [None, "no-such-compiler"])
def test_missing_compiler_is_one_sentence(named, tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path)}
    environment.pop("CXX", None)
    if named:
        environment["CXX"] = named
    command = [sys.executable, "setup.py", "build_ext"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 1
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("gankern: ")]
    assert line == process.stderr.splitlines()[-1]
    for advice in ("no C++ compiler was found", "apt install g++", "CXX", "GANKERN_BUILD_NATIVE=0"):
        assert advice in line
