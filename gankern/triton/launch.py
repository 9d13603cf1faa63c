"""How every kernel is launched, and what all launchers share.

A launch through the JIT's own ``run`` binds the arguments, makes a string of their kinds, looks the kernel up by it,
and compares every global constant that the kernel reads with what it was when it was compiled: two to four times the
cost of torch's own launch. :func:`launch` goes that way once for each kind of arguments. The compiled kernel that comes
back is kept under a key that tells apart whatever Triton compiles apart, and is from then on launched by its handle:

    of a tensor        its dtype, device, and whether its address is a multiple of 16; on AMD's devices also whether
                       the memory that it looks at is of 2 GiB or more, which takes other instructions
    of a whole number  whether it is 1, whether it is a multiple of 16, and whether it needs 64 bits
    of None            that it is None
    of a constant      its name, its type and its value

Tensors travel as addresses: Triton's launcher asks the driver about an object that is not a number, and not about a
number. A tensor that is elsewhere than the others has a key that no compiled kernel stands under, and comes to the JIT,
which refuses it. While a hook or a setting of `triton.knobs` is in force, as profilers and debuggers put it, all
launches go through the JIT, which knows them; and so they do where this Triton launches a compiled kernel in another
way than the one that is known here.

What a launcher does before it launches follows from its arguments' signature alone: it looks at shapes and strides,
chooses a grid, lays out what it allocates. :func:`planned` has it do that once. What it asked torch for and what it
launched is written down as a function of Python, and the next call with this signature runs that: it allocates and
launches, nothing else. Of a bias and a leaky ReLU, whose x has the signature that the plan is for:

    def plan(stream, a0, a1, a2, a3, a4, a5, a6):
        t2 = empty((64, 256, 64, 64), (1048576, 4096, 64, 1), float32)
        pt2 = t2.data_ptr()
        if stream is None or pt2 & 15 != 0:
            by_key(a0, a1, None, None, None, t2, None, None, 67108864, 256, 4096, 1)
        else:
            run(65536, 1, 1, stream, function, metadata, None, None, None, a0.data_ptr(), ...)
        return t2

What is read and made of many tensors at a time is read and made in one call of C++ (csrc/autograd/launch.cpp), where
that is built: the signature of all arguments, the addresses that a table is of, and tensors that are allocated one
behind the other. Without it Python does the same, tensor by tensor.

Most plans are nothing but tensors that are allocated on the current device and kernels that are launched by handle.
Such a plan is written down for C++ as well (csrc/autograd/plans.cpp), which then does all of a call: an operator of
`torch.ops.gankern` does not enter Python for it, and neither does a backward. C++ calls the driver as Triton's own
launcher for CUDA does, so it has only those compiled kernels that ask for nothing further (:func:`_native_kernel`),
and only where that launcher's source is the one that C++ repeats. It asks whether somebody listens, whether plans are
held off, and whether a launcher is being written down, at every call. With calls of other signatures, on another
device than the current one, or whose memory lies otherwise than the compiled kernels are for, it goes Python's way.

The device guard is here and nowhere else: torch's own functions have theirs. Launches go to the current stream.
"""

from __future__ import annotations

import array
import contextlib
import functools
import hashlib
import inspect
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, cast, overload

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.compiler import CompiledKernel
from triton.runtime import driver

from gankern.core import devices, native

INTERPRETED = bool(triton.knobs.runtime.interpret)
ALIGNMENT = 16  # of addresses and numbers: what Triton compiles apart
BY_MEMORY = torch.version.hip is not None  # AMD's compiler counts in 32 bits within memory of less than 2 GiB
NARROW = 2**31 - 1  # bytes
PROGRAMS, PROGRAMS_Y = 2**31 - 1, 65535  # of a launch, and along its second axis: what devices take at most


class Launch(NamedTuple):
    """One launch: a kernel, how many programs, and what they are given."""

    kernel: Any
    programs: int | tuple[int, ...]
    arguments: tuple[Any, ...]  # tensors, whole numbers and None: the kernel's first parameters, in their order
    constants: dict[str, Any]  # by the names of the kernel's other parameters
    num_warps: int


class _Handle(NamedTuple):
    """What launches a compiled kernel. `kernel` keeps the key, which has its id, from meaning another one; `compiled`
    keeps it loaded."""

    kernel: Any
    compiled: Any
    run: Any
    function: Any
    metadata: Any


