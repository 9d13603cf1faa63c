"""Spectral norm that repositories wrote (or copied) themselves: recognised by its parts, taken over where its code is
known to compute what ours does."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.acceleration._code import names_used, original
from gankern.acceleration._expressions import Unknown, Value, constant, numbers_in
from gankern.acceleration._read import Delegated, Held, Reader, Written, holds
from gankern.acceleration._scope import listed, say, settle, state
from gankern.core import devices
from gankern.core.dispatch import FLOATING
from gankern.core.torch_internals import functions_replaced, transformed
from gankern.nn.utils._requests import Request, normalize

MOST_ITERATIONS = 16  # that are recognised
# Values of a layer's weight, on average, from which on ours is faster than code of its own, which is looked up again at
# each call (measured).
FROM = 2**16


# ---- our formulas, as they are read (see _read.py) ----------------------------------------------------------------


def _biggan(weight: Any, u: Any, iterations: int, eps: float) -> Any:
    w = weight.view(weight.shape[0], -1)
    with torch.no_grad():
        for _ in range(iterations):
            v = F.normalize(torch.matmul(u, w), eps=eps)
            u = F.normalize(torch.matmul(v, w.t()), eps=eps)
    sigma = torch.matmul(torch.matmul(v, w.t()), u.t())
    return weight / sigma, u, sigma


def _wrapper(weight: Any, u: Any, v: Any, iterations: int, eps: float) -> Any:
    w = weight.detach().view(weight.shape[0], -1)
    for _ in range(iterations):
        v = torch.mv(w.t(), u)
        v = v / (v.norm() + eps)
        u = torch.mv(w, v)
        u = u / (u.norm() + eps)
    u, v = u.detach(), v.detach()
    sigma = u.dot(weight.view(weight.shape[0], -1).mv(v))
    return weight / sigma, u, v


@dataclass(frozen=True)
class Family:
    """Where one family of code keeps its state and which method of it iterates."""

    name: str
    dialect: str
    method: str  # that is replaced
    # Names of its tensors; {} is the name of the parameter, "module." stands before those of the inner layer.
    weight: str
    u: str
    v: str | None
    sigma: str | None
    runs_inner: bool = False  # the method is the whole forward
    # Whether its gradient uses the vectors of the last forward, whichever forward it belongs to: u and v are replaced
    # through .data, which autograd does not see.
    last_vectors: bool = False


FAMILIES = {
    "wrapper": Family(
        "a wrapper with weight_bar, weight_u, weight_v",
        "wrapper",
        "_update_u_v",
        "module.{}_bar",
        "module.{}_u",
        "module.{}_v",
        None,
        last_vectors=True,
    ),
    "torchgan": Family(
        "a wrapper with w_bar, u, v (torchgan)",
        "wrapper",
        "forward",
        "w_bar",
        "u",
        "v",
        None,
        runs_inner=True,
        last_vectors=True,
    ),
    "mimicry": Family("a layer with sn_u, sn_sigma", "biggan", "sn_weights", "weight", "sn_u", None, "sn_sigma"),
    "biggan": Family("a layer with u0, sv0 (BigGAN)", "biggan", "W_", "weight", "u0", None, "sv0"),
}


def _full(module: nn.Module, name: str) -> str:
    return name.format(getattr(module, "name", "weight"))


def _tensor(module: nn.Module, name: str) -> Tensor:
    """One of a module's tensors as it is kept: looking at it computes nothing, as a parametrised attribute would."""
    owner, _, inner = _full(module, name).rpartition(".")
    holder = module._modules.get(owner) if owner else module
    if holder is not None:
        for kept in (holder.__dict__, holder._parameters, holder._buffers):
            found = kept.get(inner)
            if isinstance(found, Tensor):
                return found
    raise AttributeError(f"it keeps no {_full(module, name)}")


# ---- what the code does -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How often the method iterates in one mode, while the guards hold; or why that is not known."""

    guards: Sequence[Callable[[nn.Module], bool]] = ()
    iterations: int = 0
    eps: float = 0.0
    reason: str = ""


def read(module: nn.Module, name: str) -> Reading:
    """What the method of a family computes and leaves behind, in the mode that the module is in."""
    family, reader = FAMILIES[name], Reader(module)
    found = getattr(type(module), family.method)
    reader.guard("method", lambda m: getattr(type(m), family.method) is found)
    try:
        weight, u, *others = (
            _cell(reader, module, each) for each in (family.weight, family.u, family.v) if each is not None
        )
        result = reader.function(found, (reader.root,), {})
        if family.v is not None:
            target = _full(module, "module.{}")
            written = reader.written.pop(target, None)
            if not isinstance(written, Written) or written.way != "attribute":
                raise Unknown("it does not set the weight of the layer inside")
            if isinstance(result, Delegated) != family.runs_inner or (result is not None and not family.runs_inner):
                raise Unknown("it returns something else")
            if family.runs_inner and (result.path, result.arguments) != ("module.", ()):
                raise Unknown("it runs something else")
            result = written.value
        left = {key: (each.way, each.value) for key, each in reader.written.items()}
        for eps in sorted(e for e in numbers_in(result.node) if 0 < e < 1):
            for iterations in range(1, MOST_ITERATIONS + 1):
                if _is_ours(reader, module, family, (weight, u, *others, iterations, eps), result, left):
                    return Reading(tuple(reader.guards.values()), iterations, eps)
    except Unknown as reason:
        return Reading(reason=str(reason))
    except AttributeError as reason:  # a tensor of its own is missing
        return Reading(reason=str(reason))
    return Reading(reason="its formula is none of ours")


