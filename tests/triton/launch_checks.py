"""Checks of gankern.triton.launch with the JIT itself, in a process without TRITON_INTERPRET: test_launch.py runs it.

python tests/triton/launch_checks.py NAME              each function of this file is one
python tests/triton/launch_checks.py NAME by-python    without what C++ launches by plans
"""

import contextlib
import functools
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import stub_driver
from common import in_threads

from gankern.core import native
from gankern.triton import aot, launch


@triton.jit
def _kernel(x, y, n, m, SCALE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * m, mask=i < n, other=0.0).to(DTYPE) * SCALE
    if y is not None:
        value += tl.load(y + i, mask=i < n, other=0.0)
    tl.store(x + i, value, mask=i < n)


def _call(x, y, n, m, scale=1.5, dtype=tl.float32, block=64, warps=4):
    launch.launch(_kernel, 3, x, y, n, m, SCALE=scale, DTYPE=dtype, BLOCK=block, num_warps=warps)


def second_launches_go_by_handle():
    """Every launcher: the second round meets no JIT, and launches the same kernels on the same arguments."""
    driver, by_jit = stub_driver.start()
    for module in aot.modules():
        rounds = []
        for _ in range(2):
            driver.launches.clear()
            by_jit.clear()
            aot._module(module).examples(torch.float32)
            rounds.append((list(driver.launches), len(by_jit)))
        (first, compiled), (second, again) = rounds
        assert compiled and not again, (module, compiled, again)
        assert len(first) == len(second) >= compiled
        for (*place, values), (*other_place, addresses) in zip(first, second):
            assert place == other_place, module
            assert len(values) == len(addresses)
            for value, address in zip(values, addresses):
                if isinstance(value, torch.Tensor):
                    value = value.data_ptr()
                # An address, of another tensor in either round: they are larger than the examples' sizes.
                if type(value) is int and value > 2**24:
                    assert type(address) is int and address % 16 == value % 16
                else:
                    assert value == address and type(value) is type(address), (module, value, address)


def arguments_keep_their_places():
    driver, by_jit = stub_driver.start()
    x, y = torch.zeros(64), torch.zeros(64)
    for _ in range(2):
        _call(x, y, 64, 3)
    assert len(by_jit) == 1
    grid, stream, _, arguments = driver.launches[-1]
    assert grid == (3, 1, 1) and stream == 77
    assert arguments == (x.data_ptr(), y.data_ptr(), 64, 3, 1.5, tl.float32, 64)


def every_kind_of_arguments_has_the_kernel_that_the_jit_gives_it():
    """One kind after the other, twice each and in another order: by handle always the JIT's own choice."""
    driver, by_jit = stub_driver.start()
    x, y = torch.zeros(4096 * 3), torch.zeros(4096)
    kinds = [
        (x, y, 64, 3),
        (x[1:], y, 64, 3),  # an address that is no multiple of 16
        (x, y[1:], 64, 3),
        (x, None, 64, 3),
        (x.double(), y, 64, 3),
        (x.half(), y, 64, 3),
        (x, y, 63, 3),  # no multiple of 16
        (x, y, 64, 1),
        (x, y, 1, 1),
        (x, y, 64, 0),
        (x, y, 2**31 - 1, 3),
        (x, y, 2**31, 3),  # 64 bits, and a multiple of 16
        (x, y, 2**31 + 1, 3),
        (x, y, -64, 3),
        (x, y, -(2**31) - 1, 3),
        (x, y, 64, 3, 0.0),
        (x, y, 64, 3, 1.0),
        (x, y, 64, 3, float("inf")),
        (x, y, 64, 3, 1.5, tl.float64),
        (x, y, 64, 3, 1.5, tl.float32, 128),
        (x, y, 64, 3, 1.5, tl.float32, 64, 8),
    ]
    names = "SCALE", "DTYPE", "BLOCK"
    chosen = {}
    for turn, order in enumerate((range(len(kinds)), reversed(range(len(kinds))))):
        for i in order:
            _call(*kinds[i])
            chosen.setdefault(i, []).append(driver.launches[-1][2])
        if turn == 0:
            compiled = len(by_jit)
    # As many as the JIT has kernels: some of these kinds are the same to it.
    kernels = len(_kernel.device_caches[0][0])
    assert len(by_jit) == compiled == kernels, (len(by_jit), compiled, kernels)
    for i, kind in enumerate(kinds):
        defaults = (1.5, tl.float32, 64, 4)
        *constants, warps = (*kind[4:], *defaults[len(kind) - 4 :])
        _kernel[(3,)](*kind[:4], **dict(zip(names, constants)), num_warps=warps)
        assert set(chosen[i]) == {driver.launches[-1][2]}, i
    # NaN is not equal to itself, but the same constant.
    by_jit.clear()
    for _ in range(3):
        _call(x, y, 64, 3, float("nan"))
    assert len(by_jit) == 1