def _known_way() -> bool:
    """Whether this Triton launches a compiled kernel as :func:`launch` does."""
    source = "".join(inspect.getsource(CompiledKernel.__getitem__).split())
    call = (
        "self.run(grid[0],grid[1],grid[2],stream,self.function,self.packed_metadata,launch_metadata,"
        "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*args)"
    )
    return call in source


RUNTIME, COMPILATION = triton.knobs.runtime, triton.knobs.compilation


def _nobody_listens() -> bool:
    """No hook, and no setting other than from the environment."""
    return not (
        RUNTIME.__dict__ or COMPILATION.__dict__ or RUNTIME.launch_enter_hook.calls or RUNTIME.launch_exit_hook.calls
    )


# The launchers for CUDA that csrc/autograd/plans.cpp does the work of: what _source_of_launcher gives of Triton's
# versions.
KNOWN_LAUNCHERS = {
    "a594429c749910baf95235bf116f679b54aa4d9adf6ca2f24dc3ac804eed9a3f": "3.6.0",
    "ba2226a43bddf2faae8781a10cc50e984b05015c8554a2a2c350b7a3830b0e3f": "3.7.1",
    "4305a13866a4d3e989d810dd2915ea23d574a98a68b55c09738a182f2afb4283": "3.8.0",
    "dbbeebe5fb9f697981793dd57d20b87b95ce7dff0b8bb436ad69bcf704f597d1": "3.9.0",
}
MORE_SHARED_MEMORY = 228 * 1024  # bytes, from which on launchers ask for a mode of the device
# What a kernel's parameter holds, of the kinds that are written down for C++. Addresses are numbers of 64 bits.
NUMBERS = {"i32": range(-(2**31), 2**31), "i64": range(-(2**63), 2**63)}


@functools.cache
def _launches_natively(launcher: Hashable) -> bool:
    """Whether what launches compiled kernels is Triton's launcher for CUDA, as C++ knows it, on torch's streams."""
    try:
        known = _source_of_launcher(launcher) in KNOWN_LAUNCHERS
        return known and driver.active.get_current_stream is torch._C._cuda_getCurrentRawStream
    except (AttributeError, KeyError, OSError, TypeError):  # another launcher, or without its source
        return False


def _source_of_launcher(launcher: Any) -> str:
    """A number of all of Triton's driver for CUDA: launchers are in Python there, in C, or in C that Python writes."""
    driver_py = Path(inspect.getfile(launcher))
    return hashlib.sha256(driver_py.read_bytes() + driver_py.with_suffix(".c").read_bytes()).hexdigest()


class _NativeKernel(NamedTuple):
    """What C++ launches a compiled kernel with."""

    function: int
    threads: int
    shared: int
    kinds: tuple[str, ...]  # of all parameters; "constexpr" of those that were compiled in


def _native_kernel(handle: _Handle) -> _NativeKernel | None:
    """None for a kernel that asks for more than a plain launch: then Triton's launcher has it."""
    run, source = handle.run, handle.compiled.src
    if torch.version.hip or not _launches_natively(run.__class__):
        return None
    if run.global_scratch_size or run.profile_scratch_size or run.launch_cooperative_grid or run.launch_pdl:
        return None
    warps, programs, shared = handle.metadata
    if programs != 1 or run.num_ctas != 1 or shared > MORE_SHARED_MEMORY or getattr(run, "gsan_enabled", False):
        return None
    return _NativeKernel(handle.function, 32 * warps, shared, tuple(source.signature.values()))


BY_HANDLE = not INTERPRETED and _known_way()
_handles: dict[tuple, _Handle] = {}
_record: list[Launch] | None = None


class _Thread(threading.local):
    """The launcher that this thread writes down the steps of, if any."""

    tracing: _Tracing | None = None


_thread = _Thread()