def _cell(reader: Reader, module: nn.Module, name: str) -> Any:
    value: Any = reader.root
    for part in _full(module, name).split("."):
        value = reader.member(value, part)
    return replace(value, cell=None) if isinstance(value, Value) else value  # as it is before the method runs


def _is_ours(reader: Reader, module: nn.Module, family: Family, arguments: tuple, result: Any, written: dict) -> bool:
    if family.v is not None:
        weight, u, v = reader.function(_wrapper, arguments, {})
        expected: dict[Any, Any] = {family.u: ("data", u), family.v: ("data", v)}
    else:
        weight, u, sigma = reader.function(_biggan, arguments, {})
        training = reader.attribute(reader.root, "training")
        expected = {family.u: ("copy", u), family.sigma: ("copy", sigma)} if training else {}
    if not weight.same(result) or len(written) != len(expected):
        return False
    for name, (way, value) in expected.items():
        its_way, its = written.get(_full(module, name), (None, None))
        if its_way != way or its.node is not constant(value.node):
            return False
    return True


class Normalizer:
    """Computes the weight of one layer of a family."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.readings: dict[bool, Reading] = {}  # by mode

    def __getstate__(self) -> dict[str, Any]:
        # What is known of the code is found out anew: names may mean something else in another process.
        return self.__dict__ | {"readings": {}}

    def reading(self, module: nn.Module) -> Reading | None:
        """What is known of the method in the present mode, where it is what ours does."""
        reading = self.readings.get(module.training)
        if reading is None or not holds(reading.guards, module):
            reading = self.readings[module.training] = read(module, self.family)
        return reading if reading.iterations else None

    def ready(self, module: nn.Module) -> bool:
        family = FAMILIES[self.family]
        known = devices.is_known(devices.SPECTRAL, _tensor(module, family.weight))
        return known and self.reading(module) is not None and _is_taken(module, family)

    def request(self, module: nn.Module) -> Request:
        family = FAMILIES[self.family]
        reading: Any = self.reading(module)  # there is one: ready() was asked
        weight, u = _tensor(module, family.weight), _tensor(module, family.u)
        v, sigma = (None if name is None else _tensor(module, name) for name in (family.v, family.sigma))
        rules = family.dialect, reading.iterations, reading.eps, module.training, None
        return Request(rules, weight, u, v, 0, sigma, family.last_vectors)

    def weight(self, module: nn.Module) -> Tensor:
        request = self.request(module)
        normalized, weight = normalize(request), request.weight
        if not request.replaces or request.v is None or not (torch.is_grad_enabled() and weight.requires_grad):
            return normalized
        sigma = request.u.dot(weight.view(len(request.u), -1).mv(request.v))
        return weight / sigma.expand_as(weight)


def values(module: nn.Module, family: str) -> int:
    """How many values the weight of a layer of a family has."""
    return _tensor(module, FAMILIES[family].weight).numel()


def _is_taken(module: nn.Module, family: Family) -> bool:
    """Whether the tensors are such as ours takes, beside what the reading asks of them."""
    tensors = [_tensor(module, name) for name in (family.weight, family.u, family.v, family.sigma) if name is not None]
    weight = tensors[0]
    return (
        all(
            type(x) in (Tensor, nn.Parameter) and x.dtype == weight.dtype and x.device == weight.device for x in tensors
        )
        and weight.dtype in FLOATING
        and weight.is_contiguous()
    )


def method(module: Any, normalizer: Normalizer, *args: Any, **kwargs: Any) -> Any:
    """In place of the family's method."""
    family = FAMILIES[normalizer.family]
    if torch.compiler.is_compiling() or transformed() or functions_replaced():  # as it is written
        return original(module, family.method)(*args, **kwargs)
    if not normalizer.ready(module) or ((args or kwargs) and not family.runs_inner) or kwargs:
        return original(module, family.method)(*args, **kwargs)
    if state.waiting:
        settle(args[0] if args else None, pure=True)  # what waits has its weight already
    with torch._C.DisableTorchFunction(), listed("spectral norm"):
        say("gankern: spectral norm")
        weight = normalizer.weight(module)
    if family.v is None:
        return weight
    setattr(module.module, module.name, weight)
    return module.module.forward(*args) if family.runs_inner else None


