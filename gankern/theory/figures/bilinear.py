"""The smallest game that steps along the gradient do not solve."""

from __future__ import annotations

import math
from typing import Any

import torch

from gankern.theory.figures._figure import Figure, canvas, table
from gankern.theory.games import BILINEAR_RULES, bilinear_path

ETA, STEPS = 0.1, 400
FORMULAS = {
    "simultaneous": "sqrt(1 + η²)",
    "alternating": "1 (a closed curve)",
    "extragradient": "sqrt(1 − η² + η⁴)",
    "penalty": "sqrt(1 − η + η²)",
}


def growth(path: torch.Tensor) -> float:
    """By how much a step multiplies the radius, turns left out: from the areas between one position and the next, which
    a linear step multiplies by its determinant."""
    before, after = path[:-1], path[1:]
    area = (before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]).abs()
    return (area[-1] / area[0]).item() ** (0.5 / (len(area) - 1))


def compute() -> dict[str, Any]:
    paths = {rule: bilinear_path(rule, eta=ETA, steps=STEPS) for rule in BILINEAR_RULES}
    average = paths["alternating"].cumsum(0) / torch.arange(1, STEPS + 2)[:, None]
    factors = {rule: growth(path) for rule, path in paths.items()}
    paths |= {"averaging": average}
    rows = [
        (
            rule,
            FORMULAS.get(rule, "falls as 1/steps"),
            f"{factors[rule]:.6f}" if rule in factors else "",
            f"{path[-1].norm():.4g}",
        )
        for rule, path in paths.items()
    ]
    return {
        "eta": ETA,
        "steps": STEPS,
        "growth": math.sqrt(1 + ETA * ETA),
        "table": table(("rule", "factor of the radius a step", "measured", f"radius after {STEPS} steps"), rows),
        "paths": paths,
        "factors": factors,
    }


def draw(found: dict[str, Any]) -> Figure:
    paths = found["paths"]
    figure, axes = canvas(10, 2.4, columns=5)
    for i, (ax, (rule, path)) in enumerate(zip(axes, paths.items())):
        ax.plot(path[:200, 0], path[:200, 1], color="#111111", linewidth=1)
        ax.plot(*path[0], "o", color="#111111", markersize=5)
        ax.plot(0, 0, "+", color="#c14a00", markersize=10, markeredgewidth=2)
        reach = 4.0 if rule == "simultaneous" else 1.8
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), title=rule, aspect="equal", xlabel="x")
        if i == 0:
            ax.set_ylabel("y")
    return figure