def launch(
    kernel: Any, programs: int | tuple[int, ...], *arguments: Tensor | int | None, num_warps: int, **constants: Any
) -> _Handle | None:
    """Launches ``programs`` programs of a kernel on the device of its tensors, on its current stream.

    ``arguments`` are the kernel's first parameters, in their order: tensors, whole numbers, None. Fractions are passed
    as constants, as everything else that the kernel declares ``tl.constexpr``: an argument would be rounded to fp32.
    Returns the handle that such a launch has from now on, if any.
    """
    if _thread.tracing is not None:
        return _thread.tracing.launched(Launch(kernel, programs, arguments, constants, num_warps))
    if _record is not None or not BY_HANDLE:
        return _launch_by_jit(None, Launch(kernel, programs, arguments, constants, num_warps))
    x, y = programs if isinstance(programs, tuple) else (programs, 1)
    if x * y > PROGRAMS or y > PROGRAMS_Y:  # of so many programs Triton's launcher launches none, without a word
        name = kernel.__name__
        raise ValueError(f"{name}: {x} x {y} programs; at most {PROGRAMS} are accepted, {PROGRAMS_Y} along the second")
    key: list[Any] = [id(kernel), num_warps, *constants]
    values: list[Any] = []
    device = -1
    argument: Any
    for argument in arguments:
        if argument is None:
            key.append(None)
        elif type(argument) is int:
            wide = 0 if -0x80000000 <= argument <= 0x7FFFFFFF else 2 if argument < 0x8000000000000000 else 4
            key.append(-1 if argument == 1 else wide + (not argument & 15))
        else:
            device = argument.get_device()
            key += (argument.dtype, device)
            if BY_MEMORY:
                key.append(argument.untyped_storage().nbytes() > NARROW)
            argument = argument.data_ptr()
            key.append(not argument & 15)
        values.append(argument)
    for value in constants.values():
        key += (type(value), value.hex() if type(value) is float else value)  # NaN is not equal to itself
        values.append(value)

    active = driver.active
    if device >= 0 and device != active.get_current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, *arguments, num_warps=num_warps, **constants)
    known = tuple(key)
    handle = _handles.get(known)
    if handle is None or kernel.pre_run_hooks or not _nobody_listens():
        return _launch_by_jit(known, Launch(kernel, programs, arguments, constants, num_warps))
    stream = active.get_current_stream(max(device, 0))
    handle.run(x, y, 1, stream, handle.function, handle.metadata, None, None, None, *values)
    return handle


def _launch_by_jit(key: tuple | None, request: Launch) -> _Handle | None:
    """Launches through the JIT, which compiles what it has not compiled yet, and keeps the compiled kernel."""
    kernel, programs, arguments, constants, num_warps = request
    if _record is not None:
        _record.append(request)
        return None
    grid = programs if isinstance(programs, tuple) else (programs,)
    captured = any(capturing(argument.device) for argument in arguments if isinstance(argument, Tensor))
    try:
        compiled = kernel[grid](*arguments, **constants, num_warps=num_warps)
    except RuntimeError as error:
        if captured:  # the driver loads no kernel meanwhile, and says that something is not permitted
            raise RuntimeError(
                f"{kernel.__name__}: a kernel's first launch cannot be captured in a CUDA graph; run the step once "
                f"before it is captured, on tensors of the same kinds ({error})"
            ) from error
        raise
    if key is None or not _nobody_listens() or not isinstance(compiled, CompiledKernel):
        return None
    # By handle, constants follow in the order of the call, and take their places only where that is the kernel's.
    if kernel.arg_names[len(arguments) :] == list(constants) and not kernel.pre_run_hooks:
        _handles[key] = _Handle(kernel, compiled, compiled.run, compiled.function, compiled.packed_metadata)
    return _handles.get(key)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block nothing is launched, but put into the list that is given: for checks that need no GPU."""
    global _record
    before, _record = _record, []
    try:
        with _unplanned():
            yield _record
    finally:
        _record = before


# ---- plans ------------------------------------------------------------------------------------------------------

PLANS = 512  # of a launcher; where one more comes, the oldest goes
# What a launcher may ask torch for that is no tensor: the signature decides it.
FACTS = {
    "__len__",
    "dim",
    "element_size",
    "get_device",
    "is_contiguous",
    "numel",
    "promote_types",
    "size",
    "stride",
}
ATTRIBUTES = {"device", "dtype", "is_cuda", "itemsize", "ndim", "shape"}
VIEWS = {"movedim", "view"}  # which begin where their tensor does
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty"}
# Of sizes, strides and dtype, on the current device: half the cost of torch.empty_strided.
EMPTY = {device: getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None) for device in ("cpu", "cuda")}
_held_off = 0  # how many ask for launchers without plans
native.nodes.set_launching(globals(), _thread, RUNTIME, COMPILATION)
F = TypeVar("F", bound=Callable[..., Any])


@contextlib.contextmanager
def _unplanned() -> Iterator[None]:
    """Within the block every launcher does all its work, in every thread."""
    global _held_off
    _held_off += 1
    try:
        yield
    finally:
        _held_off -= 1


def kept(function: F) -> F:
    """``functools.lru_cache`` for what a launcher computes by way of torch, which is then no step of its plan."""

    @functools.lru_cache(maxsize=4096, typed=True)
    def aside(*arguments: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*arguments)

    return cast(F, functools.wraps(function)(aside))


def constant(tensor: Tensor) -> Tensor:
    """The tensor, which a planned launcher made once for its signature and gives to its kernels at every call."""
    if _thread.tracing is not None:
        _thread.tracing.constant(tensor)
    return tensor


def of_addresses(make: Callable[[Addresses], Tensor], places: Sequence[tuple[Tensor, int] | None]) -> Tensor:
    """``make`` of the addresses of places, each so many bytes behind a tensor's first element; 0 for None. A plan calls
    it anew at each call, with the addresses that its tensors then have."""
    if _thread.tracing is not None:
        return _thread.tracing.of_addresses(make, places)
    tensors, addresses = _addresses_of(places)
    return make(addresses(tensors))


class Addresses(Hashable, Protocol):
    """A row of addresses, equal to another one where all of them are."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> int: ...


