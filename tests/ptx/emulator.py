"""The emulator of PTX (emulator.cpp) from Python, and as the driver that Triton launches its kernels by.

After :func:`install`, in a process without TRITON_INTERPRET, everything that gankern.triton launches is compiled by
Triton for sm_90 and run on tensors on the CPU, with the emulator's checks: `GANKERN_PTX=1 pytest tests/triton` has the
tests of all Triton kernels do so (tests/conftest.py).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SEED = int(os.environ.get("GANKERN_PTX_SEED", "0"))  # of the order of blocks
TARGET = int(os.environ.get("GANKERN_PTX_TARGET", "90"))
COMPILER = next(filter(shutil.which, (*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")), None)
FLAGS = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-fwrapv", "-ffp-contract=off", "-fno-strict-aliasing"]  # integers wrap, nothing is fused

MOST_TEXT = 1 << 16


NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
FOLDER = ROOT / "build" / "ptx"


def run(*command: Any) -> None:
    ran = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ran.returncode == 0, f"{command[0]}\n{ran.stdout[-4000:]}"


def built(stem: str, sources: Sequence[Path], flags: Sequence[str], make: Callable[[Path], None]) -> Path:
    """A folder with what ``make`` puts into it, which is kept for sources that are the same."""
    parts = [str(COMPILER), torch.__version__, *flags]
    digest = hashlib.sha256(b"".join([path.read_bytes() for path in sources]) + " ".join(parts).encode())
    folder = FOLDER / f"{stem}-{digest.hexdigest()[:16]}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{stem}.lock").open("w") as lock:  # processes of one test run
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder


def build() -> Path:
    """The emulator's library."""
    source = HERE / "emulator.cpp"
    folder = built("emulator", [source], FLAGS, lambda to: run(COMPILER, *FLAGS, source, "-o", to / "libptx.so"))
    return folder / "libptx.so"


def build_cuda() -> Path:
    """The folder of libcuda_ptx.so, the operators of csrc/ops/cuda for CPU tensors with the host code of csrc/cuda as
    nvcc compiles it, and of the kernels' PTX."""
    emulator = build()
    csrc = ROOT / "csrc"
    kernels, operators = sorted(csrc.glob("cuda/*.cu")), sorted(csrc.glob("ops/cuda/*.cpp"))
    sources = [*kernels, *operators, *sorted(csrc.glob("**/*.h")), HERE / "runtime.cpp", HERE / "emulator.cpp"]
    torch_root = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"]
    macros = ["-DGANKERN_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", torch_root / "include"]
    target = ["-std=c++17", "-O3", "-lineinfo", "-gencode", "arch=compute_90,code=compute_90"]

    def make(to: Path) -> None:
        objects = []
        for source in (*kernels, *operators, HERE / "runtime.cpp"):
            objects.append(to / f"{source.stem}{len(objects)}.o")
            if source.suffix == ".cu":
                keep = ["--keep", "--keep-dir", to, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
                run(NVCC, *target, *keep, "-c", source, "-o", objects[-1])
            else:
                run(COMPILER, *flags, *macros, "-c", source, "-o", objects[-1])
        wrapped = [f"-Wl,--wrap=torch_get_{kind}_data_ptr" for kind in ("mutable", "const")]
        of_torch = [f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
        run(COMPILER, "-shared", *objects, *wrapped, emulator, *of_torch, "-o", to / "libcuda_ptx.so")
        for path in to.iterdir():
            if path.suffix not in (".ptx", ".so"):
                path.unlink()

    return built("cuda", sources, [*flags, *target, NVCC], make)


def load_cuda() -> None:
    """Operators of CUDA C++ take CPU tensors, and their kernels are emulated."""
    emulator = Emulator()
    folder = build_cuda()
    torch.ops.load_library(str(folder / "libcuda_ptx.so"))
    runtime = ctypes.CDLL(str(folder / "libcuda_ptx.so"))
    for path in sorted(folder.glob("*.ptx")):
        runtime.ptx_runtime_module(ctypes.c_void_p(emulator.load(path.read_text())))


def launches() -> int:
    """How many there were in this process."""
    return ctypes.CDLL(str(build())).ptx_launches()


class Problem(AssertionError):
    """What the emulator has to say of a launch, or of a text."""


class Emulator:
    """The library: modules of PTX, the memory that kernels may touch, launches."""

    def __init__(self) -> None:
        self.library = library = ctypes.CDLL(str(build()))
        library.ptx_load.restype = ctypes.c_void_p
        library.ptx_kernels.restype = ctypes.c_char_p
        library.ptx_kernels.argtypes = library.ptx_free.argtypes = [ctypes.c_void_p]
        library.ptx_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
        library.ptx_parameters.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
        library.ptx_launch.argtypes = [
            *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t),
        ]
        library.ptx_seed.argtypes = [ctypes.c_uint64]

    def load(self, ptx: str) -> int:
        error = ctypes.create_string_buffer(MOST_TEXT)
        module = self.library.ptx_load(ptx.encode(), error, MOST_TEXT)
        if not module:
            raise Problem(error.value.decode())
        return module

    def kernels(self, module: int) -> list[str]:
        return self.library.ptx_kernels(module).decode().split()

    def launch(
        self,
        module: int,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        parameters: Sequence[bytes],
        memory: Sequence[tuple[int, int, str]],
        cooperative: bool = False,
        seed: int = SEED,
    ) -> None:
        """Runs a kernel that may touch ``memory``, (address, bytes, name) each; ``parameters`` are the arguments."""
        sizes = (ctypes.c_size_t * 256)()
        count = self.library.ptx_parameters(module, kernel.encode(), sizes, 256)
        given = [len(parameter) for parameter in parameters]
        if given != list(sizes[: max(count, 0)]):
            raise Problem(f"{kernel} takes arguments of {list(sizes[: max(count, 0)])} bytes, and is given {given}")
        buffers = [ctypes.create_string_buffer(parameter, len(parameter)) for parameter in parameters]
        pointers = (ctypes.c_void_p * max(len(buffers), 1))(*map(ctypes.addressof, buffers))
        error = ctypes.create_string_buffer(MOST_TEXT)
        self.library.ptx_seed(seed)
        self.library.ptx_unregister_all()
        for address, size, name in memory:
            self.library.ptx_register(address, size, name.encode())
        three = ctypes.c_uint * 3
        place = three(*grid), three(*block), shared
        if self.library.ptx_launch(module, kernel.encode(), *place, pointers, cooperative, error, MOST_TEXT):
            raise Problem(error.value.decode())


def extent(tensor: torch.Tensor, name: str) -> tuple[int, int, str]:
    """The memory of a tensor, from its first element to its last one."""
    name = f"{name}[{', '.join(map(str, tensor.shape))}]"
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0, name
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), (last + 1) * tensor.element_size(), name


