"""Loads the native library: the C++ kernels and their operators, where they were built."""

from __future__ import annotations

from pathlib import Path

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
