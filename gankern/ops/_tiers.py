"""What all primitives' operators share: the library of schemas, the native build, and Triton.

Schemas are defined here in Python, so that ``torch.ops.gankern.*`` exists in every installation. The native
library adds the CPU kernels when it was built; Triton kernels are attached to CUDA tensors on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import Function

from gankern.dispatch import ANY_ORDER, FLOATING, Implementation, Primitive

library = torch.library.Library("gankern", "FRAGMENT")

_PACKAGE = Path(__file__).resolve().parent.parent


def _load_native() -> str | None:
    """Loads the native library; the reason where that is not possible."""
    path = _PACKAGE / "libgankern_ops.so"
    if not path.exists():
        return (
            "the native library was not built (a C++17 compiler was missing or GANKERN_BUILD_NATIVE=0 was set; "
            "reinstall with one to have it)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


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
NATIVE_MISSING = _load_native()
TRITON_MISSING = _triton_missing()


def declare(name: str, *, gradient_order: int, dtypes: tuple[torch.dtype, ...] = FLOATING) -> Primitive:
    """A primitive with this library's usual tiers: Triton, C++ on the CPU, and the reference."""
    triton_devices = ("cuda", "cpu") if interpreting() else ("cuda",)
    cpu = Implementation("cpu", ("cpu",), dtypes, gradient_order, NATIVE_MISSING)
    triton = Implementation("triton", triton_devices, dtypes, gradient_order, TRITON_MISSING)
    reference = Implementation("reference", (), (), ANY_ORDER)
    return Primitive(name, (cpu, triton, reference))


def define(primitive: str, launcher: str, schema: str, fake: Callable[..., Any]) -> None:
    """Defines ``torch.ops.gankern.<name>``: its schema, its fake kernel, and its kernel for CUDA tensors, which
    is the function ``launcher`` of ``gankern.triton.<primitive>``. The CPU kernel is in csrc/ops/<primitive>.cpp.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, lambda *args: _launcher(primitive, launcher)(*args), "CUDA")
    torch.library.register_fake(f"gankern::{name}", fake, lib=library)


def _launcher(primitive: str, launcher: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"gankern.triton.{primitive}"), launcher)


def kernel(
    implementation: str, primitive: str, launcher: str, op: Callable[..., Any], device: str
) -> Callable[..., Any]:
    """What to call: the operator, or under Triton's interpreter the launcher itself, since the operator's
    kernel for CPU tensors is the C++ one."""
    if implementation == "triton" and device == "cpu":
        return _launcher(primitive, launcher)
    return op


def first_order_only() -> bool:
    """Whether a backward that runs now can call its kernel without recording it: nobody will differentiate it
    again, in reverse (grad mode is off) or forward mode, or under a torch.func transform. torch.compile has no
    double backward, and cannot trace a Function inside another one's backward."""
    return torch.compiler.is_compiling() or not (
        torch.is_grad_enabled()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``. In eager mode outside torch.func this skips the binding of default arguments to
    forward's signature, which costs as much as a small kernel; there are none."""
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            # Dynamo would trace forward alone and lose the gradient.
            raise RuntimeError(
                "gankern's kernels cannot be compiled inside a torch.func transform: pass implementation='reference', "
                "or leave the transform out of torch.compile"
            )
        # Where nothing is to be differentiated, Dynamo would call forward with a context that it does not take.
        needed = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        return function.apply(*args) if needed else function.forward(*args)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return function.apply(*args)
    return super(Function, function).apply(*args)
