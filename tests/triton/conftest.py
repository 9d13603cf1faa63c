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
    """A quarter of the interpreter's time: see quick_triton.py. Besides, the interpreter puts its operations in the place
    of Triton's anew for each function that a kernel calls, where those of the kernel itself are in place already; it
    makes a table of NumPy's types for each value; and it does each sum of integers again in 64 bits, to see one beyond
    32, of which tensors as small as a test's have none."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from quick_triton import quicken
    from triton import language
    from triton.runtime import interpreter

    put, modules, placed = interpreter._patch_lang, {}, []
    numpy_type, numpy_types = interpreter._get_np_dtype, {}

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

    def numpy_type_once(type):
        if type.name not in numpy_types:
            numpy_types[type.name] = numpy_type(type)
        return numpy_types[type.name]

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patched:
        quicken(patched.setattr)
        patched.setattr(interpreter, "_patch_lang", put_once)
        patched.setattr(interpreter, "_get_np_dtype", numpy_type_once)
        patched.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in INTERPRETER:
                item.add_marker(pytest.mark.filterwarnings(warning))
