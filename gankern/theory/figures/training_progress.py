"""Which loss tells how good the samples are."""

from __future__ import annotations

from typing import Any

from gankern import metrics
from gankern.core import extras
from gankern.theory.figures._figure import Figure, canvas, line
from gankern.theory.figures._training import digits, draw_samples, vector_gan

CHECKPOINTS, EVERY = 20, 20
SETTINGS: dict[str, dict[str, Any]] = {
    "wasserstein": {"gradient_penalty": 10.0, "n_critic": 3},
    "non_saturating": {},
}


def progress(loss: str) -> dict[str, list[float]]:
    """The FID and the losses at each checkpoint; of a Wasserstein critic the estimate in place of D's loss."""
    trainer, real = vector_gan(digits(), loss, **SETTINGS[loss]), digits()
    extractor = metrics.trained("digits")
    target = extractor(real.view(-1, 1, 8, 8)).features
    rows: dict[str, list[float]] = {"fid": [], "d": [], "g": []}
    for _ in range(CHECKPOINTS):
        steps = [trainer.step() for _ in range(EVERY)]
        fake = draw_samples(trainer, 1000)
        rows["fid"].append(metrics.frechet_distance(target, extractor(fake.view(-1, 1, 8, 8)).features))
        rows["g"].append(sum(s.g_loss for s in steps) / EVERY)
        if loss == "wasserstein":
            rows["d"].append(metrics.wasserstein_estimate(trainer.discriminator, real, fake))
        else:
            rows["d"].append(sum(s.d_loss for s in steps) / EVERY)
    return rows


def compute() -> dict[str, Any]:
    stats = extras.load("scipy.stats", "a figure")
    runs = {loss: progress(loss) for loss in SETTINGS}

    def rank(loss: str, player: str) -> float:
        return float(stats.spearmanr(runs[loss][player], runs[loss]["fid"]).statistic)

    return {
        "w": rank("wasserstein", "d"),
        "ns_d": rank("non_saturating", "d"),
        "ns_g": rank("non_saturating", "g"),
        "first": runs["wasserstein"]["fid"][0],
        "last": runs["wasserstein"]["fid"][-1],
        "ns_last": runs["non_saturating"]["fid"][-1],
        "runs": runs,
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, axes = canvas(9, 2.9, columns=2)
    names = {"wasserstein": ("critic's estimate of W", ""), "non_saturating": ("D's loss", "G's loss")}
    for ax, (loss, run) in zip(axes, found["runs"].items()):
        steps = [EVERY * (i + 1) for i in range(CHECKPOINTS)]
        for i, (player, name) in enumerate(zip("dg", names[loss])):
            if name:
                ax.plot(steps, run[player], **line(i, True), label=name)
        beside = ax.twinx()
        beside.semilogy(steps, run["fid"], **line(3), label="FID (right)")
        beside.grid(False)
        ax.plot([], [], **line(3), label="FID (right)")
        ax.set(title=loss, xlabel="step")
        ax.legend()
    return figure
