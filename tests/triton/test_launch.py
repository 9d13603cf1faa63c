"""How kernels are launched, without a GPU: the JIT's binder and its choice of kernels, and no copy from the host."""

import ast
import gc
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import KernelParam, create_function_from_signature

import gankern.functional as GF
from gankern.core import devices, native
from gankern.triton import (
    aot,
    launch,
    minibatch_discrimination,
    minibatch_stddev,
    pixel_norm,
    spectral_norm,
    spectral_norm_tables,
    upfirdn2d,
    virtual_batch_norm,
)

COMPILER = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
CHECKS = {  # by name, the file that it is in
    check: file
    for file in sorted(Path(__file__).parent.glob("*_checks.py"))
    for check in re.findall(r"^def ([a-z]\w*)", file.read_text(), re.M)
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PACKAGE = Path(launch.__file__).parent

OF_NODES = {
    "signatures_tell_apart_what_calls_differ_in",
    "layers_cost_little",
    *(check for check in CHECKS if check.startswith(("cpp_", "operators_"))),
}
BY_PYTHON = [
    "every_plan_is_what_its_launcher_does",
    "second_launches_go_by_handle",
    "hooks_see_planned_launches",
    "plans_do_what_the_launcher_does",
]
BOTH_WAYS = ["every_plan_is_what_its_launcher_does", "groups_follow_their_tensors", "what_was_made_may_lie_elsewhere"]


# A process that has imported all that a check imports, and becomes the check's own by a fork: each of them begins with
# nothing launched, and waits for no import.
SERVER = """
import os, runpy, sys, traceback
import stub_driver
for line in sys.stdin:
    output, *sys.argv = line.split("\\t")[:-1]
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        failed = 1
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            failed = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(failed)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module", params=["C++"])
def run_check(request, tmp_path_factory):
    """Runs a check by its name, with what else it is told."""
    of_python = {} if request.param == "C++" else {native.NODES_VARIABLE: "0"}
    search = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    environment = {**COMPILER, **search, "CUDA_VISIBLE_DEVICES": "", **of_python}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(check, *words):
            output = tmp_path_factory.mktemp("checks") / "output"
            print(output, CHECKS[check], check, *words, "", sep="\t", file=server.stdin, flush=True)
            status = server.stdout.readline().strip()
            assert status == "0", output.read_text() if output.exists() else status

        yield run
        server.stdin.close()


@pytest.mark.parametrize("check", CHECKS)
def test_with_the_jit_and_a_stub_of_the_driver(check, run_check):
    if check in OF_NODES and native.NODES_MISSING:
        pytest.skip(native.NODES_MISSING)
    run_check(check)


@pytest.mark.parametrize("check", BY_PYTHON)
def test_the_same_where_python_runs_all_plans(check, run_check):
    run_check(check, "by-python")


@pytest.mark.parametrize("run_check", ["Python"], indirect=True)
@pytest.mark.parametrize("check", BOTH_WAYS)
def test_the_same_where_python_reads_signatures(check, run_check):
    run_check(check)


def binder(kernel):
    """What the JIT binds the kernel's arguments with."""
    signature = inspect.signature(kernel.fn)
    parameters = [KernelParam(i, p, False, False) for i, p in enumerate(signature.parameters.values())]
    return create_function_from_signature(signature, parameters, BaseBackend)


def test_a_binder_refuses_a_parameter_named_options():
    def kernel(x, options):
        pass

    with pytest.raises(SyntaxError, match="options"):
        binder(type("Kernel", (), {"fn": staticmethod(kernel)}))


@pytest.mark.parametrize("module", aot.modules())
def test_every_launch_binds(module):
    """Every kernel has a binder, and every call of every launcher fits it."""
    source = (PACKAGE / f"{module}.py").read_text()
    kernels = {name: getattr(aot._module(module), name) for name in re.findall(r"^def (\w+_kernel)\(", source, re.M)}
    binders, launched = {}, set()
    for dtype in DTYPES:
        with launch.recorded() as launches:
            aot._module(module).examples(dtype)
        for kernel, _, arguments, constants, num_warps in launches:
            name = kernel.fn.__name__
            if name not in binders:
                binders[name] = binder(kernel)
            bound, kinds, rest = binders[name](*arguments, **constants, num_warps=num_warps)
            assert list(bound) == list(inspect.signature(kernel.fn).parameters)
            assert len(kinds) == len(bound) and rest == {"num_warps": num_warps}
            # In the kernel's own order, so that it can be launched by handle.
            assert list(bound)[len(arguments) :] == list(constants)
            # A fraction would be rounded to fp32.
            assert all(a is None or type(a) is int or isinstance(a, torch.Tensor) for a in arguments)
            launched.add(name)
    assert launched >= set(kernels) and launched


class Devices(TorchDispatchMode):
    """Refuses what moves values between host and device, or asks the device for one."""

    WAITS = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "lift_fresh",
        "is_pinned",
        "pin_memory",
        "unique",
        "masked_select",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert not name.startswith(self.WAITS), f"{name} waits for the device or copies from the host"
        result = func(*args, **(kwargs or {}))
        tensors, _ = torch.utils._pytree.tree_flatten((args, kwargs, result))
        devices = {x.device.type for x in tensors if isinstance(x, torch.Tensor)}
        assert devices <= {"meta"}, f"{name} on {devices}"
        return result


class Constants(TorchFunctionMode):
    """Refuses tensors made of the host's values."""

    MADE = (
        torch.tensor,
        torch.as_tensor,
        torch.asarray,
        torch.from_numpy,
        torch.Tensor.new_tensor,
        torch.scalar_tensor,
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in self.MADE, f"{func} copies from the host"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def elsewhere(monkeypatch):
    """Tensors without values, on another device than the host's."""
    # Made once for each network, and kept on the device: what a first call may copy.
    plan_of = spectral_norm_tables.plan_of.__wrapped__

    def kept_plan(matrices, u_first, device):
        with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
            return plan_of(matrices, u_first, torch.device("cpu"))

    monkeypatch.setattr(spectral_norm, "plan_of", kept_plan)
    with Constants(), Devices():
        yield "meta"


@pytest.mark.parametrize("module", aot.modules())
def test_no_launcher_copies_from_the_host_or_waits(module, elsewhere):
    for dtype in DTYPES:
        with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction(), launch.recorded():
            aot._module(module).examples(dtype)  # fills what is kept between calls
        with launch.recorded() as launches:
            aot._module(module).examples(dtype, elsewhere)
        assert launches


@pytest.mark.parametrize(
    "line",
    ["torch.tensor([1.0], device='meta')", "x.sum().item()", "x.cpu()", "torch.zeros(3).to('meta')", "x.tolist()"],
)
def test_what_copies_or_waits_is_noticed(line, elsewhere):
    x = torch.empty(3, device="meta")  # noqa: F841  (the line reads it)
    with pytest.raises((AssertionError, RuntimeError)):
        eval(line)


WAITING = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "synchronize",
    "cuda",
    "tensor",
    "as_tensor",
    "new_tensor",
    "double",
}


def test_no_launcher_calls_what_copies_or_waits():
    """But for functions that keep what they make: their first call may."""
    found = []
    for path in sorted(PACKAGE.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            if any(re.search("cache|kept", ast.unparse(d)) for d in function.decorator_list):
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in WAITING:
                    found.append(f"{path.name}:{call.lineno} {ast.unparse(call.func)}")
    assert found == []


class Allocations(TorchDispatchMode):
    """The memory of every tensor that this thread makes, as long as it lives."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = self.storages((args, kwargs))  # a view is of memory that was there
        self.made += [(func.name(), storage) for storage in self.storages(result) if storage not in given]
        return result

    @staticmethod
    def storages(tree):
        leaves = torch.utils._pytree.tree_leaves(tree)
        return [StorageWeakRef(x.untyped_storage()) for x in leaves if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("module", aot.modules())
def test_no_launcher_keeps_what_its_thread_allocates(module, monkeypatch):
    """Where a graph's pool is what the thread allocates from, all memory that is no result is the graph's to give to
    others. So what is kept between calls (tables, constants of a plan) is made by another thread."""
    monkeypatch.setattr(launch, "_launch_by_jit", lambda key, request: None)
    spectral_norm_tables.plan_of.cache_clear()
    with Allocations() as allocations:
        for _ in range(2):  # the first calls, and those by their plans
            aot._module(module).examples(torch.float32)
    gc.collect()
    assert len(allocations.made) > 2
    assert [name for name, storage in allocations.made if not storage.expired()] == []


def test_what_is_kept_by_the_thread_that_calls_is_noticed():
    @launch.planned
    def launcher(x):
        kept.append(x.new_zeros(3))

    kept = []
    with Allocations() as allocations:
        launcher(torch.zeros(2))
    assert [name for name, storage in allocations.made if not storage.expired()] == ["aten::new_zeros"]


def test_a_table_of_shapes_within_a_capture_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    matrix = spectral_norm_tables.matrix_of((8, 8), (8, 1), 0)
    with pytest.raises(RuntimeError, match="spectral_norm: the first call .* run the step once before"):
        spectral_norm_tables.plan_of((matrix,), True, torch.device("cuda", 0))


def test_every_kernel_is_launched_in_one_way():
    """By gankern.triton.launch, and nowhere by the JIT's own subscript."""
    for path in PACKAGE.glob("*.py"):
        assert not re.search(r"_kernel\[", path.read_text()), path.name
    importlib.import_module("gankern.triton.launch")


def _vector(x):
    return x[0, :, 0, 0].contiguous()


def _filtered(x, **factors):
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device)
    return GF.upfirdn2d(x, taps, padding=(2, 1, 2, 1), **factors, implementation="triton")


TRITON = {"implementation": "triton"}
# Of each kernel with block sizes: shapes that none of them divides, and calls.
VARIED = {
    "bias_act": ((4, 6, 7, 9), {"": lambda x: GF.bias_act(x, _vector(x), **TRITON)}),
    "minibatch_stddev": (
        (4, 6, 7, 9), {"": lambda x: GF.minibatch_stddev(x, group_size=4, num_channels=2, **TRITON)},
    ),
    "upfirdn2d": (
        (2, 2, 7, 75), {"up": lambda x: _filtered(x, up=2), "down": lambda x: _filtered(x, down=2), "same": _filtered},
    ),
    "minibatch_discrimination": (
        (4, 6, 5, 1), {"": lambda x: minibatch_discrimination.forward(x[..., 0].contiguous(), None, False)},
    ),
    "pixel_norm": ((4, 6, 7, 9), {"": lambda x: GF.bias_act_pixel_norm(x, _vector(x), **TRITON)}),
    "batch_norm_act": (
        (4, 6, 7, 9),
        {"": lambda x: GF.batch_norm_act(x, None, None, _vector(x), _vector(x), training=True, **TRITON)},
    ),
    "instance_norm_act": ((4, 6, 7, 9), {"": lambda x: GF.instance_norm_act(x, **TRITON)}),
    "group_norm_act": ((4, 6, 7, 9), {"": lambda x: GF.group_norm_act(x, 3, **TRITON)}),
    "virtual_batch_norm": (
        (4, 6, 7, 9),
        {"": lambda x: GF.virtual_batch_norm(x, _vector(x), _vector(x) ** 2 + 1, 3, _vector(x), _vector(x), **TRITON)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "call"), [(kernel, call) for kernel, (_, calls) in VARIED.items() for call in calls], ids=str
)
def test_every_variant_of_block_sizes_is_right(kernel, call, device):
    """What `make gpu` may choose: each variant against the first one. Those that launch what another one did, for here
    is nothing that tells them apart, run once; the interpreter knows no warps."""
    warps = device.type == "cuda" or os.environ.get("GANKERN_PTX") == "1"
    shape, calls = VARIED[kernel]
    call, contiguous = calls[call], torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)

    def launched(x):
        with launch.recorded() as launches:
            call(x)
        return repr([
            (kernel.fn.__name__, programs, [a for a in arguments if not torch.is_tensor(a)], constants)
            + ((num_warps,) if warps else ())
            for kernel, programs, arguments, constants, num_warps in launches
        ])  # fmt: skip

    for x in (contiguous, contiguous.contiguous(memory_format=torch.channels_last)):
        first, ran = call(x), {launched(x)}
        for variant in launch.Blocks.known[kernel].variants:
            with launch.Blocks.known[kernel].use(variant):
                if (launches := launched(x)) not in ran:
                    torch.testing.assert_close(call(x), first)
                ran.add(launches)


def _index_types(call):
    """Of each launch of a call, by its kernel, whether it counts in 64 bits."""
    with launch.recorded() as launches:
        call()
    return {r.kernel.__name__: r.constants["INDEX"].name == "int64" for r in launches if "INDEX" in r.constants}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("pixels", "wide"), [(2**31 - 2**17, False), (2**31 - 2**17 + 1, True), (2**31 - 1, True), (2**31 + 9, True)]
)
def test_planes_of_nearly_2_31_pixels_are_counted_in_64_bits(pixels, wide, layout):
    """A loop over tiles ends behind a plane: in 32 bits it would not end, or begin again below 0."""

    def make(channels):
        return torch.empty(2, channels, 1, pixels, device="meta", dtype=torch.bfloat16, memory_format=layout)

    x, y, vectors, taps = make(2), make(3), [torch.empty(2, device="meta")] * 4, torch.empty(4, device="meta")
    saved, moments = (torch.empty(*shape, 2, device="meta", dtype=torch.float64) for shape in ((2, 2), (2,)))
    options = 0.1, 1e-5, 0.2, True, True
    assert _index_types(lambda: virtual_batch_norm.backward(x, x, *vectors, saved, *options)) == {
        "_normalize_kernel": wide
    }
    assert _index_types(lambda: virtual_batch_norm.statistics(x)) == {"_sums_kernel": wide}
    assert _index_types(lambda: virtual_batch_norm.statistics_backward(moments, x, moments)) == {"_affine_kernel": wide}
    found = _index_types(lambda: minibatch_stddev.backward(y, x, 2, 1, True, False, 1e-8))
    assert found == {"_factors_kernel": True, "_held_kernel": True}  # of two samples; of three channels
    sizes = [1, 1], [1, 1], [0, 0], [1, pixels - 3]
    assert _index_types(lambda: upfirdn2d.forward(make(1), taps, *sizes, False, 1.0)) == {"_upfirdn2d_kernel": wide}


