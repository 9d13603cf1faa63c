"""Divergences against distance."""

from __future__ import annotations

from typing import Any

import torch

from gankern.theory.densities import game_value, jensen_shannon, kullback_leibler
from gankern.theory.figures._figure import Figure, canvas, line, table
from gankern.theory.figures.optimal_discriminator import gaussian
from gankern.theory.transport import wasserstein_by_cdf

SHIFTS = (0.5, 1.0, 2.0, 4.0, 8.0)
X = torch.linspace(-16.0, 24.0, 40_001, dtype=torch.float64)
DX = 1e-3


def measures(shift: float) -> tuple[float, float, float, float]:
    """KL, JS, V(D*) and W of N(0, 1) and N(shift, 1)."""
    p, q = gaussian(X), gaussian(X, shift)
    return (
        kullback_leibler(p, q, DX),
        jensen_shannon(p, q, DX),
        game_value(p, q, dx=DX),
        wasserstein_by_cdf(X, p * DX, q * DX),
    )


def compute() -> dict[str, Any]:
    rows = {shift: measures(shift) for shift in SHIFTS}
    curve = torch.linspace(0.0, 8.0, 33).tolist()
    lines = [(f"{s:g}", f"{kl:.6g}", f"{js:.6f}", f"{v:.6f}", f"{w:.6g}") for s, (kl, js, v, w) in rows.items()]
    return {
        "table": table(("distance t", "KL", "JS", "V(D\\*) = 2·JS − log 4", "W"), lines),
        "rows": rows,
        "t": curve,
        "curves": torch.tensor([measures(t) for t in curve], dtype=torch.float64),
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, (left, right) = canvas(9, 3, columns=2)
    kl, js, value, w = found["curves"].T
    left.plot(found["t"], kl, **line(0, True), markevery=8, label="KL = t²/2")
    left.plot(found["t"], w, **line(1, True), markevery=8, label="W = t")
    left.plot(found["t"], js, **line(2, True), markevery=8, label="JS")
    left.set(ylim=(0, 9), xlabel="distance t of the means", title="three distances of N(0, 1) and N(t, 1)")
    left.legend()
    right.plot(found["t"], value, **line(2, True), markevery=8, label="best value of the game, 2·JS − log 4")
    slope = torch.tensor(found["t"]).double().diff()
    right.plot(found["t"][1:], js.diff() / slope, **line(3, True), markevery=8, label="slope of JS")
    right.plot(found["t"][1:], w.diff() / slope, **line(1, True), markevery=8, label="slope of W")
    right.set(xlabel="distance t of the means", title="what the generator feels")
    right.legend()
    return figure
