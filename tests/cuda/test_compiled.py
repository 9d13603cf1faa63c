"""Every CUDA C++ kernel compiles for the devices of the build, and keeps its registers. Needs nvcc, and no GPU."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if "__global__" in path.read_text()]
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
ARCHITECTURES = re.search(r"CMAKE_CUDA_ARCHITECTURES ([\d\w -]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()


def usage(source: Path) -> dict[str, dict[str, int]]:
    """Of each kernel and architecture its registers and the bytes that it spills; kept for sources that are the same."""
    headers = sorted((ROOT / "csrc" / "cuda").glob("*.h"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (source, *headers, Path(__file__)))).hexdigest()
    kept = ROOT / "build" / "cuda-compiled" / f"{source.stem}-{digest[:16]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    numbers = [a.partition("-")[0] for a in ARCHITECTURES]
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        "-Xptxas",
        "-v",
        "--threads",
        "2",
        *targets,
        "-c",
        str(source),
        "-o",
        os.devnull,
    ]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:]
    pattern = (
        r"entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) reg"
    )
    found = {
        f"{name} for {target}": {"stack": int(stack), "spilled": int(spilled), "registers": int(registers)}
        for name, target, stack, spilled, registers in re.findall(pattern, ran.stdout, re.S)
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


@pytest.mark.skipif(NVCC is None, reason="nvcc is not here")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_and_spill_nothing(source):
    found = usage(source)
    for architecture in ARCHITECTURES:
        own = {k: v for k, v in found.items() if k.endswith(f"sm_{architecture.partition('-')[0]}")}
        assert len(own) >= 8, f"{len(own)} kernels for {architecture}"  # of two kinds, each for four dtypes
    assert {k: v for k, v in found.items() if v["stack"] or v["spilled"] or v["registers"] > 128} == {}
