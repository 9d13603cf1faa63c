"""The operators and the tiers of every primitive: what is registered with torch and with :mod:`gankern.core.dispatch`.

Schemas are defined here in Python, so that ``torch.ops.gankern.*`` exists in every installation. The native
library adds the CPU kernels when it was built; Triton kernels are attached to CUDA tensors on first use. Primitives
that have CUDA C++ kernels have their operators once more in ``torch.ops.gankern_cuda``, for these.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from gankern.core import batching, native, torch_internals
from gankern.core.dispatch import ANY_ORDER, FLOATING, Implementation, Primitive
from gankern.core.native import CUDA_MISSING, NATIVE_MISSING

library = torch.library.Library("gankern", "FRAGMENT")
cuda_library = torch.library.Library("gankern_cuda", "FRAGMENT")


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # Not torch.cuda.is_available(): that would start the driver, and forked workers could no longer use it.
    if not (torch.version.cuda or torch.version.hip or interpreting()):
        return "this torch was built without CUDA and ROCm"
    return None


# Decided once, at import: torch.compile can trace a choice between constants, but not the looking.
TRITON_MISSING = _triton_missing()


def _native_missing(primitive: str) -> str | None:
    """Why there are no C++ kernels of a primitive."""
    if NATIVE_MISSING or f"gankern::{primitive}" in _kernels():
        return NATIVE_MISSING
    return "the native library was built from other sources, which had no such primitive; reinstall gankern"


@functools.cache
def _kernels() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_registrations_for_dispatch_key("CPU"))


def declare(name: str, *, gradient_order: int, cuda: bool = False, large_only: bool = False) -> Primitive:
    """A primitive with this library's usual tiers: Triton, C++ on the CPU, and the reference; ``cuda``: CUDA C++, which
    is for large tensors where ``large_only``."""
    triton_devices = ("cuda", "cpu") if interpreting() else ("cuda",)
    cpu = Implementation("cpu", ("cpu",), FLOATING, gradient_order, _native_missing(name))
    triton = Implementation("triton", triton_devices, FLOATING, gradient_order, TRITON_MISSING)
    reference = Implementation("reference", (), (), ANY_ORDER)
    own = Implementation("cuda", ("cuda",), FLOATING, gradient_order, CUDA_MISSING, large_only)
    return Primitive(name, (cpu, triton, *([own] if cuda else []), reference))


def define(primitive: str, launcher: str, schema: str, fake: Callable[..., Any]) -> None:
    """Defines ``torch.ops.gankern.<name>``: its schema, its fake kernel, and its kernel for CUDA tensors, which
    is the function ``launcher`` of ``gankern.triton.<primitive>``. The CPU kernel is in csrc/ops/<primitive>.cpp, that
    of ``torch.ops.gankern_cuda.<name>``, for a primitive that has one, in csrc/ops/cuda/<primitive>.cpp.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    by_python = _kernel(f"gankern::{name}", primitive, launcher)
    if native.nodes.implement(f"gankern::{name}", by_python) is NotImplemented:
        library.impl(name, by_python, "CUDA")
    _describe(library, name, schema, fake)
    if any(tier.name == "cuda" for tier in Primitive.registry[primitive].implementations):
        cuda_library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _describe(cuda_library, name, schema, fake)


def _describe(own: torch.library.Library, name: str, schema: str, fake: Callable[..., Any]) -> None:
    """What torch's transformations have to know of an operator that a library defines."""
    qualified = f"{own.ns}::{name}"
    torch.library.register_fake(qualified, fake, lib=own)
    if "Tensor[]" in schema or "Tensor?[]" in schema:  # torch's own batching loops over what is no list
        one_by_one = functools.partial(batching.one_by_one, qualified)
        torch.library.register_vmap(qualified, one_by_one, lib=own)
        own.impl(name, functools.partial(batching.of_batched_gradients, one_by_one), "Batched")


@functools.cache
def _launcher(primitive: str, launcher: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"gankern.triton.{primitive}"), launcher)


def _kernel(operator: str, primitive: str, launcher: str) -> Callable[..., Any]:
    """A launcher as an operator's kernel for CUDA tensors: imported at the first call. From then on the operator knows
    the launcher's plans, and runs them in C++ (csrc/autograd/plans.cpp) where that is built and they are of that kind;
    it comes here with all other calls."""

    @functools.cache
    def found() -> Callable[..., Any]:
        function = _launcher(primitive, launcher)
        if hasattr(function, "plans"):
            native.nodes.share_plans(operator, function.plans)
        return function

    return lambda *arguments: found()(*arguments)


def _plain(arguments: Iterable[Any]) -> bool:
    """Whether all tensors among the arguments and in lists among them are torch's own, no subclass's, and hold their
    values in memory: the dispatcher is what makes those of a negated view, or zeros that take no memory."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if type(argument) not in (torch.Tensor, torch.nn.Parameter):
                return False
            if argument.is_neg() or argument._is_zerotensor():
                return False
        elif isinstance(argument, (list, tuple)) and not _plain(argument):
            return False
    return True


class _Launch:
    """Calls a launcher of Triton kernels without the detour through torch's dispatcher, which costs as much as a
    launch; through the operator where the dispatcher has something to do."""

    def __init__(self, launcher: Callable[..., Any], operator: Callable[..., Any]) -> None:
        self.launcher, self.operator = launcher, operator

    def __call__(self, *arguments: Any) -> Any:
        return self.launcher(*arguments) if _plain(arguments) else self.operator(*arguments)


@functools.cache
def _launch(primitive: str, launcher: str) -> _Launch:
    return _Launch(_launcher(primitive, launcher), _operator(primitive, launcher))


def _resolved(argument: Any) -> Any:
    """A negated view as the values that it has: what the dispatcher makes of it where it is asked."""
    if isinstance(argument, torch.Tensor):
        return argument.resolve_neg() if argument.is_neg() else argument
    return [*map(_resolved, argument)] if isinstance(argument, (list, tuple)) else argument


@functools.cache
def _interpreted(primitive: str, launcher: str) -> Callable[..., Any]:
    """Of Triton's interpreter, which reads tensors as they lie in memory."""
    return lambda *arguments: _launcher(primitive, launcher)(*map(_resolved, arguments))


def _operator(primitive: str, launcher: str, namespace: str = "gankern") -> Callable[..., Any]:
    name = primitive if launcher == "forward" else f"{primitive}_{launcher}"
    return getattr(getattr(torch.ops, namespace), name).default


def kernel(implementation: str, primitive: str, launcher: str, device: torch.device) -> Callable[..., Any]:
    """What to call: the operator ``<primitive>_<launcher>`` (the forward's is called as the primitive is), of CUDA C++
    kernels that of ``torch.ops.gankern_cuda``. Of Triton's kernels the launcher itself, where nobody but the launcher
    has a use for the dispatcher; and always under Triton's interpreter, since the operator's kernel for CPU tensors is
    the C++ one."""
    if implementation == "cuda":
        return _operator(primitive, launcher, "gankern_cuda")
    if implementation == "triton":
        if device.type == "cpu":
            return _interpreted(primitive, launcher)
        if not torch_internals.dispatched():
            return _launch(primitive, launcher)
    return _operator(primitive, launcher)
