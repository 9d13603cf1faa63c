"""Reads the code of a layer that somebody wrote himself, and says what it computes; or that it cannot be known.

A method is evaluated statement by statement, from its source, for inputs of given sizes: what is a tensor stays a
symbol (:class:`Value`), everything else (numbers, sizes, flags, attributes, loops and branches over them) is what it is
at this moment. The language is a closed set. Whatever is not in it raises :class:`Unknown`: a call of anything that is
not listed here, an attribute that is set, a branch on a value, a decorated function, a closure. So code that is read to
its end has no side effects but those of :attr:`Reader.written`, and two pieces of code with the same result compute the
same.

What was read holds for as long as :attr:`Reader.guards` do: each name, attribute, flag and size that was looked up is
looked up again before the knowledge is used. That the source is that of the code which runs is made sure of by
compiling it again.

A value has no memory layout: it is an expression (``node``) over labelled axes, and ``dims`` says which axes make up
each dimension. An axis is (tensor, stride, size): an index into the elements of that tensor in their logical order.
Views, squeezes, ``keepdim``, transposes and broadcasts change ``dims`` alone, which is why the many ways of writing a
formula read as one.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import copy
import functools
import inspect
import itertools
import math
import operator
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT = "(input)"  # the name of the tensor that a layer is given
Axis = tuple[str, int, int]  # tensor, stride, size; of an axis along which a value is constant: "", 0, size


class Node(tuple):
    """An expression: the name of an operation, what it is of, and options. There is one object for each expression, so
    that two are compared at once however deep they are."""

    serial: int
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other


_nodes: dict[tuple, Node] = {}
_MOST_NODES = 200_000  # after which they are forgotten; one that is read meanwhile is then not recognised
_counter = itertools.count()


def node(*parts: Any) -> Node:
    found = _nodes.get(parts)
    if found is None:
        if len(_nodes) > _MOST_NODES:
            _nodes.clear()
        found = Node(parts)
        found.serial = next(_counter)
        found = _nodes.setdefault(parts, found)
    return found


class Unknown(Exception):
    """What the code does is not known; the message says at what it was given up."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor."""

    node: Node
    dims: tuple[tuple[Axis, ...], ...]
    cell: str | None = None  # of a module's own tensor: its name
    fresh: bool = False  # whether an operation made it, so that nothing else shares its memory

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(size for _, _, size in axes) for axes in self.dims)

    def same(self, other: Any) -> bool:
        return isinstance(other, Value) and self.node is other.node and self.dims == other.dims


@dataclass(frozen=True, eq=False)
class Joined:
    """torch.cat of values, which nothing but a result may be."""

    parts: tuple[Value, ...]
    dim: int


@dataclass(frozen=True, eq=False)
class Module:
    """The module whose method is read, or one inside it."""

    module: nn.Module
    path: str


@dataclass(frozen=True, eq=False)
class Method:
    function: Any
    owner: Any


@dataclass(frozen=True, eq=False)
class Delegated:
    """What the forward of an inner module makes of these arguments."""

    path: str
    arguments: tuple


@dataclass(frozen=True, eq=False)
class Written:
    """What the code leaves behind in a tensor of the module: by ``way`` "data", "copy" or "attribute"."""

    way: str
    value: Value


@dataclass(frozen=True, eq=False)
class Device:
    """That of all tensors."""


@dataclass(frozen=True, eq=False)
class Held:
    """An object that is no module, such as a hook, whose methods are read."""

    of: Any


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


PLAIN = (int, float, bool, str, type(None))


def is_plain(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) in (tuple, list) and all(map(is_plain, value)))


def _fixed(value: Any) -> Any:
    """Without lists, which the code that is read could change."""
    return tuple(map(_fixed, value)) if type(value) in (tuple, list) else value


def _same(a: Any, b: Any) -> bool:
    """Equal, and of the same types: True is not 1 here."""
    if type(a) is not type(b):
        return False
    if type(a) in (tuple, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


# ---- the code that runs ---------------------------------------------------------------------------------------

_FUTURE = functools.reduce(operator.or_, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names))
_PARTS = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_exceptiontable")
_COUNTS = ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags")


def _same_code(a: types.CodeType, b: types.CodeType) -> bool:
    if any(getattr(a, part) != getattr(b, part) for part in (*_PARTS, *_COUNTS)):
        return False
    if len(a.co_consts) != len(b.co_consts):
        return False
    for x, y in zip(a.co_consts, b.co_consts):
        same = _same_code(x, y) if isinstance(x, types.CodeType) and isinstance(y, types.CodeType) else _same(x, y)
        if not same and not (type(x) is type(y) and type(x) not in (types.CodeType, *PLAIN) and x == y):
            return False
    return True


@functools.lru_cache(maxsize=64)
def _file(filename: str, source: str, flags: int) -> tuple[dict, dict] | None:
    """The function definitions of a file by (name, line), and what they compile to by (qualified name, line)."""
    try:
        tree = ast.parse(source)
        compiled = compile(source, filename, "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    trees = {
        (each.name, min([each.lineno, *(d.lineno for d in each.decorator_list)])): each
        for each in ast.walk(tree)
        if isinstance(each, ast.FunctionDef)
    }
    codes: dict[tuple[str, int], types.CodeType] = {}
    pending = [compiled]
    while pending:
        code = pending.pop()
        codes[code.co_qualname, code.co_firstlineno] = code
        pending += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return trees, codes


@functools.lru_cache(maxsize=1024)
def _tree(code: types.CodeType) -> ast.FunctionDef | str:
    """The syntax tree of a function, made sure to be that of its code; or why there is none."""
    try:
        source = "".join(inspect.findsource(code)[0])
    except (OSError, TypeError):
        return "its source cannot be had"
    file = _file(code.co_filename, source, code.co_flags & _FUTURE)
    if file is None:
        return "its source cannot be read"
    trees, codes = file
    tree = trees.get((code.co_name, code.co_firstlineno))
    again = codes.get((code.co_qualname, code.co_firstlineno))
    if tree is None or again is None or not _same_code(again, code):
        return "its source is not that of the code which runs"
    return tree


# ---- axes -----------------------------------------------------------------------------------------------------


