"""Compile every Triton kernel for every target ahead of time, and refuse kernels that spill. Needs no GPU.

Each module of this package has a function `examples` that calls its launchers, so that every form of its kernels is
launched. Here these launches are recorded, not done, and what they would compile is compiled. Modules are found by
looking into the package: a new one needs no registration. From a shell:

    python -m gankern.triton.aot                 # a table of registers
    python -m gankern.triton.aot --instructions  # and of NVIDIA's machine code: instructions, how they move memory
    python -m gankern.triton.aot --json          # the same, for programs
    python -m gankern.triton.aot --target sm_90 --module spectral_norm

The exit status is 1 if a kernel does not compile, also where its whole numbers are 1, spills, or takes more shared
memory than a program may have. Kernels are decorated when their module is imported, so this must run in a process
without TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import pkgutil
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
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
        """The kernel's name, the element type, whether it is a variant, and its constants."""
        constants = ", ".join(f"{name}={value}" for name, value in self.launch.constants.items())
        kind = str(self.dtype).removeprefix("torch.") + ", variant" * self.variant
        return f"{self.launch.kernel.__name__}[{kind}]({constants})"

    @property
    def kind(self) -> str:
        """What the compiler is given: the same for two launches of which one need be compiled."""
        source, options = self.source(TARGETS["sm_90"])
        function = self.launch.kernel.fn
        name = f"{function.__module__}.{function.__name__}"
        return repr((name, source.signature, source.constants, source.attrs, options))

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

    def parse(self, target: GPUTarget) -> None:
        """The first step of compiling alone, in which the kernel's own text can fail; some hundredths of a second."""
        source, given = self.source(target)
        backend, context = make_backend(target), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        options = backend.parse_options(dict(given))
        functions = backend.get_codegen_implementation(options)
        source.make_ir(target, options, functions, backend.get_module_map(), context)

    def with_ones(self) -> Entry:
        """The launch with 1 for every whole number, which to the compiler is a constant then: it has no methods."""
        ones = [1 if type(argument) is int else argument for argument in self.launch.arguments]
        return dataclasses.replace(self, launch=self.launch._replace(arguments=tuple(ones)))


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


def nvdisasm() -> Path:
    """NVIDIA's disassembler, which Triton brings along beside its cuobjdump."""
    return Path(triton.knobs.nvidia.cuobjdump.path).with_name("nvdisasm")


@dataclasses.dataclass(frozen=True)
class Instructions:
    """What the machine code of a CUDA kernel holds, as it stands there, not as often as it runs.

    ``loads`` and ``stores`` say how many instructions move so many bytes a lane between global memory and registers at
    once; ``loaded_at_once`` how many bytes a lane asks for in a turn of its loops, or in all; ``together`` how many
    16-byte loads there are at most in a row with no condition on any and no jump between them. ``looped`` are all
    instructions in a loop, of which those with fp64 operands and the calls of functions, as which the compiler writes
    a division in 64 bits or of fp64, are counted on their own, and the others are ``outside``; ``local`` are loads and
    stores of spilled registers.
    """

    total: int
    outside: int
    looped: int
    loads: dict[int, int]
    stores: dict[int, int]
    loaded_at_once: int
    together: int
    fp64: int
    fp64_looped: int
    calls_looped: int
    local: int


WIDE = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}  # bytes, by an instruction's modifiers; 4 without
_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)(.*)$")
_FP64 = re.compile(r"^(?:D(?:ADD|MUL|FMA|SETP|MNMX)|MUFU\.(?:RCP|RSQ)64H|[FI]2[FI](?:\.\w+)*\.F64)\b")