def _addresses_of(
    places: Sequence[tuple[Tensor, int] | None],
) -> tuple[tuple[Tensor | None, ...], Callable[[tuple[Tensor | None, ...]], Addresses]]:
    """The tensors of the places, and what reads the addresses of such tensors, as far behind each."""
    behind = array.array("q", [0 if place is None else place[1] for place in places])
    offsets, read = behind.tobytes(), native.nodes.addresses

    def addresses(tensors: tuple[Tensor | None, ...]) -> Addresses:
        known = read(tensors, offsets)
        if known is NotImplemented:
            return tuple([0 if t is None else t.data_ptr() + offset for t, offset in zip(tensors, behind)])
        return known

    return tuple([None if place is None else place[0] for place in places]), addresses


class _Plan(NamedTuple):
    """What a launcher does for a signature."""

    function: Callable[..., Any]  # of Python: plan(stream, a0, a1, ...)
    device: int  # that has to be the current one; -1 for none
    native: Any  # the same for C++, or None


# The numbers of csrc/autograd/plans.cpp: what a kernel's parameter holds, and what a result is made of.
NUMBER, GIVEN, MADE = range(3)
NOTHING, TUPLE, LIST = 0, 3, 4


class _NativePlan:
    """A plan for C++, as a launcher is written down: what is given, what is allocated, and what is launched on that."""

    def __init__(self) -> None:
        self.fits = True  # so far it is nothing else
        self.given = 0
        self.made: list[Tensor] = []
        self.places: dict[int, tuple[int, int]] = {}  # by a tensor's id: GIVEN or MADE, and its number among these
        self.viewed: dict[int, tuple[int, int]] = {}  # the same of views: kernels are given addresses
        self.kernels = array.array("q")

    def takes(self, tensor: Tensor) -> None:
        self.places[id(tensor)] = GIVEN, self.given
        self.given += 1

    def makes(self, tensor: Tensor, now: Tensor) -> None:
        self.places[id(tensor)] = MADE, len(self.made)
        self.made.append(now)

    def views(self, tensor: Tensor, of: Any) -> None:
        place = self.places.get(id(of), self.viewed.get(id(of)))
        if place is None or tensor.data_ptr() != of.data_ptr():
            self.fits = False
        else:
            self.viewed[id(tensor)] = place

    def launches(self, handle: _Handle, request: Launch) -> None:
        kernel = _native_kernel(handle)
        values = [*request.arguments, *request.constants.values()]
        if kernel is None or len(kernel.kinds) != len(values):
            self.fits = False
            return
        x, y = request.programs if isinstance(request.programs, tuple) else (request.programs, 1)
        parameters = array.array("q")
        for kind, value in zip(kernel.kinds, values):
            if kind != "constexpr":
                parameters.extend(self._parameter(kind, value))
        if x * y:  # of no programs Triton's launcher launches nothing
            count = len(parameters) // 3
            self.kernels.extend((kernel.function, x, y, 1, kernel.threads, kernel.shared, count))
            self.kernels.extend(parameters)

    def _parameter(self, kind: str, value: Any) -> tuple[int, int, int]:
        """NUMBER, GIVEN or MADE; the number, or which tensor; and how one that is made has to lie."""
        place = self.places.get(id(value), self.viewed.get(id(value)))
        if place is not None and kind.startswith("*"):
            return (*place, value.data_ptr() % ALIGNMENT)
        if type(value) is int and value in NUMBERS.get(kind, ()):
            return NUMBER, value, 0
        self.fits = False
        return NUMBER, 0, 0

    def finished(self, device: int, result: Any) -> Any:
        """The plan, or None where it is more than this."""
        self.fits = self.fits and BY_HANDLE and all(tensor.get_device() == device for tensor in self.made)
        returned = array.array("q", self._returned(result))
        if not self.fits:
            return None
        layouts = native.nodes.layouts(tuple(self.made))
        if layouts is NotImplemented:
            return None
        plan = native.nodes.plan(device, self.given, layouts, self.kernels.tobytes(), returned.tobytes())
        return None if plan is NotImplemented else plan

    def _returned(self, result: Any) -> Iterator[int]:
        if result is None:
            yield NOTHING
        elif type(result) in (tuple, list):
            yield from (TUPLE if type(result) is tuple else LIST, len(result))
            for entry in result:
                yield from self._returned(entry)
        elif id(result) in self.places:
            yield from self.places[id(result)]
        else:
            self.fits = False