def hooks_and_settings_are_respected():
    driver, by_jit = stub_driver.start()
    x = torch.zeros(64)
    seen = []

    def on_enter(metadata):
        seen.append(("enter", metadata.get()["name"]))

    def on_exit(metadata):
        seen.append(("exit", metadata.get()["name"]))

    runtime = triton.knobs.runtime
    _call(x, None, 64, 3)
    _call(x, None, 64, 3)
    assert not seen
    runtime.launch_enter_hook.add(on_enter)
    runtime.launch_exit_hook.add(on_exit)
    _call(x, None, 64, 3)
    assert seen == [("enter", "_kernel"), ("exit", "_kernel")]
    runtime.launch_enter_hook.remove(on_enter)
    runtime.launch_exit_hook.remove(on_exit)
    by_jit.clear()
    _call(x, None, 64, 3)
    assert len(seen) == 2 and not by_jit
    # A setting that Triton compiles apart: another kernel, and the old one afterwards.
    before = driver.launches[-1][2]
    with runtime.scope():
        runtime.debug = True
        _call(x, None, 64, 3)
        assert len(by_jit) == 1
    by_jit.clear()
    _call(x, None, 64, 3)
    assert not by_jit and driver.launches[-1][2] == before


def a_kernel_whose_constants_are_out_of_order_goes_through_the_jit():
    driver, by_jit = stub_driver.start()
    x = torch.zeros(64)
    for _ in range(2):
        launch.launch(_kernel, 3, x, None, 64, 3, BLOCK=64, DTYPE=tl.float32, SCALE=1.5, num_warps=4)
    assert len(by_jit) == 2
    assert driver.launches[-1][3][4:] == (1.5, tl.float32, 64)


def an_unknown_way_of_launching_goes_through_the_jit():
    launch.BY_HANDLE = False
    _, by_jit = stub_driver.start()
    for _ in range(3):
        _call(torch.zeros(64), None, 64, 3)
    assert len(by_jit) == 3


def other_devices_tensors_have_kernels_of_their_own():
    """What the guard does is for a machine with two devices to show; here, that it is asked for."""
    driver, _ = stub_driver.start()
    switched = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            switched.append(self.device)
            driver.get_current_device = lambda: self.device

        def __exit__(self, *error):
            driver.get_current_device = lambda: 0

    class Elsewhere:
        """A tensor, as launch asks for it, on device 1."""

        dtype = torch.float32

        def get_device(self):
            return 1

        def data_ptr(self):
            return 4096

    torch.cuda.device = Guard
    for _ in range(2):
        _call(Elsewhere(), None, 64, 3)
    assert switched == [1, 1]
    assert [place[1] for place in driver.launches] == [78, 78]


@launch.planned
def _planned(x, y, dims, scale, second):
    """A launcher: what it does depends on shapes, strides, values and the absence of arguments."""
    x = x if x.is_contiguous() else x.contiguous()
    out, none = torch.empty_like(x), x.new_empty(0)
    _call(out, y if second else None, x.numel(), dims[0], scale)
    total = x.sum(dims, dtype=torch.float64)
    return (out, total, none) if second else (out, None, x.shape[0] and total)


def plans_do_what_the_launcher_does():
    """Twice for every signature, in another order the second time: what it launches on what, and what comes back."""
    driver, by_jit = stub_driver.start()
    base = torch.randn(4, 6, 8)
    kinds = [
        (base, base, [0], 1.5, True),
        (base, torch.randn(4, 6, 8), [0], 1.5, True),  # the same signature, of two tensors
        (base, base, [0], 1.5, False),
        (base, base, [1], 1.5, True),
        (base, base, [0, 2], 1.5, True),
        (base, base, [0], 0.0, True),
        (base, base, [0], -0.0, True),  # equal, and another kernel
        (base.double(), base, [0], 1.5, True),
        (base.transpose(0, 1), base, [0], 1.5, True),
        (base.transpose(0, 1), None, [0], 1.5, False),
        (base[:, :5], base, [0], 1.5, True),
        (base.view(-1)[1:].view(-1), base, [0], 1.5, True),  # an address that is no multiple of 16
        (base.view(-1)[2:], base, [0], 1.5, True),
        (base.view(-1)[4:].view(-1), base, [0], 1.5, True),
        (base[:0], base, [0], 1.5, True),
    ]

    def done(function, kind):
        driver.launches.clear()
        results = function(*kind)
        ((grid, stream, kernel, arguments),) = driver.launches
        pointers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        assert pointers[0] == results[0].data_ptr()
        assert pointers[1] == (kind[1].data_ptr() if kind[4] else None)
        facts = [None if r is None else (r.shape, r.stride(), r.dtype) for r in results]
        return grid, stream, kernel, repr(pointers[2:]), facts, results[1]

    def plainly(*kind):
        with launch._unplanned():
            return _planned(*kind)

    right = [done(plainly, kind) for kind in kinds]
    for order in (range(len(kinds)), reversed(range(len(kinds)))):
        for i in order:
            *expected, total = right[i]
            *got, sums = done(_planned, kinds[i])
            assert got == expected, (i, got, expected)
            assert sums is total or torch.equal(sums, total)
    # A plan keeps no tensor that was given or made.
    import gc
    import weakref

    x = torch.randn(3, 5)
    kept = [weakref.ref(x), *(weakref.ref(r) for r in _planned(x, x, [0], 1.5, True))]
    del x
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4


