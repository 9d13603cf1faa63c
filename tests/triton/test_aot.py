"""Every kernel in gankern/triton compiles for every target and spills no register."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gankern.triton import aot

# Compiled kernels are decorated without the interpreter: a process of their own, see conftest.py.
COMPILER = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def test_every_kernel_on_every_target():
    command = [sys.executable, "-m", "gankern.triton.aot", "--json"]
    result = subprocess.run(command, env=COMPILER, capture_output=True, text=True)
    assert result.stdout, result.stderr
    records = json.loads(result.stdout)
    assert {record["target"] for record in records} == set(aot.TARGETS)
    failures = [f"{r['target']} {r['module']}.{r['kernel']}: {r['error']}" for r in records if r["error"]]
    assert not failures, "\n".join(failures)
    assert result.returncode == 0


def test_every_module_with_kernels_is_checked():
    package = Path(aot.__file__).parent
    with_kernels = {path.stem for path in package.glob("*.py") if "\n@triton.jit" in path.read_text()}
    assert with_kernels
    # That each of its kernels is launched: test_launch.py. Instance norm's launchers have batch norm's kernels.
    assert set(aot.modules()) == with_kernels | {"instance_norm_act", "group_norm_act"}


@pytest.mark.parametrize(
    ("spill", "spills"),
    [({}, False), ({"stack_bytes": 8}, True), ({"local_bytes": 8}, True), ({"spilled_registers": 1}, True)],
)
def test_what_counts_as_a_spill(spill, spills):
    used = {"registers": 255, "stack_bytes": 0, "local_bytes": 0, "spilled_registers": 0, **spill}
    assert aot.Resources(**used).spills is spills


def test_interpreted_kernels_are_refused():
    environment = {**COMPILER, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "gankern.triton.aot"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr


ACCESSES = """
import json, torch
from gankern.triton import aot
found = {}
for module, wanted in (("bias_act", {"ACT": "leaky_relu", "COLUMNS": 0}), ("bias_act", {"ORDER": "backward", "COLUMNS": 4}),
                       ("pixel_norm", {})):
    for dtype in (torch.float32, torch.bfloat16):
        for order in ("forward", "backward"):
            for entry in aot.entries(module):
                constants = entry.launch.constants
                if (entry.dtype == dtype and not entry.variant and constants.get("ORDER") == order
                        and "_prelu" not in entry.label
                        and all(constants.get(name) == value for name, value in wanted.items())):
                    compiled = entry.compile(aot.TARGETS["sm_90"])
                    found[entry.label] = aot.accesses(compiled), aot.resources(compiled).spills
                    break
print(json.dumps(found))
"""


def test_maps_are_moved_in_16_bytes():
    """Of bias_act, of a channel's neighbours and of neighbouring channels, and pixel norm: what is read and written of
    maps in fp32 and bf16."""
    result = subprocess.run([sys.executable, "-c", ACCESSES], env=COMPILER, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 10
    for kernel, (accesses, spills) in found.items():
        maps = 1 if "ORDER=forward" in kernel else 2
        assert accesses.get("ld 16", 0) >= maps and accesses.get("st 16", 0) >= 1, (kernel, accesses)
        assert not spills, kernel