def instructions(listing: str) -> Instructions:
    """Counts a listing of nvdisasm, ``nvdisasm -c kernel.cubin``."""
    lines: list[tuple[str, str]] = []  # opcode with modifiers, operands
    labels: dict[str, int] = {}
    together = run = 0
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]], run = len(lines), 0
        elif found := _LINE.match(line):
            condition, code, operands = found.groups()
            lines.append((code, operands))
            run = (
                0
                if code.startswith(("BRA", "EXIT"))
                else run + (code.startswith("LDG") and ".128" in code and not condition)
            )
            together = max(together, run)
    in_loop: set[int] = set()
    for place, (code, operands) in enumerate(lines):
        target = re.search(r"`\((\.L_\w+)\)", operands) if code.startswith("BRA") else None
        if target and labels.get(target[1], place) < place:  # the trap behind a kernel's end branches to itself
            in_loop.update(range(labels[target[1]], place + 1))
    counted: dict[str, collections.Counter[int]] = {"LDG": collections.Counter(), "STG": collections.Counter()}
    at_once = 0
    for place, (code, _) in enumerate(lines):
        kind, *modifiers = code.split(".")
        if kind in counted:
            size = next((WIDE[m] for m in modifiers if m in WIDE), 4)
            counted[kind][size] += 1
            at_once += size if kind == "LDG" and (place in in_loop or not in_loop) else 0
    fp64 = {place for place, (code, _) in enumerate(lines) if _FP64.match(code)}
    calls = {place for place, (code, _) in enumerate(lines) if code.startswith("CALL")}
    return Instructions(
        total=len(lines),
        outside=len(lines) - len(in_loop),
        looped=len(in_loop),
        loads=dict(counted["LDG"]),
        stores=dict(counted["STG"]),
        loaded_at_once=at_once,
        together=together,
        fp64=len(fp64),
        fp64_looped=len(fp64 & in_loop),
        calls_looped=len(calls & in_loop),
        local=sum(code.split(".")[0] in ("LDL", "STL") for code, _ in lines),
    )


_ADDRESS = re.compile(r"^\s+/\*([0-9a-f]+)\*/")
_JUMP = re.compile(r"(\s(?:BRA|BSSY|WARPSYNC)\b.*?)\b0x([0-9a-f]+)(?=\s*;)")


def _code(cubin: bytes) -> bytes:
    """The instructions of a cubin, an ELF file: its sections named .text."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * place) for place in range(count)]
    named = sections[names][4]
    return b"".join(
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", named + name)
    )


def disassembled(cubins: Sequence[bytes], target: str) -> list[Instructions]:
    """Of CUDA kernels compiled for the target, ``compiled.asm["cubin"]``: by one process, for the disassembler takes
    half a second to begin. It is given the code of all, one kernel behind the other, and names places by numbers."""
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [str(nvdisasm()), "-b", target.upper().replace("_", ""), file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    targets = {int(found[2], 16) for found in _JUMP.finditer(listing)}
    ends = itertools.accumulate(map(len, codes))
    kernels: list[list[str]] = [[] for _ in codes]
    kernel, end = -1, 0
    for line in _JUMP.sub(r"\1`(.L_\2)", listing).splitlines():
        if not (found := _ADDRESS.match(line)):
            continue
        place = int(found[1], 16)
        while place >= end:
            kernel, end = kernel + 1, next(ends)
        if place in targets:
            kernels[kernel].append(f".L_{place:x}:")
        kernels[kernel].append(line)
    return [instructions("\n".join(lines)) for lines in kernels]


# Of a multiprocessor: registers, bytes of shared memory of which each program takes 1024 more than its own, warps,
# programs.
HOLDS = {"sm_80": (65536, 164 << 10, 64, 32), "sm_90": (65536, 228 << 10, 64, 32), "sm_100": (65536, 228 << 10, 64, 32)}


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> float:
    """The share of a multiprocessor's warps that programs with so many registers a thread and so much shared memory
    fill, where there are enough of them.

    >>> occupancy("sm_90", 32, 0, 4), occupancy("sm_90", 255, 0, 4), occupancy("sm_90", 40, 100 << 10, 8)
    (1.0, 0.125, 0.25)
    """
    all_registers, all_shared, warps, programs = HOLDS[target]
    of_warp = -(-max(registers, 1) * 32 // 256) * 256  # given out by 256
    fit = min(all_registers // of_warp // num_warps, all_shared // (shared + 1024), warps // num_warps, programs)
    return fit * num_warps / warps


# Bytes of shared memory that one program may have: the driver loads no kernel that wants more.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def problem(target: str, used: Resources, shared: int) -> str | None:
    """Why a kernel that compiles is refused; None for one that is not."""
    if used.spills:
        return "spills registers"
    if shared > SHARED[target]:
        return f"takes {shared} bytes of shared memory, of which a program on {target} may have {SHARED[target]}"
    return None


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
    """What the module's examples launch, also in each variant of its block sizes: each compilation once."""
    kinds: dict[str, Entry] = {}

    def record(dtype: torch.dtype, variant: bool) -> None:
        with recorded() as launches:
            _module(module).examples(dtype)
        for launch in launches:
            entry = Entry(launch, dtype, variant)
            kinds.setdefault(entry.kind, entry)

    for dtype in DTYPES:
        record(dtype, variant=False)
    for variant in Blocks.known[module].variants[1:] if module in Blocks.known else ():
        with Blocks.known[module].use(variant):
            record(torch.bfloat16, variant=True)
    return tuple(kinds.values())


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def check(module: str, index: int, target: str, ones: bool, counted: bool) -> tuple[dict[str, Any], bytes | None]:
    """Compile one entry for one target, after a step with 1 for its whole numbers if ``ones``: a record that says what
    it uses, or what went wrong; and the machine code where it is to be counted."""
    entry = entries(module)[index]
    record = {"module": module, "kernel": entry.label, "variant": entry.variant, "target": target, "error": None}
    try:
        if ones:
            entry.with_ones().parse(TARGETS[target])
        compiled = entry.compile(TARGETS[target])
        used = resources(compiled)
    except Exception as error:  # a compiler's failure is this check's result, whatever its type
        return {**record, "error": f"{type(error).__name__}: {error}"}, None
    shared = compiled.metadata.shared
    record |= {"error": problem(target, used, shared), "shared": shared, **dataclasses.asdict(used)}
    if "cubin" not in compiled.asm or not counted:
        return record, None
    filled = occupancy(target, used.registers, shared, compiled.metadata.num_warps)
    return {**record, "occupancy": filled}, compiled.asm["cubin"]


