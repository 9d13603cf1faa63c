"""Checks of launches by plans, which test_launch.py runs as those of launch_checks.py."""

import contextlib
import functools
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import stub_driver
from common import in_threads
from launch_checks import _call, _kernel

from gankern.core import native
from gankern.triton import aot, launch, tracing


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

    plain = tracing.EMPTY["cpu"]
    tracing.EMPTY["cpu"] = lambda shape, strides, dtype: plain((shape[0] + shift,), strides, dtype)[shift:]
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


if __name__ == "__main__":
    stub_driver.run(globals())
