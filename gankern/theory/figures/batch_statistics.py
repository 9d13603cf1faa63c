"""What batch norm in a generator does to the samples of one batch, and virtual batch norm does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gankern.nn as gnn
from gankern import models
from gankern.theory.figures._figure import Figure, bar, canvas
from gankern.theory.figures._training import seeded

BATCHES, ANCHORS, SIZES = 64, 4, (8, 16, 32, 64)


def generator(norm: str) -> tuple[nn.Module, int]:
    """DCGAN's generator for 8 × 8 images, in training mode; and its latents' length."""
    with seeded(0):
        gan = models.dcgan(size=8, channels=1, latent=16, width=16, layers="gankern", generator_norm=norm)
        if norm == "virtual":
            gnn.set_reference_batch(gan.generator, torch.randn(64, 16))
    return gan.generator.train(), gan.latent


@torch.no_grad()
def shared(norm: str, size: int) -> float:
    """The mean correlation of what other samples do to two samples of one batch, less that of two batches.

    Four latents stay, the others of the batch are new each time. What changes in the four images then comes from the
    others; between images of one batch, and of different batches.
    """
    network, latent = generator(norm)
    random = torch.Generator().manual_seed(1)
    stay = torch.randn(ANCHORS, latent, generator=random)
    images = torch.stack(
        [
            network(torch.cat([stay, torch.randn(size - ANCHORS, latent, generator=random)]))[:ANCHORS]
            for _ in range(BATCHES)
        ]
    ).flatten(2)  # [batches, anchors, pixels]
    moved = images.double() - images.double().mean(0)
    if not bool((images == images[:1]).all()):
        moved = moved / moved.square().mean((0, 2), keepdim=True).sqrt()
    within = _mean_product(moved, moved)
    across = _mean_product(moved, moved.roll(1, 0))
    return within - across


def _mean_product(a: Tensor, b: Tensor) -> float:
    """The mean over pixels and batches of the products of different samples."""
    products = torch.einsum("bip,bjp->ij", a, b) / (a.shape[0] * a.shape[2])
    return (products.sum() - products.trace()).item() / (ANCHORS * (ANCHORS - 1))


@torch.no_grad()
def moved(norm: str, size: int = 16) -> Tensor:
    """One latent's images in several batches [5, 8, 8]."""
    network, latent = generator(norm)
    random = torch.Generator().manual_seed(1)
    stay = torch.randn(1, latent, generator=random)
    images = [network(torch.cat([stay, torch.randn(size - 1, latent, generator=random)]))[0, 0] for _ in range(5)]
    return torch.stack(images)


def compute() -> dict[str, Any]:
    correlation = {norm: [shared(norm, size) for size in SIZES] for norm in ("batch", "virtual")}
    pictures = {norm: moved(norm) for norm in ("batch", "virtual")}
    change = {norm: (p - p[:1]).abs().max().item() for norm, p in pictures.items()}
    return {
        "batch": correlation["batch"][1],
        "virtual": max(map(abs, correlation["virtual"])),
        "batch_change": change["batch"],
        "virtual_change": change["virtual"],
        "correlation": correlation,
        "pictures": pictures,
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, axes = canvas(9.5, 2.6, columns=3, width_ratios=(1, 1.2, 1.2))
    first, *others = axes
    for i, (norm, values) in enumerate(found["correlation"].items()):
        first.bar([j + 0.4 * i - 0.2 for j in range(len(SIZES))], values, 0.4, **bar(i), label=f"{norm} norm")
    first.set(
        xticks=range(len(SIZES)), xticklabels=SIZES, xlabel="batch", title="correlation by the batch", ylim=(0, 0.8)
    )
    first.legend()
    for ax, (norm, images) in zip(others, found["pictures"].items()):
        ax.imshow(torch.cat([*images], 1), cmap="gray")
        ax.set(title=f"one latent in five batches, {norm} norm")
        ax.axis("off")
    return figure