def plans_that_no_signature_decides_are_refused():
    stub_driver.start()
    alien = torch.ones(3)
    refused = {
        "item": lambda x: x.sum().item(),
        "data_ptr": lambda x: x.data_ptr(),
        "requires_grad": lambda x: x if x.requires_grad else x + 1,
        "grad": lambda x: x.grad,
        "_version": lambda x: x.new_empty(x._version),
        "is_leaf": lambda x: x.is_leaf and x,
        "storage_offset": lambda x: x.new_empty(x.storage_offset()),
        "is_neg": lambda x: x.is_neg() or x,
        "equal": lambda x: torch.equal(x, x) and x,
        "neither given nor made": lambda x: x + alien,
        "neither given nor made ": lambda x: torch.add(x, x, out=alien),
        "a dict": lambda x: torch.func.functional_call(torch.nn.Identity(), {"w": x}, x).add(x, **{"alpha": {}}),
    }
    for name, ask in refused.items():
        try:
            launch.planned(ask)(torch.zeros(3))
        except (RuntimeError, TypeError) as error:
            assert name.strip() in str(error) or name == "a dict", (name, error)
        else:
            raise AssertionError(f"{name}: not refused")
    assert launch._thread.tracing is None


def plans_are_made_wherever_a_launcher_is_called():
    """Within what switches torch's functions off or replaces them, as `accelerate` and its users do."""
    driver, _ = stub_driver.start()

    class Listening(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    off = torch._C.DisableTorchFunction
    surroundings = [off, torch._C.DisableTorchFunctionSubclass, Listening, lambda: torch.device("meta"), torch.no_grad]
    for columns, surrounding in enumerate(surroundings, 2):
        x = torch.randn(3, columns)  # of a signature of its own
        for _ in range(2):  # the call that is written down, and one by its plan
            driver.launches.clear()
            with surrounding():
                out, total, none = _planned(x, x, [0], 1.5, True)
            ((*_, (first, second, *_)),) = driver.launches
            assert [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in (first, second)] == [
                out.data_ptr(),
                x.data_ptr(),
            ]
            assert torch.equal(total, x.sum(0, dtype=torch.float64)) and none.numel() == 0
            assert {t.device.type for t in (out, total, none)} == {"cpu"}


def plans_give_torch_what_the_launcher_gives_it():
    """Tensors in lists and by keyword, lists that their owner changes later, results that are several."""
    stub_driver.start()

    @launch.planned
    def launcher(x, y, dims):
        both = torch.stack([x, y], dim=0)
        out = torch.empty_like(both)
        torch.mul(both, 2, out=out)
        first, second = out.unbind(0)
        mean = torch.sum(input=out, dim=dims)
        return [first.clone(), (second, None, x)], mean

    for turn in range(3):
        x, y, dims = torch.randn(2, 3), torch.randn(2, 3), [0, 1]
        (first, (second, none, same)), mean = launcher(x, y, dims)
        assert torch.equal(first, 2 * x) and torch.equal(second, 2 * y) and none is None and same is x, turn
        torch.testing.assert_close(mean, 2 * (x + y).sum(0))
        dims[:] = [2]
        assert torch.equal(launcher(x, y, dims)[1], 2 * torch.stack([x, y]).sum(2)), turn


def tensors_are_allocated_as_they_were():
    """One that torch writes to or turns right after it was made, alone or behind another one."""
    stub_driver.start()

    @launch.planned
    def launcher(x):
        first, second = torch.empty_like(x), x.new_empty(2, 3)
        second.t_()
        torch.mul(x, 2, out=first)
        third = x.new_empty(4, 5).t_()
        return first, second, third

    for _ in range(3):
        x = torch.randn(2, 3)
        first, second, third = launcher(x)
        assert torch.equal(first, 2 * x)
        assert second.shape == (3, 2) and second.stride() == (1, 3)
        assert third.shape == (5, 4) and third.stride() == (1, 5)


def numbers_of_other_types_have_other_plans():
    """1, 1.0 and True are equal, as are 0.0 and -0.0; NaN is not equal to itself. Constants are compiled in: C++ is not
    given them, and this is of what a launcher is given."""
    driver, by_jit = stub_driver.start_uncompiled(by_plan=False)
    calls = []

    @launch.planned
    def launcher(x, value, values):
        calls.append((value, values))
        _call(x, None, 64, 3, scale=value if value is not None else values[0])
        return x

    x, nan = torch.zeros(64), float("nan")
    kinds = [
        *((value, []) for value in (1, 1.0, True, 0, 0.0, -0.0, False, nan, float("inf"), -float("inf"))),
        *((None, [value]) for value in (1, 1.0, True, 0.0, -0.0, nan)),
        *((None, (value,)) for value in (1, 1.0)),
        (None, [1, 1.0]),
        (None, [1.0, 1]),
    ]
    for _ in range(3):
        for turn, (value, values) in enumerate(kinds):
            launcher(x, float("nan") if value is nan else value, values)
            constant = driver.launches[-1][3][4]
            right = value if value is not None else values[0]
            assert type(constant) is type(right) and repr(constant) == repr(right), (turn, constant, right)
    assert len(calls) == len(kinds)
    # By key as well: what is equal may be compiled apart.
    chosen = {}
    for _ in range(2):
        for scale in (1, 1.0, True, 0.0, -0.0):
            launch.launch(_kernel, 3, x, None, 64, 3, SCALE=scale, DTYPE=tl.float32, BLOCK=64, num_warps=4)
            chosen.setdefault(repr(scale), set()).add((driver.launches[-1][2], repr(driver.launches[-1][3][4])))
    assert all(len(found) == 1 and repr(scale) for scale, found in chosen.items())
    assert {next(iter(found))[1] for found in chosen.values()} == set(chosen)


def constants_of_other_names_are_other_constants():
    """Two call sites that name a kernel's constants in another order, with values that would be taken for each other's:
    the second one goes through the JIT."""
    driver, by_jit = stub_driver.start_uncompiled()
    x = torch.zeros(256)
    for _ in range(2):
        launch.launch(_kernel, 3, x, None, 64, 3, SCALE=64, DTYPE=tl.float32, BLOCK=128, num_warps=4)
        first = driver.launches[-1][2]
        launch.launch(_kernel, 3, x, None, 64, 3, BLOCK=64, DTYPE=tl.float32, SCALE=128, num_warps=4)
        assert driver.launches[-1][2] != first and driver.launches[-1][3][4:] == (128, tl.float32, 64)


def what_changes_between_calls_is_seen():
    """The stream, hooks that come and go, a hook of the kernel's own, block sizes in use, and the grad mode."""
    driver, by_jit = stub_driver.start()
    x = torch.randn(4, 6, 8)

    def done():
        driver.launches.clear()
        by_jit.clear()
        result = _planned(x, x, [0], 1.5, True)
        return driver.launches[-1], len(by_jit), result

    done()
    (grid, stream, kernel, arguments), compiled, _ = done()
    assert stream == 77 and not compiled
    driver.get_current_stream = lambda device: 1234
    assert done()[0][1] == 1234  # a graph is captured on a stream of its own
    del driver.get_current_stream
    seen = []
    _kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(1))
    launched, by, _ = done()
    assert by == 0 or seen  # a plan has no place for it, and does without: Triton's tuner alone has such hooks
    _kernel.pre_run_hooks.clear()
    with launch._unplanned():
        assert done()[0][1] == 77
    y = x.clone().requires_grad_()
    x = y
    assert done()[0][2] == kernel
    with torch.no_grad():
        assert done()[0][2] == kernel
    with torch.inference_mode():
        x = y.detach().clone()
        assert done()[0][2] == kernel
    # A plan that was made while somebody listened would launch by key for good: it is made anew.
    hook = triton.knobs.runtime.launch_enter_hook

    def on_enter(metadata):
        seen.append(2)

    x = torch.randn(5, 5)
    hook.add(on_enter)
    _planned(x, x, [0], 1.5, True)
    hook.remove(on_enter)
    _planned(x, x, [0], 1.5, True)
    by_jit.clear()
    _planned(x, x, [0], 1.5, True)
    assert not by_jit and 2 in seen


