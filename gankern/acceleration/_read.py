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
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import math
import operator
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gankern.acceleration._expressions import (
    PLAIN,
    Axis,
    Node,
    Unknown,
    Value,
    axes_of,
    constant,
    fixed,
    is_plain,
    leaves,
    merged_axes,
    node,
    overlap,
    raise_unless,
    reshaped,
    same_values,
)
from gankern.acceleration._operations import FUNCTIONS, OPERATIONS, signature
from gankern.acceleration._source import tree_of


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
            self.guard(key, lambda m: same_values(_inner(m, owner.path).__dict__.get(name, Unknown), kept))
            return fixed(kept)
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
                self.guard((*key, "value"), lambda m: same_values(found, its_value))
                return fixed(its_value)
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
        return fixed(copy.deepcopy(value))

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
            self.guard(key, lambda m: same_values(scope.get(name, getattr(builtins, name, Unknown)), kept))
            return fixed(kept)
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
        tree = tree_of(code)
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
            kept = replace(kept, dims=reshaped(kept, room))
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
            holders = sum(each is value for frame in self.frames for each in leaves(frame.values()))
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
            name = FUNCTIONS.get(called)
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
            bound = signature(handler).bind(self, *args, **kwargs)
        except TypeError as error:
            raise Unknown(f"{name}: {error}") from error
        return handler(*bound.args, **bound.kwargs)

    def value(self, x: Any) -> Value:
        raise_unless(isinstance(x, Value), "an operation on something that is not a tensor")
        return self.current(x)

    def made(self, made: Node, dims: Sequence[Sequence[Axis]]) -> Value:
        merged = tuple(merged_axes(axes) for axes in dims)
        if overlap([axis for axes in merged for axis in axes]):
            raise Unknown("a combination of a tensor's elements with each other")
        return Value(constant(made) if self.no_grad else made, merged, fresh=True)

    def view(self, x: Value, dims: Sequence[Sequence[Axis]]) -> Value:
        if x.cell is not None:
            self.viewed.add(x.cell)
        self.seen.append(x)
        return Value(self.current(x).node, tuple(merged_axes(axes) for axes in dims))

    def reshaped(self, x: Value, shape: Sequence[int]) -> Value:
        return self.view(x, reshaped(self.current(x), shape))

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


def _inner_forward() -> None:
    """Stands for the forward of a module inside the one whose method is read, whatever that is."""


def holds(guards: Sequence[Callable[[nn.Module], bool]], module: nn.Module) -> bool:
    """Whether what was read is still what runs."""
    try:
        return all(guard(module) for guard in guards)
    except (AttributeError, KeyError):  # a part of the module is gone
        return False


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
