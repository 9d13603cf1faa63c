"""Builds gankern's native part by calling CMake; CMakeLists.txt is the only description of it.

Environment: GANKERN_BUILD_NATIVE=0 installs the Python part alone (everything then runs as plain PyTorch or
Triton); GANKERN_BUILD_CUDA=1 builds the CUDA C++ kernels, for which nvcc is needed, and 0 leaves them out (default:
they are built where torch finds a GPU and there is nvcc); CXX names the compiler; CMAKE_BUILD_PARALLEL_LEVEL the number
of jobs.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.partition(".")[0]) < 77:  # the first that reads this pyproject.toml's licence
    sys.exit(
        f"gankern: the build needs setuptools 77 or later, this is {setuptools.__version__}: pip install -U setuptools"
        ", or leave --no-build-isolation out."
    )

from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
WITHOUT = "or set GANKERN_BUILD_NATIVE=0 to install gankern without compiled CPU kernels"


def tool(name: str) -> str:
    """A build tool from this environment, else from the PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        sys.exit(f"gankern: {name} was not found: pip install {name}, {WITHOUT}.")
    return found


def builds_cuda() -> bool:
    """Whether the CUDA C++ kernels are built."""
    wish = os.environ.get("GANKERN_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"gankern: GANKERN_BUILD_CUDA is {wish!r}; accepted are 0 and 1.")
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if wish == "1" and not nvcc:
        sys.exit("gankern: GANKERN_BUILD_CUDA is 1, and nvcc was not found: install it, or put it on the PATH.")
    if wish or not nvcc:
        return wish == "1"
    import torch

    return bool(torch.version.cuda) and torch.cuda.is_available()


class CMakeBuild(build_ext):
    def run(self) -> None:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
        if not compiler or not shutil.which(compiler.split()[0]):
            sys.exit(
                f"gankern: no C++ compiler was found: install one (Debian: apt install g++) or set CXX, {WITHOUT}."
            )
        for module in ("torch", "pybind11"):
            if importlib.util.find_spec(module) is None:
                sys.exit(
                    f"gankern: the build needs {module}: pip install it first and use --no-build-isolation, {WITHOUT}."
                )
        import pybind11

        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{sys.platform}"
        # An editable install wants the libraries beside the sources, a wheel in the folder it packs.
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        cmake = tool("cmake")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DGANKERN_PYBIND11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        nodes = [cmake, "--build", str(build), "--target", "gankern_autograd"]
        for command in (
            configure,
            [cmake, "--build", str(build)],
            nodes,
            [cmake, "--install", str(build), "--prefix", str(target)],
        ):
            if subprocess.run(command).returncode == 0:
                continue
            if command is not nodes:
                sys.exit(f"gankern: the native build failed (see above): mend it, {WITHOUT}.")
            # They follow torch's C++ API, which changes from version to version. Earlier ones are not these sources'.
            for stale in (*build.glob("libgankern_autograd-*.so"), *target.glob("gankern/libgankern_autograd-*.so")):
                stale.unlink()
            print(
                "gankern: the C++ autograd nodes do not build for this torch (see above): gradients go through Python."
            )
        self.build_cuda(configure, build.with_name(f"{build.name}-cuda"), target / "gankern")

    def build_cuda(self, configure: list[str], build: Path, target: Path) -> None:
        """The CUDA C++ kernels, in a folder of their own: where they do not build, all else is there."""
        library = "libgankern_cuda.so"
        if builds_cuda():
            configure = [*configure[:4], str(build), *configure[5:], "-DGANKERN_CUDA=ON"]
            commands = (configure, [configure[0], "--build", str(build), "--target", "gankern_cuda"])
            if all(subprocess.run(command).returncode == 0 for command in commands):
                shutil.copy(build / library, target / library)
                return
            if os.environ.get("GANKERN_BUILD_CUDA") == "1":
                sys.exit(
                    "gankern: the CUDA C++ kernels do not build (see above): mend it, or set GANKERN_BUILD_CUDA=0."
                )
            print("gankern: the CUDA C++ kernels do not build (see above): GPU kernels are Triton's.")
        (target / library).unlink(missing_ok=True)  # an earlier one is not these sources'

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "gankern").glob("*.so")]


class Wheel(bdist_wheel):
    """One wheel for all Pythons: the kernels know nothing of Python, and what does (gankern._C) is only for `info`."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


native = os.environ.get("GANKERN_BUILD_NATIVE", "1") != "0"
setup(
    ext_modules=[Extension("gankern._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
