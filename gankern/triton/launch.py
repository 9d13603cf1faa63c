"""How every kernel is launched, and what all launchers share.

A launch through the JIT's own ``run`` binds the arguments, makes a string of their kinds, looks the kernel up by it,
and compares every global constant that the kernel reads with what it was when it was compiled: two to four times the
cost of torch's own launch. :func:`launch` goes that way once for each kind of arguments. The compiled kernel that comes
back is kept under a key that tells apart whatever Triton compiles apart, and is from then on launched by its handle:

    of a tensor        its dtype, device, and whether its address is a multiple of 16
    of a whole number  whether it is 1, whether it is a multiple of 16, and whether it needs 64 bits
    of None            that it is None
    of a constant      its value

Tensors travel as addresses: Triton's launcher asks the driver about an object that is not a number, and not about a
number. A tensor that is elsewhere than the others has a key that no compiled kernel stands under, and comes to the JIT,
which refuses it. While a hook or a setting of `triton.knobs` is in force, as profilers and debuggers put it, all
launches go through the JIT, which knows them; and so they do where this Triton launches a compiled kernel in another
way than the one that is known here.

What a launcher does before it launches follows from its arguments' signature alone: it looks at shapes and strides,
chooses a grid, lays out what it allocates. :func:`planned` has it do that once. What it asked torch for and what it
launched is kept, and the next call with this signature allocates and launches, nothing else.

The device guard is here and nowhere else: torch's own functions have theirs. Launches go to the current stream.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast, overload

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.compiler import CompiledKernel
from triton.runtime import driver

from gankern.core import devices

INTERPRETED = bool(triton.knobs.runtime.interpret)
ALIGNMENT = 16  # of addresses and numbers: what Triton compiles apart
INT32 = range(-(2**31), 2**31)
INT64 = range(-(2**63), 2**63)


class Launch(NamedTuple):
    """One launch: a kernel, how many programs, and what they are given."""

    kernel: Any
    programs: int | tuple[int, ...]
    arguments: tuple[Any, ...]  # tensors, whole numbers and None: the kernel's first parameters, in their order
    constants: dict[str, Any]  # by the names of the kernel's other parameters
    num_warps: int


class _Handle(NamedTuple):
    """What launches a compiled kernel. `kernel` keeps the key, which has its id, from meaning another one."""

    kernel: Any
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


def _nobody_listens() -> bool:
    """No hook, and no setting other than from the environment."""
    runtime = triton.knobs.runtime
    return not (
        runtime.__dict__
        or triton.knobs.compilation.__dict__
        or runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
    )


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
    key: list[Any] = [id(kernel), num_warps]
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
            argument = argument.data_ptr()
            key.append(not argument & 15)
        values.append(argument)
    for constant in constants.values():
        key.append(constant.hex() if type(constant) is float else constant)  # NaN is not equal to itself
        values.append(constant)

    active = driver.active
    if device >= 0 and device != active.get_current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, *arguments, num_warps=num_warps, **constants)
    known = tuple(key)
    handle = _handles.get(known)
    if handle is None or not _nobody_listens():
        return _launch_by_jit(known, Launch(kernel, programs, arguments, constants, num_warps))
    x, y = programs if type(programs) is tuple else (programs, 1)
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
    compiled = kernel[grid](*arguments, **constants, num_warps=num_warps)
    if key is None or not _nobody_listens() or not isinstance(compiled, CompiledKernel):
        return None
    # By handle, constants follow in the order of the call, and take their places only where that is the kernel's.
    if kernel.arg_names[len(arguments) :] == list(constants) and not kernel.pre_run_hooks:
        _handles[key] = _Handle(kernel, compiled.run, compiled.function, compiled.packed_metadata)
    return _handles.get(key)


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
# What a launcher may ask torch for that is no tensor: the signature decides it. __get__ is of attributes.
FACTS = {
    "__get__",
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
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty"}
_held_off = 0  # how many ask for launchers without plans
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

    @functools.lru_cache(maxsize=4096)
    def aside(*arguments: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*arguments)

    return cast(F, functools.wraps(function)(aside))


class _Step:
    """Arguments in their order: those that are no tensors, and for each tensor its place and its number in the plan."""

    def __init__(self, arguments: Sequence[Any], numbers: dict[int, int]) -> None:
        tensors = [(place, value) for place, value in enumerate(arguments) if isinstance(value, Tensor)]
        self.places = [(place, numbers[id(tensor)]) for place, tensor in tensors]
        self.rest = [None if isinstance(value, Tensor) else value for value in arguments]

    def given(self, tensors: Sequence[Tensor]) -> list[Any]:
        given = self.rest.copy()
        for place, number in self.places:
            given[place] = tensors[number]
        return given


class _Call(_Step):
    """A call of torch's."""

    def __init__(self, function: Any, arguments: Sequence[Any], keywords: dict, numbers: dict[int, int]) -> None:
        super().__init__(arguments, numbers)
        self.function, self.keywords = function, keywords

    def do(self, tensors: list[Tensor], stream: int | None) -> None:
        result = self.function(*self.given(tensors), **self.keywords)
        if type(result) is tuple or type(result) is list:
            tensors += result
        else:
            tensors.append(result)


