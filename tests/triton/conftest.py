"""Without Triton there is nothing to test here. How its kernels run is decided in tests/conftest.py."""

import dataclasses
import importlib.util
import inspect
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

# What NumPy says of the interpreter's arithmetic, where a GPU says nothing.
INTERPRETER = (
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning",
    "ignore:(invalid value|overflow|underflow|divide by zero) encountered:RuntimeWarning",
)


@pytest.fixture(scope="session", autouse=True)
def a_quick_interpreter():
    """Half of the interpreter's time. It puts its operations in the place of Triton's anew for each function that a
    kernel calls, where those of the kernel itself are in place already; and it does each sum of integers again in
    64 bits, to see one beyond 32, of which tensors as small as a test's have none."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    put, modules, placed = interpreter._patch_lang, {}, []

    def put_once(function):
        if function not in modules:
            values = filter(inspect.ismodule, function.__globals__.values())
            modules[function] = [value for value in values if value in (language, language.core)]
        new = [module for module in modules[function] if module not in placed]
        if not new:
            return interpreter._LangPatchScope()  # of which nothing is taken back
        scope = put(function)
        placed.extend(new)
        take_back = scope.restore

        def restore():
            take_back()
            for module in new:
                placed.remove(module)

        scope.restore = restore
        return scope

    builder = interpreter.interpreter_builder
    options = builder.options
    interpreter._patch_lang = put_once
    builder.options = dataclasses.replace(options, sanitize_overflow=False)
    yield
    interpreter._patch_lang, builder.options = put, options


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in INTERPRETER:
                item.add_marker(pytest.mark.filterwarnings(warning))
