"""The stages `device` and `host`: the primitives beside their peers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from gpu_stages.bars import IN_CUDA, OF_THEIR_OWN
from gpu_stages.records import Record, attempt, compiled_before


def _tiny_cases() -> Iterator[tuple[Any, str]]:
    """For each primitive the case with peers that has the smallest inputs: for the host's time, sizes do not matter."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gankern.measure.cases import all_cases

    smallest: dict[str, tuple[int, Any]] = {}
    for case in all_cases():
        if case.peers:
            with FakeTensorMode():  # sizes alone: to compute the values of all cases would take longer than the stage
                size = sum(x.numel() for x in case.make(torch.float32, "cpu"))
            if case.primitive not in smallest or size < smallest[case.primitive][0]:
                smallest[case.primitive] = size, case
    for primitive, (_, case) in sorted(smallest.items()):
        yield case, primitive


def host(record: Record, device: str) -> None:
    """µs a call, of gankern and the eager peers."""
    import torch

    from gankern.measure import device as measured
    from gankern.measure.benchmark import MODES, candidates_of, step_of

    def cost(run: Callable[..., Any], case: Any, mode: str) -> float:
        step = step_of(run, case, torch.float32, device, mode)
        return measured.host_microseconds(step, device, *((3, 2) if device == "cpu" else (100, 5)))

    for case, primitive in _tiny_cases():
        for mode in MODES:
            candidates = candidates_of(case, mode, compiled=False)
            row = {name: attempt(partial(cost, run, case, mode)) for name, run in candidates.items()}
            record.add(primitive=primitive, case=case.name, mode=mode, microseconds=row)