class _Tracing(TorchFunctionMode):
    """Writes down what a launcher does, as a function of Python: ``plan(stream, a0, a1, ...)``.

    Tensors have names there: a0, or a1_0 of a list, are arguments; t5 was made on the way, and pt5 is its address.
    What the signature decides is written out, or c3 is a name of it.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        self.alive: list[Tensor] = []  # so that an id is of one of these
        self.given: dict[int, Tensor] = {}  # arguments by the ids of their aliases
        self.values: dict[str, Any] = {}
        self.lines: list[str] = []
        self.pointers: set[str] = set()  # that were written down
        self.allocated: list[tuple[str, Tensor]] = []  # and not written down yet
        self.whole = True  # every launch has a handle
        self.native = _NativePlan()
        self.arguments = [self._argument(argument, f"a{place}") for place, argument in enumerate(arguments)]
        self.device = self.alive[0].get_device()

    # -- what goes in

    def _argument(self, argument: Any, name: str) -> Any:
        if isinstance(argument, Tensor):
            alias = argument.detach()  # one tensor may be given twice now, and two the next time
            self.given[id(alias)] = argument
            self._bind(alias, name)
            self.native.takes(alias)
            return alias
        if type(argument) in (list, tuple) and any(isinstance(entry, Tensor) for entry in argument):
            self._line("".join(f"{name}_{place}, " for place in range(len(argument))) + f"= {name}")
            return [self._argument(entry, f"{name}_{place}") for place, entry in enumerate(argument)]
        return argument

    def _bind(self, tensor: Tensor, name: str) -> str:
        self.alive.append(tensor)
        self.names[id(tensor)] = name
        return name

    def constant(self, tensor: Tensor) -> None:
        self._bind(tensor, self._value(tensor))

    # -- how it is written

    def _line(self, text: str, depth: int = 1) -> None:
        self._write_allocations()
        self.lines.append("    " * depth + text)

    def _made(self, tensor: Tensor) -> str:
        return self._bind(tensor, f"t{len(self.alive)}")

    def _value(self, value: Any) -> str:
        name = f"c{len(self.values)}"
        self.values[name] = value
        return name

    def _written(self, value: Any) -> str:
        """Lists are written out: their owner may change them later."""
        if isinstance(value, Tensor):
            if id(value) not in self.names:
                raise RuntimeError("a planned launcher uses a tensor that is neither given nor made nor `constant`")
            return self.names[id(value)]
        if type(value) in (list, tuple):
            begin, end = "[]" if type(value) is list else "()"
            return begin + "".join(f"{self._written(entry)}, " for entry in value) + end
        if type(value) in (dict, set):
            raise RuntimeError(f"a planned launcher gives torch a {type(value).__name__}")
        return repr(value) if type(value) in (type(None), bool, int, str) else self._value(value)

    def _pointer(self, tensor: Tensor) -> str:
        name = self._written(tensor)
        if name.startswith("c"):
            return repr(tensor.data_ptr())
        if name.startswith("a"):
            return f"{name}.data_ptr()"
        if name not in self.pointers:
            self.pointers.add(name)
            self._line(f"p{name} = {name}.data_ptr()")
        return f"p{name}"

    # -- what is done

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # a caller's own modes have nothing to do with a launcher
            return self._done(func, args, kwargs or {})

    def _done(self, func: Any, args: Any, keywords: dict[str, Any]) -> Any:
        name = func.__name__
        if name == "__get__":
            attribute = getattr(func.__self__, "__name__", "")
            if attribute not in ATTRIBUTES:
                raise RuntimeError(f"a planned launcher asks for {attribute}, which no signature decides")
            return func(*args, **keywords)
        result = func(*args, **keywords)
        if name == "contiguous" and result is args[0]:  # its strides, which the signature decides, say so
            return result
        results = list(result) if type(result) in (tuple, list) else [result]
        if results and all(isinstance(value, Tensor) for value in results):
            if name in ALLOCATE:
                self._allocated(result)
                return result
            if name in VIEWS:
                self.native.views(result, args[0])
            else:
                self.native.fits = False
            given = [*map(self._written, args), *(f"{key}={self._written(value)}" for key, value in keywords.items())]
            called = f"{self._value(func)}({', '.join(given)})"
            if isinstance(result, Tensor):
                self._line(f"{self._made(result)} = {called}")
            else:
                self._line("".join(f"{self._made(tensor)}, " for tensor in results) + f"= {called}")
        elif name not in FACTS:
            raise RuntimeError(f"a planned launcher calls {name}, which no signature decides")
        return result

    def _allocated(self, tensor: Tensor) -> None:
        now = tensor.detach()  # a later step may change its shape
        self.allocated.append((self._made(tensor), now))
        self.native.makes(tensor, now)

    def _write_allocations(self) -> None:
        """Of the tensors that were allocated one behind the other."""
        allocated, self.allocated = self.allocated, []
        layouts = NotImplemented
        if len(allocated) > 1 and all(tensor.get_device() == self.device for _, tensor in allocated):
            layouts = native.nodes.layouts(tuple([tensor for _, tensor in allocated]))
        if layouts is not NotImplemented:
            names = "".join(f"{name}, " for name, _ in allocated)
            self.lines.append(f"    {names}= {self._value(native.nodes.allocate)}({self._value(layouts)})")
            return
        for name, tensor in allocated:
            shape, strides, dtype, device = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
            given = f"{self._written(shape)}, {self._written(strides)}, "
            allocate = EMPTY.get(device.type) if tensor.get_device() == self.device else None
            if allocate is None:
                allocate, given = torch.empty_strided, f"{given}device={self._value(device)}, dtype="
            self.lines.append(f"    {name} = {self._value(allocate)}({given}{self._value(dtype)})")

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        _thread.tracing = None
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            _thread.tracing = self

    def of_addresses(self, make: Callable[[Addresses], Tensor], places: Sequence[tuple[Tensor, int] | None]) -> Tensor:
        self.native.fits = False
        with self._aside():
            tensors, addresses = _addresses_of(places)
            made = make(addresses(tensors))
            self._line(f"{self._made(made)} = {self._value(make)}({self._value(addresses)}({self._written(tensors)}))")
        return made

    def launched(self, request: Launch) -> _Handle | None:
        """Launches, with what the JIT asks of tensors left out. In the plan by handle; by key where there is none,
        where somebody listens, and where what was made lies otherwise between multiples of 16 than the handle is for:
        where arguments lie is in the signature."""
        kernel, programs, arguments, constants, num_warps = request
        with self._aside():
            handle = launch(kernel, programs, *arguments, num_warps=num_warps, **constants)
            by_key = functools.partial(launch, kernel, programs, num_warps=num_warps, **constants)
            again = f"{self._value(by_key)}({', '.join(map(self._written, arguments))})"
            if handle is None:
                self.whole = self.native.fits = False
                self._line(again)
                return None
            self.native.launches(handle, request)
            given = [self._pointer(a) if isinstance(a, Tensor) else repr(a) for a in arguments]
            given += [self._value(value) for value in constants.values()]
            conditions = ["stream is None"]
            for argument in arguments:
                if isinstance(argument, Tensor) and self._written(argument) in self.pointers:
                    at = argument.data_ptr() % ALIGNMENT
                    conditions.append(f"p{self._written(argument)} & {ALIGNMENT - 1} != {at}")
        x, y = programs if isinstance(programs, tuple) else (programs, 1)
        place = [*map(repr, (x, y, 1)), "stream", self._value(handle.function), self._value(handle.metadata)]
        self._line(f"if {' or '.join(conditions)}:")
        self._line(again, 2)
        self._line("else:")
        self._line(f"{self._value(handle.run)}({', '.join([*place, *['None'] * 3, *given])})", 2)
        return handle

    # -- what comes out

    def plan(self, result: Any) -> _Plan:
        self._write_allocations()
        parameters = "".join(f", a{place}" for place in range(len(self.arguments)))
        text = [f"def plan(stream{parameters}):", *self.lines, f"    return {self._written(result)}"]
        names = dict(self.values)
        exec("\n".join(text), names)
        return _Plan(names["plan"], self.device, self.native.finished(self.device, result))

    def returned(self, result: Any) -> Any:
        """A result with the arguments themselves in place of their aliases."""
        if type(result) in (list, tuple):
            return type(result)(map(self.returned, result))
        return self.given.get(id(result), result)


_numbers = itertools.count()


def _reader(kinds: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """Of arguments of these types (of a list, its own and those of its entries): what tells calls apart, by a number
    that no other reader has. Written out too: it runs at every call."""
    lines: list[str] = []
    key = [repr(next(_numbers))]

    def read(kind: Any, name: str) -> None:
        if type(kind) is tuple:
            entries = [f"{name}_{place}" for place in range(len(kind) - 1)]
            if entries:
                lines.append(f"    {', '.join(entries)}, = {name}")
            for entry, of_entry in zip(kind[1:], entries):
                read(entry, of_entry)
        elif issubclass(kind, Tensor):
            key.extend(f"{name}.{fact}" for fact in ("dtype", "device", "shape", "stride()", "data_ptr() & 15"))
            if BY_MEMORY:
                key.append(f"{name}.untyped_storage().nbytes() > {NARROW}")
        elif issubclass(kind, float):
            key.append(f"{name}.hex()")  # zeros have signs, and NaN is not equal to itself
        elif kind is not type(None):
            key.append(name)

    for place, kind in enumerate(kinds):
        read(kind, f"a{place}")
    parameters = ", ".join(f"a{place}" for place in range(len(kinds)))
    names: dict[str, Any] = {}
    exec("\n".join([f"def reader({parameters}):", *lines, f"    return ({', '.join(key)},)"]), names)
    return cast(Callable[..., tuple[Any, ...]], names["reader"])


def planned(launcher: F) -> F:
    """A launcher of tensors, numbers, lists of these and None, whose work before launches is done once a signature:
    of a tensor dtype, device, shape, strides and where between multiples of 16 it lies, and all else by type and value.

    The launcher must follow from that alone, and is refused where it asks torch for more (FACTS, ATTRIBUTES). What it
    computes by way of torch and keeps is for :func:`kept`; a tensor that it keeps, for :func:`constant`. Block sizes
    that are tried, and launches that are recorded, go without plans.
    """
    by_plan = native.nodes.by_plan
    readers: dict[tuple, Callable[..., tuple[Any, ...]]] = {}
    plans: dict[Hashable, _Plan] = {}

    def call(*arguments: Any) -> Any:
        if _held_off or _thread.tracing is not None:
            return launcher(*arguments)
        key = by_plan(plans, arguments, BY_MEMORY)
        if type(key) is tuple:  # of the result alone: C++ did the call
            return key[0]
        if key is NotImplemented:
            key = _read(readers, arguments)
        known = plans.get(key)
        if known is None:
            return _traced(launcher, arguments, plans, key)
        plan, device, _ = known
        active: Any = driver.active if BY_HANDLE or device >= 0 else None
        if device >= 0 and device != active.get_current_device():
            with torch.cuda.device(device):
                return plan(active.get_current_stream(device) if BY_HANDLE and _nobody_listens() else None, *arguments)
        by_handle = BY_HANDLE and _nobody_listens()
        return plan(active.get_current_stream(max(device, 0)) if by_handle else None, *arguments)

    planned_call = functools.wraps(launcher)(call)
    vars(planned_call)["plans"] = plans  # for the operator of which it is the kernel
    return cast(F, planned_call)


def _read(readers: dict[tuple, Callable[..., tuple[Any, ...]]], arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What tells calls apart, by Python: without C++, and of what that declines."""
    kinds: tuple[Any, ...] = tuple(map(type, arguments))
    if list in kinds or tuple in kinds:
        kinds = tuple([(k, *map(type, a)) if k is list or k is tuple else k for k, a in zip(kinds, arguments)])
    reader = readers.get(kinds)
    if reader is None:
        reader = _put(readers, kinds, _reader(kinds))
    return reader(*arguments)


