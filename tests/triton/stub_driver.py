"""A driver without a device: the JIT and what it compiles are Triton's own, a launch is put on record.

For a process without TRITON_INTERPRET, in which tensors are on the CPU. What C++ launches by a plan of its own is put
on the same record, as Triton's launcher would have been given it. `python -m tests.triton.stub_driver` prints what a
launch costs the host.
"""

import functools
import json
import sys
import timeit
from typing import ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from gankern.core import native
from gankern.triton import aot, launch

GPU = GPUTarget("cuda", 90, 32)
BY_PLAN = True  # C++ runs the plans that it can run; else Python does


class StubDriver:
    """An sm_90 device, or what GPU is, that loads kernels under numbers of its own, the same for the same binary."""

    def __init__(self):
        self.launches = []  # (grid, stream, function, arguments)
        self.by_plan = 0  # how many of them C++ launched
        self.loaded = {}
        self.sources = {}  # by function: the source that it was compiled of, warps and shared memory
        self.utils = self
        driver = self

        class Launcher:
            """As Triton's for CUDA; of kernels that ask for nothing but memory that their programs share."""

            num_ctas, launch_cooperative_grid, launch_pdl = 1, False, False
            global_scratch_size = profile_scratch_size = 0

            def __init__(self, source, metadata):
                driver.compiled = source, metadata and (metadata.num_warps, metadata.shared)

            def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, exit, *arguments):
                # As Triton's launcher in C does it.
                if enter is not None:
                    enter(launch_metadata)
                driver.launches.append(((x, y, z), stream, function, arguments))
                if exit is not None:
                    exit(launch_metadata)

        self.launcher_cls = Launcher

    def launched_by_plan(self, function, x, y, z, threads, shared, device, parameters):
        """Called in the driver's place by C++: puts on record what Triton's launcher would have been given for this,
        whose own arguments are compiled in where the signature says so."""
        source, (warps, memory) = self.sources[function]
        assert (threads, shared) == (32 * warps, memory)
        words = [parameters[at : at + 8] for at in range(0, len(parameters), 8)]
        arguments = []
        for place, kind in enumerate(source.signature.values()):
            if kind == "constexpr":
                arguments.append(source.constants[place,])
                continue
            size = 4 if kind == "i32" else 8
            assert kind.startswith("*") or kind in ("i32", "i64"), kind
            arguments.append(int.from_bytes(words.pop(0)[:size], sys.byteorder, signed=kind[0] == "i"))
        assert not words
        device = 0 if device >= 2**63 else device  # of the CPU's tensors it is -1
        self.by_plan += 1
        self.launches.append(((x, y, z), self.get_current_stream(device), function, tuple(arguments)))

    def get_current_target(self):
        return GPU

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 77 + device

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, binary, shared, device):
        source, *_ = self.compiled
        kind = name, binary, repr((source.signature, source.constants))
        function = self.loaded.setdefault(kind, len(self.loaded))
        self.sources[function] = self.compiled
        return 1, function, 32, 0, 1024


def start(by_plan=True):
    """The stub in the driver's place, and the list of the launches that went through the JIT. Without ``by_plan`` Python
    runs all plans."""
    driver = StubDriver()
    triton.runtime.driver.set_active(driver)
    if by_plan and BY_PLAN:
        launch._launches_natively = lambda launcher: launcher is driver.launcher_cls
        native.nodes.record_launches(driver.launched_by_plan, 0)
    by_jit = []
    run = JITFunction.run

    def counted(self, *args, **kwargs):
        by_jit.append(self)
        return run(self, *args, **kwargs)

    JITFunction.run = counted
    return driver, by_jit


class Uncompiled(CompiledKernel):
    """What stands for a compiled kernel: one number for each kind of arguments that the JIT compiles apart."""

    numbers: ClassVar[dict] = {}

    def __init__(self, kernel, kind, source, launcher):
        self.name, self.src, self.module = kernel.__name__, source, self
        self.function = self.numbers.setdefault((kernel.__name__, kind), len(self.numbers))
        self._run, self.metadata, self.packed_metadata = launcher, (), (4, 1, 0)


def start_uncompiled(by_plan=True):
    """As start, without compiling: a second or two a kernel."""
    driver, by_jit = start(by_plan)
    launcher = driver.launcher_cls(None, None)

    def stand_in(self, key, signature, device, constexprs, options, attrs, warmup):
        source = ASTSource(self, signature, constexprs, attrs)
        kernel = Uncompiled(self, repr((signature, constexprs, attrs, options)), source, launcher)
        driver.sources[kernel.function] = source, (4, 0)
        self.device_caches[device][0][key] = kernel
        return kernel

    JITFunction._do_compile = stand_in
    return driver, by_jit


