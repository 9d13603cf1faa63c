"""Parts of a model that torch.compile has taken."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from gankern.acceleration._code import functions_used


def _made_by_compile(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of it runs what torch.compile made of it: ``torch.compile(module)``, ``module.compile()``, or a
    compiled forward."""
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or "_torchdynamo_orig_callable" in module.__dict__
        or _made_by_compile(type(module).forward)
    )


def _calls_compiled(module: nn.Module) -> bool:
    """Whether its code, or a function that it holds, calls what torch.compile made."""
    return any(_made_by_compile(f) for f in (*module.__dict__.values(), *functions_used(type(module))) if callable(f))


def compiles() -> bool:
    """Whether this process has compiled anything, or begun to."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    # What runs without a compiler, torch's own disabled functions, is there too, with None.
    return dynamo is not None and any(backend is not None for backend in dynamo.cached_backends.values())


def has_compiled_parts(root: nn.Module) -> bool:
    """Whether a forward of ``root`` may come into compiled code. Asked at each forward, since a part can be compiled at
    any time, but answered at once in a process that has compiled nothing."""
    return compiles() and any(is_compiled(m) or _calls_compiled(m) for m in root.modules())


def inside_compiled_parts(root: nn.Module) -> set[int]:
    """The ids of the modules that belong to compiled parts: they are the compiler's."""
    return {id(inner) for part in root.modules() if is_compiled(part) for inner in part.modules()}
