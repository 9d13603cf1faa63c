"""Whole training steps of this library's models: what all kernels together are worth.

A step is one update of the critic (real and generated batch, gradient penalty where the model has one) and one of the
generator, optimisers included. The contenders are one model built four ways: stock torch layers with the penalty that
people write by hand; the same with both networks under ``torch.compile`` wherever that runs (a penalty's double
backward it refuses, so the penalty stays eager); the same after one call of :func:`gankern.accelerate`; and gankern's
layers and penalty. On CUDA they meet a second time, every one of them as one CUDA graph: the kernels without the host.

A system that is no pair of generator and critic on noise (pix2pix, CycleGAN, SRGAN) or whose networks take classes is
measured as a game of :mod:`gankern.games`: all moves of one step of its trainer, on random images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import gankern
import gankern.penalties
from gankern import games, losses, models, training
from gankern.core.dispatch import short
from gankern.measure import benchmark
from gankern.measure.benchmark import ACCELERATED, OURS, Result
from gankern.training.graphed import GraphedStep
from gankern.training.trainer import Trainer

WHOLE_STEP = "whole step"
GRAPHED_STEP = "whole step, graphed"  # each contender as one CUDA graph
AS_GRAPH = ", graphed"  # what a variant's name ends with then
PENALTY = "gradient penalty"  # the profiler's name of that part of a step


@dataclass(frozen=True)
class Step:
    """One model at one size."""

    name: str
    model: str
    batch: int
    loss: str
    penalty: bool = False
    drift: float = 0.0  # ProGAN's, times the mean of D(real)²
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    options: dict[str, Any] = field(default_factory=dict)  # of models.build
    quick: bool = False


@dataclass(frozen=True)
class Play:
    """One step of a game at one size; ``settings`` are those of :func:`gankern.training.configure`."""

    name: str
    model: str
    batch: int
    size: int
    classes: int = 0  # of its labels
    settings: dict[str, Any] = field(default_factory=dict)
    quick: bool = False


STEPS: list[Step | Play] = [
    Step("DCGAN-64, batch 64", "dcgan", 64, "non_saturating", options={"size": 64}, quick=True),
    Step("SN-GAN ResNet-32, batch 64", "sngan", 64, "hinge", betas=(0.0, 0.9), options={"size": 32}, quick=True),
    Step("WGAN-GP ResNet-32, batch 64", "wgan_gp", 64, "wasserstein", True, lr=1e-4, betas=(0.0, 0.9), quick=True),
    # So small that the calls are what they take.
    Step("DCGAN-64, batch 4, width 16", "dcgan", 4, "non_saturating", options={"size": 64, "width": 16}),
    Step("SN-GAN ResNet-32, batch 4, width 16", "sngan", 4, "hinge", betas=(0.0, 0.9),
         options={"size": 32, "width": 16}),
    *(
        Step(f"ProGAN-{size}, batch {batch}", "progan", batch, "wasserstein", True, drift=1e-3, lr=1e-3,
             betas=(0.0, 0.99), options={"size": size})
        for size, batch in ((16, 16), (32, 4), (64, 4), (128, 4))
    ),
    Play("pix2pix-256, batch 1", "pix2pix", 1, 256, settings={"width": 64, "options": {"strided": 3, "dropout": 3}}),
    Play("CycleGAN-128, 6 blocks, batch 1", "cyclegan", 1, 128,
         settings={"width": 64, "options": {"blocks": 6, "strided": 3, "identity": 0.0}}),
    Play("SRGAN, crops of 96, batch 4", "srgan", 4, 96,
         settings={"width": 64, "options": {"blocks": 16, "features": 1024, "mse_steps": 0}}),
    Play("SAGAN-32, batch 16", "sagan", 16, 32, 10, settings={"width": 64}),
    Play("BigGAN-deep-128, ch 32, batch 4", "biggan_deep", 4, 128, 10,
         settings={"width": 32, "latent": 128, "options": {"embedding": 128}}),
]  # fmt: skip


def penalty_by_hand(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The penalty as the public code that is right has it."""
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
    mixed = torch.lerp(real, fake, alpha).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return 10.0 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def _play(step: Play, variant: str, device: str, fast: bool) -> Callable[[], Any]:
    """:func:`make_step` of a game."""
    torch.manual_seed(0)
    images = torch.rand(step.batch, 3, step.size, step.size) * 2 - 1
    # What the game asks for beside the images: their classes, or images to translate.
    conditions = {"labels": torch.arange(step.batch) % max(step.classes, 1), "pairs": images.flip(3),
                  "unpaired": images.flip(3)}  # fmt: skip
    needs = games.find(step.model).needs
    condition = None if needs is None else conditions[needs]
    config = training.configure(
        step.model, "noise", images, condition, size=step.size, batch_size=step.batch, device=device,
        precision="bf16" if fast else "fp32", **step.settings,
    )  # fmt: skip
    trainer = Trainer(config, OURS if variant == OURS else "torch", images, condition)
    networks = trainer.game.networks
    if variant == "torch, compiled":
        torch._dynamo.reset()
        networks.update({name: torch.compile(network) for name, network in networks.items()})  # type: ignore[misc]
    for network in networks.values() if variant == ACCELERATED else ():
        gankern.accelerate(network)
    return trainer.step


