"""Estimating a density, and learning to sample."""

from __future__ import annotations

from typing import Any

import torch

from gankern.metrics import earth_movers_distance
from gankern.theory.figures._figure import FIELD, Figure, canvas
from gankern.theory.figures._training import draw_samples, vector_gan
from gankern.theory.mixtures import GaussianMixture, fit_mixture

TRUE = GaussianMixture(
    torch.tensor([[1.0, 2.0], [-3.0, -5.0]]),
    torch.stack([torch.diag(torch.tensor([2.0, 0.5])), torch.eye(2)]),
    torch.tensor([0.5, 0.5]),
)
STEPS, SCALE = 600, 3.0


def compute() -> dict[str, Any]:
    draws, fresh = TRUE.sample(1000, seed=0), TRUE.sample(1000, seed=1)
    fitted = fit_mixture(draws, 2)
    error = (fitted.means - TRUE.means.flip(0)).abs().max().item()  # they come in order

    small = (draws / SCALE).float()
    trainer = vector_gan(small, "wasserstein", gradient_penalty=0.1, n_critic=3, latent=2, width=64, batch_size=128)
    for _ in range(STEPS):
        trainer.step()
    samples = draw_samples(trainer, 1000).double() * SCALE
    return {
        "error": error,
        "likelihood": fitted.log_density(fresh).mean().item(),
        "best_likelihood": TRUE.log_density(fresh).mean().item(),
        "mixture_distance": earth_movers_distance(fresh, fitted.sample(1000, seed=2)),
        "gan_distance": earth_movers_distance(fresh, samples),
        "noise": earth_movers_distance(fresh, TRUE.sample(1000, seed=3)),
        "fitted": fitted,
        "draws": draws,
        "samples": samples,
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, axes = canvas(9, 3, columns=3, sharex=True, sharey=True)
    x, y = torch.linspace(-7, 6, 90, dtype=torch.float64), torch.linspace(-9, 5, 90, dtype=torch.float64)
    grid = torch.cartesian_prod(x, y)
    for ax, mixture, points, title in (
        (axes[0], TRUE, found["draws"], "p(x), and 1,000 draws"),
        (axes[1], found["fitted"], None, "p(x) as EM finds it"),
        (axes[2], None, found["samples"], "a GAN's samples: no p(x)"),
    ):
        if mixture is not None:
            density = mixture.log_density(grid).exp().view(90, 90).T
            ax.contour(x, y, density, levels=7, cmap=FIELD, linewidths=1.2)
        if points is not None:
            ax.plot(*points[:1000].T, ".", color="#444444", markersize=1.5)
        ax.set(title=title, aspect="equal", xlim=(-7, 6), ylim=(-9, 5))
    return figure
