"""How every kernel is launched, and what all launchers share.

By key. A launch through Triton's JIT (``kernel[grid](...)``) binds the arguments, builds a string of their kinds to
look the compiled kernel up, and compares every global that the kernel reads with its value at compilation: two to
four times the cost of torch's own launch. :func:`launch` goes that way once for each kind of arguments. It keeps the
compiled kernel under a key that tells apart whatever Triton compiles apart, and from then on launches it by its
handle:

    tensor        its dtype, its device, whether its address is a multiple of 16; on AMD's devices also whether its
                  storage is 2 GiB or more, which takes other instructions
    whole number  whether it is 1, whether it is a multiple of 16, whether it needs 64 bits
    None          that it is None
    constant      its name, type and value

Tensors are passed as addresses: Triton's launcher asks the driver about every argument that is not a number. A tensor
on another device than the others has a key without a compiled kernel, so the JIT gets it and refuses it. All launches
go through the JIT while a hook or a setting of `triton.knobs` is in force (profilers and debuggers set these), and
where this version of Triton launches compiled kernels in another way than the one known here.

By plan. What a launcher does before it launches (look at shapes and strides, choose a grid, allocate) depends on the
signature of its arguments alone, so :func:`planned` has it done once for each signature. Meanwhile
gankern/triton/tracing.py writes down what the launcher allocates and launches, as a function of Python that the next
call with this signature runs. Most plans only allocate on the current device and launch by handle; these are written
down for C++ as well (csrc/autograd/plans.cpp), so that neither an operator of `torch.ops.gankern` nor its backward
enters Python.

C++ calls the driver as Triton's own launcher for CUDA does. It takes a kernel only if this launcher's source is one
that it repeats, and if the kernel asks for nothing further (:func:`_native_kernel`). At every call it checks that
nobody listens, that plans are not held off, and that no launcher is being written down. Another signature, another
device than the current one, or memory that is aligned in another way goes through Python.

Signatures, tables of addresses and tensors allocated one after the other are read or made by one call of C++
(csrc/autograd/launch.cpp) where that is built; without it Python does the same, tensor by tensor.

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
from triton.compiler import CompiledKernel
from triton.runtime import driver

from gankern.core import devices, native
from gankern.triton.tracing import NativeKernel, Plan, Tracing

INTERPRETED = bool(triton.knobs.runtime.interpret)
BY_MEMORY = torch.version.hip is not None  # AMD's compiler counts in 32 bits within storages of less than 2 GiB
NARROW = 2**31 - 1  # bytes
PROGRAMS, PROGRAMS_Y = 2**31 - 1, 65535  # at most, of a launch and along its second axis


class Launch(NamedTuple):
    """One launch: a kernel, the number of its programs, and their arguments."""

    kernel: Any
    programs: int | tuple[int, ...]
    arguments: tuple[Any, ...]  # tensors, whole numbers and None: the kernel's first parameters, in their order
    constants: dict[str, Any]  # by the names of the kernel's other parameters
    num_warps: int


class Handle(NamedTuple):
    """What launches a compiled kernel. `kernel` is kept alive because its id is in the key, `compiled` so that it stays
    loaded."""

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
    """Whether there is no hook, and no setting besides those from the environment."""
    return not (
        RUNTIME.__dict__ or COMPILATION.__dict__ or RUNTIME.launch_enter_hook.calls or RUNTIME.launch_exit_hook.calls
    )


# Triton's launchers for CUDA that csrc/autograd/plans.cpp repeats, by _source_of_launcher.
KNOWN_LAUNCHERS = {
    "a594429c749910baf95235bf116f679b54aa4d9adf6ca2f24dc3ac804eed9a3f": "3.6.0",
    "ba2226a43bddf2faae8781a10cc50e984b05015c8554a2a2c350b7a3830b0e3f": "3.7.1",
    "4305a13866a4d3e989d810dd2915ea23d574a98a68b55c09738a182f2afb4283": "3.8.0",
    "dbbeebe5fb9f697981793dd57d20b87b95ce7dff0b8bb436ad69bcf704f597d1": "3.9.0",
}
MORE_SHARED_MEMORY = 228 * 1024  # bytes; for more than this, launchers set a mode of the device


@functools.cache
def _launches_natively(launcher: Hashable) -> bool:
    """Whether compiled kernels are launched by Triton's launcher for CUDA, as C++ repeats it, on torch's streams."""
    try:
        known = _source_of_launcher(launcher) in KNOWN_LAUNCHERS
        return known and driver.active.get_current_stream is torch._C._cuda_getCurrentRawStream
    except (AttributeError, KeyError, OSError, TypeError):  # another launcher, or without its source
        return False


def _source_of_launcher(launcher: Any) -> str:
    """A hash of Triton's whole driver for CUDA: its launchers are in Python, in C, or in C that Python writes."""
    driver_py = Path(inspect.getfile(launcher))
    return hashlib.sha256(driver_py.read_bytes() + driver_py.with_suffix(".c").read_bytes()).hexdigest()


