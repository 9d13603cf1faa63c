#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, GPU tests, verification, speed, and a record of the machine.
#
#   scripts/gpu.sh                    on a CUDA machine; records go to $OUT (default: runs/gpu)
#   scripts/gpu.sh --dry-run-on-cpu   the same path on a machine without a GPU, with quick settings
#
# It uses the Python it finds (PYTHON=... names another one) with torch, triton, typer, rich, cmake, ninja,
# pybind11, pytest, pytest-benchmark and hypothesis. It installs nothing, needs no network, and writes to the tree
# and to $OUT alone. A stage that fails does not stop the later ones, and one whose time ends leaves what it has: the
# summary at the end names it, and the exit status is then 1. All stages together take at most $LIMIT seconds (570,
# in a dry run, which may have to compile on two cores, 2400), so the records that matter most come first.
set -euo pipefail

dry_run=false
case "${1:-}" in
  "") ;;
  --dry-run-on-cpu) dry_run=true ;;
  *) echo "usage: scripts/gpu.sh [--dry-run-on-cpu]" >&2; exit 2 ;;
esac

LIMIT=${LIMIT:-$($dry_run && echo 2400 || echo 570)}
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
  local name=$1 seconds=$2 start=$SECONDS status=0 left=$((LIMIT - SECONDS))
  shift 2
  names+=("$name")
  if ((left < 10)); then
    states+=("NOT RUN: the $LIMIT seconds of LIMIT are over")
    failed=1
    return
  fi
  if $dry_run; then seconds=$((3 * seconds)); fi  # two cores take longer
  seconds=$((seconds < left ? seconds : left))
  printf '\n==== %s\n' "$name"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$OUT/$name.log" || status=$?
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
    from gankern.measure.benchmark import environment

    record["gankern"] = environment()
except Exception as error:  # the record of the machine is worth having even where gankern does not import
    record["gankern"] = f"unknown: {type(error).__name__}: {error}"
with open(sys.argv[1], "w") as file:
    json.dump(record, file, indent=2)
print(json.dumps(record, indent=2))
PYTHON
}
export -f environment

stage build 400 bash -euo pipefail -c build
stage environment 60 bash -euo pipefail -c 'environment "$1"' environment "$OUT/environment.json"
if $dry_run; then
  device=cpu
  quick=--quick
  gpu_tests=(tests/gpu)
  kernel_tests=(-m "not gpu" tests/triton -k spectral)
else
  device=cuda
  quick=
  # A test module that lacks a package (of a test that needs no GPU) must not keep the others from running.
  gpu_tests=(tests --continue-on-collection-errors)
  # The kernels on their own: the tests that run in the interpreter elsewhere run on the GPU here.
  kernel_tests=(tests/triton)
fi
stage gpu_tests 240 "$python" -m pytest -m gpu "${gpu_tests[@]}"
stage bench 150 "$python" -m gankern.cli bench --quick --device $device --json "$OUT/bench.json"
stage bench_models 120 "$python" -m gankern.cli bench --model dcgan --model sngan --model wgan_gp --quick \
  --device $device --json "$OUT/bench_models.json"
stage bench_bfloat16 120 "$python" -m gankern.cli bench --quick --no-compiled --device $device --dtype bfloat16 \
  --json "$OUT/bench_bfloat16.json"
stage verify 120 "$python" -m gankern.cli verify $quick --device $device --json "$OUT/verify.json"
stage kernel_tests 150 "$python" -m pytest "${kernel_tests[@]}"
# Reads and writes out of bounds, and races within a program: the sanitizer is slow, a few shapes are enough.
if ! $dry_run && command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    stage "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -m gpu \
      tests/gpu/test_every_primitive.py -k same_bits -x
  done
fi

printf '\n==== summary, records in %s\n' "$OUT"
for i in "${!names[@]}"; do printf '%-16s %s\n' "${names[$i]}" "${states[$i]}"; done
exit $failed