def _merged(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Without axes of size 1, and neighbours that count on from each other as one."""
    merged: list[Axis] = []
    for tensor, stride, size in axes:
        if size == 1:
            continue
        if merged and merged[-1][0] == tensor and merged[-1][1] == stride * size:
            merged[-1] = (tensor, stride, merged[-1][2] * size)
        else:
            merged.append((tensor, stride, size))
    return tuple(merged)


def _overlap(axes: Sequence[Axis]) -> bool:
    """Whether two axes of one tensor are (partly) the same."""
    spans = [(t, s, s * n) for t, s, n in axes if t]
    return any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a, b in itertools.combinations(spans, 2))


def axes_of(name: str, shape: Sequence[int]) -> tuple[tuple[Axis, ...], ...]:
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return tuple(_merged([(name, stride, size)]) for stride, size in zip(strides, shape))


def _bound(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Axes that are summed over, in an order of their own."""
    return _merged(sorted(axes, key=lambda axis: (axis[0], -axis[1])))


# ---- expressions ----------------------------------------------------------------------------------------------


def number(value: float) -> Node:
    return node("number", float(value))


def constant(of: Node) -> Node:
    """Without a gradient."""
    return of if of[0] in ("number", "constant") else node("constant", _stripped(of, {}))


def _stripped(of: Any, done: dict[Node, Any]) -> Any:
    if not isinstance(of, tuple):
        return of
    if not isinstance(of, Node):
        return tuple(_stripped(part, done) for part in of)
    if of not in done:
        parts = tuple(_stripped(part, done) for part in of)
        match parts:
            case "constant", inner:
                done[of] = inner
            case ("add" | "mul") as name, a, b:
                done[of] = node(name, *_ordered(a, b))
            case "network", operands, links:
                done[of] = node("network", _ordered(*operands), links)
            case _:
                done[of] = node(*parts)
    return done[of]


def nodes_in(of: Any) -> set[Node]:
    """All operations in an expression."""
    found: set[Node] = set()
    pending: list[Any] = [of]
    while pending:
        part = pending.pop()
        if isinstance(part, Node):
            if part in found:
                continue
            found.add(part)
        if isinstance(part, tuple):
            pending += part
    return found


def numbers_in(of: Node) -> set[float]:
    return {part[1] for part in nodes_in(of) if part[0] == "number"}


def _ordered(*nodes: Node) -> tuple[Node, ...]:
    """Of what commutes."""
    return tuple(sorted(nodes, key=lambda each: each.serial))


def _pointwise(name: str, *nodes: Node) -> Node:
    """One node for the ways of writing the same."""
    match name, nodes:
        case "add" | "sub", (a, ("number", 0.0)):
            return a
        case "add", (("number", 0.0), a):
            return a
        case "mul", (a, b) if a is b:
            return node("square", a)
        case "mul", (("number", 1.0), a) | (a, ("number", 1.0)):
            return a
        case "mul" | "add", (a, b):
            return node(name, *_ordered(a, b))
        case "div", (("number", 1.0), ("sqrt", b)):
            return node("rsqrt", b)
        case "div", (a, ("sqrt", b)):
            return node("mul", *_ordered(a, node("rsqrt", b)))
        case "div", (a, ("number", 1.0)):
            return a
        case "pow", (a, ("number", 2.0)):
            return node("square", a)
        case "pow", (a, ("number", 0.5)):
            return node("sqrt", a)
        case "pow", (a, ("number", -0.5)):
            return node("rsqrt", a)
    return node(name, *nodes)


def _reduced(name: str, of: Node, axes: tuple[Axis, ...]) -> Node:
    match name, of:
        case "mean", _ if not axes:
            return of
        case "mean" | "sum", (inner, what, others) if inner == name:
            return node(name, what, _bound((*others, *axes)))
        case "mean", ("square", ("sub", a, ("mean", b, others))) if a is b and others == axes:
            return node("var", a, axes, 0)
    return node(name, of, axes)


# ---- the reader -----------------------------------------------------------------------------------------------


class Reader:
    """Evaluates methods of ``module``."""

    steps = 20_000

    def __init__(
        self, module: nn.Module, device: str = "", sets: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        self.root = Module(module, "")
        self.device, self.dtype = device, dtype  # of all tensors, where the code may ask for them
        self.sets = sets  # whether the code may set an attribute of the module itself
        self.guards: dict[Any, Callable[[nn.Module], bool]] = {}
        self.cells: dict[str, Value] = {}
        self.written: dict[str, Written] = {}
        self.viewed: set[str] = set()
        self.seen: list[Value] = []  # of which there are views
        self.frames: list[dict[str, Any]] = []
        self.no_grad = False

    # ---- what is looked up

    def guard(self, what: Any, holds: Callable[[nn.Module], bool]) -> None:
        """``what`` tells one guard from another; of two alike one is enough."""
        self.guards.setdefault(what, holds)

    def tensor(self, owner: Module, name: str, x: Tensor) -> Value:
        key = f"{owner.path}{name}"
        if key not in self.cells:
            if x.numel() == 0 or not x.is_floating_point() or x.layout != torch.strided:
                raise Unknown(f"{key} is not a plain tensor of real numbers")
            shape, grad = x.shape, x.requires_grad
            self.guard(
                ("tensor", key),
                lambda module: (
                    isinstance(now := _get(module, owner.path, name), Tensor)
                    and now.shape == shape
                    and now.requires_grad == grad
                    and now.layout == torch.strided
                ),
            )
            symbol = node("tensor", key)
            self.cells[key] = Value(symbol if grad else constant(symbol), axes_of(key, shape), key)
        return self.cells[key]

    def attribute(self, owner: Module, name: str) -> Any:
        module, cls = owner.module, type(owner.module)
        if name == "forward" and owner.path:
            return Method(_inner_forward, owner)
        self.plain_class(cls)
        key = owner.path, name
        found = inspect.getattr_static(cls, name, None)
        if isinstance(found, property):
            self.guard(key, lambda m: _static(type(_inner(m, owner.path)), name) is found)
            return self.function(found.fget, (owner,), {})
        state = module.__dict__
        if name in state:
            if hasattr(type(found), "__set__"):
                raise Unknown(f"{name} is a descriptor")
            value = state[name]
            if isinstance(value, Tensor):
                return self.tensor(owner, name, value)
            if not is_plain(value):
                raise Unknown(f"self.{name} is a {type(value).__name__}")
            kept = copy.deepcopy(value)
            self.guard(key, lambda m: _same(_inner(m, owner.path).__dict__.get(name, Unknown), kept))
            return _fixed(kept)
        if found is not None:
            self.guard(
                key,
                lambda m: (
                    _static(type(_inner(m, owner.path)), name) is found
                    and (name == "forward" or name not in _inner(m, owner.path).__dict__)
                ),
            )
            if isinstance(found, staticmethod):
                return found.__func__
            if isinstance(found, types.FunctionType):
                return Method(found, owner)
            if is_plain(found):
                its_value = copy.deepcopy(found)
                self.guard((*key, "value"), lambda m: _same(found, its_value))
                return _fixed(its_value)
            raise Unknown(f"{name} is a {type(found).__name__}")
        for kind in ("_parameters", "_buffers"):
            if name in state[kind]:
                value = state[kind][name]
                if value is None:
                    self.guard(key, lambda m: _get(m, owner.path, name) is None)
                    return None
                return self.tensor(owner, name, value)
        if name in state["_modules"]:
            inner = state["_modules"][name]
            if inner is None:
                raise Unknown(f"self.{name} is None")
            return Module(inner, f"{owner.path}{name}.")
        raise Unknown(f"it has no attribute {name}")

    def held(self, owner: Held, name: str) -> Any:
        """An attribute of an object that is no module. What is read of it holds for now only."""
        found = inspect.getattr_static(type(owner.of), name, None)
        if isinstance(found, staticmethod):
            return found.__func__
        if isinstance(found, types.FunctionType):
            return Method(found, owner)
        value = getattr(owner.of, "__dict__", {}).get(name, found)
        raise_unless(is_plain(value), f"its {name} is a {type(value).__name__}")
        return _fixed(copy.deepcopy(value))

    def forward(self, owner: Module) -> Any:
        """The forward of the module's class, whatever stands in its place on the instance."""
        found = inspect.getattr_static(type(owner.module), "forward")
        return found.__func__ if isinstance(found, staticmethod) else Method(found, owner)

    def plain_class(self, cls: type) -> None:
        """Whether an attribute is what it looks like."""
        for name, its in (("__getattribute__", object), ("__getattr__", nn.Module), ("__setattr__", nn.Module)):
            if inspect.getattr_static(cls, name) is not inspect.getattr_static(its, name):
                raise Unknown(f"{cls.__name__} has its own {name}")

    def name(self, function: types.FunctionType, name: str) -> Any:
        local = self.frames[-1]
        if name in local:
            return local[name]
        if name.startswith("__") or name in function.__code__.co_varnames:
            raise Unknown(f"it reads {name}, which has no value yet")
        scope = function.__globals__
        key = id(scope), name
        value = scope[name] if name in scope else getattr(builtins, name, Unknown)
        if value is Unknown:
            raise Unknown(f"{name} is not defined")
        if is_plain(value):
            kept = copy.deepcopy(value)
            self.guard(key, lambda m: _same(scope.get(name, getattr(builtins, name, Unknown)), kept))
            return _fixed(kept)
        self.guard(key, lambda m: scope.get(name, getattr(builtins, name, Unknown)) is value)
        return value

    # ---- functions and statements

    def function(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not isinstance(function, types.FunctionType):
            raise Unknown(f"{getattr(function, '__qualname__', function)} is not a function in Python")
        if function.__dict__ or function.__code__.co_freevars:
            raise Unknown(f"{function.__name__} is decorated or a closure")
        if len(self.frames) > 16:
            raise Unknown("its calls are nested too deeply")
        code, defaults, others = function.__code__, function.__defaults__, function.__kwdefaults__
        tree = _tree(code)
        if isinstance(tree, str):
            raise Unknown(f"{function.__name__}: {tree}")
        if not all(type(x) in (*PLAIN, tuple) and is_plain(x) for x in (*(defaults or ()), *(others or {}).values())):
            raise Unknown(f"{function.__name__} has a default that is not a number")
        kept = dict(others or {})
        self.guard(
            function,
            lambda m: (
                function.__code__ is code
                and not function.__dict__
                and function.__defaults__ is defaults
                and (function.__kwdefaults__ or {}) == kept
            ),
        )
        try:
            bound = inspect.signature(function).bind(*args, **kwargs)
        except TypeError as error:
            raise Unknown(str(error)) from error
        bound.apply_defaults()
        self.frames.append(dict(bound.arguments))
        grad = self.no_grad
        try:
            self.block(tree.body, function)
            return None
        except _Return as result:
            return result.value
        finally:
            self.frames.pop()
            self.no_grad = grad

    def block(self, statements: Sequence[ast.stmt], function: types.FunctionType) -> None:
        for statement in statements:
            self.steps -= 1
            if self.steps < 0:
                raise Unknown("it is too long")
            self.statement(statement, function)

    def statement(self, statement: ast.stmt, function: types.FunctionType) -> None:
        def evaluate(tree: ast.expr) -> Any:
            return self.expression(tree, function)

        match statement:
            case ast.Expr(ast.Constant()) | ast.Pass():
                return
            case ast.Expr(value):
                evaluate(value)
            case ast.Return(value):
                raise _Return(None if value is None else evaluate(value))
            case ast.Assign(targets, value):
                result = evaluate(value)
                for target in targets:
                    self.assign(target, result, function)
            case ast.AnnAssign(target, _, value) if value is not None and isinstance(target, ast.Name):
                self.assign(target, evaluate(value), function)
            case ast.AugAssign(ast.Name(name), op, value):
                self.frames[-1][name] = self.changed(self.name(function, name), op, evaluate(value))
            case ast.If(test, body, others):
                self.block(body if self.truth(evaluate(test)) else others, function)
            case ast.Assert(test):
                if not self.truth(evaluate(test)):
                    raise Unknown("an assertion of its own fails")
            case ast.For(target, iterable, body, []):
                for element in self.elements(evaluate(iterable)):
                    self.assign(target, element, function)
                    self.block(body, function)
            case ast.With([ast.withitem(context, None)], body):
                if evaluate(context) != ("no_grad",):
                    raise Unknown("a with block that is not torch.no_grad()")
                before, self.no_grad = self.no_grad, True
                self.block(body, function)
                self.no_grad = before
            case _:
                raise Unknown(f"a statement that is not known ({type(statement).__name__.lower()})")

    def assign(self, target: ast.expr, value: Any, function: types.FunctionType) -> None:
        match target:
            case ast.Name(name):
                self.frames[-1][name] = value
            case ast.Tuple(parts) | ast.List(parts):
                elements = self.elements(value)
                if len(elements) != len(parts) or any(isinstance(part, ast.Starred) for part in parts):
                    raise Unknown("an assignment to several names")
                for part, element in zip(parts, elements):
                    self.assign(part, element, function)
            case ast.Attribute(base, "data"):
                self.write(self.expression(base, function), "data", value)
            case ast.Subscript(base, ast.Slice(None, None, None)):
                self.write(self.expression(base, function), "copy", value)
            case ast.Attribute(_, name):
                raise Unknown(f"it sets an attribute ({name})")
            case _:
                raise Unknown("an assignment to a part of something")

    def write(self, target: Any, way: str, value: Any) -> None:
        if not isinstance(target, Value) or target.cell is None or not isinstance(value, Value):
            raise Unknown("it writes to something that is not a tensor of its own")
        value, before = self.current(value), self.cells[target.cell]
        if way == "copy":
            raise_unless(target.cell not in self.viewed, f"it writes to {target.cell}, of which there are views")
            # A copy with a gradient would become a part of the graph.
            without = self.no_grad or (value.node[0] == before.node[0] == "constant")
            raise_unless(without, f"it writes to {target.cell} with a gradient")
        size, room = math.prod(value.shape), before.shape
        if (way == "data" and value.shape != room) or (way == "copy" and size not in (1, math.prod(room))):
            raise Unknown(f"it writes another size to {target.cell}")
        if way == "copy" and size > 1 and _dropped(value.shape) != _dropped(room):
            raise Unknown(f"it writes another shape to {target.cell}")
        kept = Value(constant(value.node), value.dims if size > 1 else before.dims, target.cell)
        if size > 1:
            kept = replace(kept, dims=_reshaped(kept, room))
        elif math.prod(room) > 1:
            kept = replace(kept, dims=tuple((("", 0, n),) if n > 1 else () for n in room))
        self.cells[target.cell] = kept
        self.written[target.cell] = Written(way, kept)

    def changed(self, value: Any, op: ast.operator, other: Any) -> Any:
        """name op= other."""
        if isinstance(value, list):
            raise_unless(isinstance(op, ast.Add) and isinstance(other, list), "a list that changes")
            value.extend(other)
            return value
        if isinstance(value, Value):
            holders = sum(each is value for frame in self.frames for each in _leaves(frame.values()))
            if not value.fresh or holders != 1 or any(each is value for each in self.seen):
                raise Unknown("it changes a tensor in place")
            result = self.binary(op, value, other)
            raise_unless(isinstance(result, Value) and result.shape == value.shape, "it changes a tensor in place")
            return result
        return self.binary(op, value, other)

    # ---- expressions

    def expression(self, tree: ast.expr, function: types.FunctionType) -> Any:
        def evaluate(each: ast.expr) -> Any:
            return self.expression(each, function)

        self.steps -= 1
        match tree:
            case ast.Constant(value) if is_plain(value):
                return value
            case ast.Name(name):
                return self.name(function, name)
            case ast.Tuple(parts):
                return tuple(self.arguments(parts, function))
            case ast.List(parts):
                return self.arguments(parts, function)
            case ast.Attribute(base, name):
                return self.member(evaluate(base), name)
            case ast.BinOp(left, op, right):
                return self.binary(op, evaluate(left), evaluate(right))
            case ast.UnaryOp(ast.USub(), operand):
                value = evaluate(operand)
                return self.operation("neg", value) if isinstance(value, Value) else -self.plain(value)
            case ast.UnaryOp(ast.Not(), operand):
                return not self.truth(evaluate(operand))
            case ast.BoolOp(op, parts):
                value = None
                for part in parts:
                    value = evaluate(part)
                    if self.truth(value) is isinstance(op, ast.Or):
                        break
                return value
            case ast.Compare(left, [op], [right]):
                return self.compare(op, evaluate(left), evaluate(right))
            case ast.IfExp(test, body, other):
                return evaluate(body if self.truth(evaluate(test)) else other)
            case ast.Subscript(base, index):
                return self.item(evaluate(base), index, function)
            case ast.Call(called, parts, keywords):
                args = self.arguments(parts, function)
                kwargs = {k.arg: evaluate(k.value) for k in keywords if k.arg is not None}
                raise_unless(len(kwargs) == len(keywords), "a call with **")
                return self.call(evaluate(called), args, kwargs)
            case ast.JoinedStr(parts):
                return "".join(evaluate(part) for part in parts)
            case ast.FormattedValue(value, -1, None):
                return str(self.plain(evaluate(value)))
            case ast.ListComp(element, [generator]) | ast.GeneratorExp(element, [generator]):
                results = []
                outer = self.frames[-1]
                self.frames[-1] = dict(outer)
                for each in self.elements(evaluate(generator.iter)):
                    self.assign(generator.target, each, function)
                    if all(self.truth(evaluate(test)) for test in generator.ifs):
                        results.append(evaluate(element))
                self.frames[-1] = outer
                return results
        raise Unknown(f"an expression that is not known ({type(tree).__name__.lower()})")

    def arguments(self, parts: Sequence[ast.expr], function: types.FunctionType) -> list[Any]:
        result: list[Any] = []
        for part in parts:
            if isinstance(part, ast.Starred):
                result += self.elements(self.expression(part.value, function))
            else:
                result.append(self.expression(part, function))
        return result

    def plain(self, value: Any) -> Any:
        raise_unless(is_plain(value), "it computes with something that is not a number")
        return value

    def truth(self, value: Any) -> bool:
        raise_unless(is_plain(value), "a branch on something that is not a number")
        return bool(value)

    def elements(self, value: Any) -> list[Any]:
        raise_unless(isinstance(value, (tuple, list, range)), "it goes through something that is not a list")
        raise_unless(len(value) <= 1000, "it is too long")
        return list(value)

    def current(self, value: Value) -> Value:
        return value if value.cell is None else self.cells[value.cell]

    def member(self, base: Any, name: str) -> Any:
        if isinstance(base, Module):
            return self.attribute(base, name)
        if isinstance(base, Held):
            return self.held(base, name)
        if isinstance(base, Value):
            value = self.current(base)
            match name:
                case "shape":
                    return value.shape
                case "ndim":
                    return len(value.dims)
                case "data":
                    return self.detached(base)
                case "device" | "is_cuda":
                    raise_unless(bool(self.device), "it asks for the device")
                    return Device() if name == "device" else self.device == "cuda"
                case "dtype":
                    raise_unless(self.dtype is not None, "it asks for the type")
                    return self.dtype
                case "T" if len(value.dims) == 2:
                    return self.operation("t", base)
            return Method(name, base)
        if isinstance(base, Device):
            raise_unless(name == "type", f"it reads .{name} of a device")
            return self.device
        if isinstance(base, types.ModuleType) and base.__name__.split(".")[0] in ("torch", "math", "collections"):
            found = getattr(base, name, Unknown)
            raise_unless(found is not Unknown, f"{base.__name__} has no {name}")
            self.guard((base, name), lambda m: getattr(base, name, Unknown) is found)
            return found
        if isinstance(base, list) and name == "append":
            return Method("append", base)
        raise Unknown(f"it reads .{name} of a {type(base).__name__}")

    def binary(self, op: ast.operator, a: Any, b: Any) -> Any:
        if isinstance(a, Value) or isinstance(b, Value):
            name = _OPERATORS.get(type(op))
            if name is None:
                raise Unknown(f"an operator that is not known ({type(op).__name__.lower()})")
            return self.operation(name, a, b)
        function: Any = _ARITHMETIC.get(type(op))
        raise_unless(function is not None, "an operator that is not known")
        if isinstance(a, (list, tuple)) and type(a) is type(b) and function is operator.add:
            return function(a, b)
        try:
            return function(self.plain(a), self.plain(b))
        except (ArithmeticError, TypeError, ValueError) as error:
            raise Unknown(f"its arithmetic fails: {error}") from error

    def compare(self, op: ast.cmpop, a: Any, b: Any) -> bool:
        if isinstance(op, (ast.Is, ast.IsNot)) and (a is None or b is None):
            return (a is b) is isinstance(op, ast.Is)
        if isinstance(op, (ast.Eq, ast.NotEq)) and isinstance(a, torch.dtype) and isinstance(b, torch.dtype):
            return (a is b) is isinstance(op, ast.Eq)
        function: Any = _COMPARISONS.get(type(op))
        raise_unless(function is not None, "a comparison that is not known")
        try:
            return bool(function(self.plain(a), self.plain(b)))
        except TypeError as error:
            raise Unknown(str(error)) from error

    def item(self, base: Any, index: ast.expr, function: types.FunctionType) -> Any:
        if isinstance(base, Value):
            parts = index.elts if isinstance(index, ast.Tuple) else [index]
            value, shape, at = base, [], 0
            for part in parts:
                if isinstance(part, ast.Constant) and part.value is None:
                    shape.append(1)
                elif isinstance(part, ast.Slice):
                    raise_unless(at < len(self.current(value).shape), "too many indices")
                    start, stop, step = (
                        None if b is None else self.expression(b, function) for b in (part.lower, part.upper, part.step)
                    )
                    value = self.part(value, at, start, stop, 1 if step is None else step)
                    shape.append(self.current(value).shape[at])
                    at += 1
                else:
                    raise Unknown("it takes a part of a tensor")
            return self.reshaped(value, [*shape, *self.current(value).shape[at:]])
        raise_unless(isinstance(base, (tuple, list)), "it takes a part of something")

        def bound(tree: ast.expr | None) -> Any:
            return None if tree is None else self.plain(self.expression(tree, function))

        try:
            if isinstance(index, ast.Slice):
                return base[bound(index.lower) : bound(index.upper) : bound(index.step)]
            return base[self.plain(self.expression(index, function))]
        except (IndexError, TypeError, ValueError) as error:
            raise Unknown(str(error)) from error

    def call(self, called: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if isinstance(called, Method):
            if isinstance(called.owner, Value):
                return self.operation(called.function, called.owner, *args, **kwargs)
            if isinstance(called.owner, list):
                raise_unless(len(args) == 1 and not kwargs, "append")
                called.owner.append(args[0])
                return None
            if called.function is _inner_forward:
                raise_unless(not kwargs, "a forward with named arguments")
                return Delegated(called.owner.path, tuple(args))
            return self.function(called.function, (called.owner, *args), kwargs)
        if called is getattr or called is setattr:
            raise_unless(len(args) >= 2 and isinstance(args[1], str) and not kwargs, "getattr")
            if called is getattr:
                raise_unless(len(args) == 2, "getattr with a default")
                return self.member(args[0], args[1])
            return self.set(args[0], args[1], args[2])
        if called is isinstance and len(args) == 2 and not kwargs:
            raise_unless(is_plain(args[0]) and isinstance(args[1], type), "isinstance of something of its own")
            return isinstance(*args)
        mathematics = isinstance(called, types.BuiltinFunctionType) and called.__module__ == "math"
        if mathematics or any(called is function for function in _BUILTINS):
            if called is len and isinstance(args[0], Value):
                return self.current(args[0]).shape[0]
            raise_unless(not any(isinstance(x, (Value, Module)) for x in args), "a function of Python on a tensor")
            if called in (enumerate, zip):
                return [tuple(each) for each in called(*map(self.elements, args), **kwargs)]
            raise_unless(all(is_plain(x) or isinstance(x, list) for x in args), "a function of Python")
            try:
                result = called(*args, **kwargs)
            except (ArithmeticError, TypeError, ValueError) as error:
                raise Unknown(str(error)) from error
            raise_unless(is_plain(result) or isinstance(result, range), "a function of Python")
            return result
        if called is torch.autograd.Variable and len(args) == 1 and not kwargs:
            raise_unless(isinstance(args[0], Value) and args[0].node[0] == "constant", "it calls Variable")
            return args[0]
        if called is torch.no_grad and not args and not kwargs:
            return ("no_grad",)
        try:
            name = _FUNCTIONS.get(called)
        except TypeError:
            name = None
        if name is not None:
            return self.operation(name, *args, **kwargs)
        if isinstance(called, types.FunctionType):
            raise_unless(called.__module__.split(".")[0] != "torch", f"it calls {called.__name__}")
            return self.function(called, args, kwargs)
        raise Unknown(f"it calls {getattr(called, '__name__', type(called).__name__)}")

    def set(self, owner: Any, name: str, value: Any) -> None:
        """setattr(inner module, name, tensor), where that is a plain attribute."""
        inner = isinstance(owner, Module) and (owner.path != "" or self.sets)
        raise_unless(inner and isinstance(value, Value), "it sets an attribute")
        cls, state = type(owner.module), owner.module.__dict__
        self.plain_class(cls)
        where = [kind for kind in ("_parameters", "_buffers", "_modules") if name in state[kind]]
        raise_unless(not where and inspect.getattr_static(cls, name, None) is None, f"it sets {name}")
        path = owner.path
        self.guard(
            (path, name, "set"),
            lambda m: not any(name in _inner(m, path).__dict__[k] for k in ("_parameters", "_buffers", "_modules")),
        )
        self.written[f"{path}{name}"] = Written("attribute", self.current(value))

    # ---- tensors

    def operation(self, name: str, *args: Any, **kwargs: Any) -> Any:
        handler = OPERATIONS.get(name)
        if handler is None:
            raise Unknown(f"an operation that is not known ({name})")
        kwargs = {_SPELLINGS.get(k, k): v for k, v in kwargs.items()}
        try:
            bound = _signature(handler).bind(self, *args, **kwargs)
        except TypeError as error:
            raise Unknown(f"{name}: {error}") from error
        return handler(*bound.args, **bound.kwargs)

    def value(self, x: Any) -> Value:
        raise_unless(isinstance(x, Value), "an operation on something that is not a tensor")
        return self.current(x)

    def made(self, made: Node, dims: Sequence[Sequence[Axis]]) -> Value:
        merged = tuple(_merged(axes) for axes in dims)
        if _overlap([axis for axes in merged for axis in axes]):
            raise Unknown("a combination of a tensor's elements with each other")
        return Value(constant(made) if self.no_grad else made, merged, fresh=True)

    def view(self, x: Value, dims: Sequence[Sequence[Axis]]) -> Value:
        if x.cell is not None:
            self.viewed.add(x.cell)
        self.seen.append(x)
        return Value(self.current(x).node, tuple(_merged(axes) for axes in dims))

    def reshaped(self, x: Value, shape: Sequence[int]) -> Value:
        return self.view(x, _reshaped(self.current(x), shape))

    def part(self, x: Value, dim: int, start: Any, stop: Any, step: Any) -> Value:
        """x[start:stop:step] along a dimension."""
        raise_unless(all(type(b) in (int, type(None)) for b in (start, stop)) and type(step) is int, "another slice")
        raise_unless(step > 0, "another slice")
        value = self.current(x)
        size, dims = value.shape[dim], list(value.dims)
        kept = range(size)[slice(start, stop, step)]
        raise_unless(len(kept) > 0, "an empty slice")
        if len(kept) == size:
            return self.view(x, dims)
        axes = dims[dim]
        if all(tensor == "" for tensor, _, _ in axes):
            return self.view(x, [*dims[:dim], (("", 0, len(kept)),), *dims[dim + 1 :]])
        dims[dim] = ((f"part of {axes} from {kept.start} by {kept.step}", 1, len(kept)),)
        made = node("part", value.node, axes, kept.start, kept.step, len(kept))
        return replace(self.view(x, dims), node=constant(made) if self.no_grad else made)

    def detached(self, x: Value) -> Value:
        value = self.view(x, self.current(x).dims)
        return replace(value, node=constant(value.node))

    def broadcast(self, values: Sequence[Value]) -> list[tuple[Axis, ...]]:
        rank = max(len(v.dims) for v in values)
        dims = []
        for i in range(rank):
            here = [v.dims[i - rank] for v in values if i - rank >= -len(v.dims) and v.dims[i - rank]]
            labelled = {axes for axes in here if any(tensor for tensor, _, _ in axes)}
            sizes = {math.prod(size for _, _, size in axes) for axes in here}
            if len(labelled) > 1 or len(sizes) > 1:
                raise Unknown("a combination of tensors along different axes")
            dims.append(next(iter(labelled)) if labelled else here[0] if here else ())
        return dims


def raise_unless(known: bool, reason: str) -> None:
    if not known:
        raise Unknown(reason)


def _inner_forward() -> None:
    """Stands for the forward of a module inside the one whose method is read, whatever that is."""


def holds(guards: Sequence[Callable[[nn.Module], bool]], module: nn.Module) -> bool:
    """Whether what was read is still what runs."""
    try:
        return all(guard(module) for guard in guards)
    except (AttributeError, KeyError):  # a part of the module is gone
        return False


def _leaves(values: Any) -> Any:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _static(cls: type, name: str) -> Any:
    """inspect.getattr_static of a class that has no metaclass, at a tenth of its cost."""
    for each in cls.__mro__:
        if name in each.__dict__:
            return each.__dict__[name]
    return None


def _inner(module: Any, path: str) -> nn.Module:
    if not path:
        return module
    for name in path.split(".")[:-1]:
        module = module._modules[name]
    return module


def _get(module: nn.Module, path: str, name: str) -> Any:
    state = _inner(module, path).__dict__
    for values in (state, state["_parameters"], state["_buffers"]):
        if name in values:
            return values[name]
    return Unknown


def _dropped(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _reshaped(x: Value, shape: Sequence[int]) -> tuple[tuple[Axis, ...], ...]:
    raise_unless(all(type(n) is int for n in shape), "a size that is not a number")
    total, sizes = math.prod(x.shape), list(shape)
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        raise_unless(rest > 0 and total % rest == 0, "a size that does not fit")
        sizes[sizes.index(-1)] = total // rest
    raise_unless(math.prod(sizes) == total and min(sizes, default=1) > 0, "a size that does not fit")
    left, dims = [axis for axes in x.dims for axis in axes], []
    for size in sizes:
        axes: list[Axis] = []
        while size > 1:
            tensor, stride, count = left.pop(0)
            if size % count == 0:
                axes.append((tensor, stride, count))
                size //= count
            elif count % size == 0:
                axes.append((tensor, stride * (count // size), size))
                left.insert(0, (tensor, stride, count // size))
                size = 1
            else:
                raise Unknown("a view across the axes of a tensor")
        dims.append(tuple(axes))
    return tuple(dims)


_OPERATORS = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.Pow: "pow", ast.MatMult: "matmul"
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_COMPARISONS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_BUILTINS = (min, max, len, int, float, bool, range, enumerate, zip, list, tuple, abs, sum, str)
_SPELLINGS = {"axis": "dim", "keepdims": "keepdim", "input": "x", "self": "x", "tensor": "x"}


# ---- the operations -------------------------------------------------------------------------------------------


def _elementwise(name: str, arity: int) -> Callable[..., Value]:
    if arity == 1:
        return lambda reader, x: reader.made(node(name, reader.value(x).node), reader.value(x).dims)

    def run(reader: Reader, x: Any, other: Any) -> Value:
        operands = [reader.current(v) if isinstance(v, Value) else v for v in (x, other)]
        values = [v for v in operands if isinstance(v, Value)]
        raise_unless(bool(values), "an operation without a tensor")
        raise_unless(all(isinstance(v, Value) or type(v) in (int, float) for v in operands), "an operand of its own")
        pair = _pair(reader, name, *values) if len(values) == 2 else None
        if pair is not None:
            return pair
        operands = _aligned(operands)
        values = [v for v in operands if isinstance(v, Value)]
        nodes = [v.node if isinstance(v, Value) else number(v) for v in operands]
        return reader.made(_pointwise(name, *nodes), reader.broadcast(values))

    return run


def _own_vector(value: Value) -> int | None:
    """The dimension along which a vector of the module's own lies; None for anything else."""
    of = value.node[1] if value.node[0] == "constant" else value.node
    labelled = [d for d, axes in enumerate(value.dims) if axes]
    return labelled[0] if of[0] == "tensor" and of[1] != INPUT and len(labelled) == 1 else None


def _aligned(operands: list[Any]) -> list[Any]:
    """With a vector of the module's own (a bias) along the other operand's dimension."""
    if len(operands) != 2 or not all(isinstance(v, Value) for v in operands):
        return operands
    for own, other in ((0, 1), (1, 0)):
        vector, value = operands[own], operands[other]
        at = _own_vector(vector)
        if at is None or _own_vector(value) is not None or len(vector.dims) - at > len(value.dims):
            continue
        axes = value.dims[at - len(vector.dims)]
        if not axes or not all(tensor for tensor, _, _ in axes) or math.prod(n for *_, n in axes) != vector.shape[at]:
            continue
        dims = tuple(axes if d == at else () for d in range(len(vector.dims)))
        aligned = Value(node("along", vector.node, vector.dims[at], axes), dims)
        return [aligned, value] if own == 0 else [value, aligned]
    return operands


def _pair(reader: Reader, name: str, a: Value, b: Value) -> Value | None:
    """Each element of an axis with each: a - b of one value that lies along two dimensions."""
    if name != "sub" or a.node is not b.node or len(a.dims) != len(b.dims) or a.dims == b.dims:
        return None
    apart = [i for i, (x, y) in enumerate(zip(a.dims, b.dims)) if x != y]
    raise_unless(len(apart) == 2, "a combination of a tensor's elements with each other")
    rows = [i for i in apart if a.dims[i] and not b.dims[i]]
    columns = [i for i in apart if b.dims[i] and not a.dims[i]]
    raise_unless(
        len(rows) == len(columns) == 1 and a.dims[rows[0]] == b.dims[columns[0]] and len(a.dims[rows[0]]) == 1,
        "a combination of a tensor's elements with each other",
    )
    (axis,) = a.dims[rows[0]]
    dims = list(a.dims)
    # Which is which does not matter to a distance, and nothing but a distance is recognised.
    dims[rows[0]], dims[columns[0]] = ((f"row of {axis[0]}", *axis[1:]),), ((f"column of {axis[0]}", *axis[1:]),)
    return reader.made(node("pairs", a.node, axis), dims)


def _dims(value: Value, dim: Any) -> list[int]:
    rank = len(value.dims)
    if dim is None:
        return list(range(rank))
    found = [dim] if type(dim) is int else list(dim)
    raise_unless(all(type(d) is int and -rank <= d < rank for d in found), "a dimension that does not exist")
    return [d % rank for d in found] if found else list(range(rank))


def _split(value: Value, dim: Any, keepdim: bool) -> tuple[tuple[Axis, ...], list[tuple[Axis, ...]]]:
    """The axes of these dimensions, and the other dimensions."""
    gone = _dims(value, dim)
    raise_unless(len(set(gone)) == len(gone) and type(keepdim) is bool, "a dimension twice")
    axes = [axis for d in gone for axis in value.dims[d]]
    raise_unless(all(tensor for tensor, _, _ in axes), "a sum over copies")
    kept = [() if d in gone else value.dims[d] for d in range(len(value.dims)) if keepdim or d not in gone]
    return _bound(axes), kept


def _reduction(name: str) -> Callable[..., Value]:
    def run(reader: Reader, x: Any, dim: Any = None, keepdim: bool = False) -> Value:
        value = reader.value(x)
        axes, kept = _split(value, dim, keepdim)
        return reader.made(_reduced(name, value.node, axes), kept)

    return run


def _variance(name: str) -> Callable[..., Value]:
    def run(
        reader: Reader, x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, correction: Any = None
    ) -> Value:
        value = reader.value(x)
        if isinstance(dim, bool):  # var(x, unbiased)
            dim, unbiased = None, dim
        raise_unless(unbiased in (None, True, False) and (unbiased is None or correction is None), "a variance")
        correction = correction if correction is not None else 1 if unbiased in (None, True) else 0
        raise_unless(correction in (0, 1), "a variance with another correction")
        axes, kept = _split(value, dim, keepdim)
        return reader.made(node(name, value.node, axes, int(correction)), kept)

    return run


def _norm(reader: Reader, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Value:
    value = reader.value(x)
    raise_unless(p in (2, "fro", None) and not isinstance(p, bool), "another norm")
    axes, kept = _split(value, dim, keepdim)
    return reader.made(node("norm", value.node, axes), kept)


def _normalize(reader: Reader, x: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Value:
    value = reader.value(x)
    raise_unless(p == 2 and type(eps) in (int, float) and type(dim) is int, "another normalisation")
    axes, _ = _split(value, dim, False)
    length = node("largest", node("norm", value.node, axes), number(eps))
    return reader.made(node("div", value.node, length), value.dims)


def _matmul(reader: Reader, x: Any, other: Any) -> Value:
    a, b = reader.value(x), reader.value(other)
    raise_unless(1 <= len(a.dims) <= 2 and 1 <= len(b.dims) <= 2, "a product of more than matrices")
    left, right = a.dims[-1], b.dims[0]
    raise_unless(a.shape[-1] == b.shape[0], "a product of sizes that do not fit")
    raise_unless(all(t for t, _, _ in (*left, *right)), "a product of copies")
    return reader.made(_network((a.node, left), (b.node, right)), (*a.dims[:-1], *b.dims[1:]))


def _network(a: tuple[Node, tuple[Axis, ...]], b: tuple[Node, tuple[Axis, ...]]) -> Node:
    """A sum of products over one index, in whichever order several of them are taken."""
    operands: list[Node] = []
    links = [tuple(sorted((a[1], b[1])))]
    for each, _ in (a, b):
        operands += each[1] if each[0] == "network" else [each]
        links += each[2] if each[0] == "network" else []
    raise_unless(len({_stripped(o, {}) for o in operands}) == len(operands), "a tensor multiplied by itself")
    return node("network", _ordered(*operands), tuple(sorted(links)))


def _flat_sizes(sizes: tuple[Any, ...]) -> list[int]:
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else list(sizes)


def _expand(reader: Reader, x: Any, *sizes: Any) -> Value:
    value, shape = reader.value(x), _flat_sizes(sizes)
    dims, new = list(value.dims), len(shape) - len(value.dims)
    raise_unless(new >= 0 and all(type(n) is int for n in shape), "an expansion")
    dims = [()] * new + dims
    for i, size in enumerate(shape):
        has = math.prod(n for _, _, n in dims[i])
        if size in (-1, has):
            raise_unless(size > 0 or i >= new, "an expansion")
        else:
            raise_unless(has == 1 and size > 0, "an expansion")
            dims[i] = (("", 0, size),)
    return reader.view(x, dims)


def _repeat(reader: Reader, x: Any, *sizes: Any) -> Value:
    value, times = reader.value(x), _flat_sizes(sizes)
    new = len(times) - len(value.dims)
    raise_unless(new >= 0 and all(type(n) is int and n > 0 for n in times), "a repetition")
    dims = [*[()] * new, *value.dims]
    return reader.made(value.node, [(("", 0, n), *axes) for n, axes in zip(times, dims)])


def _permute(reader: Reader, x: Any, *order: Any) -> Value:
    value, places = reader.value(x), _flat_sizes(order)
    rank = len(value.dims)
    raise_unless(sorted(d % rank for d in places if type(d) is int) == list(range(rank)), "a permutation")
    return reader.view(x, [value.dims[d % rank] for d in places])


def _transpose(reader: Reader, x: Any, dim0: int, dim1: int) -> Value:
    rank = len(reader.value(x).dims)
    raise_unless(all(type(d) is int and -rank <= d < rank for d in (dim0, dim1)), "a permutation")
    order = list(range(rank))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(reader, x, *order)


def _t(reader: Reader, x: Any) -> Value:
    rank = len(reader.value(x).dims)
    raise_unless(rank <= 2, "a transpose of more than a matrix")
    return _permute(reader, x, *range(rank)[::-1])


def _squeeze(reader: Reader, x: Any, dim: Any = None) -> Value:
    shape = reader.value(x).shape
    gone = [d for d in _dims(reader.value(x), dim) if shape[d] == 1]
    return reader.reshaped(x, [n for d, n in enumerate(shape) if d not in gone])


def _unsqueeze(reader: Reader, x: Any, dim: int) -> Value:
    shape = list(reader.value(x).shape)
    raise_unless(type(dim) is int and -len(shape) - 1 <= dim <= len(shape), "a dimension that does not exist")
    shape.insert(dim % (len(shape) + 1), 1)
    return reader.reshaped(x, shape)


def _view(reader: Reader, x: Any, *shape: Any) -> Value:
    raise_unless(isinstance(x, Value), "a view of something that is not a tensor")
    return reader.reshaped(x, _flat_sizes(shape))


def _reshape(reader: Reader, x: Any, *shape: Any) -> Value:
    return _view(reader, x, *shape)


def _flatten(reader: Reader, x: Any, start_dim: int = 0, end_dim: int = -1) -> Value:
    shape = list(reader.value(x).shape)
    raise_unless(type(start_dim) is int and type(end_dim) is int and bool(shape), "a view")
    start, end = start_dim % len(shape), end_dim % len(shape)
    return reader.reshaped(x, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])


def _unflatten(reader: Reader, x: Any, dim: int, sizes: Any) -> Value:
    shape = list(reader.value(x).shape)
    raise_unless(type(dim) is int and isinstance(sizes, (tuple, list)) and -1 not in sizes, "a view")
    raise_unless(math.prod(sizes) == shape[dim], "a view")
    at = dim % len(shape)
    return reader.reshaped(x, [*shape[:at], *sizes, *shape[at + 1 :]])


def _expand_as(reader: Reader, x: Any, other: Any) -> Value:
    return _expand(reader, x, *reader.value(other).shape)


def _view_as(reader: Reader, x: Any, other: Any) -> Value:
    return _view(reader, x, *reader.value(other).shape)


def _size(reader: Reader, x: Any, dim: Any = None) -> Any:
    shape = reader.value(x).shape
    if dim is None:
        return shape
    raise_unless(type(dim) is int and -len(shape) <= dim < len(shape), "a dimension that does not exist")
    return shape[dim]


def _cat(reader: Reader, tensors: Any, dim: int = 0) -> Joined:
    raise_unless(isinstance(tensors, (tuple, list)) and type(dim) is int, "a torch.cat")
    parts = tuple(reader.value(x) for x in tensors)
    raise_unless(len({len(p.dims) for p in parts}) == 1 and not reader.no_grad, "a torch.cat")
    return Joined(parts, dim % len(parts[0].dims))


def _activation(name: str, slope: float | None) -> Callable[..., Value]:
    def run(reader: Reader, x: Any, negative_slope: Any = slope, inplace: Any = False) -> Value:
        value = reader.value(x)
        raise_unless(type(inplace) is bool and type(negative_slope) in (int, float, type(None)), "an activation")
        if inplace:  # of what nobody else has
            held = any(each is x for frame in reader.frames for each in _leaves(frame.values()))
            raise_unless(x.fresh and not held and not any(each is x for each in reader.seen), "it works in place")
        options = () if negative_slope is None else (number(negative_slope),)
        return reader.made(node(name, value.node, *options), value.dims)

    if slope is None:
        return lambda reader, x, inplace=False: run(reader, x, None, inplace)
    return run


def _clamp(reader: Reader, x: Any, min: Any = None, max: Any = None) -> Value:
    value = reader.value(x)
    raise_unless(type(min) in (int, float) and type(max) in (int, float), "a clamp")
    return reader.made(node("clamp", value.node, number(min), number(max)), value.dims)


def _pad(reader: Reader, x: Any, pad: Any, mode: Any = "constant", value: Any = None) -> Value:
    raise_unless(isinstance(pad, (tuple, list)) and all(type(n) is int for n in pad), "a padding")
    raise_unless(mode == "constant" and value in (None, 0) and len(pad) % 2 == 0, "a padding that is not of zeros")
    result, rank = reader.value(x), len(reader.value(x).dims)
    raise_unless(len(pad) <= 2 * rank, "a padding")
    for dim in range(rank - len(pad) // 2, rank):
        before, after = pad[2 * (rank - 1 - dim)], pad[2 * (rank - 1 - dim) + 1]
        size = result.shape[dim]
        if min(before, after) < 0:
            result = reader.part(result, dim, max(-before, 0), size - max(-after, 0), 1)
            before, after, size = max(before, 0), max(after, 0), result.shape[dim]
        if before == after == 0:
            continue
        dims = list(result.dims)
        # Of a dimension of size 1, which has no axis: the one before it names it.
        axes = dims[dim] or (("after", dim and dims[dim - 1]) if dim and dims[dim - 1] else None)
        raise_unless(axes is not None and all(t != "" for t, *_ in dims[dim]), "a padding of copies")
        dims[dim] = ((f"padded {axes} by {before}, {after}", 1, before + size + after),)
        result = reader.made(node("padded", result.node, axes, before, after), dims)
    return replace(result, fresh=True)


def _flip(reader: Reader, x: Any, *dims: Any) -> Value:
    result = reader.value(x)
    for dim in sorted(_dims(result, _flat_sizes(dims))):
        axes = result.dims[dim]
        if axes:
            raise_unless(all(tensor for tensor, _, _ in axes), "a flip of copies")
            turned = list(result.dims)
            turned[dim] = ((f"flipped {axes}", 1, result.shape[dim]),)
            result = reader.made(node("flipped", result.node, axes), turned)
    return replace(result, fresh=True)


def _filter(
    reader: Reader,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> Value:
    """conv2d of each channel by itself with the same kernel."""
    image, kernel = reader.value(x), reader.value(weight)
    ones = (1, (1, 1))
    plain = bias is None and _fixed(stride) in ones and _fixed(padding) in (0, (0, 0)) and _fixed(dilation) in ones
    raise_unless(plain and len(image.dims) == len(kernel.dims) == 4, "a convolution")
    one = kernel.shape[1] == 1 and kernel.shape[0] == groups == image.shape[1]
    raise_unless(one and all(tensor == "" for tensor, _, _ in kernel.dims[0]), "a convolution of several channels")
    dims, spans = list(image.dims), []
    for dim in (2, 3):
        axes, taps = image.dims[dim], kernel.dims[dim]
        left = image.shape[dim] - kernel.shape[dim] + 1
        raise_unless(left > 0 and all(tensor for tensor, _, _ in (*axes, *taps)), "a convolution")
        spans.append((axes, taps))
        if taps:
            dims[dim] = ((f"filtered {axes} by {kernel.shape[dim]}", 1, left),)
    return reader.made(node("filtered", image.node, kernel.node, tuple(spans)), dims)


def _itself(reader: Reader, x: Any) -> Value:
    return reader.view(x, reader.value(x).dims)


OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: _elementwise(name, 1) for name in ("neg", "abs", "exp", "sqrt", "rsqrt", "square")},
    **{name: _elementwise(name, 2) for name in ("add", "sub", "mul", "div", "pow")},
    **{name: _reduction(name) for name in ("mean", "sum")},
    "var": _variance("var"), "std": _variance("std"), "norm": _norm, "normalize": _normalize,
    "matmul": _matmul, "mm": _matmul, "mv": _matmul, "dot": _matmul,
    "expand": _expand, "repeat": _repeat, "permute": _permute, "transpose": _transpose, "t": _t, "squeeze": _squeeze,
    "unsqueeze": _unsqueeze, "view": _view, "reshape": _reshape, "flatten": _flatten, "unflatten": _unflatten,
    "expand_as": _expand_as, "view_as": _view_as, "size": _size, "cat": _cat, "contiguous": _itself, "clone": _itself,
    "relu": _activation("relu", None), "leaky_relu": _activation("leaky_relu", 0.01), "clamp": _clamp,
    "pad": _pad, "flip": _flip, "conv2d": _filter,
    "detach": lambda reader, x: reader.detached(reader.value(x) if x.cell is None else x),
    "dim": lambda reader, x: len(reader.value(x).dims), "numel": lambda reader, x: math.prod(reader.value(x).shape),
}  # fmt: skip

_FUNCTIONS: dict[Any, str] = {
    **{getattr(torch, n): n for n in OPERATIONS if hasattr(torch, n)},
    **{getattr(torch, alias): n for alias, n in (
        ("concat", "cat"), ("concatenate", "cat"), ("absolute", "abs"), ("negative", "neg"), ("subtract", "sub"),
        ("multiply", "mul"), ("divide", "div"), ("true_divide", "div"), ("swapaxes", "transpose"),
    )},
    F.normalize: "normalize", F.relu: "relu", F.leaky_relu: "leaky_relu", F.pad: "pad", F.conv2d: "conv2d",
}  # fmt: skip

_signature = functools.lru_cache(maxsize=256)(inspect.signature)