def _native_kernel(handle: Handle) -> NativeKernel | None:
    """What C++ launches it with; None for a kernel that asks for more than a plain launch, which Triton's launcher
    does."""
    run, source = handle.run, handle.compiled.src
    if torch.version.hip or not _launches_natively(run.__class__):
        return None
    if run.global_scratch_size or run.profile_scratch_size or run.launch_cooperative_grid or run.launch_pdl:
        return None
    warps, programs, shared = handle.metadata
    if programs != 1 or run.num_ctas != 1 or shared > MORE_SHARED_MEMORY or getattr(run, "gsan_enabled", False):
        return None
    return NativeKernel(handle.function, 32 * warps, shared, tuple(source.signature.values()))


BY_HANDLE = not INTERPRETED and _known_way()
_handles: dict[tuple, Handle] = {}
_record: list[Launch] | None = None


class _Thread(threading.local):
    """What writes down the launcher that runs in this thread, if any."""

    tracing: Tracing | None = None


_thread = _Thread()


def launch(
    kernel: Any, programs: int | tuple[int, ...], *arguments: Tensor | int | None, num_warps: int, **constants: Any
) -> Handle | None:
    """Launches ``programs`` programs of a kernel on the device of its tensors, on its current stream.

    ``arguments`` are the kernel's first parameters, in their order: tensors, whole numbers, None. Fractions are passed
    as constants, like everything else that the kernel declares ``tl.constexpr``: an argument would be rounded to fp32.
    Returns the handle by which such a launch goes from now on, if any.
    """
    if _thread.tracing is not None:
        return _launch_and_write_down(_thread.tracing, Launch(kernel, programs, arguments, constants, num_warps))
    if _record is not None or not BY_HANDLE:
        return _launch_by_jit(None, Launch(kernel, programs, arguments, constants, num_warps))
    x, y = programs if isinstance(programs, tuple) else (programs, 1)
    if x * y > PROGRAMS or y > PROGRAMS_Y:  # Triton's launcher would silently launch nothing
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
        key += (type(value), value.hex() if type(value) is float else value)  # NaN is unequal to itself
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


def _launch_and_write_down(tracing: Tracing, request: Launch) -> Handle | None:
    """Launches, and has what the JIT asks of tensors left out of the plan."""
    kernel, programs, arguments, constants, num_warps = request
    with _untraced(tracing):
        by_key = functools.partial(launch, kernel, programs, num_warps=num_warps, **constants)
        handle = by_key(*arguments)
        tracing.launched(request, by_key, handle, None if handle is None else _native_kernel(handle))
    return handle


@contextlib.contextmanager
def _untraced(tracing: Tracing) -> Iterator[None]:
    """Within the block nothing is written down, nor seen by the mode that does so."""
    _thread.tracing = None
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        _thread.tracing = tracing


