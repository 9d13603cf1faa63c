"""A GAN in the plane at four moments, for four losses: what ``gankern play`` shows in motion."""

from __future__ import annotations

from typing import Any

import torch

from gankern.data import POINTS
from gankern.theory.figures._figure import Figure, canvas, table
from gankern.theory.figures._training import seeded
from gankern.theory.play.recording import LOSSES, REACH, Recording, record

DATA, STEPS, FRAMES = "ring", 400, 4


def compute() -> dict[str, Any]:
    runs: dict[str, Recording] = {}
    for loss in LOSSES:
        with seeded(0):
            *_, last = record(loss, DATA, steps=STEPS, frames=FRAMES)
        assert isinstance(last, Recording)
        runs[loss] = last
    first = next(iter(runs.values()))
    rows = [
        (LOSSES[loss][0], *(f"{w:.2f}" for w in run.figures[:, 2].tolist()), f"{run.figures[-1, 4]:.2f}")
        for loss, run in runs.items()
    ]
    head = ("loss", *(f"W, step {step}" for step in first.steps.tolist()), "JS at the end")
    return {
        "start": first.figures[0, 2].item(),
        "last": {loss: run.figures[-1, 2].item() for loss, run in runs.items()},
        "table": table(head, rows),
        "runs": runs,
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, axes = canvas(7.6, 8, rows=4, columns=FRAMES, sharex=True, sharey=True)
    real = POINTS[DATA].sample(200, torch.Generator().manual_seed(0))
    cells = iter(axes)
    for loss, run in found["runs"].items():
        for moment, step in enumerate(run.steps.tolist()):
            ax = next(cells)
            shade = run.heat[moment]
            ax.imshow(shade, origin="lower", extent=(-REACH, REACH, -REACH, REACH), cmap="Greys_r", alpha=0.35)
            sheet = run.manifold[moment]
            ax.plot(sheet[..., 0], sheet[..., 1], color="#c14a00", linewidth=0.3)
            ax.plot(sheet[..., 0].T, sheet[..., 1].T, color="#c14a00", linewidth=0.3)
            ax.plot(*real.T, "o", markersize=2, markerfacecolor="none", markeredgecolor="#0062a3", markeredgewidth=0.6)
            ax.plot(*run.points[moment].T, "^", markersize=2.5, color="#111111")
            ax.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[], aspect="equal")
            ax.set_title(f"step {step}" if loss == "minimax" else "")
            if not moment:
                ax.set_ylabel(LOSSES[loss][0])
    return figure