def every_plan_launches_on_the_stream_of_its_call():
    """All launchers by their examples, as a capture has it, which runs on a stream of its own: each launch of a plan is
    on the stream that is current at that call, and nothing but allocations, torch's operators and launches is done."""
    driver, _ = stub_driver.start_uncompiled()
    for name in aot.modules():
        module = aot._module(name)
        if name not in stub_driver.OF_THEIR_SIZE:
            module.torch = stub_driver._Small()
        for stream in (77, 1234, 77, 5):
            driver.get_current_stream = lambda device, stream=stream: stream
            driver.launches.clear()
            module.examples(torch.float32)
            assert driver.launches and {place[1] for place in driver.launches} == {stream}, (name, stream)
        module.torch = torch


def plans_are_for_the_device_of_their_tensors():
    """Whichever device is current when a plan is made and when it runs: the launch is on that of the tensors, and its
    stream is that device's. What the guard does is for a machine with two devices to show; here, that it is asked for."""
    driver, _ = stub_driver.start_uncompiled()
    current, switched = 0, []
    driver.get_current_device = lambda: current

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            nonlocal current
            self.before, current = current, self.device
            switched.append(self.device)

        def __exit__(self, *error):
            nonlocal current
            current = self.before

    class There(torch.Tensor):
        """On device 1, as launchers ask."""

        def get_device(self):
            return 1

    @launch.planned
    def launcher(x):
        _call(x, None, 64, 3)
        return x

    torch.cuda.device = Guard
    x = torch.zeros(64).as_subclass(There)
    for at in (0, 0, 1, 0, 1, 2):
        current = at
        switched.clear()
        driver.launches.clear()
        assert launcher(x) is x and current == at
        assert [place[1] for place in driver.launches] == [78], at
        assert switched == ([] if at == 1 else [1]), at