def _launch_by_jit(key: tuple | None, request: Launch) -> Handle | None:
    """Launches through the JIT, which compiles the kernel if necessary, and keeps the compiled kernel."""
    kernel, programs, arguments, constants, num_warps = request
    if _record is not None:
        _record.append(request)
        return None
    grid = programs if isinstance(programs, tuple) else (programs,)
    captured = any(capturing(argument.device) for argument in arguments if isinstance(argument, Tensor))
    try:
        compiled = kernel[grid](*arguments, **constants, num_warps=num_warps)
    except RuntimeError as error:
        if captured:  # the driver loads no kernel during a capture; its error says only "not permitted"
            raise RuntimeError(
                f"{kernel.__name__}: a kernel's first launch cannot be captured in a CUDA graph; run the step once "
                f"before it is captured, on tensors of the same kinds ({error})"
            ) from error
        raise
    if key is None or not _nobody_listens() or not isinstance(compiled, CompiledKernel):
        return None
    # By handle, constants are passed in the order of the call, which must be the kernel's.
    if kernel.arg_names[len(arguments) :] == list(constants) and not kernel.pre_run_hooks:
        _handles[key] = Handle(kernel, compiled, compiled.run, compiled.function, compiled.packed_metadata)
    return _handles.get(key)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block launches are put into the list that it gives, and not launched: for checks that need no GPU."""
    global _record
    before, _record = _record, []
    try:
        with _unplanned():
            yield _record
    finally:
        _record = before


# ---- plans ------------------------------------------------------------------------------------------------------

PLANS = 512  # kept of a launcher; one more drops the oldest
_held_off = 0  # how many blocks of _unplanned() are active
native.nodes.set_launching(globals(), _thread, RUNTIME, COMPILATION)
F = TypeVar("F", bound=Callable[..., Any])


@contextlib.contextmanager
def _unplanned() -> Iterator[None]:
    """Within the block launchers go without plans, in every thread."""
    global _held_off
    _held_off += 1
    try:
        yield
    finally:
        _held_off -= 1


def kept(function: F) -> F:
    """``functools.lru_cache`` for what a launcher computes with torch and its plan is not to repeat."""

    @functools.lru_cache(maxsize=4096, typed=True)
    def aside(*arguments: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*arguments)

    return cast(F, functools.wraps(function)(aside))


def constant(tensor: Tensor) -> Tensor:
    """Marks a tensor that a planned launcher makes once for a signature and gives to its kernels at every call."""
    if _thread.tracing is not None:
        _thread.tracing.constant(tensor)
    return tensor


def of_addresses(make: Callable[[Addresses], Tensor], places: Sequence[tuple[Tensor, int] | None]) -> Tensor:
    """``make`` of addresses, each of a place so many bytes behind a tensor's first element; 0 for None. A plan calls
    it again at each call, with the addresses of the tensors of that call."""
    tracing = _thread.tracing
    if tracing is None:
        tensors, addresses = _addresses_of(places)
        return make(addresses(tensors))
    with _untraced(tracing):
        tensors, addresses = _addresses_of(places)
        made = make(addresses(tensors))
        tracing.of_addresses(made, make, addresses, tensors)
    return made


class Addresses(Hashable, Protocol):
    """A row of addresses, equal to another one if all of them are."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> int: ...


def _addresses_of(
    places: Sequence[tuple[Tensor, int] | None],
) -> tuple[tuple[Tensor | None, ...], Callable[[tuple[Tensor | None, ...]], Addresses]]:
    """The tensors of the places, and a function from such tensors to the addresses, at the same distances from each."""
    behind = array.array("q", [0 if place is None else place[1] for place in places])
    offsets, read = behind.tobytes(), native.nodes.addresses

    def addresses(tensors: tuple[Tensor | None, ...]) -> Addresses:
        known = read(tensors, offsets)
        if known is NotImplemented:
            return tuple([0 if t is None else t.data_ptr() + offset for t, offset in zip(tensors, behind)])
        return known

    return tuple([None if place is None else place[0] for place in places]), addresses


_numbers = itertools.count()