def _put(into: dict[Any, Any], key: Hashable, value: Any) -> Any:
    if len(into) >= PLANS:
        for oldest in [*into][: 1 - PLANS]:  # of a copy: other threads put theirs meanwhile
            into.pop(oldest, None)
    into[key] = value
    return value


def _traced(launcher: Callable[..., Any], arguments: Sequence[Any], plans: dict[Hashable, Any], key: Hashable) -> Any:
    """Calls a launcher: its result; and its plan is kept, unless somebody listens now."""
    tracing = _thread.tracing = _Tracing(arguments)
    try:
        # Whoever calls may have switched torch's functions off for others, as `accelerate` does: here they are seen.
        with torch._C._EnableTorchFunction(), tracing:
            result = launcher(*tracing.arguments)
    finally:
        _thread.tracing = None
    if tracing.whole or not BY_HANDLE:
        _put(plans, key, tracing.plan(result))
    return tracing.returned(result)


# ---- block sizes ------------------------------------------------------------------------------------------------


class Blocks:
    """The block sizes of a kernel: those that it takes where nothing was measured, and the others that are tried.

    All of them give right results; tests run each. On a device that has a file (gankern.core.devices), which `make gpu`
    writes, the kernel takes what that says. An entry that is none of the variants is of another version, and means
    nothing.

    >>> blocks = Blocks("bias_act", {"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 2048, "num_warps": 8})
    >>> blocks(torch.device("cpu"))
    {'BLOCK': 1024, 'num_warps': 4}
    """

    known: ClassVar[dict[str, Blocks]] = {}

    def __init__(self, kernel: str, *variants: dict[str, int]) -> None:
        self.kernel, self.variants = kernel, variants
        self._chosen: dict[torch.device, dict[str, int]] = {}
        self._used: dict[str, int] | None = None
        Blocks.known[kernel] = self

    def __call__(self, device: torch.device) -> dict[str, int]:
        """The constants and num_warps of a launch on the device."""
        if self._used is not None:
            return self._used
        chosen = self._chosen.get(device)
        if chosen is None:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
            best = devices.measured(name).get("blocks", {}).get(self.kernel)
            chosen = self._chosen[device] = best if best in self.variants else self.variants[0]
        return chosen

    @contextlib.contextmanager
    def use(self, variant: dict[str, int]) -> Iterator[None]:
        """Within the block, this variant on every device: to try and to test it."""
        before, self._used = self._used, variant
        try:
            with _unplanned():
                yield
        finally:
            self._used = before


