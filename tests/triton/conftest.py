"""The tests of Triton kernels run on the GPU where there is one, and elsewhere in Triton's interpreter.

A process does one or the other: Triton reads TRITON_INTERPRET when it decorates a kernel, and at its first
import for its own library. pytest loads this file while it collects, before it runs any test, so the variable
is set here in time unless something has imported Triton at module level before. That would fail in odd ways
much later, so it is refused. The ahead-of-time compilations need the other mode and run in their own process.
"""

import importlib.util
import os
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "Triton was imported before tests/triton/conftest.py could set TRITON_INTERPRET=1: "
            "set it in the environment, or run `pytest tests/triton` on its own"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