def make_step(step: Step | Play, variant: str, device: str, fast: bool = False) -> Callable[[], Any]:
    """A function that trains for one step. Every variant starts from the same weights and sees the same images.

    ``variant`` is "gankern", "torch", "torch, compiled" or "torch, accelerated"; with ", graphed" behind it, the step
    is one CUDA graph. ``fast``: forward passes under autocast to bfloat16, and networks and images in channels_last."""
    if isinstance(step, Play):
        return _play(step, variant, device, fast)
    torch.manual_seed(0)
    graphed = variant.endswith(AS_GRAPH)
    variant = variant.removesuffix(AS_GRAPH)
    layers = OURS if variant == OURS else "torch"
    gan = models.build(step.model, layers=layers, **step.options)
    layout = torch.channels_last if fast else torch.contiguous_format
    generator, critic = gan.generator.to(device), gan.discriminator.to(device)
    for network in (generator, critic):
        network.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs leave it out
    if variant == ACCELERATED:
        for network in (generator, critic):
            gankern.accelerate(network)
    loss = losses.get(step.loss)
    g_optimiser, d_optimiser = (
        torch.optim.Adam(network.parameters(), step.lr, step.betas, capturable=graphed and device != "cpu", fused=True)
        for network in (generator, critic)
    )
    latents = torch.randn(step.batch, gan.latent, device=device)
    with torch.no_grad():
        real = (torch.rand_like(generator(latents)) * 2 - 1).contiguous(memory_format=layout)
    g: Callable[..., Any] = generator
    d: Callable[..., Any] = critic
    if variant == "torch, compiled":
        torch._dynamo.reset()
        g, d = torch.compile(generator), torch.compile(critic)

    def critic_loss_by_hand(real: Tensor, fake: Tensor) -> Tensor:
        d_real, d_fake = d(real), d(fake)
        total = loss.discriminator(d_real, d_fake)
        if step.drift:
            total = total + step.drift * d_real.square().mean()
        if step.penalty:
            with record_function(PENALTY):
                # Its own backward: the graph of the other part is not kept while this one is at its largest.
                penalty_by_hand(critic, real, fake).backward()
        return total

    def penalty(*args: Any, **options: Any) -> Tensor:
        with record_function(PENALTY):
            return gankern.penalties.gradient_penalty(*args, **options)

    def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
        return gankern.penalties.critic_step(
            critic,
            real,
            fake,
            loss=loss.discriminator,
            penalty=penalty if step.penalty else None,
            drift_weight=step.drift,
        ).loss

    def train(real: Tensor, latents: Tensor) -> None:
        autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=fast)
        with torch.no_grad(), autocast():
            fake = g(latents)
        d_optimiser.zero_grad()
        with autocast():
            d_loss = (critic_loss if layers == OURS else critic_loss_by_hand)(real, fake.to(real.dtype))
        d_loss.backward()
        d_optimiser.step()
        g_optimiser.zero_grad()
        with autocast():
            g_loss = loss.generator(d(g(latents)))
        g_loss.backward(inputs=list(generator.parameters()))
        g_optimiser.step()

    if graphed:
        replay = GraphedStep(train, (real, latents), (generator, critic), (g_optimiser, d_optimiser))
        return partial(replay, real, latents)
    return partial(train, real, latents)


def modes_of(device: str, step: Step | Play | None = None) -> tuple[str, ...]:
    """How a step is measured on a device: each of its modes is a result of its own. (A game's trainer replays graphs
    by itself where it can.)"""
    graphed = device.startswith("cuda") and not isinstance(step, Play)
    return (WHOLE_STEP, GRAPHED_STEP) if graphed else (WHOLE_STEP,)


def variants_of(mode: str, compiled: bool) -> dict[str, str]:
    """Who meets in a mode: the contender's name in the result, and the variant that it is."""
    if mode == GRAPHED_STEP:
        # Peers keep the name of their variant; ours are called as in every other result.
        return {name: name + AS_GRAPH for name in (OURS, ACCELERATED)} | {"torch" + AS_GRAPH: "torch" + AS_GRAPH}
    names = [OURS, ACCELERATED, "torch", *(["torch, compiled"] if compiled else [])]
    return dict(zip(names, names))


def measure(
    step: Step | Play, device: str, compiled: bool, seconds: float, mode: str = WHOLE_STEP, fast: bool = False
) -> Result:
    """Times one step in all variants of a mode; ``fast`` as :func:`make_step` has it."""
    dtype = torch.bfloat16 if fast else torch.float32
    result = Result("model", step.name, mode, short(dtype), device, OURS)
    variants = variants_of(mode, compiled).items()
    makers = {name: partial(make_step, step, variant, device, fast) for name, variant in variants}
    benchmark.contend(result, makers, seconds, least=3)
    return result


# Beginnings of operators' names, most telling first.
KINDS = {
    "convolution": ("aten::convolution", "aten::mkldnn", "aten::_conv", "aten::cudnn", "aten::slow_conv", "aten::thnn",
                    "aten::mm", "aten::addmm", "aten::bmm", "gankern::conv", "gankern::bilinear"),
    "normalisation and activation": ("aten::native_batch_norm", "aten::leaky_relu", "aten::relu", "aten::threshold",
                                     "aten::tanh", "aten::native_group", "aten::linalg_vector_norm", "gankern::"),
    "optimiser": ("aten::_foreach", "aten::_fused", "Optimizer"),
}  # fmt: skip


def breakdown(step: Step | Play, variant: str, device: str) -> dict[str, float]:
    """Milliseconds of one step by what they are spent on; the penalty apart, whatever it is made of."""
    train = make_step(step, variant, device)
    train()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train()
    spent = dict.fromkeys([*KINDS, PENALTY, "rest"], 0.0)
    for event in profiler.events():
        within = event
        while within is not None and within.name != PENALTY:
            within = within.cpu_parent
        kind = PENALTY if within is not None else next(
            (kind for kind, starts in KINDS.items() if event.name.startswith(starts)), "rest"
        )  # fmt: skip
        spent[kind] += event.self_cpu_time_total / 1e3
    return spent
