"""Every kernel in gankern/triton compiles for every target and spills no register."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from gankern.triton import aot

# Compiled kernels are decorated without the interpreter: a process of their own, see conftest.py.
COMPILER = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


# Of kernels that memory bounds: module, kernel, what its label holds, and how many maps it reads and writes.
PER_CHANNEL = [
    (name, kernel, parts, reads, writes)
    for name in ("batch_norm_act", "instance_norm_act", "group_norm_act")
    for layout in ("LAST=False", "LAST=True")
    for kernel, parts, reads, writes in (
        ("_moments_kernel", (layout,), 1, 0),
        ("_apply_kernel", (layout, "ORDER=forward"), 1, 1),
        ("_reduce_kernel", (layout, "ORDER=backward"), 2, 0),
        ("_apply_kernel", (layout, "ORDER=backward"), 2, 1),
        ("_reduce_kernel", (layout, "ORDER=double_backward"), 3, 0),
        ("_apply_kernel", (layout, "ORDER=double_backward"), 3, 2),
    )
]
MAPS = [
    *PER_CHANNEL,
    # Neighbours are of one channel (COLUMNS=0), or are channels.
    *(("bias_act", "_bias_act_kernel", (f"ORDER={order}", "COLUMNS=0"), reads, writes)
      for order, reads, writes in (("forward", 1, 1), ("backward", 2, 1), ("double_backward", 3, 2))),
    *(("bias_act", "_bias_act_kernel", (f"ORDER={order}", "COLUMNS=4"), reads, writes)
      for order, reads, writes in (("backward", 2, 1), ("double_backward", 3, 2))),
    *(("bias_act", "_prelu_kernel", (f"ORDER={order}",), reads, writes)
      for order, reads, writes in (("forward", 1, 1), ("backward", 2, 2), ("double_backward", 3, 3))),
    *(("pixel_norm", "_pixel_norm_kernel", (f"ORDER={order}", lines), reads, writes)
      for order, reads, writes in (("forward", 1, 1), ("backward", 2, 1), ("double_backward", 3, 2))
      for lines in ("LINES=True", "LINES=False")),
    # In channels_last a pixel of the result has a channel more: it begins anywhere. Of groups of up to four samples a
    # lane asks for the values of all of them at once.
    *(("minibatch_stddev", kernel, (f"ORDER={order}", f"C={6 * last},", group), reads * samples, writes * samples)
      for kernel, group, samples in (("_positions_kernel", "", 1), ("_held_kernel", "GROUP=4", 4))
      for order, last, reads, writes in (("forward", False, 1, 1), ("backward", False, 2, 1), ("double_backward", False, 2, 2),
                                         ("forward", True, 1, 0), ("backward", True, 1, 1), ("double_backward", True, 2, 1))),
    # Of images whose size is a multiple of 16 bytes: others begin anywhere.
    ("gradient_penalty", "_dots_kernel", ("PARTS=64",), 1, 0),
    ("gradient_penalty", "_combine_kernel", ("PARTS=64", "SECOND=True"), 2, 1),
    *(("virtual_batch_norm", "_normalize_kernel", (f"ORDER={order}", "IN_TURN=False", *channels), reads, writes)
      for order, reads, writes in (("forward", 1, 1), ("backward", 2, 1), ("double_backward", 3, 2))
      for channels in (("CHANNELS=1,",), ("CHANNELS=8,", "[float32"), ("CHANNELS=16,", "[bfloat16"))),
    *(("virtual_batch_norm", kernel, channels, 1, writes)
      for kernel, writes, channels in (("_sums_kernel", 0, ("CHANNELS=1,",)), ("_sums_kernel", 0, ("CHANNELS=8,", "[float32")),
                                       ("_sums_kernel", 0, ("CHANNELS=16,", "[bfloat16")),
                                       ("_affine_kernel", 1, ("CHANNELS=1,",)), ("_affine_kernel", 1, ("CHANNELS=64,",)))),
    # What it writes: neighbouring inputs of a filter overlap, and are read one by one.
    ("upfirdn2d", "_doubling_kernel", ("EVEN_Y=True", "EVEN_X=True"), 0, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def records():
    """What became of every kernel on every target, with the machine code of those above for sm_90, in fp32 and bf16, as
    NVIDIA's disassembler lists it. Kept for sources that are the same; the first process that asks compiles them."""
    package = Path(aot.__file__).parents[1]
    sources = [Path(__file__), *sorted((package / "triton").glob("*.py")), *sorted((package / "core").glob("*.py"))]
    digest = hashlib.sha256(b"".join([triton.__version__.encode(), *(path.read_bytes() for path in sources)]))
    kept = package.parent / "build" / "triton-compiled" / f"{digest.hexdigest()[:16]}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (kept.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists():
            return json.loads(kept.read_text())
        found = compiled()
        if not any(record["error"] for record in found):
            kept.with_suffix(".part").write_text(json.dumps(found))
            kept.with_suffix(".part").replace(kept)
        return found