def block_sizes_that_change_reach_every_launch():
    """A variant that is tried is launched, whatever plans there are; afterwards the kernel's own is, by its old plan;
    and none is made of the variant's launches."""
    from gankern.triton import bias_act

    driver, by_jit = stub_driver.start_uncompiled()
    x = torch.zeros(4, 4, 8, 8)

    def launched():
        driver.launches.clear()
        bias_act.forward(x, None, 1, 2, 0.2, 1.0, None)
        ((grid, _, kernel, arguments),) = driver.launches
        return grid, kernel, arguments[-1]

    launched()
    own = launched()
    others = []
    for _ in range(2):
        for variant in bias_act.BLOCKS.variants[1:]:
            with bias_act.BLOCKS.use(variant):
                others += [launched(), launched()]
            by_jit.clear()
            assert launched() == own and not by_jit
    assert own not in others
    assert len(set(others)) == len(bias_act.BLOCKS.variants) - 1


def what_was_made_may_lie_elsewhere():
    """Memory whose remainder by 16 is another one than when the plan was made has the kernel for that."""
    driver, by_jit = stub_driver.start_uncompiled(by_plan=False)  # what C++ allocates is not for Python to shift
    shift = 0

    @launch.planned
    def launcher(x):
        out = x.new_empty(64)
        _call(out, x, 64, 3)
        return out

    plain = launch.EMPTY["cpu"]
    launch.EMPTY["cpu"] = lambda shape, strides, dtype: plain((shape[0] + shift,), strides, dtype)[shift:]
    x = torch.zeros(64)
    launcher(x)
    aligned = driver.launches[-1][2]
    for shift in (0, 1, 4, 0, 3):
        launcher(x)
        *_, kernel, _ = driver.launches[-1]
        assert (kernel == aligned) == (shift % 4 == 0), shift


def amd_kernels_are_for_memory_of_their_size():
    """AMD's compiler counts in 32 bits within a storage of less than 2 GiB: a view of a larger one has another kernel,
    whatever its shape is."""
    stub_driver.GPU = stub_driver.GPUTarget("hip", "gfx942", 64)
    launch.BY_MEMORY = True
    driver, by_jit = stub_driver.start_uncompiled()
    small, large = torch.empty(1024), torch.empty(2**31, dtype=torch.int8).view(torch.float32)  # not touched
    assert large.untyped_storage().nbytes() > launch.NARROW >= small.untyped_storage().nbytes()

    def chosen(x):
        _call(x, None, 64, 3)
        by_key = driver.launches[-1][2]
        _planned(small, x, [0], 1.5, True)
        return by_key, driver.launches[-1][2]

    x, view = small[:64], large[:64]
    first, other = chosen(x), chosen(view)
    assert first[0] != other[0] and first[1] != other[1]
    by_jit.clear()
    for _ in range(2):
        assert chosen(view) == other and chosen(x) == first
    assert not by_jit


def grids_that_a_device_does_not_take_are_refused():
    """Of 2^32 programs Triton's launcher, which counts in 32 bits, would launch none and say nothing."""
    driver, _ = stub_driver.start()
    x = torch.zeros(64)
    for programs in (2**31, (2**16, 2**16), (1, 2**16), (2**20, 2**12)):
        try:
            launch.launch(_kernel, programs, x, None, 64, 3, SCALE=1.5, DTYPE=tl.float32, BLOCK=64, num_warps=4)
        except ValueError as error:
            assert "programs" in str(error)
        else:
            raise AssertionError(programs)
    assert not driver.launches


def sizes_past_32_bits_have_plans_of_their_own():
    """Of views that repeat one element: what is as large as it looks, and takes no memory."""
    driver, by_jit = stub_driver.start_uncompiled()

    @launch.planned
    def launcher(x):
        _call(x, None, x.numel(), x.stride(0))
        return None

    one, kernels = torch.zeros(64), {}
    for _ in range(2):
        for count in (2**31 - 1, 2**31, 2**31 + 16, 2**32, 2**33 + 1):
            launcher(one[:1].expand(count))
            assert driver.launches[-1][3][2] == count
            kernels.setdefault(count, set()).add(driver.launches[-1][2])
    assert all(len(found) == 1 for found in kernels.values())
    assert kernels[2**31 - 1] != kernels[2**31] == kernels[2**32] != kernels[2**33 + 1]


def first_launches_within_a_capture_say_what_to_do():
    """The driver loads no kernel while a graph is captured. What was launched before can be captured."""
    driver, _ = stub_driver.start()
    x = torch.zeros(64)
    _call(x, None, 64, 3)
    plain, refused = driver.load_binary, "Triton Error [CUDA]: operation not permitted when stream is capturing"

    def load_binary(*given):
        raise RuntimeError(refused)

    driver.load_binary, launch.capturing = load_binary, lambda device: True
    _call(x, None, 64, 3)
    try:
        _call(x, x, 64, 3)
    except RuntimeError as error:
        assert "_kernel: a kernel's first launch cannot be captured" in str(error) and refused in str(error)
    else:
        raise AssertionError
    launch.capturing = lambda device: False
    try:
        _call(x.double(), None, 64, 3)
    except RuntimeError as error:
        assert str(error) == refused
    else:
        raise AssertionError
    driver.load_binary = plain
    _call(x, x, 64, 3)