def recognise(module: nn.Module) -> tuple[str | None, str | None]:
    """The family of a module that normalises spectrally by itself; or why it is of none (None: it does not look so)."""
    for name, family in FAMILIES.items():
        if not callable(getattr(type(module), family.method, None)) or not _has_parts(module, family):
            continue
        before = module.training
        try:
            for training in (True, False):
                module.__dict__["training"] = training
                reading = read(module, name)
                if not reading.iterations:
                    return None, reading.reason
        finally:
            module.__dict__["training"] = before
        return (name, None) if _is_taken(module, family) else (None, "its tensors are not plain ones of one type")
    cls = type(module)
    named = any(word in cls.__name__.lower() for word in ("spectral", "snconv", "snlinear", "snembedding"))
    if cls.__module__.split(".")[0] not in ("torch", "gankern") and (named or _iterates(module)):
        return None, "its code is of none of the known forms"
    return None, None


# ---- what is left, and why --------------------------------------------------------------------------------------

_NORMS = {"norm", "normalize", "l2normalize", "_l2normalize", "l2_norm", "mv", "matmul", "mm", "dot"}


def _iterates(module: nn.Module) -> bool:
    """Whether it looks as if it normalised a weight spectrally: it keeps a vector of as many values as the weight has
    outputs, which is not trained, and multiplies or takes norms. Only what the report says depends on it."""
    kept = {**module.__dict__, **module._buffers, **module._parameters}
    tensors = {name: x for name, x in kept.items() if isinstance(x, Tensor)}
    outputs = {x.shape[0] for x in tensors.values() if x.ndim >= 2 and x.requires_grad}
    vectors = [x for n, x in tensors.items() if x.numel() in outputs and not x.requires_grad and x.numel() > 1]
    return bool(vectors) and bool(names_used(module) & _NORMS)


def hooked(module: nn.Module) -> list[tuple[str, str]]:
    """The hooks of their own that make a tensor of this layer before each forward: the name, and why they are left."""
    made = [x for x in module.__dict__.values() if isinstance(x, Tensor)]
    if not made:
        return []
    own = [hook for hook in module._forward_pre_hooks.values() if not _is_torchs(hook)]
    return [(getattr(hook, "__name__", type(hook).__name__), _why_left(module, hook)) for hook in own]


def _is_torchs(hook: Any) -> bool:
    return (getattr(type(hook), "__module__", "") or "").split(".")[0] in ("torch", "gankern")


def _why_left(module: nn.Module, hook: Any) -> str:
    function = hook if isinstance(hook, types.FunctionType) else inspect.getattr_static(type(hook), "__call__", None)
    if not isinstance(function, types.FunctionType):
        return "it is no function in Python"
    device = next((x.device.type for x in module.parameters(recurse=False)), "")
    reader = Reader(module, device, sets=True)
    try:
        owner = () if function is hook else (Held(hook),)
        reader.function(function, (*owner, reader.root, ()), {})
    except Unknown as reason:
        return f"its code is not known: {reason}"
    weights = [each.value for each in reader.written.values() if each.way == "attribute" and len(each.value.shape) > 1]
    for weight in weights:
        for formula in (_by_norm, _by_normalize):
            for u in reader.cells.values():
                if _is_through(reader, formula, weight, u):
                    return "the gradient goes through its vectors u and v, which are constants in torch's and ours"
    return "it computes none of the known forms"


def _by_norm(weight: Any, u: Any, shape: Any, eps: float) -> Any:
    w = weight.view(shape[0], -1)
    v = w.t() @ u
    v = v / (v.norm() + eps)
    u = w @ v
    u = u / (u.norm() + eps)
    return weight / (u.t() @ w @ v), w


def _by_normalize(weight: Any, u: Any, shape: Any, eps: float) -> Any:
    w = weight.view(shape[0], -1)
    v = F.normalize(w.t() @ u, dim=0, eps=eps)
    u = F.normalize(w @ v, dim=0, eps=eps)
    return weight / (u.t() @ w @ v), w


def _is_through(reader: Reader, formula: Callable[..., Any], weight: Value, u: Value) -> bool:
    for own in reader.cells.values():
        if own.node[0] == "constant" or own.shape != weight.shape or u.node is own.node:
            continue
        for eps in sorted(numbers_in(weight.node) | {0.0}):
            try:
                if weight.node is reader.function(formula, (own, replace(u, cell=None), weight.shape, eps), {})[0].node:
                    return True
            except Unknown:
                continue
    return False


def _has_parts(module: nn.Module, family: Family) -> bool:
    try:
        tensors = [
            _tensor(module, name) for name in (family.weight, family.u, family.v, family.sigma) if name is not None
        ]
    except (AttributeError, TypeError):
        return False
    weight, u = tensors[:2]
    return all(isinstance(x, Tensor) for x in tensors) and weight.ndim >= 2 and u.numel() == weight.shape[0]
