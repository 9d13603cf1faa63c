"""The stage `steps`: whole training steps, penalties, and what `accelerate` does to layers one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gpu_stages.bars import LAYER_MODES, LAYER_SIZES, LAYERS, NOT_SLOWER
from gpu_stages.choices import keep_choices
from gpu_stages.records import Record, attempt, compiled_before


def whole_steps(where: str) -> list[Any]:
    """The whole steps to measure, those with a bar first."""
    from gankern.measure import steps as whole

    Step = whole.Step
    if where == "cpu":
        return [Step("DCGAN-16, batch 4", "dcgan", 4, "non_saturating", options={"size": 16, "width": 8})]
    progan = {"loss": "wasserstein", "penalty": True, "drift": 1e-3, "lr": 1e-3, "betas": (0.0, 0.99)}
    return [
        next(s for s in whole.STEPS if s.model == "wgan_gp"),
        next(s for s in whole.STEPS if s.model == "sngan"),
        next(s for s in whole.STEPS if s.model == "dcgan"),
        Step("ProGAN-64, batch 4", "progan", 4, options={"size": 64}, **progan),
        Step("ProGAN-256, batch 4", "progan", 4, options={"size": 256}, **progan),
        Step("DCGAN-64, batch 256", "dcgan", 256, "non_saturating", options={"size": 64}),
    ]


def steps(record: Record, where: str) -> None:
    """Whole steps: torch, accelerated and gankern, as CUDA graphs and without; fp32 with TF32, and bfloat16 in
    channels_last. Then what `accelerate` does to single layers, the kernels that take most of a step's time,
    accelerated steps, and last torch compiled, which may take longer than everything else."""
    import torch

    from gankern.core import devices
    from gankern.measure import device as measured
    from gankern.measure import steps as whole
    from gankern.measure.benchmark import ACCELERATED, OURS

    wanted = whole_steps(where)
    modes = sorted(whole.modes_of(where), key=lambda mode: not mode.endswith("graphed"))
    order = [(fast, mode, number) for mode in modes for fast in (False, True) for number in range(len(wanted))]
    if where == "cuda":
        variants = sorted({v for mode in modes for v in whole.variants_of(mode, compiled=False).values()})
        eager = [v for v in variants if "graphed" not in v and v != "torch"]
        work = [(n, v, where, fast) for fast in (False, True) for n in range(len(wanted)) for v in eager]
        record.add(what="compiled", **compiled_before(_compile_step, work, 30))

    def measure(fast: bool, mode: str, step: Any, variants: dict[str, str]) -> None:
        for name, variant in variants.items():  # a row each: what is stopped keeps those before
            time_of = partial(_step_time, measured, whole, step, variant, where, fast)
            record.add(step=step.name, mode=mode, fast=fast, contenders={name: attempt(time_of)})

    def measure_all(accelerated: bool) -> None:
        for fast, mode, number in order:
            variants = whole.variants_of(mode, compiled=False)
            chosen = {name: v for name, v in variants.items() if (name == ACCELERATED) == accelerated}
            measure(fast, mode, wanted[number], chosen)

    # In this process: penalties by the method that the device's file will name, and everything that accelerate has;
    # what is worth it goes to that file.
    penalties(record, where)
    if where == "cuda":
        worth = worth_accelerating(record.content["results"])
        devices.ACCELERATED[torch.cuda.get_device_name()] = {**dict.fromkeys(DECIDED, 0), **worth}
    measure_all(accelerated=False)  # what bars need
    accelerated_layers(record, where)
    for step in wanted[:4]:
        for variant in ("torch", OURS):
            record.add(
                step=step.name,
                variant=variant,
                kernels=attempt(lambda s=step, v=variant: measured.top_kernels(whole.make_step(s, v, where), where)),
            )
    measure_all(accelerated=True)
    for step in wanted if where == "cuda" else []:
        for mode in modes:
            others = whole.variants_of(mode, compiled=False)
            compiled = {n: v for n, v in whole.variants_of(mode, compiled=True).items() if n not in others}
            measure(False, mode, step, compiled)


# What `accelerate` does by a device's file: the layers that decide, and what its threshold counts, the values of a map
# or of a convolution's weight.
DECIDED: dict[str, tuple[tuple[str, ...], Callable[[Sequence[int]], int]]] = {
    "pairs": (("Upsample Conv2d", "Conv2d AvgPool2d"), math.prod),
    "second derivative": (
        ("LeakyReLU", "BatchNorm2d LeakyReLU", "InstanceNorm2d ReLU", "GroupNorm LeakyReLU", "Conv2d LeakyReLU",
         "ConvTranspose2d BatchNorm2d ReLU"), math.prod),
    "spectral norm": (
        ("SpectralNorm LeakyReLU", "HookedSpectralNorm LeakyReLU"), lambda shape: 9 * shape[1] ** 2),
}  # fmt: skip


def _layers(names: str, channels: int, where: str) -> Any:
    from torch import nn

    def convolution() -> Any:
        return nn.Conv2d(channels, channels, 3, padding=1)

    made = {
        "LeakyReLU": lambda: nn.LeakyReLU(0.2),
        "ReLU": nn.ReLU,
        "BatchNorm2d": lambda: nn.BatchNorm2d(channels),
        "InstanceNorm2d": lambda: nn.InstanceNorm2d(channels, affine=True),
        "GroupNorm": lambda: nn.GroupNorm(max(1, channels // 8), channels),
        "Conv2d": convolution,
        "ConvTranspose2d": lambda: nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False),
        "Upsample": lambda: nn.Upsample(scale_factor=2),
        "AvgPool2d": lambda: nn.AvgPool2d(2),
        "SpectralNorm": lambda: nn.utils.parametrizations.spectral_norm(convolution()),
        "HookedSpectralNorm": lambda: nn.utils.spectral_norm(convolution()),
    }
    return nn.Sequential(*(made[name]() for name in names.split())).to(where)


# Samples of critics whose penalty is measured without a graph, by both methods.
CRITICS = {"64 of 32x32": (64, 3, 32, 32), "64 of 64x64": (64, 3, 64, 64), "16 of 256x256": (16, 3, 256, 256)}
DRY = {"seconds": 0.0, "rounds": 1}


def _critic(channels: int, side: int, where: str) -> Any:
    from torch import nn

    import gankern.nn as gnn

    layers: list[Any] = []
    while side > 4:
        width = min(512, 1024 // side * 32)
        layers += [gnn.Conv2d(channels, width, 3, padding=1), gnn.LeakyReLU(0.2), nn.AvgPool2d(2)]
        channels, side = width, side // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, 1)).to(where)


def _layer_milliseconds(model: Any, x: Any, mode: str, where: str) -> float:
    import torch

    from gankern.measure import device as measured

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def backward() -> None:
        torch.autograd.grad(model(x).sum(), [x, *model.parameters()])

    def penalty() -> None:
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), [x, *model.parameters()], allow_unused=True)

    step = {"forward": forward, "penalty": penalty}.get(mode, backward)
    quick = {"seconds": 0.02, "rounds": 3} if where == "cuda" else DRY
    return measured.milliseconds(measured.graph_of(step, where) if "graphed" in mode else step, where, **quick)


def penalties(record: Record, where: str) -> None:
    """Milliseconds of a penalty without a graph, by double backward and by the tangent form, which costs the host more.
    The device's file says from how many values of the samples on that is worth it."""
    import torch

    from gankern.measure import device as measured
    from gankern.penalties import gradient_penalty

    def measure(shape: Sequence[int], method: str) -> float:
        critic = _critic(shape[1], shape[2], where)
        real, fake = torch.rand(2, *shape, device=where)

        def step() -> None:
            loss = gradient_penalty(critic, real, fake, method=method)
            torch.autograd.grad(loss, [*critic.parameters()], allow_unused=True)

        return measured.milliseconds(step, where, **({"seconds": 0.1, "rounds": 3} if where == "cuda" else DRY))

    for name, shape in CRITICS.items():
        at = shape if where == "cuda" else (2, 3, 16, 16)
        row = {method: attempt(partial(measure, at, method)) for method in ("double_backward", "tangent")}
        record.add(critic=name, contenders=row)