class _Allocation:
    """Memory for a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.strides = tuple(tensor.shape), tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device

    def do(self, tensors: list[Tensor], stream: int | None) -> None:
        tensors.append(torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device))


class _Launched(_Step):
    """A launch, and the handle that it goes by, if any."""

    def __init__(self, request: Launch, handle: _Handle | None, numbers: dict[int, int]) -> None:
        arguments = *request.arguments, *request.constants.values()
        super().__init__(arguments, numbers)
        self.request = request._replace(arguments=())  # which would keep the tensors
        self.count = len(request.arguments)
        self.x, self.y = request.programs if isinstance(request.programs, tuple) else (request.programs, 1)
        self.handle = handle
        # The handle is for addresses of these remainders.
        self.addresses = [(*place, arguments[place[0]].data_ptr() % ALIGNMENT) for place in self.places]

    def do(self, tensors: list[Tensor], stream: int | None) -> None:
        handle = self.handle
        if handle is None or stream is None:
            self.by_key(tensors)
            return
        given = self.rest.copy()
        for place, number, remainder in self.addresses:
            given[place] = address = tensors[number].data_ptr()
            if address & 15 != remainder:
                self.by_key(tensors)
                return
        handle.run(self.x, self.y, 1, stream, handle.function, handle.metadata, None, None, None, *given)

    def by_key(self, tensors: list[Tensor]) -> None:
        kernel, programs, _, constants, num_warps = self.request
        launch(kernel, programs, *self.given(tensors)[: self.count], num_warps=num_warps, **constants)


class _Tracing(TorchFunctionMode):
    """Writes down what a launcher does. Tensors are known by number: the arguments, then all results."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = list(tensors)  # alive, so that an id is of one of them
        self.numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        self.steps: list[_Call | _Allocation | _Launched] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        result = func(*args, **keywords)
        results = list(result) if type(result) in (tuple, list) else [result]
        if results and all(isinstance(value, Tensor) for value in results):
            for value in (*args, *keywords.values()):
                if isinstance(value, (tuple, list)) and any(isinstance(entry, Tensor) for entry in value):
                    raise RuntimeError(f"a planned launcher gives torch.{func.__name__} a list of tensors")
            if func.__name__ in ALLOCATE:
                self.steps.append(_Allocation(result))
            else:
                self.steps.append(_Call(func, args, keywords, self.numbers))
            for tensor in results:
                self.numbers[id(tensor)] = len(self.tensors)
                self.tensors.append(tensor)
        elif func.__name__ not in FACTS:
            raise RuntimeError(f"a planned launcher calls {func.__name__}, which no signature decides")
        return result

    def launched(self, request: Launch) -> _Handle | None:
        """Launches, with what the JIT asks of tensors left out."""
        kernel, programs, arguments, constants, num_warps = request
        _thread.tracing = None
        try:
            with torch._C.DisableTorchFunction():
                handle = launch(kernel, programs, *arguments, num_warps=num_warps, **constants)
                self.steps.append(_Launched(request, handle, self.numbers))
        finally:
            _thread.tracing = self
        return handle


class _Plan:
    """What a launcher does for a signature, and which of the tensors are its result."""

    def __init__(self, traced: _Tracing, result: Any) -> None:
        self.steps = traced.steps
        self.result = _numbered(result, traced.numbers)

    def run(self, tensors: list[Tensor]) -> Any:
        """Does it with these arguments, whose list it then fills with all that is made."""
        stream = None
        if BY_HANDLE and _nobody_listens():
            active, device = driver.active, tensors[0].get_device()
            if device >= 0 and device != active.get_current_device():
                with torch.cuda.device(device):
                    return self.run(tensors)
            stream = active.get_current_stream(max(device, 0))
        for step in self.steps:
            step.do(tensors, stream)
        return _of_numbers(self.result, tensors)


def _numbered(result: Any, numbers: dict[int, int]) -> Any:
    """A launcher's result with numbers in place of the tensors."""
    if isinstance(result, (tuple, list)):
        return tuple(_numbered(value, numbers) for value in result)
    return None if result is None else numbers[id(result)]


def _of_numbers(result: Any, tensors: Sequence[Tensor]) -> Any:
    if type(result) is int:
        return tensors[result]
    return None if result is None else tuple([_of_numbers(value, tensors) for value in result])


def planned(launcher: F) -> F:
    """A launcher of tensors, numbers, lists of numbers and None, whose work before launches is done once a signature:
    of a tensor dtype, device, shape, strides and where between multiples of 16 it lies, and all else by value.

    The launcher must follow from that alone, and is refused where it asks torch for more (FACTS). What it computes by
    way of torch and keeps is for :func:`kept`. Block sizes that are tried, and launches that are recorded, go without
    plans.
    """
    plans: dict[tuple, _Plan] = {}

    def call(*arguments: Any) -> Any:
        if _held_off or _thread.tracing is not None:
            return launcher(*arguments)
        key: list[Any] = []
        tensors: list[Tensor] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                key += (argument.dtype, argument.device, argument.shape, argument.stride(), argument.data_ptr() & 15)
                tensors.append(argument)
            elif type(argument) is float:
                key.append(argument or argument.hex())  # zeros have signs
            else:
                key.append(tuple(argument) if type(argument) is list else argument)
        known = tuple(key)
        plan = plans.get(known)
        if plan is not None:
            return plan.run(tensors)
        plan, result = _traced(launcher, arguments)
        if len(plans) >= PLANS:
            plans.pop(next(iter(plans), ()), None)
        plans[known] = plan
        return result

    return cast(F, functools.wraps(launcher)(call))


def _traced(launcher: Callable[..., Any], arguments: Sequence[Any]) -> tuple[_Plan, Any]:
    """Calls a launcher: its plan, and its result."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    # One tensor may be given twice now, and two the next time.
    aliases = [tensor.detach() for tensor in tensors]
    following = iter(aliases)
    tracing = _thread.tracing = _Tracing(aliases)
    try:
        with tracing:
            result = launcher(*[next(following) if isinstance(a, Tensor) else a for a in arguments])
    finally:
        _thread.tracing = None
    plan = _Plan(tracing, result)
    return plan, _of_numbers(plan.result, [*tensors, *tracing.tensors[len(tensors) :]])


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
