"""One Gaussian for two: which direction of KL is minimised decides what it looks like."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gankern.core import extras
from gankern.theory.densities import kullback_leibler
from gankern.theory.figures._figure import Figure, canvas, line
from gankern.theory.figures.optimal_discriminator import gaussian

X = torch.linspace(-40.0, 40.0, 16_001, dtype=torch.float64)
DX = 5e-3
P = 0.5 * gaussian(X, -2.0, 0.5) + 0.5 * gaussian(X, 2.0, 0.5)
LEAST = 1e-290  # a density that has underflowed is not 0


def best(direction: str, mean: float, std: float) -> tuple[float, float, float]:
    """(μ, σ, KL) of the Gaussian q of least KL(p ‖ q), "forward", or KL(q ‖ p), "reverse", from a start."""
    optimize = extras.load("scipy.optimize", "a figure")
    p = P.clamp(min=LEAST)

    def divergence(parameters: Any) -> float:
        q = gaussian(X, float(parameters[0]), math.exp(float(parameters[1]))).clamp(min=LEAST)
        return kullback_leibler(p, q, DX) if direction == "forward" else kullback_leibler(q, p, DX)

    solved = optimize.minimize(
        divergence,
        (mean, math.log(std)),
        method="Nelder-Mead",
        bounds=((-4.0, 4.0), (math.log(0.1), math.log(4.0))),
        options={"xatol": 1e-7, "fatol": 1e-12},
    )
    return float(solved.x[0]), math.exp(float(solved.x[1])), float(solved.fun)


def compute() -> dict[str, Any]:
    forward, reverse = best("forward", 0.5, 1.0), best("reverse", 1.5, 1.0)
    wide: Tensor = gaussian(X, forward[0], forward[1])
    found = dict(zip(("forward_mean", "forward_std", "forward_kl"), forward))
    found |= dict(zip(("reverse_mean", "reverse_std", "reverse_kl"), reverse))
    found["forward_mean"] = abs(found["forward_mean"])  # 0 to rounding, of either sign
    return found | {"wide_reverse_kl": kullback_leibler(wide, P.clamp(min=LEAST), DX)}


def draw(found: dict[str, Any]) -> Figure:
    figure, (left, right) = canvas(9, 2.8, columns=2, sharey=True)
    shown = slice(6_800, 9_200, 8)
    for axes, name, title in (
        (left, "forward", "KL(p ‖ q): covers everything"),
        (right, "reverse", "KL(q ‖ p): takes one mode"),
    ):
        axes.plot(X[shown], P[shown], **line(0), label="data p")
        q = gaussian(X, found[f"{name}_mean"], found[f"{name}_std"])
        axes.plot(X[shown], q[shown], **line(1), label=f"q, KL = {found[f'{name}_kl']:.4f}")
        axes.fill_between(X[shown], 0, q[shown], facecolor="none", edgecolor="#999999", hatch="///", linewidth=0)
        axes.set(title=title, xlabel="x")
        axes.legend()
    return figure
