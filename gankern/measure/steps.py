"""Whole training steps of this library's models: what all kernels together are worth.

A step is one update of the critic (real and generated batch, gradient penalty where the model has one) and one of the
generator, optimisers included. The contenders are one model built four ways: stock torch layers with the penalty that
people write by hand; the same with both networks under ``torch.compile`` wherever that runs (a penalty's double
backward it refuses, so the penalty stays eager); the same after one call of :func:`gankern.accelerate`; and gankern's
layers and penalty.
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
from gankern import losses, models
from gankern.core.dispatch import short
from gankern.measure import benchmark
from gankern.measure.benchmark import ACCELERATED, GRAPHED, OURS, Result
from gankern.training.graphed import GraphedStep

WHOLE_STEP = "whole step"
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


STEPS = [
    Step("DCGAN-64, batch 64", "dcgan", 64, "non_saturating", options={"size": 64}, quick=True),
    Step("SN-GAN ResNet-32, batch 64", "sngan", 64, "hinge", betas=(0.0, 0.9), options={"size": 32}, quick=True),
    Step("WGAN-GP ResNet-32, batch 64", "wgan_gp", 64, "wasserstein", True, lr=1e-4, betas=(0.0, 0.9), quick=True),
    *(
        Step(f"ProGAN-{size}, batch {batch}", "progan", batch, "wasserstein", True, drift=1e-3, lr=1e-3,
             betas=(0.0, 0.99), options={"size": size})
        for size, batch in ((16, 16), (32, 4), (64, 4), (128, 4))
    ),
]  # fmt: skip


def penalty_by_hand(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The penalty as the public code that is right has it."""
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
    mixed = torch.lerp(real, fake, alpha).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return 10.0 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def make_step(step: Step, variant: str, device: str) -> Callable[[], None]:
    """A function that trains for one step. Every variant starts from the same weights and sees the same images."""
    torch.manual_seed(0)
    layers = OURS if variant in (OURS, GRAPHED) else "torch"
    gan = models.build(step.model, layers=layers, **step.options)
    generator, critic = gan.generator.to(device), gan.discriminator.to(device)
    if variant == ACCELERATED:
        for network in (generator, critic):
            gankern.accelerate(network)
    loss = losses.get(step.loss)
    g_optimiser, d_optimiser = (
        torch.optim.Adam(network.parameters(), step.lr, step.betas, capturable=variant == GRAPHED)
        for network in (generator, critic)
    )
    latents = torch.randn(step.batch, gan.latent, device=device)
    with torch.no_grad():
        real = torch.rand_like(generator(latents)) * 2 - 1
    g, d = generator, critic
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
        options = {"loss": loss.discriminator, "drift_weight": step.drift}
        return gankern.penalties.critic_step(
            critic, real, fake, penalty=penalty if step.penalty else None, **options
        ).loss

    def train(real: Tensor, latents: Tensor) -> None:
        with torch.no_grad():
            fake = g(latents)
        d_optimiser.zero_grad()
        (critic_loss if layers == OURS else critic_loss_by_hand)(real, fake).backward()
        d_optimiser.step()
        g_optimiser.zero_grad()
        loss.generator(d(g(latents))).backward(inputs=list(generator.parameters()))
        g_optimiser.step()

    if variant == GRAPHED:
        train = GraphedStep(train, (real, latents), (generator, critic), (g_optimiser, d_optimiser))
    return partial(train, real, latents)


def variants_of(compiled: bool, device: str) -> list[str]:
    graphed = [GRAPHED] if device.startswith("cuda") else []
    return [OURS, *graphed, ACCELERATED, "torch", *(["torch, compiled"] if compiled else [])]


def measure(step: Step, device: str, compiled: bool, seconds: float) -> Result:
    """Times one step in all variants."""
    variants = variants_of(compiled, device)
    result = Result("model", step.name, WHOLE_STEP, short(torch.float32), device, OURS)
    benchmark.contend(result, {v: partial(make_step, step, v, device) for v in variants}, seconds, least=3)
    return result


# Beginnings of operators' names, most telling first.
KINDS = {
    "convolution": ("aten::convolution", "aten::mkldnn", "aten::_conv", "aten::cudnn", "aten::slow_conv", "aten::thnn",
                    "aten::mm", "aten::addmm", "aten::bmm", "gankern::conv", "gankern::bilinear"),
    "normalisation and activation": ("aten::native_batch_norm", "aten::leaky_relu", "aten::relu", "aten::threshold",
                                     "aten::tanh", "aten::native_group", "aten::linalg_vector_norm", "gankern::"),
    "optimiser": ("aten::_foreach", "aten::_fused", "Optimizer"),
}  # fmt: skip


def breakdown(step: Step, variant: str, device: str) -> dict[str, float]:
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
