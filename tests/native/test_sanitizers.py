"""The C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer, without torch and without Python; and the operators,
with both, under AddressSanitizer and UBSan.

csrc/cpu/testing/ holds the kernels' program, csrc/cuda/testing/ that of the emulated CUDA kernels, operators.py the
operators'; CMake builds what they run when GANKERN_SANITIZE is set. The build folders are kept, so only a first run takes long.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"address": ["-fsanitize=address,undefined"], "thread": ["-fsanitize=thread", "-pthread"]}
# What UBSan finds in a kernel is an illegal instruction (CMakeLists.txt): AddressSanitizer is to say where.
SAYS_WHERE = "handle_sigill=1"


def tool(name: str) -> str:
    """A build tool from this environment, else from the PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is needed to build gankern, and was not found"
    return found


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def require_sanitizer(kind: str, folder: Path) -> str:
    """The compiler. Skips where no program can be compiled with the sanitizer and run."""
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
    return compiler


def build(kind: str) -> Path:
    folder = ROOT / "build" / f"sanitize-{kind}"
    configure = [tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DGANKERN_SANITIZE={kind}"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, [tool("cmake"), "--build", str(folder)]):
        result = run(command)
        assert result.returncode == 0, result.stdout[-4000:]
    return folder


@pytest.mark.parametrize("kind", FLAGS)
def test_kernels(kind, tmp_path):
    require_sanitizer(kind, tmp_path)
    folder = build(kind)
    # All instruction sets of this processor, whatever the caller allows torch to use.
    environment = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    environment["ASAN_OPTIONS"] = SAYS_WHERE
    result = run([str(folder / "kernel_tests")], env=environment)
    assert result.returncode == 0, result.stdout[:4000]
    assert " 0 failures" in result.stdout
    for source in (ROOT / "csrc" / "cpu" / "testing").glob("*.cpp"):
        if source.stem != "main":
            assert f"{source.stem}: " in result.stdout  # it has its row in main.cpp's table
    if kind == "address":
        result = run([str(folder / "kernel_tests"), "--overflow"], env=environment)
        assert result.returncode != 0 and "AddressSanitizer: ILL" in result.stdout and "main.cpp:" in result.stdout


@pytest.mark.parametrize("kind", FLAGS)
def test_emulated_cuda_kernels(kind, tmp_path):
    """Their threads are fibers: reads out of bounds, races between threads and between blocks."""
    require_sanitizer(kind, tmp_path)
    program = str(build(kind) / "cuda_tests")
    environment = {**os.environ, "ASAN_OPTIONS": SAYS_WHERE}
    result = run([program], env=environment)
    assert result.returncode == 0, result.stdout[:4000]
    assert " 0 failures" in result.stdout
    # What is there is seen.
    fault, message = {"thread": ("--race", "data race"), "address": ("--beyond", "use-after-poison")}[kind]
    result = run([program, fault])
    assert result.returncode != 0 and message in result.stdout


def test_operators(tmp_path):
    """Through the library that torch loads: what each argument is converted to lives as long as the call."""
    compiler = require_sanitizer("address", tmp_path)
    library = build("address") / "libgankern_ops.so"
    # The package as it is, but for that library.
    package = tmp_path / "gankern"
    shutil.copytree(ROOT / "gankern", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(library, package)

    runtimes = [run([compiler, f"-print-file-name={name}"]).stdout.strip() for name in ("libasan.so", "libstdc++.so")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": f"detect_leaks=0:{SAYS_WHERE}",  # the leaks are Python's own
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "2",
    }
    result = run([sys.executable, str(Path(__file__).with_name("operators.py"))], env=environment)
    assert result.returncode == 0, result.stdout[:6000]
    assert " operators, 0 wrong" in result.stdout
    assert str(package / library.name) in result.stdout  # it is this one that ran