def check_all(
    module_names: list[str], targets: list[str], processes: int, kernels: str, counted: str | None
) -> list[dict[str, Any]]:
    """Records of the kernels that are named so, with the instructions of those that are named like ``counted``."""
    work = []
    parsed: set[str] = set()  # with 1 for whole numbers, of which many launches differ in these alone
    for module in module_names:
        for index, entry in enumerate(entries(module)):
            if not re.search(kernels, entry.label):
                continue
            kind = "" if entry.variant else entry.with_ones().kind
            for target in targets:
                if target in VARIANTS if entry.variant else entry.dtype == torch.float32 or target in ANY_TYPE:
                    ones = not entry.variant and target in VARIANTS and kind not in parsed
                    if ones:
                        parsed.add(kind)
                    count = counted is not None and re.search(counted, f"{target} {module}.{entry.label}")
                    work.append((module, index, target, ones, bool(count)))
    # Nothing has been compiled in this process, so that it can be forked: its children know all entries.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        found = pool.starmap(check, work, chunksize=1)
    for target in targets:
        of_target = [(record, code) for record, code in found if code is not None and record["target"] == target]
        if of_target:
            own, codes = zip(*of_target)
            for record, counts in zip(own, disassembled(codes, target)):
                record |= dataclasses.asdict(counts)
    return [record for record, _ in found]


def _described(record: dict[str, Any]) -> str:
    if "total" not in record:
        return ""
    moved = [f"{record[kind].get(16, 0)}/{sum(record[kind].values())}" for kind in ("loads", "stores")]
    return (
        f"{record['occupancy']:4.0%} warps  {record['outside']:4} + {record['looped']:4} instructions  "
        f"by 16 bytes {moved[0]:>5} loads {moved[1]:>5} stores  {record['fp64_looped']:2} fp64 in loops  "
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gankern.triton.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--module", action="append", choices=modules(), help="default: all")
    parser.add_argument("--kernel", default="", help="a regular expression for kernels, as the table names them")
    counted = "count NVIDIA's of all kernels, or of these, with their target before"
    parser.add_argument("--instructions", nargs="?", const="", metavar="KERNELS", help=counted)
    parser.add_argument("--processes", type=int, default=2, help="compilations at a time")
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    for name, given in (("--kernel", options.kernel), ("--instructions", options.instructions or "")):
        try:
            re.compile(given)
        except re.error as error:
            parser.error(f"argument {name}: {given!r} is no regular expression: {error}")

    wanted = options.module or modules(), options.target or list(TARGETS)
    records = check_all(*wanted, options.processes, options.kernel, options.instructions)
    if not records:
        parser.error(f"argument --kernel: no kernel of {', '.join(wanted[0])} is named like {options.kernel!r}")
    if options.json:
        print(json.dumps(records))
    else:
        for record in records:
            kernel = f"{record['module']}.{record['kernel']}"
            print(f"{record['target']:7} {record.get('registers', '-'):>4} registers  {_described(record)}{kernel}")
            if record["error"]:
                print(f"        {record['error']}")
    return int(any(record["error"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
