"""The C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer, without torch and without Python.

csrc/cpu/testing/ holds the program; CMake builds it when GANKERN_SANITIZE is set. The build folders are kept, so
only a first run takes long.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"address": ["-fsanitize=address,undefined"], "thread": ["-fsanitize=thread", "-pthread"]}


def tool(name: str) -> str:
    """A build tool from this environment, else from the PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is needed to build gankern, and was not found"
    return found


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def require_sanitizer(kind: str, folder: Path) -> None:
    """Skips where no program can be compiled with the sanitizer and run."""
    named = os.environ.get("CXX", "").split()[:1]
    compiler = next(filter(shutil.which, [*named, "c++", "g++", "clang++"]), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n")
    built = run([compiler, *FLAGS[kind], str(source), "-o", str(program)])
    if built.returncode != 0:
        pytest.skip(f"{compiler} has no runtime for {FLAGS[kind][0]}: {built.stdout.strip()[-200:]}")
    started = run([str(program)])
    if started.returncode != 0:
        pytest.skip(f"a program with {FLAGS[kind][0]} does not run here: {started.stdout.strip()[-200:]}")


@pytest.mark.parametrize("kind", FLAGS)
def test_kernels(kind, tmp_path):
    require_sanitizer(kind, tmp_path)
    build = ROOT / "build" / f"sanitize-{kind}"
    configure = [tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DGANKERN_SANITIZE={kind}"]
    for command in ([*configure, f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"], [tool("cmake"), "--build", str(build)]):
        result = run(command)
        assert result.returncode == 0, result.stdout[-4000:]

    # All instruction sets of this processor, whatever the caller allows torch to use.
    environment = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    result = run([str(build / "kernel_tests")], env=environment)
    assert result.returncode == 0, result.stdout[:4000]
    assert " 0 failures" in result.stdout
    for source in (ROOT / "csrc" / "cpu" / "testing").glob("*.cpp"):
        if source.stem != "main":
            assert f"{source.stem}: " in result.stdout  # it has its row in main.cpp's table
