"""Checks of launches by key with the JIT itself, in a process without TRITON_INTERPRET: test_launch.py runs them.

python tests/triton/launch_checks.py NAME              each public function of a file of checks is one
python tests/triton/launch_checks.py NAME by-python    without what C++ launches by plans
"""

import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1]))
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


if __name__ == "__main__":
    stub_driver.run(globals())
