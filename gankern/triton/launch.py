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

The device guard is here and nowhere else: torch's own functions have theirs. Launches go to the current stream.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, overload

import torch
import triton
import triton.language as tl
from torch import Tensor
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


def launch(
    kernel: Any, programs: int | tuple[int, int], *arguments: Tensor | int | None, num_warps: int, **constants: Any
) -> None:
    """Launches ``programs`` programs of a kernel on the device of its tensors, on its current stream.

    ``arguments`` are the kernel's first parameters, in their order: tensors, whole numbers, None. Fractions are passed
    as constants, as everything else that the kernel declares ``tl.constexpr``: an argument would be rounded to fp32.
    """
    if _record is not None or not BY_HANDLE:
        _launch_by_jit(None, Launch(kernel, programs, arguments, constants, num_warps))
        return
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
            launch(kernel, programs, *arguments, num_warps=num_warps, **constants)
        return
    known = tuple(key)
    handle = _handles.get(known)
    if handle is None or not _nobody_listens():
        _launch_by_jit(known, Launch(kernel, programs, arguments, constants, num_warps))
        return
    x, y = programs if type(programs) is tuple else (programs, 1)
    stream = active.get_current_stream(max(device, 0))
    handle.run(x, y, 1, stream, handle.function, handle.metadata, None, None, None, *values)


def _launch_by_jit(key: tuple | None, request: Launch) -> None:
    """Launches through the JIT, which compiles what it has not compiled yet, and keeps the compiled kernel."""
    kernel, programs, arguments, constants, num_warps = request
    if _record is not None:
        _record.append(request)
        return
    grid = programs if isinstance(programs, tuple) else (programs,)
    compiled = kernel[grid](*arguments, **constants, num_warps=num_warps)
    if key is None or not _nobody_listens() or not isinstance(compiled, CompiledKernel):
        return
    # By handle, constants follow in the order of the call, and take their places only where that is the kernel's.
    if kernel.arg_names[len(arguments) :] == list(constants) and not kernel.pre_run_hooks:
        _handles[key] = _Handle(kernel, compiled.run, compiled.function, compiled.packed_metadata)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block nothing is launched, but put into the list that is given: for checks that need no GPU."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


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


@functools.lru_cache(maxsize=4096)
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
