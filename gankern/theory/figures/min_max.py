"""min max is not max min."""

from __future__ import annotations

import math
from typing import Any

import torch

from gankern.theory.densities import game_value, jensen_shannon
from gankern.theory.figures._figure import Figure, bar, canvas, line
from gankern.theory.games import max_min, min_max


def compute() -> dict[str, Any]:
    p, choices = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    probability = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    logit = probability.log() - (1 - probability).log()
    # D(b) = 1 − D(a), along which both of G's answers are seen.
    values = [[game_value(p, row, torch.stack([d, -d])) for d in logit] for row in choices]
    return {
        "js": jensen_shannon(p, choices[0]),
        "min_max": min_max(p, choices),
        "max_min": max_min(p, choices),
        "minus_log_4": -math.log(4.0),
        "probability": probability,
        "values": torch.tensor(values, dtype=torch.float64),
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, (left, right) = canvas(9, 2.9, columns=2, width_ratios=(2, 1))
    d = found["probability"]
    for i, values in enumerate(found["values"]):
        left.plot(d, values, **line(i), label=f"G makes {'ab'[i]}")
    left.plot(d, found["values"].min(0).values, **line(3), linewidth=3.5, alpha=0.45, label="G answers D")
    left.axhline(found["min_max"], **line(2), label="best D against a G that stays")
    left.set(ylim=(-3.2, -0.6), xlabel="D(a) = 1 − D(b)", ylabel="V", title="two images a, b in the data")
    left.legend(loc="lower center", ncols=2)
    bars = right.bar(("min_G max_D", "max_D min_G"), (found["min_max"], found["max_min"]), width=0.6)
    for i, patch in enumerate(bars):
        look = bar(i)
        patch.set(facecolor=look["color"], edgecolor="black", hatch=look["hatch"])
    right.bar_label(bars, fmt="%.4f", padding=-22, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    right.set(title="who moves last wins", ylim=(-1.7, 0))
    return figure
