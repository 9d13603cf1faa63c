"""The discriminator that is best, and one that learned it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gankern.losses import cross_entropy_discriminator
from gankern.theory.densities import game_value, optimal_logit
from gankern.theory.figures._figure import Figure, canvas, line
from gankern.theory.figures._training import mlp, seeded, train_critic

SHIFT = 2.0
X = torch.linspace(-12.0, 14.0, 26_001, dtype=torch.float64)
DX = 1e-3


def gaussian(x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2.0 * math.pi))


def compute() -> dict[str, Any]:
    p, q = gaussian(X), gaussian(X, SHIFT)
    exact = optimal_logit(p, q)
    with seeded(0):
        fitted = mlp(1, 32, 32, 1)
    train_critic(
        fitted,
        lambda n, random: torch.randn(n, 1, generator=random),
        lambda n, random: torch.randn(n, 1, generator=random) + SHIFT,
        steps=600,
        loss=cross_entropy_discriminator,
        lr=5e-3,
        batch=1024,
    )
    with torch.no_grad():
        logits = fitted(X.float()[:, None])[:, 0].double()
    near = (X > -2.0) & (X < SHIFT + 2.0)
    return {
        "value": game_value(p, q, exact, DX),
        "fitted_value": game_value(p, q, logits, DX),
        "largest_difference": (logits.sigmoid() - exact.sigmoid())[near].abs().max().item(),
        "p": p,
        "q": q,
        "exact": exact,
        "logits": logits,
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, (left, right) = canvas(9, 3, columns=2)
    shown = slice(8_000, 18_000, 20)
    x = X[shown]
    left.plot(x, found["p"][shown], **line(0), label="data p = N(0, 1)")
    left.plot(x, found["q"][shown], **line(1), label="generator q = N(2, 1)")
    left.plot(x, found["exact"][shown].sigmoid(), **line(3), label="D* = p/(p + q)")
    left.plot(x, found["logits"][shown].sigmoid(), **line(2), label="D trained on samples")
    left.set(xlabel="x", title="densities and discriminators")
    right.plot(x, found["exact"][shown], **line(3), label="exact: −2x + 2")
    right.plot(x, found["logits"][shown], **line(2), label="trained")
    right.set(xlabel="x", title="their logits", ylim=(-12, 12))
    for axes in (left, right):
        axes.legend()
    return figure
