"""Value surfaces of critics whose weights are clipped, and of critics under a gradient penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gankern.data import POINTS
from gankern.theory.figures._figure import FIELD, Figure, canvas
from gankern.theory.figures._training import Sample, mlp, seeded, train_critic

SETS = ("8gaussians", "25gaussians", "swiss_roll")
SIDE, REACH, STEPS = 61, 2.2, 800


def plane() -> Tensor:
    """The points of a grid [SIDE², 2] over the picture."""
    axis = torch.linspace(-REACH, REACH, SIDE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def noisy(sample: Sample) -> Sample:
    """A generator that stands still at the data plus N(0, I) (Gulrajani 2017, §3)."""
    return lambda n, random: sample(n, random) + torch.randn(n, 2, generator=random)


def slopes(critic: nn.Module, real: Tensor, fake: Tensor, random: torch.Generator) -> Tensor:
    """‖∇f‖ at points drawn between the real and the generated ones, where the penalty asks."""
    points = torch.lerp(real, fake, torch.rand(len(real), 1, generator=random)).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(points).sum(), points)
    return gradient.norm(dim=1)


def compute() -> dict[str, Any]:
    found: dict[str, Any] = {"surfaces": {}}
    grid = plane()
    for name in SETS:
        sample = POINTS[name].sample
        for kind in ("clipped", "penalty"):
            with seeded(3):
                critic = mlp(2, 64, 64, 64, 1)
            options: dict[str, Any] = {"clip": 0.1} if kind == "clipped" else {"penalty": 1.0}
            train_critic(critic, sample, noisy(sample), STEPS, lr=2e-3, batch=256, **options)
            random = torch.Generator().manual_seed(5)
            real, fake = sample(2000, random), noisy(sample)(2000, random)
            norms = slopes(critic, real, fake, random)
            with torch.no_grad():
                surface = critic(grid).view(SIDE, SIDE)
                between = critic(real).mean() - critic(fake).mean()
            found[f"{kind}_slope_{name}"] = norms.mean().item()
            found[f"{kind}_spread_{name}"] = norms.std().item()
            found[f"{kind}_estimate_{name}"] = between.item()
            found["surfaces"][kind, name] = surface
            if name == "8gaussians":
                found[f"{kind}_tops"] = tops(critic)
    with seeded(3):
        critic = mlp(2, 64, 64, 64, 1)
    sample = POINTS["8gaussians"].sample
    train_critic(critic, sample, noisy(sample), STEPS // 2, penalty=10.0, lr=2e-3, batch=256)
    random = torch.Generator().manual_seed(5)
    found["strict_slope"] = slopes(critic, sample(2000, random), noisy(sample)(2000, random), random).mean().item()
    return found


@torch.no_grad()
def tops(critic: nn.Module) -> int:
    """At how many of the eight modes the critic is higher than half way to either neighbour, on the circle."""
    angle = torch.arange(16) * (torch.pi / 8)
    around = critic(2.0 / 1.414 * torch.stack([angle.cos(), angle.sin()], 1))[:, 0]
    modes, between = around[::2], around[1::2]
    return int(((modes > between) & (modes > between.roll(1))).sum())


def draw(found: dict[str, Any]) -> Figure:
    figure, axes = canvas(9, 5.6, rows=2, columns=3, sharex=True, sharey=True)
    random = torch.Generator().manual_seed(0)
    ticks = torch.linspace(-REACH, REACH, SIDE)
    for ax, ((kind, name), surface) in zip(
        axes, sorted(found["surfaces"].items(), key=lambda item: (item[0][0], SETS.index(item[0][1])))
    ):
        ax.contourf(ticks, ticks, surface, levels=12, cmap=FIELD)
        ax.contour(ticks, ticks, surface, levels=12, colors="black", linewidths=0.4)
        x, y = POINTS[name].sample(300, random).T
        ax.plot(x, y, ".", color="white", markeredgecolor="black", markeredgewidth=0.3, markersize=3)
        ax.set(title=f"{name}, {'clipped at 0.1' if kind == 'clipped' else 'gradient penalty'}", aspect="equal")
        ax.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH))
        ax.grid(False)
    return figure
