"""Checks of the plans that C++ runs (csrc/autograd/plans.cpp), which test_launch.py runs as those of launch_checks.py."""

import array
import functools
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1]))
import stub_driver
from common import in_threads
from launch_checks import _call, _kernel
from plan_checks import _compare

from gankern.core import native
from gankern.triton import aot, launch, tracing


@launch.planned
def _alone(x, y, scale):
    """A launcher that does nothing but allocate and launch."""
    out, more = torch.empty_like(x), x.new_empty(3, 5)
    _call(out, y, x.numel(), 3, scale)
    _call(x, more, x.numel(), 3, scale)
    return out, more, x


def _run_of_alone(driver, x, y=None, scale=1.5):
    """How many launches C++ made of a call's two, which are right either way."""
    driver.launches.clear()
    before = driver.by_plan
    out, more, same = _alone(x, y, scale)
    (first, second) = (
        [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in call[-1]] for call in driver.launches
    )
    assert first[:2] == [out.data_ptr(), None if y is None else y.data_ptr()]
    assert second[:2] == [x.data_ptr(), more.data_ptr()] and same is x
    assert out.shape == x.shape and more.shape == (3, 5)
    assert {call[1] for call in driver.launches} == {77}
    return driver.by_plan - before


def cpp_runs_a_plan_from_the_second_call_on():
    driver, by_jit = stub_driver.start()
    x, y = torch.zeros(64), torch.zeros(64)
    assert [_run_of_alone(driver, x, y) for _ in range(3)] == [0, 2, 2]
    by_jit.clear()
    # Other tensors of this signature, one tensor twice, others of other signatures.
    assert _run_of_alone(driver, torch.zeros(64), x) == 2 and _run_of_alone(driver, y, y) == 2 and not by_jit
    for other in (torch.zeros(65)[1:], x.double(), torch.zeros(128)[::2], torch.zeros(8, 8)):
        assert [_run_of_alone(driver, other, y) for _ in range(2)] == [0, 2]
    assert [_run_of_alone(driver, x) for _ in range(2)] == [0, 2]
    assert [_run_of_alone(driver, x, scale=0.5) for _ in range(2)] == [0, 2]
    # A parameter is a tensor, another class is for Python; as is a call that comes with other types.
    assert _run_of_alone(driver, torch.nn.Parameter(x, requires_grad=False), y) == 2
    _alone(x.as_subclass(type("Other", (torch.Tensor,), {})), y, 1.5)
    before = driver.by_plan
    _alone(x.as_subclass(type("Other", (torch.Tensor,), {})), y, 1.5)
    assert driver.by_plan == before


def cpp_leaves_a_plan_to_python_while_somebody_listens_or_holds_it_off():
    driver, by_jit = stub_driver.start()
    x, seen = torch.zeros(64), []
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    _run_of_alone(driver, x)

    def hook(metadata):
        seen.append(metadata.get()["name"])

    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        assert _run_of_alone(driver, x) == 2
        chain.add(hook)
        assert _run_of_alone(driver, x) == 0
        chain.remove(hook)
    assert len(seen) == 4
    for knobs, setting in ((runtime, "debug"), (compilation, "override")):
        assert _run_of_alone(driver, x) == 2
        with knobs.scope():
            setattr(knobs, setting, False)
            assert _run_of_alone(driver, x) == 0
    assert _run_of_alone(driver, x) == 2
    with launch._unplanned(), launch._unplanned():
        assert _run_of_alone(driver, x) == 0
    assert _run_of_alone(driver, x) == 2
    launch.BY_HANDLE = False
    by_jit.clear()
    assert _run_of_alone(driver, x) == 0 and len(by_jit) == 2
    launch.BY_HANDLE = True
    with launch.recorded() as launches:
        driver.launches.clear()
        _alone(x, None, 1.5)
    assert len(launches) == 2 and not driver.launches
    assert _run_of_alone(driver, x) == 2

    # A launcher that calls another one is written down with what that does.
    @launch.planned
    def outer(x):
        return _alone(x, None, 1.5)

    before = driver.by_plan
    outer(x)
    assert driver.by_plan == before
    outer(x)
    assert driver.by_plan == before + 2
    launch._thread.tracing = object()  # while one thread writes down a launcher, others go by plans
    ran = []
    in_threads(lambda: ran.append(_run_of_alone(driver, x)))
    launch._thread.tracing = None
    assert ran == [2]


def cpp_leaves_what_is_no_plain_launch_to_python():
    """Kernels that ask for more than C++ gives, results that it does not make, and all that is more than launches."""
    driver, _ = stub_driver.start()
    x = torch.zeros(64)
    kind = driver.launcher_cls
    for number, (setting, value) in enumerate(
        (
            ("global_scratch_size", 16),
            ("profile_scratch_size", 16),
            ("launch_cooperative_grid", True),
            ("launch_pdl", True),
            ("num_ctas", 2),
        )
    ):
        before = getattr(kind, setting)
        setattr(kind, setting, value)
        scale = 2.5 + number
        assert [_run_of_alone(driver, x, scale=scale) for _ in range(2)] == [0, 0], setting
        setattr(kind, setting, before)
    assert [_run_of_alone(driver, x, scale=9.5) for _ in range(2)] == [0, 2]
    kept = torch.zeros(64)

    def first(*launched):
        _call(*launched)
        return launched[0]

    left = {
        "a torch call": lambda x: first(x.clone(), None, 64, 3),
        "a view of what was made": lambda x: first(x.new_empty(64), None, 64, 3).view(8, 8),
        "a constant tensor": lambda x: first(x, launch.constant(kept), 64, 3),
        "a table": lambda x: first(x, launch.of_addresses(lambda addresses: kept, [(x, 0)]), 64, 3),
        "a number": lambda x: (first(x, None, 64, 3), 3),
        "out of order": lambda x: (
            launch.launch(_kernel, 3, x, None, 64, 3, BLOCK=64, DTYPE=tl.float32, SCALE=1.5, num_warps=4) and x
        ),
    }
    for name, launcher in left.items():
        planned = launch.planned(launcher)
        before = driver.by_plan
        for _ in range(3):
            planned(x)
        assert driver.by_plan == before, name
    # Of no programs nothing is launched, by C++ as by Triton's launcher.
    none = launch.planned(lambda x: launch.launch(_kernel, 0, x, None, 64, 3, SCALE=1.5, DTYPE=tl.float32, BLOCK=64, num_warps=4) and x)  # fmt: skip
    none(x)
    driver.launches.clear()
    none(x)
    assert not driver.launches


