"""Loads the native libraries, where they were built: C++ kernels and their operators, and C++ autograd nodes."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

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


# Decided once, at import: torch.compile can trace a choice between constants, but not the looking.
NATIVE_MISSING = _load_native()


def _load_cuda() -> str | None:
    """Loads the library of CUDA C++ kernels; the reason where that is not possible."""
    path = _PACKAGE / "libgankern_cuda.so"
    if not path.exists():
        return "the CUDA C++ kernels were not built: GANKERN_BUILD_CUDA=1 builds them, where nvcc is"
    if not torch.version.cuda:
        return "this torch was built without CUDA"
    try:
        torch.ops.load_library(str(path))  # which starts no driver
    except OSError as error:
        return f"the CUDA C++ kernels do not load: {error}"
    return None


CUDA_MISSING = _load_cuda()


# ---- autograd nodes ---------------------------------------------------------------------------------------------

# Set to 0, every gradient goes through Python.
NODES_VARIABLE = "GANKERN_AUTOGRAD_NODES"

_INTERFACE = 20  # as csrc/autograd/module.cpp has it


class _Declines:
    """Stands for the nodes where there are none: declines every call, so that Python does it."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: NotImplemented


def nodes_library() -> str:
    """The name of the nodes' library that fits the torch and the Python that run."""
    return f"libgankern_autograd-{torch.__version__}.{sys.implementation.cache_tag}.so"


def _load_nodes() -> tuple[Any, str | None]:
    """The nodes, and why there are none."""
    if NATIVE_MISSING:
        return _Declines(), NATIVE_MISSING
    if os.environ.get(NODES_VARIABLE) == "0":
        return _Declines(), f"{NODES_VARIABLE}=0 is set"
    path = _PACKAGE / nodes_library()
    if not path.exists():
        others = sorted(p.name.removeprefix("libgankern_autograd-") for p in _PACKAGE.glob("libgankern_autograd-*.so"))
        built = f"were built for {', '.join(o.removesuffix('.so') for o in others)}" if others else "were not built"
        running = f"{torch.__version__}.{sys.implementation.cache_tag}"
        return _Declines(), (
            f"they {built}, and this is {running}: gradients go through Python, which is slower a call; reinstall "
            "gankern beside this torch (pip install --no-build-isolation)"
        )
    try:
        module = _import(path)
    except ImportError as error:
        return _Declines(), f"they do not load: {error}; reinstall gankern beside this torch"
    if getattr(module, "interface", None) != _INTERFACE:
        return _Declines(), "they were built from other sources than these; reinstall gankern"
    return module, None


def _import(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("gankern._nodes", str(path))
    spec = importlib.util.spec_from_file_location("gankern._nodes", path, loader=loader)
    assert spec is not None  # with a loader there is one
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# Each function of theirs is given what the Python function of that name is, and returns NotImplemented for what is
# left to that one.
nodes, NODES_MISSING = _load_nodes()


@contextlib.contextmanager
def python_gradients() -> Iterator[None]:
    """Within the block every gradient goes through Python, as without the nodes. For tests; holds for the process."""
    before = nodes.enable(False)
    try:
        yield
    finally:
        nodes.enable(before)
