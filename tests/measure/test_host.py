"""What a call costs the host: which operators it calls, what it allocates, how many instructions it takes."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.autograd.profiler import profile

from gankern.core import native
from gankern.measure import host

ROOT = Path(__file__).resolve().parents[2]
CASES = [pytest.param(case, id=f"{case.primitive}: {case.name}") for case in host.cases()]
SINGLE = [  # the others are of several operators, and modules copy their vectors beside it
    p
    for p in CASES
    if p.values[0].primitive not in ("convolution", "self_attention2d") and "modules" not in p.values[0].name
]
needs_nodes = pytest.mark.skipif(native.NODES_MISSING is not None, reason=str(native.NODES_MISSING))

# The operators of a forward, and those that forward and backward have beyond them, where they are not NAME and
# NAME_backward: by primitive, or by case. Nothing else may be called: no constants are made, nothing is copied or
# converted.
OPERATORS = {
    "bias_act: leaky_relu alone": (["aten::leaky_relu"], ["aten::leaky_relu_backward"]),
    "upfirdn2d": (["gankern::upfirdn2d"], ["gankern::upfirdn2d"]),
    "spectral_norm: 11 layers, layer by layer": (
        11 * ["gankern::spectral_norm"],
        11 * ["gankern::spectral_norm_backward"],
    ),
}


# Of results; the engine's own; a look at the sign bit of lists of gradients.
ALWAYS = ("aten::empty", "torch::autograd::GraphRoot", "aten::resolve_neg")


def called(function) -> Counter:
    """The operators that it calls."""
    for _ in range(2):
        function()
    with profile(use_cpu=True, use_kineto=False) as profiler:
        function()
    names = [event.name for event in profiler.function_events]
    return Counter(n for n in names if "::" in n and not n.startswith("autograd::") and n not in ALWAYS)


@needs_nodes
@pytest.mark.parametrize("case", SINGLE)
def test_a_call_is_one_operator_and_its_backward_another(case):
    own = [f"gankern::{case.primitive}"], [f"gankern::{case.primitive}_backward"]
    forward, more = OPERATORS.get(f"{case.primitive}: {case.name}") or OPERATORS.get(case.primitive, own)
    inputs = case.make(torch.float32, "cpu")
    run = lambda given: case.run(None, given)  # noqa: E731
    assert called(host.call_of(run, inputs, "forward")) == Counter(forward)
    both = called(host.call_of(run, inputs, "forward + backward"))
    assert both == Counter(forward) + Counter(more)


@needs_nodes
def test_attention_is_one_operator_between_torchs_convolutions():
    """Two convolutions and one pooling before it, one convolution behind it: what they call is torch's."""
    (case,) = host.cases(["self_attention2d"])
    inputs = case.make(torch.float32, "cpu")
    run = lambda given: case.run(None, given)  # noqa: E731
    ours = lambda mode: {n: k for n, k in called(host.call_of(run, inputs, mode)).items() if n.startswith("gankern::")}  # noqa: E731
    assert ours("forward") == {"gankern::self_attention2d": 1}
    assert ours("forward + backward") == {"gankern::self_attention2d": 1, "gankern::self_attention2d_backward": 1}
    forward = called(host.call_of(run, inputs, "forward"))
    assert forward["aten::conv2d"] == 3 and forward["aten::max_pool2d"] == 1 and forward["aten::cat"] == 1


def test_costs_are_measured_of_every_primitive():
    from gankern.core.dispatch import Primitive

    assert {case.primitive for case in host.cases()} == Primitive.registry.keys()
    case = next(c for c in host.cases(["bias_act"]) if "alone" not in c.name)
    for mode in host.MODES:
        cost = host.measure(case, mode, "cpu", rounds=1, samples=1)
        assert cost.mode == mode and cost.microseconds.keys() == {"gankern", "eager", "in place"}
        assert cost.share == cost.microseconds["gankern"] / min(
            cost.microseconds["eager"], cost.microseconds["in place"]
        )
        assert cost.implementation == ("cpu" if native.NATIVE_MISSING is None else "reference")


def test_a_peer_that_cannot_is_left_out():
    (case,) = host.cases(["minibatch_discrimination"])
    costs = {mode: host.measure(case, mode, "cpu", rounds=1, samples=1) for mode in ("forward", "double backward")}
    assert "cdist" in costs["forward"].microseconds
    assert costs["double backward"].microseconds.keys() == {"gankern", "broadcast"}


# ---- instructions -------------------------------------------------------------------------------------------------

# Of 1,000 calls, in thousands, made by `python tests/measure/test_host.py`.
PINNED = ROOT / "tests/measure/host_instructions.json"

COUNTED = """
import os, subprocess, torch
from gankern.measure import host
torch.set_num_threads(1)
host.cases()
# From here on; instrumented, the imports alone would take minutes.
subprocess.run(["callgrind_control", "-i", "on", str(os.getpid())], check=True, capture_output=True)
for case in host.cases():
    if ("layer by layer" in case.name and not case.name.startswith("one layer")) or "modules" in case.name:
        continue
    inputs = case.make(torch.float32, "cpu")
    for mode in ("forward", "forward + backward"):
        call = host.call_of(lambda given: case.run(None, given), inputs, mode)
        for _ in range(3):
            call()
        torch._C._valgrind_toggle()
        for _ in range(CALLS):
            call()
        torch._C._valgrind_toggle_and_dump_stats()
        print(f"{case.primitive}: {case.name}, {mode}", flush=True)
"""


def instructions(folder: Path, calls: int = 50) -> dict[str, float]:
    """Thousands of instructions that 1,000 calls take, by case and mode, as callgrind counts them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
                   "ATEN_CPU_CAPABILITY": "default"}  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no", f"--callgrind-out-file={folder / 'out'}",
         sys.executable, "-c", COUNTED.replace("CALLS", str(calls))],
        capture_output=True, text=True, env=environment, timeout=900,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    names = process.stdout.splitlines()
    counts = {}
    for i, name in enumerate(names):
        text = (folder / f"out.{i + 1}").read_text()
        totals = next(line for line in text.splitlines() if line.startswith(("summary:", "totals:")))
        counts[name] = round(int(totals.split()[1]) / calls, 1)
    return counts


def environment() -> dict[str, str]:
    """What the counts depend on."""
    return {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}


@needs_nodes
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.skipif(not torch._C._valgrind_supported_platform(), reason="this torch was built without valgrind's calls")
def test_instructions_of_a_call(tmp_path):
    pinned = json.loads(PINNED.read_text())
    if pinned["environment"] != environment():
        pytest.skip(f"the counts are those of {pinned['environment']}")
    counts = instructions(tmp_path)
    assert counts.keys() >= pinned["instructions"].keys()
    grown = {
        name: (before, counts[name]) for name, before in pinned["instructions"].items() if counts[name] > 1.1 * before
    }
    assert not grown, f"more instructions than before: {grown}"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        counts = instructions(Path(folder))
    PINNED.write_text(json.dumps({"environment": environment(), "instructions": counts}, indent=1) + "\n")
