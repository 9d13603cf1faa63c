"""Compile every Triton kernel for every target ahead of time, and refuse kernels that spill. Needs no GPU.

Each module of this package has a function `examples` that calls its launchers, so that every form of its kernels is
launched. Here these launches are recorded, not done, and what they would compile is compiled. Modules are found by
looking into the package: a new one needs no registration. From a shell:

    python -m gankern.triton.aot                 # a table of registers, stack and local memory
    python -m gankern.triton.aot --json          # the same, for programs
    python -m gankern.triton.aot --target sm_90 --module spectral_norm

The exit status is 1 if a kernel does not compile or spills. Kernels are decorated when their module is
imported, so this must run in a process without TRITON_INTERPRET=1.
"""

import argparse
import collections
import dataclasses
import functools
import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from gankern.triton.launch import Blocks, Launch, recorded

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


ANY_TYPE = ("sm_90", "gfx942")  # of one maker, what spills in other types than fp32 hardly depends on the device
VARIANTS = ("sm_90",)  # for which variants are compiled
DTYPES = (torch.float64, torch.float32, torch.bfloat16)  # the widest elements and sums, what mostly runs, the narrowest


@dataclasses.dataclass(frozen=True)
class Entry:
    """One compilation: a launch, and the element type of the example that made it."""

    launch: Launch
    dtype: torch.dtype
    variant: bool = False  # in block sizes that `make gpu` may choose

    @property
    def label(self) -> str:
        """The kernel's name, its constants, and the element type."""
        constants = ", ".join(f"{name}={value}" for name, value in self.launch.constants.items())
        return f"{self.launch.kernel.__name__}[{str(self.dtype).removeprefix('torch.')}]({constants})"

    def source(self, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
        """What the JIT would compile for the target, and with which options: bound and taken apart by its own binder.

        A kernel that the JIT cannot launch, for the names of its parameters or for those of the call, fails here."""
        kernel, _, arguments, constants, num_warps = self.launch
        backend = make_backend(target)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        given = {**constants, "num_warps": num_warps, "debug": False}
        bound, specialization, options = bind(*arguments, **given)
        options, signature, constexprs, attributes = kernel._pack_args(backend, given, bound, specialization, options)
        return ASTSource(kernel, signature, constexprs, attributes), options.__dict__

    def compile(self, target: GPUTarget) -> Any:
        """The compiled kernel."""
        source, options = self.source(target)
        return triton.compile(source, target=target, options=options)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one thread of a compiled kernel holds. Spilled registers lie in the stack or in local memory."""

    registers: int
    stack_bytes: int
    local_bytes: int
    spilled_registers: int

    @property
    def spills(self) -> bool:
        return bool(self.stack_bytes or self.local_bytes or self.spilled_registers)


def resources(compiled: Any) -> Resources:
    """Registers, stack and local memory of a kernel that `Entry.compile` returned."""
    if "cubin" in compiled.asm:
        return _cuda_resources(compiled.asm["cubin"])
    return _hip_resources(compiled.asm["amdgcn"])


def accesses(compiled: Any) -> dict[str, int]:
    """How many of a CUDA kernel's instructions load and store so many bytes of global memory at once: {"ld 16": 8}, and
    so on. Empty for other devices."""
    found: collections.Counter[str] = collections.Counter()
    for name, suffixes in re.findall(r"\b(ld|st)\.global((?:\.\w+|::\w+)*)", compiled.asm.get("ptx", "")):
        elements = re.search(r"\.v(\d)", suffixes)
        bits = _number(r"\.[bfsu](\d+)", suffixes) * (int(elements[1]) if elements else 1)
        found[f"{name} {bits // 8}"] += 1
    return dict(found)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the compiler does not say {pattern!r}")
    return int(found[1])


def _cuda_resources(cubin: bytes) -> Resources:
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def used(key: str) -> int:
        return _number(rf"\b{key}:(\d+)", usage)

    return Resources(used("REG"), used("STACK"), used("LOCAL"), spilled_registers=0)


def _hip_resources(assembly: str) -> Resources:
    def metadata(key: str) -> int:
        return _number(rf"^\s*\.{key}:\s*(\d+)", assembly)

    return Resources(
        registers=metadata("vgpr_count"),
        stack_bytes=metadata("private_segment_fixed_size"),
        local_bytes=0,
        spilled_registers=metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
    )


def modules() -> list[str]:
    """The modules of this package that hold kernels."""
    names = [info.name for info in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return [name for name in names if hasattr(_module(name), "examples")]


@functools.cache
def entries(module: str) -> tuple[Entry, ...]:
    """What the module's examples launch, each compilation once; and in each variant of its block sizes."""
    kinds: dict[str, Entry] = {}
    for dtype in DTYPES:
        with recorded() as launches:
            _module(module).examples(dtype)
        for launch in launches:
            source, options = Entry(launch, dtype).source(TARGETS["sm_90"])
            kind = repr((launch.kernel.__name__, source.signature, source.constants, source.attrs, options))
            kinds.setdefault(kind, Entry(launch, dtype))
    found = [*kinds.values()]
    for variant in Blocks.known[module].variants[1:] if module in Blocks.known else ():
        with Blocks.known[module].use(variant), recorded() as launches:
            _module(module).examples(torch.bfloat16)
        others = {Entry(launch, torch.bfloat16).label: launch for launch in launches}
        found += [Entry(launch, torch.bfloat16, variant=True) for launch in others.values()]
    return tuple(found)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def check(module: str, index: int, target: str) -> dict[str, Any]:
    """Compile one entry for one target; a record that says what it uses, or what went wrong."""
    entry = entries(module)[index]
    record = {"module": module, "kernel": entry.label, "variant": entry.variant, "target": target, "error": None}
    try:
        compiled = entry.compile(TARGETS[target])
        used = resources(compiled)
    except Exception as error:  # a compiler's failure is this check's result, whatever its type
        return {**record, "error": f"{type(error).__name__}: {error}"}
    if used.spills:
        record["error"] = "spills registers"
    return {**record, **dataclasses.asdict(used), "accesses": accesses(compiled)}


def check_all(module_names: list[str], targets: list[str], processes: int) -> list[dict[str, Any]]:
    work = [
        (module, index, target)
        for module in module_names
        for index, entry in enumerate(entries(module))
        for target in targets
        if (target in VARIANTS if entry.variant else entry.dtype == torch.float32 or target in ANY_TYPE)
    ]
    # Compilers are not fork-safe once they have run: each worker starts as a fresh process.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.starmap(check, work, chunksize=4)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gankern.triton.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--module", action="append", choices=modules(), help="default: all")
    parser.add_argument("--processes", type=int, default=2, help="compilations at a time")
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")

    records = check_all(options.module or modules(), options.target or list(TARGETS), options.processes)
    if options.json:
        print(json.dumps(records))
    else:
        for record in records:
            kernel = f"{record['module']}.{record['kernel']}"
            print(f"{record['target']:7} {record.get('registers', '-'):>4} registers  {kernel}")
            if record["error"]:
                print(f"        {record['error']}")
    return int(any(record["error"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
