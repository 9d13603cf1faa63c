"""What a call costs the host: which operators it calls, what it allocates, how many instructions it takes."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
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

SINGLE = [p for p in CASES if p.values[0].primitive != "self_attention2d"]  # the others are of one operator an order

# By primitive, or by case: the operators of a forward, those that forward and backward have beyond them, and those that
# a double backward has beyond these. Nothing else may be called: no constants are made, nothing is copied or converted.
ZEROS, ADDED = "aten::zeros_like", "aten::add_"  # of leaves that a kink hides; where two gradients of a leaf meet


def _three(name: str, zeros: int = 0, added: int = 0) -> tuple[list[str], ...]:
    """One operator an order."""
    return [name], [f"{name}_backward"], [f"{name}_double_backward", *zeros * [ZEROS], *added * [ADDED]]


def _rows(*more: str) -> tuple[list[str], ...]:
    row, weight = "gankern::convolution_row", "gankern::convolution_row_weight_gradient"
    return [row], [row, weight], [row, row, row, weight, ADDED, *more]


UPFIRDN = tuple(["gankern::upfirdn2d"] for _ in range(3))
LAYERS = tuple(11 * names for names in _three("gankern::spectral_norm"))
OPERATORS = {
    "bias_act": _three("gankern::bias_act", zeros=2),
    "bias_act: leaky_relu alone": (
        ["aten::leaky_relu"],
        ["aten::leaky_relu_backward"],
        ["aten::leaky_relu_backward", ZEROS],
    ),
    "pixel_norm": (
        ["gankern::pixel_norm"],
        ["gankern::pixel_norm_backward"],
        # Its second gradient is that of the result and the scale, and goes through the first order's node.
        ["gankern::pixel_norm_double_backward", "gankern::pixel_norm_backward"],
    ),
    "batch_norm_act": _three("gankern::batch_norm_act", zeros=3, added=2),
    "group_norm_act": _three("gankern::group_norm_act", zeros=3, added=2),
    "instance_norm_act": _three("gankern::instance_norm_act", zeros=1, added=1),
    "minibatch_stddev": _three("gankern::minibatch_stddev"),
    "minibatch_discrimination": _three("gankern::minibatch_discrimination"),
    "virtual_batch_norm": _three("gankern::virtual_batch_norm", zeros=5, added=4),
    "gradient_penalty": _three("gankern::gradient_penalty"),
    "upfirdn2d": UPFIRDN,
    "spectral_norm": _three("gankern::spectral_norm"),
    "spectral_norm: 11 layers, layer by layer": LAYERS,
    "spectral_norm: 11 modules, layer by layer": LAYERS,
    "spectral_norm: 11 modules, grouped": LAYERS,  # each where it is used, on the CPU
    "convolution: upsample": _rows(),
    "convolution: downsample": _rows("aten::view_as", ZEROS, ZEROS, ADDED, ADDED),
    # Torch's own: what torch's function calls, without the turn of the dispatcher through conv2d itself.
    "convolution: 3x3": None,
    "convolution: 4x4": None,
    "convolution: transposed": None,
}

# The allocations of a forward, of forward and backward, and with a double backward, in which the test's own tensors of
# ones are: results, and what is kept.
ALLOCATIONS = {
    "bias_act": (1, 3, 8),
    "bias_act: leaky_relu alone": (1, 2, 5),
    "pixel_norm": (2, 4, 11),
    "batch_norm_act": (2, 5, 14),
    "group_norm_act": (2, 7, 17),
    "instance_norm_act": (2, 3, 7),
    "minibatch_stddev": (1, 2, 5),
    "minibatch_discrimination": (1, 2, 5),
    "virtual_batch_norm": (2, 7, 22),
    "gradient_penalty": (2, 3, 6),
    "upfirdn2d": (1, 2, 4),
    "spectral_norm": (2, 3, 6),
    "spectral_norm: 11 layers, grouped": (12, 23, 56),
    "spectral_norm: 11 layers, layer by layer": (22, 33, 66),
    "spectral_norm: 11 modules, grouped": (22, 33, 66),
    "spectral_norm: 11 modules, layer by layer": (22, 33, 66),
    "convolution: upsample": (1, 3, 9),
    "convolution: downsample": (1, 3, 11),
    "convolution: 3x3": None,
    "convolution: 4x4": None,
    "convolution: transposed": None,
}

# Of results; the engine's own; a look at the sign bit of lists of gradients; the test's own.
ALWAYS = ("aten::empty", "torch::autograd::GraphRoot", "aten::resolve_neg", "aten::ones_like")


def of_case(table, case):
    """What stands there under the longest beginning of the case's name."""
    name = f"{case.primitive}: {case.name}"
    return table[max((key for key in table if name.startswith(key)), key=len)]


