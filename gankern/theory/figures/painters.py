"""Samples over time, and each last one beside its nearest training image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern.theory.figures._figure import Figure, canvas
from gankern.theory.figures._training import digits, draw_samples, vector_gan

AT = (0, 30, 100, 200, 400)
SHOWN = 10


def nearest(samples: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of each sample to its nearest training image, and that image's index."""
    return torch.cdist(samples, training, compute_mode="donot_use_mm_for_euclid_dist").min(1)


def compute() -> dict[str, Any]:
    images = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    training, held_out = images[order[:1297]], images[order[1297:]]
    trainer = vector_gan(training, "wasserstein", gradient_penalty=10.0, n_critic=3)
    times: list[Tensor] = []
    for step in range(max(AT) + 1):
        if step in AT:
            times.append(draw_samples(trainer, SHOWN))
        trainer.step()
    samples = draw_samples(trainer, len(held_out)).clamp(-1, 1)
    distance, index = nearest(samples, training)
    usual, _ = nearest(held_out, training)
    # The share of pairs (sample, held-out image) of which the sample is the nearer to training data.
    share = (distance[:, None] < usual).double().mean().item()
    return {
        "share": share,
        "distance": distance.median().item(),
        "usual": usual.median().item(),
        "held_out": len(held_out),
        "times": times,
        "pairs": torch.stack([samples[:SHOWN], training[index[:SHOWN]]]),
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, (left, right) = canvas(9, 2.4, columns=2, width_ratios=(1, 1))

    def tiles(rows: Any) -> Tensor:
        return torch.cat([torch.cat([*row.view(-1, 8, 8)], 1) for row in rows])

    left.imshow(tiles(found["times"]), cmap="gray", vmin=-1, vmax=1)
    left.set(
        title="ten latents over time", yticks=[8 * i + 4 for i in range(len(AT))], yticklabels=[f"step {a}" for a in AT]
    )
    right.imshow(tiles(found["pairs"]), cmap="gray", vmin=-1, vmax=1)
    right.set(title="samples, and their nearest training images", yticks=[4, 12], yticklabels=["sample", "nearest"])
    for ax in (left, right):
        ax.set(xticks=[])
        ax.grid(False)
    return figure