def plans_after_a_fork():
    """Another process launches by the plans of the first one."""
    import os

    driver, _ = stub_driver.start()
    x = torch.randn(4, 6, 8)
    _planned(x, x, [0], 1.5, True)
    kernel = driver.launches[-1][2]
    child = os.fork()
    if child == 0:
        out, total, _ = _planned(x + 1, x, [0], 1.5, True)
        fine = driver.launches[-1][2] == kernel and torch.equal(total, (x + 1).sum(0, dtype=torch.float64))
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0


def settings_of_torch_do_not_reach_plans():
    """The default dtype and device, deterministic algorithms and autocast: what is allocated stays as it was."""
    stub_driver.start()
    x = torch.randn(4, 6, 8)
    right = _planned(x, x, [0], 1.5, True)
    facts = [(r.shape, r.dtype, r.device) for r in right]

    def same():
        return [(r.shape, r.dtype, r.device) for r in _planned(x, x, [0], 1.5, True)] == facts

    torch.set_default_dtype(torch.float64)
    assert same()
    torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert same()
    torch.use_deterministic_algorithms(True)
    assert same()
    torch.use_deterministic_algorithms(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert same()


def every_plan_is_what_its_launcher_does():
    """All launchers by their examples: a plan's launches and results are those of the launcher without one, on
    arguments of which one after the other is shifted in memory, strided otherwise, of another type, or missing."""
    driver, _ = stub_driver.start_uncompiled()
    tried = 0
    for name in aot.modules():
        module, calls = aot._module(name), []
        entries = stub_driver.launchers(module)
        # The callers of sums have plans, and instance norm's launchers call group norm's.
        assert entries or name in ("sums", "instance_norm_act"), name
        vars(module).update({key: stub_driver._recorder(value, driver, calls) for key, value in entries.items()})
        if name not in stub_driver.OF_THEIR_SIZE:
            module.torch = stub_driver._Small()
        module.examples(torch.float32)
        vars(module).update(entries, torch=torch)
        done = set()
        for function, given, _ in calls:
            kind = function.__name__, tuple(map(type, given))
            if kind in done:
                continue
            done.add(kind)
            for arguments in _changed(given):
                tried += 1
                _compare(driver, name, function, arguments)
    assert tried > 150, tried
    assert driver.by_plan > tried or not (stub_driver.BY_PLAN and native.NODES_MISSING is None)


def _changed(given):
    """The arguments, and these with one of them changed."""
    yield given
    for place, argument in enumerate(given):
        for other in _others(argument):
            yield (*given[:place], other, *given[place + 1 :])
    yield given


def _others(argument):
    if isinstance(argument, torch.Tensor) and argument.numel():
        room = torch.zeros(argument.numel() + 1, dtype=argument.dtype)
        yield torch.as_strided(room[1:], argument.shape, torch.empty_like(argument).stride())
        if argument.ndim > 1:
            yield torch.zeros(*argument.shape[:-1], 2 * argument.shape[-1], dtype=argument.dtype)[..., ::2]
    elif isinstance(argument, list) and argument and isinstance(argument[0], torch.Tensor):
        for other in _others(argument[0]):
            yield [other, *argument[1:]]
    elif type(argument) is float:
        yield argument * 0.5


def _compare(driver, name, function, arguments, other=None):
    """The launcher with and without its plan; or ``other``, which is to do the same."""

    def done(function):
        driver.launches.clear()
        results = function(*arguments)
        places = {}
        for r in torch.utils._pytree.tree_leaves((arguments, results)):
            if isinstance(r, torch.Tensor) and r.numel():
                places.setdefault(r.data_ptr(), len(places))
        launches = []
        for grid, stream, kernel, values in driver.launches:
            told = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
            # Of addresses: whose they are, or of memory on the way, how they lie.
            told = [
                ("of", places[v]) if v in places and type(v) is int else v % 16 if type(v) is int and v > 2**24 else v
                for v in told
            ]
            launches.append((grid, stream, kernel, repr(told)))
        facts = [
            (r.shape, r.stride(), r.dtype) if isinstance(r, torch.Tensor) else r
            for r in torch.utils._pytree.tree_leaves(results)
        ]
        return launches, facts, torch.utils._pytree.tree_structure(results)

    def outcome(plainly):
        try:
            with launch._unplanned() if plainly else contextlib.nullcontext():
                return done(function if plainly else other or function)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if "planned launcher" in str(error):
                raise
            return type(error)

    right = outcome(True)
    for turn in range(3):
        assert outcome(False) == right, (name, function.__name__, turn)


def signatures_tell_apart_what_calls_differ_in():
    """Of each two lists of arguments: C++ has one key for both where Python has. And what C++ leaves to Python."""
    x = torch.zeros(4, 6, 8)
    room = torch.zeros(4 * 6 * 8 + 8)
    tensors = [
        x,
        torch.zeros(4, 6, 8),
        x.double(),
        x.half(),
        x.int(),
        x.view(torch.int32),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x[:, :, ::2],
        x[..., :4],
        x.expand(2, 4, 6, 8),
        x.flatten(),
        x.reshape(4, 48),
        x.reshape(24, 8),
        *(room[offset : offset + 192].view(4, 6, 8) for offset in range(1, 6)),
        x[:0],
        x.sum(),
        torch.zeros(1),
        torch.zeros(4, 6, 8, device="meta"),
    ]
    numbers = [0, 1, -1, 2, 2**31, 2**62, -(2**63), True, False, 0.0, -0.0, 1.0, 1.5, float("nan"), float("inf"), None]
    texts = ["", "a", "b", "backward", "backwards", "forward", "a long text of more than one word", "\0", "\0\0"]
    lists = [[], (), [None], (None,), [x], (x,), [x, x], [x, None], [None, x], [0, 1], (0, 1), [1], ["a"], [0.0, -0.0]]
    calls = [(entry,) for entry in (*tensors, *numbers, *texts, *lists)]
    calls += [(), (x, x), (x, None), ([x], x), ([x, x],), ([], [x]), ([x], []), ((x,), 1), ("a", "b"), ("ab",), (0, 1)]
    readers = {}
    keys = [(native.nodes.signature(call, False), launch._read(readers, call)) for call in calls]
    again = [(native.nodes.signature(call, False), launch._read(readers, call)) for call in calls]
    assert not any(known is NotImplemented for known, _ in keys)
    for one, known, by_python in zip(calls, *zip(*keys)):
        for other, other_known, other_by_python in zip(calls, *zip(*again)):
            same = by_python == other_by_python
            assert (known == other_known) == same and (known != other_known) == (not same), (one, other)
            assert not same or hash(known) == hash(other_known)
    assert keys[0][0] != keys[0][1] and keys[0][0] != 3
    # A parameter is a tensor, as kernels see it.
    assert native.nodes.signature((torch.nn.Parameter(x),), False) == native.nodes.signature((x,), False)
    large = torch.empty(2**31, dtype=torch.int8).view(torch.float32)[:64]
    small = torch.empty(64)
    for by_memory in (False, True):
        one, other = (native.nodes.signature((t,), by_memory) for t in (large, small))
        assert (one != other) == by_memory

    class Number(int):
        pass

    class Other(torch.Tensor):
        pass

    batched = []
    torch.vmap(lambda row: batched.append(native.nodes.signature((row,), False)) or row)(x)
    left = [2**63, Number(3), x.as_subclass(Other), x.to_sparse(), torch.float32, x.device, {}, {1}, [[[1]]], "\ud800"]
    assert batched == [NotImplemented]
    for argument in left:
        for call in ((argument,), ([x, argument],)):
            assert native.nodes.signature(call, False) is NotImplemented, call
    for wrong in ([x], x, None):
        assert native.nodes.signature(wrong, False) is NotImplemented


def addresses_are_those_of_the_tensors():
    """Some bytes behind the first element of each, 0 for None, by C++ as by Python, which a subclass has."""

    class Other(torch.Tensor):
        pass

    x, y = torch.zeros(64), torch.zeros(64, dtype=torch.float64)[3:]
    for one in (x, x.as_subclass(Other)):
        places = [(one, 0), None, (y, 16), (one, -8), None]
        right = (x.data_ptr(), 0, y.data_ptr() + 16, x.data_ptr() - 8, 0)
        tensors, addresses = launch._addresses_of(places)
        found = addresses(tensors)
        assert tuple(found) == right and len(found) == 5 and found == addresses(tensors)
        assert hash(found) == hash(addresses(tensors))
        assert found != addresses((one, None, one, one, None))


def groups_follow_their_tensors():
    """Spectral norm of a group whose weights are exchanged, moved, laid out otherwise, made of another type, or given
    twice: the launches of a plan are those of the launcher without one, and each table has the addresses of its call."""
    from gankern.triton import spectral_norm as sn

    driver, _ = stub_driver.start_uncompiled()
    weights = [torch.empty(16, 8, 3, 3) for _ in range(3)]
    us, vs, state = [torch.empty(16)] * 3, [torch.empty(72)] * 3, torch.empty(3 + 3 * 88)
    dims, tables = [0] * 3, []
    upload, lookup = sn.PointerTables.upload, sn.PointerTables.__call__

    def looked_up(self, addresses):
        table = lookup(self, addresses)
        assert torch.equal(table, upload(self, addresses, torch.empty_like(table)))
        tables.append([place[1:] for place in table.view(3, -1).tolist()])
        return table

    sn.PointerTables.__call__ = looked_up

    def done():
        found = []
        for launcher, given in (
            (sn.forward, (weights, us, vs, dims, 1, 1e-12, True, False)),
            (sn.backward, (grads, weights, state, dims)),
            (sn.double_backward, (grads, grads, weights, state, dims)),
        ):
            driver.launches.clear()
            tables.clear()
            results = torch.utils._pytree.tree_leaves(launcher(*given))
            (table,) = tables
            for row, weight, grad in zip(table, weights, grads):
                if launcher is sn.forward or grad is not None:
                    assert row[0] == weight.data_ptr()
            new = {r.data_ptr() for r in results if r.numel()}
            places = [[0 if address in new else address for address in row] for row in table]
            if launcher is sn.forward:  # new u and new v lie in the state
                places = [row[:4] for row in places]
            kernels = [(grid, kernel) for grid, _, kernel, _ in driver.launches]
            facts = [(r.shape, r.stride(), r.dtype) for r in results]
            found.append((kernels, facts, places))
        return found

    def check():
        with launch._unplanned():
            right = done()
        for _ in range(3):
            assert done() == right

    for step in range(8):
        if step == 1:
            weights[0], weights[1] = weights[1], weights[0]
        if step == 2:
            weights[2].data = torch.empty(16, 8, 3, 3)
        if step == 3:
            weights[1].data = weights[1].data.contiguous(memory_format=torch.channels_last)
        if step == 4:
            weights[0] = weights[2]
        if step == 5:
            weights[1] = torch.empty(16 * 72 + 1)[1:].view(16, 8, 3, 3)
        if step == 6:
            weights[:] = [weight.double() for weight in weights]
            us, vs, state = [us[0].double()] * 3, [vs[0].double()] * 3, state.double()
        grads = list(weights)
        if step == 7:
            grads[1] = None
        check()


def layers_cost_little():
    """A group of 11 layers, whose three kernels are launched with what they are given, calls less than two of the JIT's
    launches do. Counted: a time would be the machine's."""
    jit = stub_driver.host_cost(stub_driver.calls_of)["jit"]
    cost = {key: stub_driver.calls_of(call) for key, call in stub_driver.recorded_launchers(("spectral_norm",)).items()}
    assert cost["spectral_norm.forward", 11, 3] < 2 * jit, (cost, jit)
    assert cost["spectral_norm.backward", 11, 2] < 2 * jit, (cost, jit)


def plans_are_few():
    stub_driver.start()
    calls = []

    @launch.planned
    def launcher(x, number):
        calls.append(number)
        return x.new_empty(number)

    x = torch.zeros(3)
    for number in (*range(launch.PLANS + 1), launch.PLANS, 0):  # the oldest one is gone
        assert launcher(x, number).shape == (number,)
    assert calls == [*range(launch.PLANS + 1), 0]


def plans_of_several_threads():
    stub_driver.start()
    x = torch.randn(4, 6, 8)

    def work(k):
        for n in range(1, 5):
            for _ in range(3):
                out, total, _ = _planned(x[:n], x, [0], 1.5 + k % 2, True)
                assert out.shape == x[:n].shape and torch.equal(total, x[:n].sum(0, dtype=torch.float64)), n

    in_threads(*(functools.partial(work, k) for k in range(4)))


def plans_go_in_several_threads():
    """The oldest ones, where each call brings another signature."""
    import itertools
    import threading

    sys.setswitchinterval(1e-6)
    launch.PLANS = 3
    plans, failed, numbers = {}, [], itertools.count()

    def work():
        try:
            for _ in range(50_000):
                launch._put(plans, next(numbers), None)
        except RuntimeError as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    launch._put(plans, next(numbers), None)
    assert len(plans) == 3


def hooks_see_planned_launches():
    driver, by_jit = stub_driver.start()
    x, seen = torch.randn(4, 6, 8), []
    for _ in range(2):
        _planned(x, x, [0], 1.5, True)
    by_jit.clear()
    hook = triton.knobs.runtime.launch_enter_hook

    def on_enter(metadata):
        seen.append(metadata.get()["name"])

    hook.add(on_enter)
    _planned(x, x, [0], 1.5, True)
    hook.remove(on_enter)
    _planned(x, x, [0], 1.5, True)
    assert seen == ["_kernel"] and len(by_jit) == 1


def the_way_of_this_triton_is_known():
    assert launch._known_way()
    from triton.backends.nvidia.driver import CudaLauncher

    assert launch._source_of_launcher(CudaLauncher) in launch.KNOWN_LAUNCHERS
    stub_driver.start(by_plan=False)  # another driver, whose streams are not torch's
    assert not launch._launches_natively(stub_driver.StubDriver) and not launch._launches_natively(CudaLauncher)


def host_cost():
    """A launch by key calls fewer functions than the JIT's, a whole planned launcher with what it allocates a quarter."""
    cost = stub_driver.host_cost(stub_driver.calls_of)
    assert cost["handle"] < cost["jit"], cost
    assert cost["planned"] < cost["jit"] / 4, cost


def no_global_constants():
    """They would be compared at each launch through the JIT."""
    for module in aot.modules():
        for name, value in vars(aot._module(module)).items():
            assert not isinstance(value, tl.constexpr), (module, name)
            if isinstance(value, triton.runtime.jit.JITFunction):
                value.cache_key  # noqa: B018  (collects the globals that it reads)
                assert not value.used_global_vals, (module, name, value.used_global_vals)


# ---- plans that C++ runs: csrc/autograd/plans.cpp ---------------------------------------------------------------


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
    parameter = launch._NativePlan._parameter

    def elsewhere(self, kind, value):  # as if it had been written down of memory at another remainder by 16
        source, number, at = parameter(self, kind, value)
        return source, number, at ^ 8

    launch._NativePlan._parameter = elsewhere
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
    launched = launch.array.array("q", (0, 1, 1, 1, 128, 0, 0)).tobytes()
    for device, ran in ((0, True), (1, False), (-1, True)):
        plan = native.nodes.plan(device, 1, b"", launched, launch.array.array("q", (1, 0)).tobytes())
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
    stub_driver.BY_PLAN = sys.argv[2:] != ["by-python"]
    globals()[sys.argv[1]]()
