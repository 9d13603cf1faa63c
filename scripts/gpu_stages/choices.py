"""The stages `variants` and `convolutions`, which write what was fastest to the device's file in gankern/devices."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from gpu_stages.primitives import device_cases, inputs_of, modes_of, replayed, tiers_of, with_cuda
from gpu_stages.records import Record, attempt, compiled_before


def _by(tier: str, run: Callable[..., Any], *inputs: Any) -> Any:
    """By this implementation, whatever the device's file says by now."""
    import gankern

    with gankern.use_implementation(tier):
        return run(*inputs)


def _variant_cases(where: str) -> dict[str, list[tuple[str, Callable[..., Any], tuple[int, ...]]]]:
    """By kernel with variants, the cases of the device stage that launch it: name, function, shape."""
    import gankern.functional as GF

    large = [(name, ours, shape) for name, shape, ours, _, _ in device_cases(where) if "large" in name]
    kernels = {"bias_act_pixel_norm": "pixel_norm"}
    found: dict[str, list[tuple[str, Callable[..., Any], tuple[int, ...]]]] = {}
    for case in large:
        primitive = case[0].split()[0]
        if primitive != "gradient_penalty":
            found.setdefault(kernels.get(primitive, primitive), []).append(case)
    points = (256, 100, 5) if where == "cuda" else (8, 2, 5)
    found["minibatch_discrimination"] = [("minibatch_discrimination", lambda m, b: GF.l1_similarity(m), points)]
    found["upfirdn2d"] = found.pop("upfirdn2d")  # has the most variants
    return found


def _step_by(run: Callable[..., Any], shape: Any, dtype: Any, layout: str, where: str, tier: str) -> Callable[[], None]:
    return modes_of(partial(_by, tier, run), inputs_of(shape, dtype, layout, where))["f+b"]


def _kinds_of(name: str, where: str) -> Iterator[tuple[str, Callable[[str], Callable[[], None]]]]:
    """The cases that launch a kernel, in each dtype and memory format: the name of the bar, and what makes a tier's
    forward and backward."""
    import torch

    for case, run, shape in _variant_cases(where)[name]:
        for dtype, layout in itertools.product((torch.float32, torch.bfloat16), ("contiguous", "channels_last")):
            if len(shape) == 4 or (dtype, layout) == (torch.float32, "contiguous"):
                yield (
                    f"{case}, {str(dtype)[6:]}, {layout}",
                    partial(_step_by, run, shape, dtype, layout, where),
                )


