"""Three ways to a 1-Lipschitz critic, and the power iteration that one of them runs on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import gankern.nn as gnn
from gankern.data import POINTS
from gankern.theory.figures._figure import Figure, canvas, line, table
from gankern.theory.figures._training import mlp, seeded, train_critic
from gankern.theory.figures.value_surfaces import noisy, plane
from gankern.theory.lipschitz import lipschitz_bound, power_iteration, steepest_slope

CLIP = 0.1


def compute() -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 48, generator=random, dtype=torch.float64)
    found = power_iteration(weight, 40, seed=1)
    sigma1, sigma2 = found.singular_values[:2].tolist()
    error = 1.0 - found.sigma / sigma1

    sample = POINTS["8gaussians"].sample
    rows, critics = [], {}
    for name in ("clipping", "penalty", "spectral norm"):
        with seeded(4):
            critic = mlp(2, 64, 64, 1)
            if name == "spectral norm":
                for layer in critic:
                    if isinstance(layer, nn.Linear):
                        gnn.utils.spectral_norm(layer)
        options: dict[str, Any] = {"clipping": {"clip": CLIP}, "penalty": {"penalty": 10.0}}.get(name, {})
        train_critic(critic, sample, noisy(sample), 400, lr=2e-3, batch=256, **options)
        critic.eval()
        steepest, bound = steepest_slope(critic, plane()), lipschitz_bound(critic)
        critics[name] = critic
        rows.append((name, f"{steepest:.3f}", f"{bound:.3f}"))
    sigmas = [
        torch.linalg.matrix_norm(m.weight.detach().double(), 2).item()
        for m in critics["spectral norm"]
        if isinstance(m, nn.Linear)
    ]
    return {
        "fall": (sigma2 / sigma1) ** 2,
        "measured_fall": (found.tangent[-1] / found.tangent[-2]).item(),
        "error_10": error[9].item(),
        "half_square_10": 0.5 * found.tangent[9].item() ** 2,
        "least_sigma": min(sigmas),
        "largest_sigma": max(sigmas),
        "slope": float(rows[2][1]),
        "bound": float(rows[2][2]),
        "table": table(("critic", "steepest slope on the plane", "product of the layers' norms"), rows),
        "tangent": found.tangent,
        "error": error,
        "critics": critics,
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, (left, right) = canvas(9, 3, columns=2)
    steps = range(1, len(found["tangent"]) + 1)
    left.semilogy(steps, found["tangent"], **line(0), label="tangent of the angle of v to v₁")
    left.semilogy(steps, found["error"].clamp(min=1e-16), **line(1), label="relative error of σ")
    left.semilogy(steps, 0.5 * found["tangent"] ** 2, **line(2), label="half the square of the tangent")
    left.semilogy(
        steps,
        found["tangent"][0] * found["fall"] ** torch.arange(len(found["tangent"])),
        **line(3),
        label="(σ₂/σ₁)² a step",
    )
    left.set(title="power iteration, a 64 × 48 Gaussian matrix", xlabel="iteration")
    left.legend()
    x = torch.linspace(-2.2, 2.2, 200)
    along = torch.stack([x, torch.zeros(200)], 1)
    for i, (name, critic) in enumerate(found["critics"].items()):
        with torch.no_grad():
            value = critic(along)[:, 0]
        right.plot(x, value - value.mean(), **line(i), label=name)
    right.set(title="three critics along y = 0, 8 Gaussians", xlabel="x")
    right.legend()
    return figure