def compiled():
    kernels = "|".join(sorted({kernel for _, kernel, *_ in MAPS}))
    counted = rf"^sm_90 \w+\.({kernels})\[(float32|bfloat16)\]"
    quick = (
        "import sys; from quick_triton import quicken; from gankern.triton import aot; quicken(); sys.exit(aot.main())"
    )
    command = [sys.executable, "-c", quick, "--json", "--instructions", counted]
    result = subprocess.run(command, env=COMPILER, capture_output=True, text=True)
    assert result.stdout, result.stderr
    records = json.loads(result.stdout)
    assert result.returncode == int(any(record["error"] for record in records))
    return records


def test_every_kernel_on_every_target(records):
    assert {record["target"] for record in records} == set(aot.TARGETS)
    failures = [f"{r['target']} {r['module']}.{r['kernel']}: {r['error']}" for r in records if r["error"]]
    assert not failures, "\n".join(failures)


def test_shared_memory_of_what_is_compiled_for_one_device(records):
    """Other types than fp32, and variants, are compiled for sm_90 alone of NVIDIA's devices: what they take there, a
    program may have on each."""
    least = min(most for target, most in aot.SHARED.items() if target.startswith("sm_"))
    found = {record["kernel"]: record.get("shared", 0) for record in records if record["target"] == "sm_90"}
    assert {kernel: shared for kernel, shared in found.items() if shared > least} == {}


@pytest.mark.parametrize(
    ("module", "kernel", "parts", "reads", "writes"), MAPS, ids=lambda v: "-".join(v) if isinstance(v, tuple) else v
)
def test_the_machine_code_of_what_memory_bounds(records, module, kernel, parts, reads, writes):
    """Maps in fp32 and bf16 are moved in 16 bytes a lane, with at least one instruction for each; no loop has
    arithmetic in fp64 or divides in 64 bits, for which the compiler calls a function; nothing is spilled."""
    found = [
        record
        for record in records
        if "total" in record
        and record["module"] == module
        and record["kernel"].startswith(kernel)
        and all(part in record["kernel"] for part in parts)
    ]
    assert found
    for record in found:
        name = record["kernel"]
        assert record["loads"].get("16", 0) >= reads and record["stores"].get("16", 0) >= writes, name
        assert (record["fp64_looped"], record["calls_looped"], record["local"]) == (0, 0, 0), name


def test_loops_are_seen(records):
    """A kernel is disassembled behind others, where a jump back names a place among theirs."""
    of_sums = [record for record in records if "total" in record and record["kernel"].startswith("_moments_kernel")]
    assert of_sums and all(record["looped"] for record in of_sums)


LISTING = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/              @!P0 LDG.E.EF.64 R8, desc[UR4][R2.64] ;
        /*0030*/                   DADD R8, R8, R10 ;
        /*0040*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*0050*/                   STL [R1], R8 ;
        /*0060*/             @!UP0 BRA `(.L_x_1) ;
        /*0070*/                   F2F.F32.F64 R8, R8 ;
        /*0080*/                   I2F.S64 R9, R10 ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
        /*00a0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00b0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BRA `(.L_x_2);
