"""Decides, before any test module is imported, how this process runs Triton kernels.

On a machine without a GPU they run in Triton's interpreter, on CPU tensors. Triton reads TRITON_INTERPRET when it
is first imported and again when it decorates a kernel, and much of torch (torch.compile, for one) imports Triton.
So the variable has to be there before all of that, for all tests of the process. torch.compile is not disturbed:
on the CPU it generates C++. Tests that need Triton's compiler take it out again for a process of their own.
"""

import contextlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

# common.py and quick_triton.py, for tests and for the processes that they start.
_TESTS = str(Path(__file__).parent)
sys.path.insert(0, _TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join([_TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])

EMULATED = os.environ.get("GANKERN_PTX") == "1"  # what Triton compiles is emulated: tests/ptx/emulator.py

if EMULATED:
    sys.path.insert(0, str(Path(__file__).parent / "ptx"))
    _EMULATOR = importlib.import_module("emulator")
    _EMULATOR.install()

    def pytest_terminal_summary(terminalreporter):
        terminalreporter.write_line(f"{_EMULATOR.launches()} launches emulated")

elif importlib.util.find_spec("triton") and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError(
            "Triton was imported before tests/conftest.py could set TRITON_INTERPRET=1: set it in the environment"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def as_much_memory_as_before():
    """`gankern bench` limits its process to what memory there is then: here, to what other tests left of it, and with it
    the processes that later tests start."""
    if sys.platform != "linux":
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limits)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run in this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture
def same():
    """Whether two states are equal to the last bit, all the way down."""
    return _same


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A machine for a few minutes has not every package: a test that meets one of gankern's own errors, which say what
    to install, is skipped. Tests of these errors catch them themselves."""
    try:
        return (yield)
    except ImportError as error:
        if "pip install" not in str(error) or not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def onnx_functions_once():
    """For tests that export to ONNX more than once: torch.onnx.export parses the source of onnxscript's five hundred
    functions for every program again, which takes longer than all else that it does."""
    if importlib.util.find_spec("onnxscript") is None:
        yield  # whoever needs it skips
        return
    from torch.onnx._internal.exporter import _registration

    patch = pytest.MonkeyPatch()
    read = staticmethod(cache(_registration.ONNXRegistry.from_torchlib))
    patch.setattr(_registration.ONNXRegistry, "from_torchlib", read)
    yield
    patch.undo()


@pytest.fixture
def nothing_drawn(monkeypatch):
    """Runs have the images of their pictures made, and draw none: that takes longer than a few steps of training."""
    from gankern.training import pictures

    for name in ("save_samples", "save_loss_curves", "save_figure_curves"):
        monkeypatch.setattr(pictures, name, lambda *_: None)


@pytest.fixture(params=["C++", "Python"])
def way(request):
    """Who records gradients: the C++ autograd nodes, or Python."""
    from gankern.core import native

    if request.param == "C++" and native.NODES_MISSING:
        pytest.skip(native.NODES_MISSING)
    with native.python_gradients() if request.param == "Python" else contextlib.nullcontext():
        yield request.param


@pytest.fixture
def double():
    """What is made has float64 for its dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