def _reader(kinds: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """A function of arguments of these types (for a list, its own and those of its entries) that returns what tells
    calls apart, with a number that no other reader has. It is written out as Python, because it runs at every call."""
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
            key.append(f"{name}.hex()")  # zeros have signs, and NaN is unequal to itself
        elif kind is not type(None):
            key.append(name)

    for place, kind in enumerate(kinds):
        read(kind, f"a{place}")
    parameters = ", ".join(f"a{place}" for place in range(len(kinds)))
    names: dict[str, Any] = {}
    exec("\n".join([f"def reader({parameters}):", *lines, f"    return ({', '.join(key)},)"]), names)
    return cast(Callable[..., tuple[Any, ...]], names["reader"])


def planned(launcher: F) -> F:
    """A launcher of tensors, numbers, lists of these and None, whose work before launches is done once for each
    signature: a tensor's dtype, device, shape, strides and address modulo 16, and everything else by type and value.

    The launcher may depend on nothing else, and is refused where it asks torch for more (FACTS and ATTRIBUTES of
    tracing.py). What it computes with torch and keeps is marked by :func:`kept`, a tensor that it keeps by
    :func:`constant`. Launches that are recorded, or that try block sizes, go without plans.
    """
    by_plan = native.nodes.by_plan
    readers: dict[tuple, Callable[..., tuple[Any, ...]]] = {}
    plans: dict[Hashable, Plan] = {}

    def call(*arguments: Any) -> Any:
        if _held_off or _thread.tracing is not None:
            return launcher(*arguments)
        key = by_plan(plans, arguments, BY_MEMORY)
        if type(key) is tuple:  # with the result: C++ did the call
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
    vars(planned_call)["plans"] = plans  # for the operator whose kernel it is
    return cast(F, planned_call)


def _read(readers: dict[tuple, Callable[..., tuple[Any, ...]]], arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What tells calls apart, read by Python: without C++, and for what that declines."""
    kinds: tuple[Any, ...] = tuple(map(type, arguments))
    if list in kinds or tuple in kinds:
        kinds = tuple([(k, *map(type, a)) if k is list or k is tuple else k for k, a in zip(kinds, arguments)])
    reader = readers.get(kinds)
    if reader is None:
        reader = _put(readers, kinds, _reader(kinds))
    return reader(*arguments)


def _put(into: dict[Any, Any], key: Hashable, value: Any) -> Any:
    if len(into) >= PLANS:
        for oldest in [*into][: 1 - PLANS]:  # a copy, because other threads put theirs meanwhile
            into.pop(oldest, None)
    into[key] = value
    return value


def _traced(launcher: Callable[..., Any], arguments: Sequence[Any], plans: dict[Hashable, Any], key: Hashable) -> Any:
    """Calls a launcher, returns its result, and keeps its plan, unless somebody listens now."""
    tracing = _thread.tracing = Tracing(arguments)
    try:
        # A caller may have disabled the modes for torch's functions, as `accelerate` does: here they must be seen.
        with torch._C._EnableTorchFunction(), tracing:
            result = launcher(*tracing.arguments)
    finally:
        _thread.tracing = None
    if tracing.whole or not BY_HANDLE:
        _put(plans, key, tracing.plan(result))
    return tracing.returned(result)


# ---- block sizes ------------------------------------------------------------------------------------------------


class Blocks:
    """The block sizes of a kernel: the default first, then the variants that `make gpu` tries.

    All of them give right results; tests run each. On a device with a file (gankern.core.devices), which `make gpu`
    writes, the kernel takes what that says. An entry that is none of the variants is of another version, and is
    ignored.

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
        """The constants and num_warps for a launch on the device."""
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
        """Within the block every device takes this variant, to try and to test it."""
        before, self._used = self._used, variant
        try:
            with _unplanned():
                yield
        finally:
            self._used = before


# ---- what launchers share ---------------------------------------------------------------------------------------


def ceil_div(count: int, size: int) -> int:
    """How many blocks of a size hold so many elements. Triton's own costs some microseconds on the host."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of two that is not less than the count, 1 for 0. Triton's own is as slow as its ceil_div."""
    return 1 << (count - 1).bit_length() if count > 1 else 1


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """The type of sums: fp64 for fp64, else fp32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """:func:`sum_type`, as a dtype of torch."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def index_type(*counts: int) -> tl.dtype:
    """The type that counts elements: 64 bits where 32 are not enough, with room for a block behind the last element."""
    return tl.int64 if max(counts) > 2**31 - 2**17 else tl.int32


@kept
def dense_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides of ``torch.empty_like``: the given ones if elements lie densely in some order, else dense in that
    order."""
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


def dense(x: Tensor) -> Tensor:
    """x if its elements lie densely in some order, else a dense copy."""
    return x if x.stride() == dense_strides(x.shape, x.stride()) else torch.empty_like(x).copy_(x)


@overload
def laid_out_as(x: Tensor, model: Tensor) -> Tensor: ...
@overload
def laid_out_as(x: None, model: Tensor) -> None: ...
def laid_out_as(x: Tensor | None, model: Tensor) -> Tensor | None:
    """x if it has the strides of the dense ``model``, else a copy that has; None for None."""
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