"""


def test_how_a_listing_is_counted():
    assert aot.instructions(LISTING) == aot.Instructions(
        total=14, outside=9, looped=5, loads={16: 1, 8: 1}, stores={2: 1, 4: 1}, loaded_at_once=8, together=1, fp64=2, fp64_looped=1,
        calls_looped=1, local=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "share"),
    [
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_90", 33, 0, 4, 0.75),  # 40 registers: 51 warps, of which 12 programs of 4
        ("sm_90", 255, 0, 4, 0.125),
        ("sm_90", 40, 100 << 10, 8, 0.25),  # shared memory is for two
        ("sm_80", 40, 100 << 10, 8, 0.125),
        ("sm_100", 16, 0, 1, 0.5),  # no more than 32 programs
    ],
)
def test_how_many_warps_fit(target, registers, shared, num_warps, share):
    assert aot.occupancy(target, registers, shared, num_warps) == share


def test_every_module_with_kernels_is_checked():
    package = Path(aot.__file__).parent
    with_kernels = {path.stem for path in package.glob("*.py") if "\n@triton.jit" in path.read_text()}
    assert with_kernels
    # That each of its kernels is launched: test_launch.py. The kernels of _norm_act are those of three primitives.
    norms = {"batch_norm_act", "instance_norm_act", "group_norm_act"}
    assert set(aot.modules()) == with_kernels - {"_norm_act"} | norms


@pytest.mark.parametrize(
    ("spill", "spills"),
    [({}, False), ({"stack_bytes": 8}, True), ({"local_bytes": 8}, True), ({"spilled_registers": 1}, True)],
)
def test_what_counts_as_a_spill(spill, spills):
    used = {"registers": 255, "stack_bytes": 0, "local_bytes": 0, "spilled_registers": 0, **spill}
    assert aot.Resources(**used).spills is spills


OF_ONE = """
import torch, triton, triton.language as tl
from gankern.triton import aot
from gankern.triton.launch import Launch

@triton.jit
def kernel(x, count):
    tl.store(x + count.to(tl.int64), 0.0)

entry = aot.Entry(Launch(kernel, 1, (torch.empty(32, device="meta"), 16), {}, 4), torch.float32)
entry.parse(aot.TARGETS["sm_90"])
try:
    entry.with_ones().parse(aot.TARGETS["sm_90"])
except triton.CompilationError as error:
    print("refused:", error.error_message or error.__cause__)
"""


def test_a_kernel_that_does_not_compile_where_a_size_is_one_is_found(tmp_path):
    """The JIT makes a constant of a whole number that is 1, and a constant has no `to`."""
    script = tmp_path / "of_one.py"
    script.write_text(OF_ONE)
    result = subprocess.run([sys.executable, script], env=COMPILER, capture_output=True, text=True)
    assert "refused:" in result.stdout, result.stderr


def test_interpreted_kernels_are_refused():
    environment = {**COMPILER, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "gankern.triton.aot"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr


@pytest.mark.parametrize("kernel, message", [("(", "is no regular expression"), ("nosuch", "no kernel of bias_act")])
def test_names_of_no_kernel_are_refused(kernel, message):
    """To have checked none is no success."""
    command = [sys.executable, "-m", "gankern.triton.aot", "--module", "bias_act", "--kernel", kernel]
    result = subprocess.run(command, env=COMPILER, capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr


def test_kernels_that_spill_or_take_too_much_shared_memory_are_refused():
    fine = aot.Resources(registers=32, stack_bytes=0, local_bytes=0, spilled_registers=0)
    for target, most in (("sm_80", 166912), ("sm_90", 232448), ("sm_100", 232448), ("gfx942", 65536)):
        assert aot.problem(target, fine, most) is None
        assert f"takes {most + 1} bytes of shared memory" in aot.problem(target, fine, most + 1)
    assert aot.problem("sm_90", aot.Resources(32, 8, 0, 0), 0) == "spills registers"
    assert aot.SHARED.keys() == aot.TARGETS.keys()