def cpp_leaves_a_plan_whose_memory_lies_elsewhere_to_python():
    driver, _ = stub_driver.start()
    parameter = tracing.NativePlan._parameter

    def elsewhere(self, kind, value):  # as if it had been written down of memory at another remainder by 16
        source, number, at = parameter(self, kind, value)
        return source, number, at ^ 8

    tracing.NativePlan._parameter = elsewhere
    x = torch.zeros(64)
    assert [_run_of_alone(driver, x) for _ in range(3)] == [0, 0, 0]


def cpp_leaves_the_plan_of_another_device_to_python():
    driver, _ = stub_driver.start()
    x = torch.zeros(64)
    for _ in range(2):
        _run_of_alone(driver, x)
    key = native.nodes.signature((x, None, 1.5), False)
    plans = _alone.plans
    of_the_cpu = plans[key]
    launched = array.array("q", (0, 1, 1, 1, 128, 0, 0)).tobytes()
    for device, ran in ((0, True), (1, False), (-1, True)):
        plan = native.nodes.plan(device, 1, b"", launched, array.array("q", (1, 0)).tobytes())
        driver.sources[0] = type("Source", (), {"signature": {}, "constants": {}}), (4, 0)
        driver.launches.clear()
        found = native.nodes.by_plan({key: of_the_cpu._replace(native=plan)}, (x, None, 1.5), False)
        assert (type(found) is tuple and found[0] is x) == ran and len(driver.launches) == ran, device
        assert ran or found == key
    native.nodes.record_launches(None, 0)  # and of the CPU's tensors, without a record, all of them
    assert type(native.nodes.by_plan(plans, (x, None, 1.5), False)) is not tuple


def cpp_runs_plans_in_several_threads():
    driver, _ = stub_driver.start()
    for n in range(1, 5):
        for k in range(2):
            _alone(torch.zeros(64 * n), None, 1.5 + k)
    driver.launches.clear()
    before = driver.by_plan

    def work(k):
        for turn in range(400):
            x = torch.zeros(64 * (1 + turn % 4))
            out, more, same = _alone(x, None, 1.5 + k % 2)
            assert out.shape == x.shape and more.shape == (3, 5) and same is x, turn

    in_threads(*(functools.partial(work, k) for k in range(4)))
    assert driver.by_plan - before == 4 * 400 * 2


SOME_LEFT_TO_PYTHON = {"bias_act_backward", "bias_act_double_backward"}  # on small maps, whose sums are torch's
LEFT_TO_PYTHON = {  # sums by torch, copies of what is not dense, tables of addresses
    "bias_act_prelu_backward",
    "bias_act_prelu_double_backward",
    "minibatch_discrimination_backward",
    "minibatch_discrimination_double_backward",
    "spectral_norm",
    "spectral_norm_backward",
    "spectral_norm_double_backward",
}


def operators_go_by_their_launchers_plans():
    """The kernel for CUDA of every operator, called on the CPU's tensors past the dispatcher: what it launches and
    returns is what the launcher does, and from the second call on C++ does it where it can."""
    import importlib

    from gankern.core import registry

    defined = {}
    define = registry._kernel

    def noted(operator, primitive, launcher):
        defined[operator.partition("::")[2]] = primitive, launcher
        return define(operator, primitive, launcher)

    registry._kernel = noted
    assert "gankern.ops.bias_act" not in sys.modules
    importlib.import_module("gankern.functional")
    driver, _ = stub_driver.start_uncompiled()
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    left, some = {}, set()  # of each operator, the calls that Python did; and which others did some
    for name, (primitive, launcher) in defined.items():
        module, calls, of_examples = aot._module(primitive), [], launcher.rstrip("_")  # in place: as otherwise
        entry, recorded = getattr(module, launcher), getattr(module, of_examples)
        setattr(module, of_examples, stub_driver._recorder(recorded, driver, calls))
        if primitive not in stub_driver.OF_THEIR_SIZE:
            module.torch = stub_driver._Small()
        module.examples(torch.float32)
        vars(module).update({of_examples: recorded, "torch": torch})
        operator = getattr(torch.ops.gankern, name).default
        assert calls, name
        for _, given, _ in calls:
            given = (*given, *(a.default_value for a in operator._schema.arguments[len(given) :]))

            def call(*arguments, operator=operator):
                return operator.redispatch(cuda, *arguments)

            call.__name__ = launcher
            before = driver.by_plan
            _compare(driver, primitive, entry, given, call)
            if driver.by_plan == before:
                left.setdefault(name, []).append(given)
        if len(left.get(name, ())) < len(calls):
            some.add(name)
    assert left.keys() == LEFT_TO_PYTHON | SOME_LEFT_TO_PYTHON, left.keys()
    assert some == defined.keys() - LEFT_TO_PYTHON, some


if __name__ == "__main__":
    stub_driver.run(globals())