def test_pixel_norm_of_2_31_values_counts_in_64_bits():
    for shape, wide in (((2, 3, 4), False), ((8, 1024, 2**18 - 8), True)):
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        found = _index_types(lambda x=x: pixel_norm.backward(x, None, x, x[:, 0].float(), 1, 1.0, 0.2, True))
        assert found == {"_pixel_norm_kernel": wide}


def test_every_kernel_with_variants_is_tried():
    assert VARIED.keys() == launch.Blocks.known.keys()


def test_a_device_file_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU (80 GB)")
    devices.measured.cache_clear()
    file = devices.device_file("Some GPU (80 GB)")
    assert file.name == "Some_GPU_80_GB_.json"
    best, stale = {"BLOCK": 2, "num_warps": 4}, {"BLOCK": 3, "num_warps": 4}
    file.write_text(json.dumps({"device": "Some GPU (80 GB)", "blocks": {"a": best, "b": stale}}))
    first = {"BLOCK": 1, "num_warps": 4}
    try:
        for kernel, device, expected in (("a", "cuda", best), ("a", "cpu", first), ("b", "cuda", first)):
            blocks = launch.Blocks(kernel, first, {"num_warps": 4, "BLOCK": 2})
            assert blocks(torch.device(device)) == expected
    finally:
        devices.measured.cache_clear()
        for kernel in "ab":
            launch.Blocks.known.pop(kernel, None)