# ---- Triton's driver --------------------------------------------------------------------------------------------

# Bytes of an argument, by its type in a signature; a pointer's is 8.
NUMBERS = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u8": 1, "u16": 2, "u32": 4, "u64": 8}


class Driver:
    """What Triton asks of a device and of its driver, for an sm_90 device whose memory is the CPU's."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.emulator = Emulator()
        self.target = GPUTarget("cuda", TARGET, 32)
        self.utils = self
        self.ptx = ""  # of the kernel that is being loaded
        self.tables: list[weakref.ref[torch.Tensor]] = []  # tensors whose addresses are in memory
        driver = self

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.signature = source.signature
                self.names = source.fn.arg_names
                self.warps, self.shared, self.kernel = metadata.num_warps, metadata.shared, metadata.name
                self.scratch = [getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]

            def __call__(
                self, x: int, y: int, z: int, stream: Any, module: int, packed: Any, metadata: Any, *others: Any
            ) -> None:
                given = zip(self.signature.items(), self.names, others[2:], strict=True)
                parameters, memory = [], []
                for (_, kind), name, value in given:
                    if kind == "constexpr":
                        continue
                    if isinstance(value, torch.Tensor):
                        memory.append(extent(value, name))
                        value = value.data_ptr()
                    size = NUMBERS.get(kind, 8)
                    parameters.append(int(value or 0).to_bytes(size, "little", signed=int(value or 0) < 0))
                assert not any(self.scratch), "a kernel wants memory of the launcher's"
                parameters += [bytes(8)] * 2
                alive = [tensor for tensor in (reference() for reference in driver.tables) if tensor is not None]
                memory += [extent(tensor, "a tensor of a table") for tensor in alive]
                place = (x, y, z), (32 * self.warps, 1, 1), self.shared
                seed = SEED + launches()
                driver.emulator.launch(module, self.kernel, *place, parameters, memory, seed=seed)

        self.launcher_cls = Launcher

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        module = self.emulator.load(self.ptx)
        return module, module, 32, 0, 1024


def install() -> Driver:
    """Kernels of gankern.triton take CPU tensors, and are emulated."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels cannot be compiled"
    os.environ["TRITON_CACHE_DIR"] = str(FOLDER / "triton")  # its own: nothing there has machine code
    import triton
    from quick_triton import quicken
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import CompiledKernel

    from gankern.core import registry

    # What of torch's allocations nobody has written is NaN, and is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    registry.interpreting = lambda: True  # before a primitive is declared
    registry.TRITON_MISSING = None

    from gankern.triton import launch

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    load = CompiledKernel._init_handles

    def loaded(kernel: Any) -> None:
        driver.ptx = kernel.asm["ptx"]
        load(kernel)

    CompiledKernel._init_handles = loaded
    quicken()
    CUDABackend.make_cubin = lambda *given: b""  # half the time that a kernel takes to compile
    launch.BY_HANDLE = False  # which travels as an address: here a tensor says how much memory it has
    addresses_of = launch._addresses_of

    def noted(places: Any) -> Any:
        tensors, addresses = addresses_of(places)

        def read(given: Any) -> Any:
            driver.tables = [reference for reference in driver.tables if reference() is not None]
            driver.tables += [weakref.ref(tensor) for tensor in given if tensor is not None]
            return addresses(given)

        return tensors, read

    launch._addresses_of = noted
    return driver
