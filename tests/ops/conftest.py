"""What the tests of several primitives do alike: other numbers of threads, and other instruction sets."""

import os
import subprocess
import sys

import pytest
import torch

from gankern.core import native


@pytest.fixture
def same_bits():
    """Checks that what a function computes has the same bits on one thread, two and three."""

    def check(compute):
        before, runs = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                runs.append(compute())
        finally:
            torch.set_num_threads(before)
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))

    return check


SETS = ("default", "avx2", "avx512")
HERE = torch.backends.cpu.get_cpu_capability().lower()  # which all other tests run


@pytest.fixture(params=SETS[: SETS.index(HERE)] if HERE in SETS else SETS[:1])
def instruction_set(request):
    """Each of those below the one that this process uses."""
    return request.param


@pytest.fixture
def on_instruction_set(instruction_set):
    """Runs lines in a process that uses one of the other instruction sets, with a file of tests as ``cases``."""
    if native.NATIVE_MISSING:
        pytest.skip("the native library was not built")

    def run(file, *lines):
        head = (
            "import importlib.util, torch",
            f"spec = importlib.util.spec_from_file_location('cases', {file!r})",
            "cases = importlib.util.module_from_spec(spec); spec.loader.exec_module(cases)",
        )
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": instruction_set}
        subprocess.run([sys.executable, "-c", "\n".join([*head, *lines])], env=environment, check=True)

    return run


@pytest.fixture
def bits_elsewhere(tmp_path, on_instruction_set):
    """What a file's ``all_bits`` gives on another instruction set, on one thread as on two."""

    def bits(file, *lines):
        on_instruction_set(
            file,
            "one, two = (torch.set_num_threads(n) or cases.all_bits() for n in (1, 2))",
            "assert all(torch.equal(a, b) for a, b in zip(one, two))",
            *lines,
            f"torch.save(one, {str(tmp_path / 'bits')!r})",
        )
        return torch.load(tmp_path / "bits")

    return bits