def _variant_steps(name: str, where: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for label, step_by in _kinds_of(name, where):
        yield label, step_by("triton")


def _compile_variant(name: str, number: int, where: str) -> None:
    """Runs a variant once, so that its kernels are in Triton's cache."""
    blocks = _blocks_of(name)
    with blocks.use(blocks.variants[number]):
        for _, step in _variant_steps(name, where):
            step()


def _blocks_of(name: str) -> Any:
    from gankern.triton import launch

    importlib.import_module(f"gankern.triton.{name}")  # which registers its variants
    return launch.Blocks.known[name]


def variants(record: Record, where: str) -> None:
    """CUDA C++ beside Triton; then each variant of a kernel's block sizes, forward and backward, on the large maps of
    the bars. The best go to the device's file as soon as they are known. Compiling the variants takes longest, and is
    done in advance, in parallel."""
    if where == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    tiers = _fastest_tiers(record, where)
    keep_choices(record, where, tiers=tiers)
    blocks = {name: _blocks_of(name) for name in _variant_cases(where)}
    work = [(name, number, where) for name, own in blocks.items() for number in range(len(own.variants))]
    if where == "cpu":
        work = work[:1]  # there is nothing to compile
    record.add(what="compiled", **compiled_before(_compile_variant, work, 30 if where == "cuda" else 120))

    def row_of(name: str, variant: dict[str, int]) -> dict[str, float]:
        with blocks[name].use(variant):
            return {label: attempt(partial(_milliseconds, step, where)) for label, step in _variant_steps(name, where)}

    best = {}
    for name, own in blocks.items():
        times: dict[int, float] = {}
        # The interpreter is slow, and of variants it tells nothing.
        for number, variant in enumerate(own.variants[: 1 if where == "cpu" else None]):
            row = attempt(partial(row_of, name, variant))
            given = list(row.values()) if isinstance(row, dict) else [row]
            fine = all(isinstance(ms, float) for ms in given)
            times[number] = math.prod(given) ** (1 / len(given)) if fine else math.inf
            record.add(kernel=name, variant=variant, ms=row)
        # A change of the default must be worth it in the mean over types and layouts.
        fastest = min(times, key=times.__getitem__)
        best[name] = own.variants[fastest if times[fastest] < 0.97 * times[0] else 0]
        keep_choices(record, where, blocks=best)


def _milliseconds(step: Callable[[], None], where: str) -> float:
    from gankern.measure import device as measured

    return measured.milliseconds(measured.graph_of(step, where), where, 0.02, 3)


def keep_choices(record: Record, where: str, **choices: dict[str, Any]) -> None:
    """Writes choices to the device's file, which keeps its other ones, and to the record, because from a lent machine
    only $OUT comes back."""
    import torch

    from gankern.core import devices

    name = torch.cuda.get_device_name() if where == "cuda" else "CPU"
    path = devices.device_file(name)
    before = json.loads(path.read_text()) if where == "cuda" and path.exists() else {"blocks": {}, "tiers": {}}
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    record.content["device_file"] = content = {**before, "device": name, **versions, **choices}
    record.write()
    if where == "cuda":
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            print(f"{path} cannot be written, the record has what belongs there: {error}", flush=True)


def _fastest_tiers(record: Record, where: str) -> dict[str, str]:
    """For each primitive with kernels in CUDA C++ and in Triton: "cuda" where it is a tenth faster in the mean over
    cases, modes and types, and nowhere slower by more than a twentieth."""
    import gankern.functional  # noqa: F401 (declares the primitives)
    from gankern.core.dispatch import Primitive

    chosen = {}
    having = {n: tier for n, p in Primitive.registry.items() for tier in p.implementations if tier.name == "cuda"}
    for primitive, tier in having.items():
        ratios = []
        for what, runs in (_large_maps if tier.large_only else _bench_cases)(primitive, where):
            row = {name: attempt(run) for name, run in runs.items()}
            record.add(tiers_of=primitive, **what, ms=row)
            fine = all(isinstance(ms, float) for ms in row.values())
            ratios.append(row["triton"] / row["cuda"] if fine else 0.0)
        if is_worth(ratios):
            chosen[primitive] = "cuda"
    return chosen


Runs = Iterator[tuple[dict[str, str], dict[str, Callable[[], float]]]]  # what is run, and its milliseconds by each tier


def _bench_cases(primitive: str, where: str) -> Runs:
    from gankern.measure import benchmark
    from gankern.measure.cases import all_cases

    dtypes = ("float32", "bfloat16") if primitive == "upfirdn2d" else ("float32",)  # maps come in both
    for case in all_cases():
        if case.primitive != primitive or not case.bench or case.along is not None:
            continue
        if not {"triton", "cuda"} <= {*tiers_of(case, where)}:
            continue
        for mode, dtype in itertools.product(benchmark.MODES[:2], dtypes):
            runs = {
                tier: partial(replayed, partial(case.run, tier), case, mode, where, 0.02, 3, dtype)
                for tier in ("triton", "cuda")
            }
            yield {"case": case.name, "mode": mode, "dtype": dtype}, runs


def _large_maps(primitive: str, where: str) -> Runs:
    if primitive not in with_cuda(where):
        return

    def milliseconds(step_by: Callable[[str], Callable[[], None]], tier: str) -> float:
        return _milliseconds(step_by(tier), where)  # a step runs once where it is made, and may fail there

    for label, step_by in _kinds_of(primitive, where):
        yield {"case": label}, {tier: partial(milliseconds, step_by, tier) for tier in ("triton", "cuda")}


def is_worth(ratios: Sequence[float]) -> bool:
    """Whether something this many times as fast, case by case, replaces another. A failure is a 0."""
    return bool(ratios) and min(ratios) > 0.95 and math.prod(ratios) ** (1 / len(ratios)) >= 1.1


def convolutions(record: Record, where: str) -> None:
    """Convolutions that resample, forward and backward, by each way that a GPU has, with their times for the device's
    file; and plain ones, beside torch's."""
    import torch
    import torch.nn.functional as F

    import gankern.functional as GF
    from gankern.measure import device as measured
    from gankern.ops import convolution, convolution_choice

    def resize_convolution(x: Any, w: Any) -> Any:
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), w, padding=1)

    def convolution_pool(x: Any, w: Any) -> Any:
        return F.avg_pool2d(F.conv2d(x, w, padding=1), 2)

    def forced(kind: str, way: str) -> Callable[..., Any]:
        def run(x: Any, w: Any) -> Any:
            size = convolution_choice.result_size(kind, 1, *x.shape[2:])
            return convolution._run((kind, 1, 1.0, "highest", way, 0), *size, x, w, None)

        return run

    plain = {"upsample": resize_convolution, "downsample": convolution_pool}
    # (images, channels in, channels out, pixels each way of the smaller image), of generators and discriminators
    shapes = [
        (16, 512, 512, 4), (16, 512, 256, 8), (64, 256, 256, 8), (64, 256, 128, 16), (16, 128, 128, 32),
        (4, 512, 512, 16), (4, 128, 64, 64), (4, 32, 16, 128),
    ]  # fmt: skip
    if where == "cpu":
        shapes = [(2, 4, 3, 4)]

    def replayed(run: Callable[..., Any], leaves: Sequence[Any]) -> float:
        step = measured.graph_of(lambda: torch.autograd.grad(run(*leaves).sum(), leaves), where)
        return measured.milliseconds(step, where, 0.02, 3)

    found: dict[str, dict[str, list[Any]]] = {kind: {} for kind in plain}
    kinds = itertools.product((torch.float32, torch.bfloat16), ("contiguous", "channels_last"))
    for (dtype, layout), kind in itertools.product(kinds, [*plain, "same"]):
        for n, c, out, side in shapes:
            size = 2 * side if kind == "downsample" else side
            memory_format = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
            x = torch.randn(n, c, size, size, device=where, dtype=dtype).contiguous(memory_format=memory_format)
            w = torch.randn(out, c, 3, 3, device=where, dtype=dtype).contiguous(memory_format=memory_format)
            leaves = x.requires_grad_(), w.requires_grad_()
            if kind == "same":
                runs = {"gankern": partial(GF.conv2d, padding=1), "torch": partial(F.conv2d, padding=1)}
            else:
                runs = {way: forced(kind, way) for way in convolution_choice.ON_DEVICE if way != "reference"}
                runs["reference"] = plain[kind]
            row = {name: attempt(partial(replayed, run, leaves)) for name, run in runs.items()}
            record.add(kind=kind, shape=[n, c, out, side], dtype=str(dtype)[6:], layout=layout, ms=row)
            times = {way: round(ms, 5) for way, ms in row.items() if isinstance(ms, float)}
            if kind != "same" and times:
                rows = found[kind].setdefault(f"{str(dtype)[6:]} {layout}", [])
                rows.append([c, out, n * side * side, times])
                keep_choices(record, where, convolutions=found)
