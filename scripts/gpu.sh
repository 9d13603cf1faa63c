#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, GPU tests, verification, speed, and a record of the machine.
#
#   scripts/gpu.sh                    on a CUDA machine; records go to $OUT (default: runs/gpu)
#   scripts/gpu.sh --dry-run-on-cpu   the same path on a machine without a GPU, with quick settings
#
# It uses the Python it finds (PYTHON=... names another one) with torch, triton, typer, rich, cmake, ninja,
# pybind11, pytest, pytest-benchmark and hypothesis. It installs nothing, needs no network, and writes to the tree
# and to $OUT alone. A stage that fails does not stop the later ones: the summary at the end names it, and the
# exit status is then 1.
set -euo pipefail

dry_run=false
case "${1:-}" in
  "") ;;
  --dry-run-on-cpu) dry_run=true ;;
  *) echo "usage: scripts/gpu.sh [--dry-run-on-cpu]" >&2; exit 2 ;;
esac

OUT=$(realpath -m "${OUT:-$(dirname "$0")/../runs/gpu}")
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
mkdir -p "$OUT" build
# A build tool that was installed into Python's own environment comes first.
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH
export PATH PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 COLUMNS=160
# Compilers' caches would go to the home folder.
export TRITON_CACHE_DIR="$root/build/triton" TORCHINDUCTOR_CACHE_DIR="$root/build/inductor"

if ! $dry_run && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "scripts/gpu.sh: the torch of $python finds no GPU; --dry-run-on-cpu goes through the motions" >&2
  exit 2
fi

names=() states=() failed=0

# stage NAME SECONDS COMMAND...: runs the command, at most so long, with its output also in $OUT/NAME.log.
stage() {
  local name=$1 seconds=$2 start=$SECONDS status=0
  shift 2
  printf '\n==== %s\n' "$name"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$OUT/$name.log" || status=$?
  names+=("$name")
  case $status in
    0) states+=("passed in $((SECONDS - start)) s") ;;
    124 | 137) states+=("FAILED: stopped after $seconds s"); failed=1 ;;
    *) states+=("FAILED with status $status after $((SECONDS - start)) s, see $OUT/$name.log"); failed=1 ;;
  esac
}

build() {
  cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" \
    -DGANKERN_PYBIND11_DIR="$("$python" -m pybind11 --cmakedir)"
  cmake --build build/gpu
  cmake --install build/gpu --prefix "$root"
}
export -f build
export python root

environment() {
  "$python" - "$1" <<'PYTHON'
"""Versions and hardware. Whatever cannot be asked is recorded as the reason why."""
import importlib.metadata
import json
import platform
import subprocess
import sys

import torch


def ask(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


gpus = []
for index in range(torch.cuda.device_count()):
    facts = torch.cuda.get_device_properties(index)
    gpus.append({
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "l2_bytes": getattr(facts, "L2_cache_size", None),
    })
query = "name,driver_version,clocks.max.sm,clocks.max.memory,power.limit,ecc.mode.current"
record = {
    "gpus": gpus,
    "nvidia_smi": ask("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") if gpus else None,
    "nvcc": ask("nvcc", "--version").splitlines()[-1],
    "cuda": torch.version.cuda,
    "hip": torch.version.hip,
    "packages": {name: version(name) for name in ("torch", "triton", "numpy", "pytest", "cmake", "ninja", "pybind11")},
    "python": platform.python_version(),
    "platform": platform.platform(),
}
try:
    from gankern.benchmark import environment

    record["gankern"] = environment()
except Exception as error:  # the record of the machine is worth having even where gankern does not import
    record["gankern"] = f"unknown: {type(error).__name__}: {error}"
with open(sys.argv[1], "w") as file:
    json.dump(record, file, indent=2)
print(json.dumps(record, indent=2))
PYTHON
}
export -f environment

stage build 300 bash -euo pipefail -c build
stage environment 60 bash -euo pipefail -c 'environment "$1"' environment "$OUT/environment.json"
if $dry_run; then
  stage gpu_tests 120 "$python" -m pytest -m gpu tests/gpu
  stage kernel_tests 300 "$python" -m pytest -m "not gpu" tests/triton -k spectral
  stage verify 300 "$python" -m gankern.cli verify --quick --device cpu --json "$OUT/verify.json"
  stage bench 300 "$python" -m gankern.cli bench --quick --device cpu --json "$OUT/bench.json"
else
  # A test module that lacks a package (of a test that needs no GPU) must not keep the others from running.
  stage gpu_tests 240 "$python" -m pytest -m gpu tests --continue-on-collection-errors
  # The kernels on their own: the tests that run in the interpreter elsewhere run on the GPU here.
  stage kernel_tests 240 "$python" -m pytest tests/triton
  # Reads and writes out of bounds, and races within a program: the sanitizer is slow, a few shapes are enough.
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      stage "$tool" 180 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -m gpu \
        tests/gpu/test_every_primitive.py -k "same_bits" -x
    done
  fi
  stage verify 180 "$python" -m gankern.cli verify --device cuda --json "$OUT/verify.json"
  stage bench 240 "$python" -m gankern.cli bench --device cuda --json "$OUT/bench.json"
  stage bench_bfloat16 240 "$python" -m gankern.cli bench --device cuda --dtype bfloat16 \
    --json "$OUT/bench_bfloat16.json"
fi

printf '\n==== summary, records in %s\n' "$OUT"
for i in "${!names[@]}"; do printf '%-16s %s\n' "${names[$i]}" "${states[$i]}"; done
exit $failed
