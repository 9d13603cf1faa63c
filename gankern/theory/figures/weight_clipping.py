"""Clipping drives weights to the limits, and gradients through many layers to nothing or to infinity."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gankern.data import POINTS
from gankern.losses import wasserstein_discriminator
from gankern.theory.figures._figure import Figure, bar, canvas, line
from gankern.theory.figures._training import mlp, seeded, train_critic
from gankern.theory.figures.value_surfaces import noisy

DEPTH, WIDTH, STEPS = 12, 32, 250
LIMITS = (0.5, 0.1, 0.01)
HISTOGRAM = 0.01  # the limit whose weights are shown, on the critic of three layers


def gradients(critic: nn.Sequential) -> list[float]:
    """‖∂L/∂h‖ at the output of each hidden layer, from the first on."""
    random = torch.Generator().manual_seed(2)
    sample = POINTS["swiss_roll"].sample
    outputs: list[torch.Tensor] = []
    handles = [
        m.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for m in critic if isinstance(m, nn.Linear)
    ]
    real, fake = sample(512, random), noisy(sample)(512, random)
    loss = wasserstein_discriminator(critic(real), critic(fake))
    for handle in handles:
        handle.remove()
    each = torch.autograd.grad(loss, outputs)
    return [
        (a.square().sum() + b.square().sum()).sqrt().item()
        for a, b in zip(each[: DEPTH - 1], each[DEPTH : 2 * DEPTH - 1])
    ]


def compute() -> dict[str, Any]:
    sample = POINTS["swiss_roll"].sample
    depth: dict[str, list[float]] = {}
    for limit in LIMITS:
        with seeded(0):
            critic = mlp(2, *(WIDTH,) * (DEPTH - 1), 1)
        train_critic(critic, sample, noisy(sample), STEPS, clip=limit, lr=1e-3, batch=128)
        depth[f"clipped at {limit:g}"] = gradients(critic)
    with seeded(0):
        critic = mlp(2, *(WIDTH,) * (DEPTH - 1), 1)
    train_critic(critic, sample, noisy(sample), STEPS, penalty=10.0, lr=1e-3, batch=128)
    depth["gradient penalty"] = gradients(critic)

    weights = {}
    for kind in ("clipped", "penalty"):
        with seeded(1):
            shallow = mlp(2, 64, 64, 1)
        options: dict[str, Any] = {"clip": HISTOGRAM} if kind == "clipped" else {"penalty": 10.0}
        train_critic(shallow, sample, noisy(sample), 400, lr=1e-3, batch=128, **options)
        weights[kind] = torch.cat([m.weight.detach().flatten() for m in shallow if isinstance(m, nn.Linear)])
    per_layer = {name: (norms[0] / norms[-1]) ** (1 / (len(norms) - 1)) for name, norms in depth.items()}
    return {
        "saturated": (weights["clipped"].abs() >= 0.99 * HISTOGRAM).double().mean().item(),
        "saturated_penalty": (weights["penalty"].abs() >= 0.99 * weights["penalty"].abs().max()).double().mean().item(),
        "loose": per_layer["clipped at 0.5"],
        "middle": per_layer["clipped at 0.1"],
        "tight": per_layer["clipped at 0.01"],
        "penalty": per_layer["gradient penalty"],
        "depth": depth,
        "weights": weights,
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, (first, second, third) = canvas(9.5, 2.9, columns=3, width_ratios=(1, 1, 1.4))
    first.hist(found["weights"]["clipped"] / HISTOGRAM, bins=41, **bar(0))
    first.set(title="weights, clipped", xlabel="weight / limit")
    second.hist(found["weights"]["penalty"], bins=41, **bar(1))
    second.set(title="weights under the penalty", xlabel="weight")
    for i, (name, norms) in enumerate(found["depth"].items()):
        third.semilogy(range(1, DEPTH), norms, **line(i, True), label=name)
    third.set(title="gradient at each layer's output", xlabel="layer (12 is the last)")
    third.legend()
    return figure
