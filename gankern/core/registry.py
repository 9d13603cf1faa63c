"""The operators and the tiers of every primitive: what is registered with torch and with :mod:`gankern.core.dispatch`.

Schemas are defined here in Python, so that ``torch.ops.gankern.*`` exists in every installation. The native
library adds the CPU kernels when it was built; Triton kernels are attached to CUDA tensors on first use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from gankern.core import batching
from gankern.core.dispatch import ANY_ORDER, FLOATING, Implementation, Primitive
from gankern.core.native import NATIVE_MISSING

library = torch.library.Library("gankern", "FRAGMENT")


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
    if "Tensor[]" in schema or "Tensor?[]" in schema:  # torch's own batching loops over what is no list
        one_by_one = functools.partial(batching.one_by_one, name)
        torch.library.register_vmap(f"gankern::{name}", one_by_one, lib=library)
        library.impl(name, functools.partial(batching.of_batched_gradients, one_by_one), "Batched")


def _launcher(primitive: str, launcher: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"gankern.triton.{primitive}"), launcher)


def kernel(implementation: str, primitive: str, launcher: str, device: torch.device) -> Callable[..., Any]:
    """What to call: the operator ``<primitive>_<launcher>`` (the forward's is called as the primitive is), or under
    Triton's interpreter the launcher itself, since the operator's kernel for CPU tensors is the C++ one."""
    if implementation == "triton" and device.type == "cpu":
        return _launcher(primitive, launcher)
    name = primitive if launcher == "forward" else f"{primitive}_{launcher}"
    return getattr(torch.ops.gankern, name).default
