"""Checks of gankern.triton.launch with the JIT itself, in a process without TRITON_INTERPRET: test_launch.py runs it.

python tests/triton/launch_checks.py NAME      each function of this file is one
"""

import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parent))
import stub_driver

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
    for ask in (lambda x: x.sum().item(), lambda x: x.data_ptr(), lambda x: torch.stack([x, x])):
        try:
            launch.planned(ask)(torch.zeros(3))
        except RuntimeError as error:
            assert "planned launcher" in str(error)
        else:
            raise AssertionError("not refused")
    assert launch._thread.tracing is None


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
    import threading

    driver, _ = stub_driver.start()
    x, failed = torch.randn(4, 6, 8), []

    def work(k):
        for n in range(1, 5):
            for _ in range(3):
                out, total, _ = _planned(x[:n], x, [0], 1.5 + k % 2, True)
                if out.shape != x[:n].shape or not torch.equal(total, x[:n].sum(0, dtype=torch.float64)):
                    failed.append(n)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


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


def host_cost():
    """Loosely: a launch by handle costs less than two thirds of the JIT's, and a whole planned launcher, with what it
    allocates, less than that is."""
    cost = stub_driver.host_cost()
    assert cost["handle"] < cost["jit"] / 1.5, cost
    assert cost["planned"] < cost["jit"], cost


def no_global_constants():
    """They would be compared at each launch through the JIT."""
    for module in aot.modules():
        for name, value in vars(aot._module(module)).items():
            assert not isinstance(value, tl.constexpr), (module, name)
            if isinstance(value, triton.runtime.jit.JITFunction):
                value.cache_key  # noqa: B018  (collects the globals that it reads)
                assert not value.used_global_vals, (module, name, value.used_global_vals)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
