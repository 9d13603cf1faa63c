"""Whether the generator's loss explains that samples are sharp."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from gankern import metrics
from gankern.losses import LOSSES, mean_logit_generator
from gankern.theory.figures._figure import Figure, bar, canvas, table
from gankern.theory.figures._training import digits, draw_samples, vector_gan

SEEDS, STEPS = (0, 1, 2), 400
# With the best discriminator the logit is log p − log q, so −E d is KL(q ‖ p), and −½·E eᵈ has KL(p ‖ q)'s gradient.
GENERATORS = {
    "maximum likelihood": LOSSES["maximum_likelihood"].generator,
    "non-saturating": LOSSES["non_saturating"].generator,
    "reverse KL": mean_logit_generator,
}


def energy(images: Tensor) -> float:
    """Mean square of what a blur by half takes away: the finest band of a Laplacian pyramid."""
    finest = metrics.laplacian_pyramid(images.view(-1, 1, 8, 8), 2)[0]
    return finest.square().mean().item()


def compute() -> dict[str, Any]:
    real = digits()
    extractor = metrics.trained("digits")
    target = extractor(real.view(-1, 1, 8, 8)).features
    energies: dict[str, list[float]] = {}
    distances: dict[str, list[float]] = {}
    samples: dict[str, Tensor] = {}
    for name, generator in GENERATORS.items():
        for seed in SEEDS:
            trainer = vector_gan(real, "non_saturating", seed, gradient_penalty=1.0)
            game: Any = trainer.game
            game.loss = replace(game.loss, generator=generator)
            for _ in range(STEPS):
                trainer.step()
            fake = draw_samples(trainer, 1000).clamp(-1, 1)
            energies.setdefault(name, []).append(energy(fake) / energy(real))
            features = extractor(fake.view(-1, 1, 8, 8)).features
            distances.setdefault(name, []).append(metrics.frechet_distance(target, features))
            samples.setdefault(name, fake[:16])
    rows = [
        (name, f"{min(energies[name]):.2f} to {max(energies[name]):.2f}", f"{min(d):.1f} to {max(d):.1f}")
        for name, d in distances.items()
    ]
    means = [sum(values) / len(SEEDS) for values in energies.values()]
    return {
        "between": max(means) - min(means),
        "within": max(max(values) - min(values) for values in energies.values()),
        "seeds": len(SEEDS),
        "steps": STEPS,
        "table": table(("generator's loss", "finest band / real", "FID"), rows),
        "energies": energies,
        "samples": samples,
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, axes = canvas(9.5, 2.7, columns=4, width_ratios=(1.5, 1, 1, 1))
    first, *others = axes
    for i, (name, values) in enumerate(found["energies"].items()):
        first.bar([i + 0.25 * j - 0.25 for j in range(len(values))], values, 0.25, **bar(i), label=name)
    first.axhline(1.0, color="black", linestyle="--", linewidth=1)
    first.set(xticks=[], title="finest band, generated / real (three seeds)", ylim=(0, 2.4))
    first.legend(loc="upper left")
    for ax, (name, images) in zip(others, found["samples"].items()):
        tiles = images.view(4, 4, 8, 8).permute(0, 2, 1, 3).reshape(32, 32)
        ax.imshow(tiles, cmap="gray", vmin=-1, vmax=1)
        ax.set(title=name)
        ax.axis("off")
    return figure