def called(function, past: tuple[str, ...] = ()) -> Counter:
    """The operators that it calls, not what torch's own call within; in place of those of ``past``, what these call."""
    for _ in range(2):
        function()
    with profile(use_cpu=True, use_kineto=False) as profiler:
        function()
    events = [e for e in profiler.function_events if "::" in e.name and not e.name.startswith("autograd::")]
    inside = lambda e: e is not None and e.name not in past and e.name.startswith(("aten::", "gankern::"))  # noqa: E731
    return Counter(e.name for e in events if not inside(e.cpu_parent) and e.name not in (*ALWAYS, *past))


def allocations(function) -> int:
    """How often it asks the allocator."""
    for _ in range(2):
        function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


def runs(case):
    """Its calls by mode: gankern's, and torch's."""
    inputs = case.make(torch.float32, "cpu")
    peer = next(iter(case.peers.values()))
    ours = [host.call_of(partial(case.run, None), inputs, mode) for mode in host.MODES[1:]]
    return ours, [host.call_of(peer, inputs, mode) for mode in host.MODES[1:]]


@needs_nodes
@pytest.mark.parametrize("case", SINGLE)
def test_an_order_is_one_operator(case):
    ours, theirs = runs(case)
    orders = of_case(OPERATORS, case)
    expected = Counter()
    for i, (call, peer) in enumerate(zip(ours, theirs, strict=True)):
        expected = called(peer, past=("aten::conv2d",)) if orders is None else expected + Counter(orders[i])
        assert called(call) == expected, host.MODES[i + 1]


@needs_nodes
@pytest.mark.parametrize("case", SINGLE)
def test_nothing_is_allocated_but_results(case):
    ours, theirs = runs(case)
    counts = of_case(ALLOCATIONS, case)
    assert [allocations(call) for call in ours] == (
        [allocations(call) for call in theirs] if counts is None else list(counts)
    )


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
import functools, gc, os, subprocess, torch
from gankern.measure import host
torch.set_num_threads(1)
gc.disable()  # a collection costs as much as hundreds of calls, whoever's turn it is
host.cases()
# From here on; instrumented, the imports alone would take minutes.
subprocess.run(["callgrind_control", "-i", "on", str(os.getpid())], check=True, capture_output=True)
for case in host.cases():
    if ("layer by layer" in case.name and not case.name.startswith("one layer")) or "module" in case.name:
        continue
    if case.name.endswith("as a layer"):
        continue
    inputs = case.make(torch.float32, "cpu")
    for mode in ("forward", "forward + backward"):
        call = host.call_of(functools.partial(case.run, None), inputs, mode)
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
    assert counts.keys() == pinned["instructions"].keys()
    grown = {
        name: (before, counts[name]) for name, before in pinned["instructions"].items() if counts[name] > 1.1 * before
    }
    assert not grown, f"more instructions than before: {grown}"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        counts = instructions(Path(folder))
    PINNED.write_text(json.dumps({"environment": environment(), "instructions": counts}, indent=1) + "\n")
