"""Every CUDA C++ kernel compiles for the devices of the build, and keeps its registers. Needs nvcc, and no GPU."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

aot = pytest.importorskip("gankern.triton.aot", reason="NVIDIA's disassembler comes with Triton")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if "__global__" in path.read_text()]
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
ARCHITECTURES = re.search(r"CMAKE_CUDA_ARCHITECTURES ([\d\w -]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()


def usage(source: Path) -> dict[str, dict]:
    """Of each kernel and architecture its registers and the bytes that it spills, and for sm_90 what its machine code
    holds (gankern.triton.aot.Instructions); kept for sources that are the same."""
    headers = sorted((ROOT / "csrc" / "cuda").glob("*.h"))
    counter = Path(aot.__file__)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (source, *headers, Path(__file__), counter)))
    kept = ROOT / "build" / "cuda-compiled" / f"{source.stem}-{digest.hexdigest()[:16]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    numbers = [a.partition("-")[0] for a in ARCHITECTURES]
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "all.fatbin"
        command = [
            NVCC,
            "-std=c++17",
            "-O3",
            "-Xptxas",
            "-v",
            "--threads",
            "2",
            *targets,
            "-fatbin",
            source,
            "-o",
            binary,
        ]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert ran.returncode == 0, ran.stdout[-4000:]
        cuobjdump = aot.nvdisasm().with_name("cuobjdump")
        subprocess.run([cuobjdump, "-xelf", "all", binary], cwd=folder, check=True, capture_output=True)
        (cubin,) = Path(folder).glob("*sm_90*.cubin")
        listing = subprocess.run([aot.nvdisasm(), "-c", cubin], check=True, capture_output=True, text=True).stdout
    pattern = (
        r"entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) reg"
    )
    found: dict[str, dict] = {
        f"{name} for {target}": {"stack": int(stack), "spilled": int(spilled), "registers": int(registers)}
        for name, target, stack, spilled, registers in re.findall(pattern, ran.stdout, re.S)
    }
    _, *parts = re.split(r"^//-+ \.text\.(\S+) -+$", listing, flags=re.M)
    for name, own in zip(parts[::2], parts[1::2]):
        found[f"{name} for sm_90"] |= dataclasses.asdict(aot.instructions(own))
    found = json.loads(json.dumps(found))  # as it is read again: sizes are texts
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
    # Launch bounds say how many: those of upfirdn2d, and of batch norm's second order, leave room for more.
    most = {"upfirdn2d": 255, "batch_norm_act": 255}.get(source.stem, 128)
    assert {k: v for k, v in found.items() if v["stack"] or v["spilled"] or v["registers"] > most} == {}


# By the names of kernels: how many 16-byte loads and stores there are at least in the code for sm_90, and how many loads
# in a row of which nothing is asked.
WIDE = {
    "batch_norm_act": {"held_kernel": (4, 1, 2)},
    "upfirdn2d": {"tiled_kernel": (20, 5, 5)},  # within the image, all rows that a thread meets
    "spectral_norm": {"forward_kernel": (20, 1, 1), "gradient_kernel": (3, 1, 1)},
    "minibatch_discrimination": {},  # a point's values lie kernels times dimensions apart
}


@pytest.mark.skipif(NVCC is None, reason="nvcc is not here")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_move_16_bytes_at_once(source):
    """In every dtype; and nothing lies in local memory."""
    found = {name: own for name, own in usage(source).items() if name.endswith("for sm_90")}
    assert all("loads" in own and not own["local"] for own in found.values())
    for kernel, (loads, stores, together) in WIDE[source.stem].items():
        own = {name: facts for name, facts in found.items() if kernel in name}
        assert len(own) >= 4
        narrow = {n for n, f in own.items() if f["loads"].get("16", 0) < loads or f["stores"].get("16", 0) < stores}
        assert narrow == set()
        assert min(facts["together"] for facts in own.values()) >= together
