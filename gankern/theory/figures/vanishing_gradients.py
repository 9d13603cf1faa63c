"""How hard a generated sample is pushed, by how sure the discriminator is of it."""

from __future__ import annotations

from typing import Any

import torch

from gankern.theory.densities import generator_slopes
from gankern.theory.figures._figure import Figure, canvas, line, table

SHOWN = {
    "minimax": "−σ(d)",
    "non_saturating": "−σ(−d)",
    "maximum_likelihood": "−½·eᵈ",
    "least_squares": "d − 1",
    "wasserstein": "−1",
}
AT = (-10.0, -4.0, 0.0, 4.0)


def compute() -> dict[str, Any]:
    d = torch.linspace(-10.0, 4.0, 141, dtype=torch.float64)
    at = {loss: generator_slopes(loss, torch.tensor(AT, dtype=torch.float64)) for loss in SHOWN}
    rows = [(loss, formula, *(f"{v:.5g}" for v in at[loss].tolist())) for loss, formula in SHOWN.items()]
    return {
        "table": table(("loss", "∂L/∂d", *(f"d = {d:g}" for d in AT)), rows),
        "at": at,
        "logits": d,
        "slopes": {loss: generator_slopes(loss, d) for loss in SHOWN},
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, (left, right) = canvas(9, 3.2, columns=2)
    d = found["logits"]
    for i, (loss, slopes) in enumerate(found["slopes"].items()):
        left.plot(d, slopes, **line(i), label=loss)
        right.semilogy(d, slopes.abs().clamp(min=1e-6), **line(i, True), markevery=20, label=loss)
    left.set(ylim=(-6, 1), title="slope of the generator's loss", xlabel="logit d of a generated sample")
    right.set(ylim=(1e-5, 30), title="its size", xlabel="logit d (−10: D is sure that it is generated)")
    left.legend(loc="lower left")
    return figure