def device_cases(device: str) -> list[tuple[str, Any, int]]:
    """(name, shape, gankern's function, the peer, least passes over the first input forward and backward)."""
    import torch
    import torch.nn.functional as F

    import gankern.functional as GF

    big = (64, 256, 64, 64) if device == "cuda" else (4, 4, 8, 8)
    small = (16, 128, 8, 8) if device == "cuda" else (4, 4, 4, 4)

    def bias_act(x: Any, b: Any, implementation: str | None = None) -> Any:
        return GF.bias_act(x, b, activation="leaky_relu", implementation=implementation)

    def eager_bias_act(x: Any, b: Any) -> Any:
        return F.leaky_relu(x + b[:, None, None], 0.2)

    def eager_pixel_norm(x: Any, b: Any) -> Any:
        a = F.leaky_relu(x + b[:, None, None], 0.2)
        return a * (a.square().mean(1, keepdim=True) + 1e-8).rsqrt()

    def eager_batch_norm(x: Any, b: Any) -> Any:
        return F.leaky_relu(F.batch_norm(x, None, None, b, b, True), 0.2)

    def eager_stddev(x: Any, b: Any) -> Any:
        y = x.view(4, -1, *x.shape[1:]).float().var(0, correction=0).add(1e-8).sqrt().mean((1, 2, 3)).to(x.dtype)
        y = y.view(-1, 1, 1, 1).repeat(4, 1, *x.shape[2:])
        return torch.cat([x, y], 1)

    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=device) / 8

    def eager_instance_norm(x: Any, b: Any) -> Any:
        return F.leaky_relu(F.instance_norm(x, None, None, b, b), 0.2)

    def groups(x: Any) -> int:  # of eight channels
        return max(1, x.shape[1] // 8)

    def eager_group_norm(x: Any, b: Any) -> Any:
        return F.leaky_relu(F.group_norm(x, groups(x), b, b), 0.2)

    def eager_penalty(x: Any, b: Any) -> Any:
        return (torch.linalg.vector_norm(x, dim=(1, 2, 3)) - 1).square()

    def virtual_batch_norm(x: Any, b: Any, implementation: str | None = None) -> Any:
        m = mean[: x.shape[1]]
        return GF.virtual_batch_norm(x, m, m + 1, 64, b, b, activation="leaky_relu", implementation=implementation)

    def eager_up(x: Any, b: Any) -> Any:
        c = x.shape[1]
        kernel = (torch.outer(taps, taps) * 4).to(x.dtype).expand(c, 1, 4, 4)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=c)

    def eager_down(x: Any, b: Any) -> Any:
        c = x.shape[1]
        return F.conv2d(x, torch.outer(taps, taps).to(x.dtype).expand(c, 1, 4, 4), stride=2, padding=1, groups=c)

    def eager_same(x: Any, b: Any) -> Any:
        c = x.shape[1]
        return F.conv2d(F.pad(x, (2, 1, 2, 1)), torch.outer(taps, taps).to(x.dtype).expand(c, 1, 4, 4), groups=c)

    mean = torch.zeros(big[1], device=device)
    cases = []
    for shape, label in ((big, "large"), (small, "small")):
        half = (shape[0] // 2, shape[1] // 2, *shape[2:])
        wide = (*half[:2], 2 * shape[2], 2 * shape[3])
        cases += [
            (f"bias_act {label}", shape, bias_act, eager_bias_act, 5),
            (f"bias_act_pixel_norm {label}", shape, GF.bias_act_pixel_norm, eager_pixel_norm, 5),
            (f"batch_norm_act {label}", shape,
             lambda x, b: GF.batch_norm_act(x, None, None, b, b, True, activation="leaky_relu"), eager_batch_norm, 5),
            (f"minibatch_stddev {label}", shape, lambda x, b: GF.minibatch_stddev(x, group_size=4), eager_stddev, 5),
            (f"virtual_batch_norm {label}", shape, virtual_batch_norm,
             partial(virtual_batch_norm, implementation="reference"), 5),
            (f"upfirdn2d up {label}", half,
             lambda x, b: GF.upfirdn2d(x, taps, up=2, padding=(2, 1, 2, 1), gain=4), eager_up, 10),
            (f"upfirdn2d down {label}", wide,
             lambda x, b: GF.upfirdn2d(x, taps, down=2, padding=(1, 1, 1, 1)), eager_down, 2.5),
            (f"upfirdn2d same {label}", wide,
             lambda x, b: GF.upfirdn2d(x, taps, padding=(2, 1, 2, 1)), eager_same, 4),
            (f"instance_norm_act {label}", shape,
             lambda x, b: GF.instance_norm_act(x, None, None, b, b, activation="leaky_relu"), eager_instance_norm, 5),
            (f"group_norm_act {label}", shape,
             lambda x, b: GF.group_norm_act(x, groups(x), b, b, activation="leaky_relu"), eager_group_norm, 5),
            (f"gradient_penalty {label}", shape, lambda x, b: GF.gradient_penalty(x), eager_penalty, 3),
        ]  # fmt: skip
    return cases


def device(record: Record, where: str) -> None:
    """Milliseconds of gankern, torch eager and torch compiled, each as replays of a CUDA graph, and the limit of
    memory: the least passes over the input at the measured copy bandwidth."""
    import torch

    from gankern.core import devices
    from gankern.measure import benchmark
    from gankern.measure import device as measured

    if where == "cuda":  # in this process `auto` takes Triton, beside which CUDA C++ is measured
        devices.TIERS.pop(torch.cuda.get_device_name(), None)
    quick = {"seconds": 0.05, "rounds": 3} if where == "cuda" else {"seconds": 0.0, "rounds": 1}
    bandwidth = benchmark.copy_bandwidth(where, 256 if where == "cuda" else 8)
    record.content["copy_bandwidth"] = bandwidth
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    kinds = [(dtype, layout) for dtype in (torch.float32, torch.bfloat16) for layout in layouts]

    def measure(
        runs: dict[str, Callable[..., Any]], dtype: Any, layout: str, name: str, shape: Any, passes: float
    ) -> None:
        inputs = inputs_of(shape, dtype, layout, where)
        x = inputs[0]
        row = {who: attempt(partial(_times, measured, run, inputs, where, quick)) for who, run in runs.items()}
        limit = passes * x.nbytes / bandwidth * 1e3
        record.add(case=name, dtype=str(dtype)[6:], layout=layout, limit_ms=limit, contenders=row)

    cases = device_cases(where)
    large = [(number, *kind) for kind in kinds for number in range(len(cases)) if "large" in cases[number][0]]
    # Small maps in one kind only: there the launches decide, which are the same in all.
    small = [(number, *kinds[0]) for number in range(len(cases)) if "large" not in cases[number][0]]
    own = _cases_of_their_own(where)
    bare = [case for case in own if any(f"{case.primitive} {case.name}".startswith(row[0]) for row in OF_THEIR_OWN)]
    if where == "cuda":
        work = [(*one, False) for one in large + small] + [(*one, True) for one in large]
        record.add(what="compiled", **compiled_before(_compile_case, work, 40))

    def measure_cases(work: Sequence[tuple[int, Any, str]], who: str) -> None:
        for number, dtype, layout in work:
            name, shape, ours, peer, passes = cases[number]
            if who == "compiled":
                torch._dynamo.reset()
            runs = {"gankern": ours, IN_CUDA: partial(_in_cuda, ours), "eager": peer, "compiled": torch.compile(peer)}
            measure({who: runs[who]}, dtype, layout, name, shape, passes)

    def measure_own(work: Sequence[Any], modes: Sequence[str], compiled: bool) -> None:
        for case, mode in itertools.product(work, modes):
            candidates = benchmark.candidates_of(case, mode, compiled)
            if compiled:
                runs = {who: run for who, run in candidates.items() if who.endswith(benchmark.COMPILED)}
            else:
                runs = candidates | {f"gankern, {tier}": partial(case.run, tier) for tier in tiers_of(case, where)}
            row = {who: attempt(partial(replayed, run, case, mode, where, **quick)) for who, run in runs.items()}
            record.add(case=f"{case.primitive} {case.name}", mode=mode, dtype="float32", contenders=row)

    # What bars need comes first; last among that, peers whose compilation takes seconds where no cache has it.
    measure_cases(large, "gankern")
    measure_cases([one for one in large if cases[one[0]][0].split()[0] in with_cuda(where)], IN_CUDA)
    measure_own(bare, benchmark.MODES[1:], False)
    if where == "cuda":
        measure_cases(large, "compiled")
        measure_own(bare, benchmark.MODES[1:2], True)
    measure_cases(large, "eager")
    for who in ("gankern", "eager"):
        measure_cases(small, who)
    measure_own(own, benchmark.MODES[:1], False)
    measure_own([case for case in own if case not in bare], benchmark.MODES[1:], False)


def _in_cuda(run: Callable[..., Any], *inputs: Any) -> Any:
    """By CUDA C++, where `auto` may still take Triton: the device's file does not say yet which is faster."""
    import gankern

    with gankern.use_implementation("cuda"):
        return run(*inputs)


def with_cuda(where: str) -> list[str]:
    """The primitives that CUDA C++ runs here."""
    import torch

    import gankern.functional  # noqa: F401 (declares the primitives)
    from gankern.core.dispatch import Primitive

    having = [p for p in Primitive.registry.values() if any(tier.name == "cuda" for tier in p.implementations)]
    return [p.name for p in having if where == "cuda" and p.refusals(where, torch.float32)["cuda"] is None]


def _cases_of_their_own(where: str) -> list[Any]:
    """Cases that are measured as in `gankern bench`, and spectral norm of a discriminator too large for other
    places."""
    from gankern.measure.cases import Case, all_cases, spectral_norm

    names = ("spectral_norm", "minibatch_discrimination", "gradient_penalty")
    if where == "cpu":
        return [case for case, primitive in _tiny_cases() if primitive in names]
    found = [case for case in all_cases() if case.primitive in names and case.bench and case.along is None]
    peers = {"torch parametrization": spectral_norm.torch_parametrization}
    return [
        *found,
        Case("spectral_norm", BIGGAN, _biggan_weights, spectral_norm.grouped, peers, spectral_norm.work),
    ]


BIGGAN = "BigGAN-128 discriminator, grouped"
BIGGAN_WIDTHS = (3, 96, 192, 384, 768, 1536, 1536)


def _biggan_weights(dtype: Any, device: str, widths: Sequence[int] = BIGGAN_WIDTHS, classes: int = 1000) -> list[Any]:
    """The discriminator's weights, u and v, made on the device: they are 350 MB."""
    import torch
    import torch.nn.functional as F

    shapes: list[tuple[int, ...]] = []
    for given, width in itertools.pairwise(widths):
        shapes += [(width, given, 3, 3), (width, width, 3, 3)]
        shapes += [(width, given, 1, 1)] if width != given else []
    width = widths[1]  # of the attention, behind the first block
    shapes += [
        (width // 8, width, 1, 1),
        (width // 8, width, 1, 1),
        (width // 2, width, 1, 1),
        (width, width // 2, 1, 1),
    ]
    shapes += [(1, widths[-1]), (classes, widths[-1])]
    weights = [(torch.randn(shape, device=device, dtype=dtype) / shape[0] ** 0.5).requires_grad_() for shape in shapes]
    us = [F.normalize(torch.randn(shape[0], device=device, dtype=dtype), dim=0) for shape in shapes]
    with torch.no_grad():
        vs = [F.normalize(w.flatten(1).T @ u, dim=0) for w, u in zip(weights, us)]
    return [*weights, *us, *vs]


def inputs_of(shape: Any, dtype: Any, layout: str, where: str) -> tuple[Any, Any]:
    """A map and a bias, both leaves."""
    import torch

    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(shape, device=where, dtype=dtype).contiguous(memory_format=memory_format)
    return x.requires_grad_(), torch.randn(shape[1], device=where, dtype=dtype).requires_grad_()


def _compile_case(number: int, dtype: Any, layout: str, peer: bool) -> None:
    """Runs a case of the device stage once, ours or the compiled peer, so that its kernels are in the caches."""
    import torch

    _, shape, ours, eager, _ = device_cases("cuda")[number]
    for step in modes_of(torch.compile(eager) if peer else ours, inputs_of(shape, dtype, layout, "cuda")).values():
        attempt(step)


def replayed(
    run: Callable[..., Any],
    case: Any,
    mode: str,
    where: str,
    seconds: float = 0.05,
    rounds: int = 3,
    dtype: str = "float32",
) -> float:
    """Milliseconds of a case's mode as replays of a graph."""
    import torch

    from gankern.measure import benchmark
    from gankern.measure import device as measured

    step = benchmark.step_of(run, case, getattr(torch, dtype), where, mode)
    return measured.milliseconds(measured.graph_of(step, where), where, seconds, rounds)


def tiers_of(case: Any, where: str) -> list[str]:
    """The implementations that take a case on this device besides the reference, if there is more than one."""
    import torch

    able: list[str] = case.implementations(where, torch.float32)
    return able if len(able) > 1 else []


def modes_of(run: Callable[..., Any], inputs: Sequence[Any]) -> dict[str, Callable[[], None]]:
    """Forward, forward + backward, double backward."""
    import torch

    def forward() -> None:
        with torch.no_grad():
            run(*inputs)

    cotangent = torch.ones_like(run(*inputs)).requires_grad_()
    gradients = torch.autograd.grad(run(*inputs).sum(), inputs, allow_unused=True)
    used = [x for x, gradient in zip(inputs, gradients) if gradient is not None]

    def backward() -> None:
        torch.autograd.grad(run(*inputs), used, cotangent)

    def double_backward() -> None:
        grads = torch.autograd.grad(run(*inputs), used, cotangent, create_graph=True)
        torch.autograd.grad(grads, [*used, cotangent], [torch.ones_like(g) for g in grads], allow_unused=True)

    return {"f": forward, "f+b": backward, "double backward": double_backward}


def _times(measured: Any, run: Callable[..., Any], inputs: Sequence[Any], where: str, quick: dict) -> dict[str, Any]:
    """The milliseconds of each mode, and the memory of forward + backward."""
    modes = modes_of(run, inputs)
    timed = {
        mode: attempt(lambda step=step: measured.milliseconds(measured.graph_of(step, where), where, **quick))
        for mode, step in modes.items()
    }
    return timed | {"peak_mb": attempt(lambda: measured.peak_megabytes(modes["f+b"], where))}
