"""The pickles that CIFAR-10's python files are, read without an unpickler.

An unpickler builds whatever objects a file asks for, and even NumPy's own can be given a state that points anywhere.
Here a file is a list of opcodes, walked by a machine that knows only those that such a file has. Its values are
Python's bytes, strings, integers, lists, tuples and dictionaries. The names of functions in the file stay names, and of
the calls of such names it knows the few that an array of bytes is pickled as, each with the one set of arguments that
it has. Only when all is read is an array made, of bytes that are in the file and of a shape that fits their number.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
KNOWN = ("numpy ndarray", "numpy dtype", "_codecs encode", "__builtin__ bytes", *RECONSTRUCT)


@dataclass(frozen=True)
class _Name:
    """Of a function or class; nothing is looked up."""

    name: str


@dataclass
class _Dtype:
    """uint8, which is the only one."""

    complete: bool = False


@dataclass
class _Array:
    """An array that is still empty, or what is in it."""

    shape: tuple[int, ...] | None = None
    content: bytes = b""


class _Mark:
    pass


def read_batch(content: bytes) -> dict[bytes, Any]:
    """The dictionary in such a file: its values are bytes, integers, lists of those, or arrays of uint8.

    Raises: ValueError, saying what is not as it is in the files of CIFAR-10.
    """
    result = _run(content)
    if not isinstance(result, dict):
        raise ValueError(f"it holds a {type(result).__name__.strip('_')}, not a dictionary")
    return {key: _finished(value) if isinstance(value, _Array) else value for key, value in result.items()}


def _finished(array: _Array) -> np.ndarray:
    if array.shape is None:
        raise ValueError("an array in it has no content")
    return np.frombuffer(array.content, np.uint8).reshape(array.shape).copy()


def _run(content: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    end = 0
    for opcode, argument, position in pickletools.genops(content):
        name, end = opcode.name, position or 0
        if name in IGNORED:
            continue
        if name in CONSTANTS:
            stack.append(CONSTANTS[name](argument))
        elif name in TUPLES:
            stack.append(tuple(_pop(stack, TUPLES[name])))
        elif name in OPERATIONS:
            OPERATIONS[name](stack)
        elif name in PUTS:
            _memorise(memo, len(memo) if argument is None else argument, stack)
        elif name in GETS:
            if argument not in memo:
                raise ValueError(f"it refers to a value {argument} that it has not")
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_name(str(argument)))
        elif name == "STOP":
            break
        else:
            raise ValueError(f"it has the instruction {name}, which no file of CIFAR-10 has")
    if end != len(content) - 1 or len(stack) != 1:
        raise ValueError("something follows its end" if end < len(content) - 1 else "it ends in the middle")
    return stack[0]


def _memorise(memo: dict[int, Any], key: int, stack: list[Any]) -> None:
    (value,) = _pop(stack, 1)
    memo[key] = value
    stack.append(value)


def _pop(stack: list[Any], number: int) -> list[Any]:
    if len(stack) < number or any(isinstance(value, _Mark) for value in stack[len(stack) - number :]):
        raise ValueError("an instruction in it lacks its arguments")
    values = stack[len(stack) - number :]
    del stack[len(stack) - number :]
    return values


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    for i in range(len(stack) - 1, -1, -1):
        if isinstance(stack[i], _Mark):
            values = stack[i + 1 :]
            del stack[i:]
            return values
    raise ValueError("an instruction in it lacks its arguments")


def _name(name: str) -> _Name:
    if name not in KNOWN:
        raise ValueError(f"it asks for {'.'.join(name.split())[:80]}, which no file of CIFAR-10 does")
    return _Name(name)


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"it has a {type(value).__name__.strip('_')} where a {kind.__name__.strip('_')} belongs")
    return value


def _are(values: tuple, *accepted: tuple) -> bool:
    """Whether there are as many values, each one of those accepted in its place."""
    return len(values) == len(accepted) and all(
        any(type(value) is type(one) and value == one for one in choices) for value, choices in zip(values, accepted)
    )


def _append(stack: list[Any]) -> None:
    target, value = _pop(stack, 2)
    _of(list, target).append(value)
    stack.append(target)


def _extend(stack: list[Any]) -> None:
    values = _pop_to_mark(stack)
    (target,) = _pop(stack, 1)
    _of(list, target).extend(values)
    stack.append(target)


def _set_item(stack: list[Any]) -> None:
    target, key, value = _pop(stack, 3)
    _of(dict, target)[_of(bytes, key)] = value
    stack.append(target)


def _set_items(stack: list[Any]) -> None:
    values = _pop_to_mark(stack)
    (target,) = _pop(stack, 1)
    if len(values) % 2:
        raise ValueError("a key in it lacks its value")
    for key, value in zip(values[::2], values[1::2]):
        _of(dict, target)[_of(bytes, key)] = value
    stack.append(target)


def _name_on_stack(stack: list[Any]) -> None:
    module, name = _pop(stack, 2)
    stack.append(_name(f"{_of(str, module)} {_of(str, name)}"))


def _call(stack: list[Any]) -> None:
    """A call of a name, with the one set of arguments that it has in these files."""
    function, arguments = _pop(stack, 2)
    name, given = _of(_Name, function).name, _of(tuple, arguments)
    if name == "_codecs encode" and len(given) == 2 and given[1] == "latin1":
        try:
            stack.append(_of(str, given[0]).encode("latin1"))  # how Python 3 writes bytes in this protocol
        except UnicodeEncodeError:
            raise ValueError("it has a text where bytes belong") from None
    elif name == "__builtin__ bytes" and given == ():
        stack.append(b"")  # and how it writes none
    elif name == "numpy dtype" and _are(given, ("u1", b"u1"), (0, False), (1, True)):
        stack.append(_Dtype())
    elif name in RECONSTRUCT and _are(given, (_Name("numpy ndarray"),), ((0,),), (b"b",)):
        stack.append(_Array())
    else:
        raise ValueError(f"it calls {'.'.join(name.split())} otherwise than the files of CIFAR-10 do")


def _build(stack: list[Any]) -> None:
    """The state of what a call made."""
    made, state = _pop(stack, 2)
    if isinstance(made, _Dtype) and _are(_of(tuple, state), (3,), ("|", b"|"), *3 * [(None,)], (-1,), (-1,), (0,)):
        made.complete = True
    elif isinstance(made, _Array) and len(_of(tuple, state)) == 5:
        version, shape, dtype, fortran, content = state
        sizes = [_of(int, size) for size in _of(tuple, shape)]
        if not _are((version, fortran), (1,), (0, False)) or not _of(_Dtype, dtype).complete:
            raise ValueError("an array in it is none of uint8 in C's order")
        if not 1 <= len(sizes) <= 2 or min(sizes) < 0 or prod(sizes) != len(_of(bytes, content)):
            raise ValueError("an array in it has another number of bytes than its shape")
        made.shape, made.content = tuple(sizes), content
    else:
        raise ValueError("it gives a state to an object otherwise than the files of CIFAR-10 do")
    stack.append(made)


def _tuple(stack: list[Any]) -> None:
    stack.append(tuple(_pop_to_mark(stack)))


def _string(argument: str) -> bytes:
    """What Python 2 called a string: pickletools takes each byte for a letter."""
    return argument.encode("latin1")


def _as_it_is(argument: Any) -> Any:
    return argument


IGNORED = ("PROTO", "FRAME")
CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "MARK": lambda _: _Mark(),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _as_it_is),
    **dict.fromkeys(("SHORT_BINSTRING", "BINSTRING"), _string),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _as_it_is),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE"), _as_it_is),
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
OPERATIONS: dict[str, Callable[[list[Any]], None]] = {
    "TUPLE": _tuple,
    "APPEND": _append,
    "APPENDS": _extend,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "STACK_GLOBAL": _name_on_stack,
    "REDUCE": _call,
    "BUILD": _build,
}
PUTS = ("BINPUT", "LONG_BINPUT", "MEMOIZE")
GETS = ("BINGET", "LONG_BINGET")