def run(checks):
    """The check that the command line names, of a file of them."""
    global BY_PLAN
    BY_PLAN = sys.argv[2:] != ["by-python"]
    checks[sys.argv[1]]()


def calls_of(function):
    """How many functions, of Python or not, a call of it calls: what of its cost is the same on each machine."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def microseconds(function):
    # Slices of a millisecond: on a busy machine some of them are whole.
    return min(timeit.repeat(function, number=50, repeat=200)) / 50 * 1e6


def host_cost(measure=microseconds):
    """µs of a launch of the kernel of bias_act by handle and through the JIT, and of the whole launcher by its plan."""
    from gankern.triton import bias_act

    driver, by_jit = start(by_plan=False)  # the record of what C++ launches is made by Python
    x, y = torch.empty(2, 3, 8), torch.empty(2, 3, 8)
    arguments = ("forward", x, None, None, None, None, y, None, 1, 2, 0.2, 1.0, None)
    cost = {}
    for way, by_handle in (("jit", False), ("handle", True)):
        launch.BY_HANDLE = by_handle
        bias_act._launch(*arguments)
        cost[way] = measure(functools.partial(bias_act._launch, *arguments))
        driver.launches.clear()
    call = functools.partial(bias_act.forward, x, None, 1, 2, 0.2, 1.0, None)
    call()
    cost["planned"] = measure(call)
    driver.launches.clear()
    return cost


OF_THEIR_SIZE = ("spectral_norm", "self_attention2d", "sums", "group_norm_act")  # whose examples stay as they are


class _Small:
    """torch, with sizes from 16 on as 4: its operators then cost their calls alone."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *sizes, **options):
        return torch.empty(*(4 if isinstance(n, int) and n >= 16 else n for n in sizes), **options)


def _recorder(function, driver, calls):
    def call(*given):
        before = len(driver.launches)
        result = function(*given)
        calls.append((function, given, len(driver.launches) - before))
        return result

    return call


def launchers(module):
    """Its planned launchers, by name."""
    code = launch.planned(lambda: None).__code__
    return {key: value for key, value in vars(module).items() if getattr(value, "__code__", None) is code}


def _networks(forward, backward, double_backward):
    """Grouped spectral norm of a discriminator's layers, and of a generator and discriminator that are deep."""
    for layers in (11, 60):
        weights = [torch.empty(16, 8, 3, 3) for _ in range(layers)]
        us, vs, dims = [torch.empty(16)] * layers, [torch.empty(72)] * layers, [0] * layers
        _, state = forward(weights, us, vs, dims, 1, 1e-12, True, False)
        backward(weights, weights, state, dims)
        double_backward(weights, weights, weights, state, dims)


def recorded_launchers(only=None):
    """A call of every launcher in fp32, by (its name, the layers that it is of, the kernels that it launches)."""
    driver, _ = start_uncompiled(by_plan=False)  # the record of what C++ launches is made by Python
    found = {}
    for name in only or aot.modules():
        module, calls = aot._module(name), []
        orders = ("forward", "backward", "double_backward")  # instance norm's call group norm's, which have the plans
        entries = launchers(module) or {key: getattr(module, key) for key in orders if hasattr(module, key)}
        names = {function: key for key, function in entries.items()}
        recorders = {key: _recorder(function, driver, calls) for key, function in entries.items()}
        vars(module).update(recorders)
        if name not in OF_THEIR_SIZE:
            module.torch = _Small()
        module.examples(torch.float32)
        if name == "spectral_norm":
            _networks(**recorders)
        vars(module).update(entries, torch=torch)
        for function, given, kernels in calls:
            layers = len(given[0]) if isinstance(given[0], list) else 1
            key = f"{name}.{names[function]}", layers, kernels
            found.setdefault(key, functools.partial(function, *given))
    return found


def launcher_costs(number=20, repeat=30, rounds=8):
    """µs of each of recorded_launchers(). In rounds over all of them: what slows a machine down for a while is not one
    launcher's."""
    found = recorded_launchers()
    costs = dict.fromkeys(found, float("inf"))
    for _ in range(rounds):
        for key, call in found.items():
            cost = min(timeit.repeat(call, number=number, repeat=repeat)) / number * 1e6
            costs[key] = min(costs[key], cost)
    return costs


if __name__ == "__main__":
    print(json.dumps(host_cost()))
    for (launcher, layers, kernels), cost in launcher_costs().items():
        of_layers = f"{launcher}, {layers} layers" if layers > 1 else launcher
        print(f"{of_layers:48} {kernels} kernels {cost:6.1f} µs, {cost / kernels:5.1f} a kernel")
    sys.exit(0)
