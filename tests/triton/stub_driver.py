"""A driver without a device: the JIT and what it compiles are Triton's own, a launch is put on record.

For a process without TRITON_INTERPRET, in which tensors are on the CPU. `python -m tests.triton.stub_driver` prints what
a launch costs the host.
"""

import json
import sys
import timeit

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gankern.triton import launch


class StubDriver:
    """An sm_90 device that loads kernels under numbers of its own, the same for the same binary."""

    def __init__(self):
        self.launches = []  # (grid, stream, function, arguments)
        self.loaded = {}
        self.utils = self
        driver = self

        class Launcher:
            def __init__(self, source, metadata):
                pass

            def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, exit, *arguments):
                # As Triton's launcher in C does it.
                if enter is not None:
                    enter(launch_metadata)
                driver.launches.append(((x, y, z), stream, function, arguments))
                if exit is not None:
                    exit(launch_metadata)

        self.launcher_cls = Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 77 + device

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, binary, shared, device):
        return 1, self.loaded.setdefault((name, binary), len(self.loaded)), 32, 0, 1024


def start():
    """The stub in the driver's place, and the list of the launches that went through the JIT."""
    driver = StubDriver()
    triton.runtime.driver.set_active(driver)
    by_jit = []
    run = JITFunction.run

    def counted(self, *args, **kwargs):
        by_jit.append(self)
        return run(self, *args, **kwargs)

    JITFunction.run = counted
    return driver, by_jit


def host_cost():
    """µs of a launch of the kernel of bias_act: by handle, and through the JIT."""
    from gankern.triton import bias_act

    driver, by_jit = start()
    x, y = torch.empty(2, 3, 8), torch.empty(2, 3, 8)
    arguments = ("forward", x, None, None, None, None, y, None, 1, 2, 0.2, 1.0, None)
    cost = {}
    for way, by_handle in (("jit", False), ("handle", True)):
        launch.BY_HANDLE = by_handle
        bias_act._launch(*arguments)
        repeated = timeit.repeat(lambda: bias_act._launch(*arguments), number=500, repeat=9)
        cost[way] = min(repeated) / 500 * 1e6
        driver.launches.clear()
    return cost


if __name__ == "__main__":
    print(json.dumps(host_cost()))
    sys.exit(0)