# ---- what launchers share ---------------------------------------------------------------------------------------


def ceil_div(count: int, size: int) -> int:
    """How many blocks of a size hold so many things. Triton's own costs some microseconds on the host."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of two that is not less than the count; 1 for none. As with :func:`ceil_div`."""
    return 1 << (count - 1).bit_length() if count > 1 else 1


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """What is summed up in: fp64 for fp64, else fp32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """As :func:`sum_type`, for torch."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def index_type(*counts: int) -> tl.dtype:
    """In what elements are counted: 64 bits where 32 are not enough, with room for a block behind the last one."""
    return tl.int64 if max(counts) > 2**31 - 2**17 else tl.int32


@kept
def dense_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides of ``torch.empty_like``: those given where elements lie densely in some order, else of that order."""
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


def dense(x: Tensor) -> Tensor:
    """x where its elements lie densely in some order, else a dense copy."""
    return x if x.stride() == dense_strides(x.shape, x.stride()) else torch.empty_like(x).copy_(x)


@overload
def laid_out_as(x: Tensor, model: Tensor) -> Tensor: ...
@overload
def laid_out_as(x: None, model: Tensor) -> None: ...
def laid_out_as(x: Tensor | None, model: Tensor) -> Tensor | None:
    """x where it lies in memory as the dense ``model`` does, else a copy that does; None for None."""
    if x is None or x.stride() == model.stride():
        return x
    return torch.empty_like(model).copy_(x)


@overload
def contiguous(x: Tensor) -> Tensor: ...
@overload
def contiguous(x: None) -> None: ...
def contiguous(x: Tensor | None) -> Tensor | None:
    """x, or a contiguous copy; None for None."""
    return x if x is None or x.is_contiguous() else x.contiguous()