def accelerated_layers(record: Record, where: str) -> None:
    """Milliseconds of layers as they are and with all that `accelerate` has, on small maps, where the host dominates,
    and on large ones. The device's file makes `accelerate` leave alone whatever was slower."""
    import torch

    import gankern

    def measure(names: str, shape: Sequence[int], mode: str, who: str) -> float:
        # New layers each time: what they keep of a call on the default stream would prevent a later capture.
        x = torch.randn(shape if where == "cuda" else (2, 8, 8, 8), device=where).requires_grad_()
        model = _layers(names, x.shape[1], where)
        if who == "accelerated":
            gankern.accelerate(model)
        return _layer_milliseconds(model, x, mode, where)

    for (size, shape), names in itertools.product(LAYER_SIZES.items(), LAYERS):
        for mode in LAYER_MODES:
            row = {who: attempt(partial(measure, names, shape, mode, who)) for who in ("original", "accelerated")}
            record.add(layers=names, size=size, mode=mode, contenders=row)
    keep_choices(record, where, accelerate=worth_accelerating(record.content["results"]))


def worth_accelerating(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The thresholds of a device's file for `accelerate` and penalties: the values of a map, weight or samples from
    which on none was slower in any mode, at any size. None for what was slower at the largest size, or not measured."""
    ratios = {}
    for row in rows:
        times = row.get("contenders", {})
        if "layers" in row and all(isinstance(times.get(who), float) for who in ("original", "accelerated")):
            ratios[row["layers"], row["size"], row["mode"]] = times["original"] / times["accelerated"]
    found: dict[str, int] = {}
    for what, (layers, values) in DECIDED.items():
        for size, shape in sorted(LAYER_SIZES.items(), key=lambda entry: -math.prod(entry[1])):
            if any(ratios.get((one, size, mode), 0.0) < NOT_SLOWER for one in layers for mode in LAYER_MODES):
                break
            found[what] = values(shape)
    critics = {row["critic"]: row["contenders"] for row in rows if "critic" in row}
    for name, shape in sorted(CRITICS.items(), key=lambda entry: -math.prod(entry[1])):
        times = [critics.get(name, {}).get(method) for method in ("tangent", "double_backward")]
        if not all(isinstance(ms, float) for ms in times) or times[0] > times[1]:
            break
        found["tangent form"] = math.prod(shape)
    return found


def _compile_step(number: int, variant: str, where: str, fast: bool) -> None:
    """One step of training, so that its kernels are in the caches."""
    from gankern.measure import steps as whole

    _with_tf32()
    whole.make_step(whole_steps(where)[number], variant, where, fast)()


def _with_tf32() -> None:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def _step_time(measured: Any, whole: Any, step: Any, variant: str, where: str, fast: bool) -> dict[str, Any]:
    _with_tf32()
    train = whole.make_step(step, variant, where, fast)
    return {
        "ms": measured.milliseconds(train, where, seconds=0.2, rounds=3),
        "peak_mb": measured.peak_megabytes(train, where),
    }
