"""Writes down what a launcher does for a signature: as a function of Python, and for C++ where it only allocates and
launches. gankern/triton/launch.py says when.

Of a bias and a leaky ReLU, with the values that have no literal as names:

    def plan(stream, a0, a1, a2, a3, a4, a5, a6):
        t2 = empty((64, 256, 64, 64), (1048576, 4096, 64, 1), float32)
        pt2 = t2.data_ptr()
        if stream is None or pt2 & 15 != 0:
            by_key(a0, a1, None, None, None, t2, None, None, 67108864, 256, 4096, 1)
        else:
            run(65536, 1, 1, stream, function, metadata, None, None, None, a0.data_ptr(), ...)
        return t2
"""

from __future__ import annotations

import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gankern.core import native

if TYPE_CHECKING:
    from gankern.triton.launch import Addresses, Handle, Launch

ALIGNMENT = 16  # of addresses and numbers: what Triton compiles apart
# What a launcher may ask torch for besides tensors: the signature decides it.
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
VIEWS = {"movedim", "view"}  # they begin where their tensor does
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty"}
# Of sizes, strides and dtype, on the current device: half the cost of torch.empty_strided.
EMPTY = {device: getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None) for device in ("cpu", "cuda")}
# What a kernel's whole numbers hold, of the kinds that are written down for C++. Addresses have 64 bits.
NUMBERS = {"i32": range(-(2**31), 2**31), "i64": range(-(2**63), 2**63)}


class NativeKernel(NamedTuple):
    """What C++ launches a compiled kernel with."""

    function: int
    threads: int
    shared: int
    kinds: tuple[str, ...]  # of all parameters; "constexpr" of those that were compiled in


class Plan(NamedTuple):
    """What a launcher does for a signature."""

    function: Callable[..., Any]  # of Python: plan(stream, a0, a1, ...)
    device: int  # that has to be the current one; -1 for none
    native: Any  # the same for C++, or None


# The numbers of csrc/autograd/plans.cpp: what a kernel's parameter holds, and what a result is made of.
NUMBER, GIVEN, MADE = range(3)
NOTHING, TUPLE, LIST = 0, 3, 4


class NativePlan:
    """A launcher's plan for C++: what is given, what is allocated, and what is launched on that."""

    def __init__(self) -> None:
        self.fits = True  # so far the launcher did nothing else
        self.given = 0
        self.made: list[Tensor] = []
        self.places: dict[int, tuple[int, int]] = {}  # by a tensor's id: GIVEN or MADE, and its number among these
        self.viewed: dict[int, tuple[int, int]] = {}  # the same for views, which begin at the same address
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

    def launches(self, kernel: NativeKernel | None, request: Launch) -> None:
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
        """NUMBER, GIVEN or MADE; the number, or which tensor; and the alignment that one that is made must have."""
        place = self.places.get(id(value), self.viewed.get(id(value)))
        if place is not None and kind.startswith("*"):
            return (*place, value.data_ptr() % ALIGNMENT)
        if type(value) is int and value in NUMBERS.get(kind, ()):
            return NUMBER, value, 0
        self.fits = False
        return NUMBER, 0, 0

    def finished(self, device: int, result: Any) -> Any:
        """The plan, or None if the launcher did more than this can hold."""
        self.fits = self.fits and all(tensor.get_device() == device for tensor in self.made)
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


class Tracing(TorchFunctionMode):
    """Writes down what a launcher does, as a function of Python: ``plan(stream, a0, a1, ...)``.

    Its names: a0, or a1_0 in a list, are arguments; t5 was made on the way, and pt5 is its address; c3 stands for a
    value that the signature decides and that has no literal.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        self.alive: list[Tensor] = []  # so that no id is reused
        self.given: dict[int, Tensor] = {}  # arguments by the ids of their aliases
        self.values: dict[str, Any] = {}
        self.lines: list[str] = []
        self.pointers: set[str] = set()  # whose addresses were written down
        self.allocated: list[tuple[str, Tensor]] = []  # but not written down yet
        self.whole = True  # every launch has a handle
        self.native = NativePlan()
        self.arguments = [self._argument(argument, f"a{place}") for place, argument in enumerate(arguments)]
        self.device = self.alive[0].get_device()

    # -- what goes in

    def _argument(self, argument: Any, name: str) -> Any:
        if isinstance(argument, Tensor):
            alias = argument.detach()  # this call may give one tensor twice, and the next one two tensors
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
        """Lists are written out, because their owner may change them later."""
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
        with torch._C.DisableTorchFunction():  # a launcher's calls are not for a caller's own modes
            return self._done(func, args, kwargs or {})

    def _done(self, func: Any, args: Any, keywords: dict[str, Any]) -> Any:
        name = func.__name__
        if name == "__get__":
            attribute = getattr(func.__self__, "__name__", "")
            if attribute not in ATTRIBUTES:
                raise RuntimeError(f"a planned launcher asks for {attribute}, which no signature decides")
            return func(*args, **keywords)
        result = func(*args, **keywords)
        if name == "contiguous" and result is args[0]:  # which follows from its strides, so from the signature
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
        """Of the tensors that were allocated one after the other."""
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

    def of_addresses(
        self,
        made: Tensor,
        make: Callable[[Addresses], Tensor],
        addresses: Callable[[tuple[Tensor | None, ...]], Addresses],
        tensors: tuple[Tensor | None, ...],
    ) -> None:
        self.native.fits = False
        self._line(f"{self._made(made)} = {self._value(make)}({self._value(addresses)}({self._written(tensors)}))")

    def launched(
        self, request: Launch, by_key: Callable[..., Any], handle: Handle | None, kernel: NativeKernel | None
    ) -> None:
        """The plan launches by handle. It launches by key where there is none, where somebody listens, and where memory
        that was made on the way is aligned otherwise than the handle is for; how arguments are aligned is in the
        signature."""
        _, programs, arguments, constants, _ = request
        again = f"{self._value(by_key)}({', '.join(map(self._written, arguments))})"
        if handle is None:
            self.whole = self.native.fits = False
            self._line(again)
            return
        self.native.launches(kernel, request)
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

    # -- what comes out

    def plan(self, result: Any) -> Plan:
        self._write_allocations()
        parameters = "".join(f", a{place}" for place in range(len(self.arguments)))
        text = [f"def plan(stream{parameters}):", *self.lines, f"    return {self._written(result)}"]
        names = dict(self.values)
        exec("\n".join(text), names)
        return Plan(names["plan"], self.device, self.native.finished(self.device, result))

    def returned(self, result: Any) -> Any:
        """A result with the arguments themselves in place of their aliases."""
        if type(result) in (list, tuple):
            return type(result)(map(self.returned, result))
        return self.given.get(id(result), result)
