"""Without Triton there is nothing to test here. How its kernels run is decided in tests/conftest.py."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

# What NumPy says of the interpreter's arithmetic, where a GPU says nothing.
INTERPRETER = (
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning",
    "ignore:(invalid value|overflow|underflow|divide by zero) encountered:RuntimeWarning",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in INTERPRETER:
                item.add_marker(pytest.mark.filterwarnings(warning))
