"""Two distributions that never meet: exact distances, and what trained networks make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gankern import losses
from gankern.theory.densities import jensen_shannon, kullback_leibler
from gankern.theory.figures._figure import Figure, canvas, line, table
from gankern.theory.figures._training import mlp, seeded, train_critic
from gankern.theory.transport import optimal_plan

SHIFTS = (-1.0, -0.5, 0.5, 1.0)
GRID = torch.linspace(-1.25, 1.25, 11, dtype=torch.float64)


def segment(theta: float, number: int, random: torch.Generator) -> Tensor:
    """Points (θ, y), y ~ U(0, 1)."""
    return torch.stack([torch.full((number,), theta), torch.rand(number, generator=random)], 1)


def exact(theta: float) -> tuple[float, float, float]:
    """KL, JS and W of the segments at 0 and at θ, each of 8 equal points: the places that both have are one."""
    y = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    real = torch.stack([torch.zeros(8, dtype=torch.float64), y], 1)
    fake = torch.stack([torch.full((8,), theta, dtype=torch.float64), y], 1)
    places = torch.cat([real, fake]).unique(dim=0)
    p, q = (((places[:, None] == points).all(2)).any(1).double() / 8 for points in (real, fake))
    equal = torch.full((8,), 1 / 8)
    return kullback_leibler(p, q), jensen_shannon(p, q), optimal_plan(torch.cdist(real, fake), equal, equal).cost


def trained(theta: float) -> dict[str, float]:
    """A discriminator by cross entropy and a critic with a penalty, both against segments that stand still."""
    with seeded(1):
        discriminator, critic = mlp(2, 64, 64, 1), mlp(2, 64, 64, 1)
    samples = (lambda n, r: segment(0.0, n, r)), (lambda n, r: segment(theta, n, r))
    train_critic(discriminator, *samples, steps=400, loss=losses.cross_entropy_discriminator, lr=1e-2)
    train_critic(critic, *samples, steps=300, penalty=10.0, lr=5e-3)
    random = torch.Generator().manual_seed(7)
    real, fake = (sample(1000, random) for sample in samples)
    fake.requires_grad_()
    d_real, d_fake = discriminator(real), discriminator(fake)
    (to_generator,) = torch.autograd.grad(losses.minimax_generator(d_fake) * len(fake), fake)
    w_fake = critic(fake)
    (by_critic,) = torch.autograd.grad(losses.mean_logit_generator(w_fake) * len(fake), fake)
    return {
        "accuracy": 0.5 * ((d_real > 0).double().mean() + (d_fake < 0).double().mean()).item(),
        "loss": losses.cross_entropy_discriminator(d_real, d_fake).item(),
        "gradient": to_generator.norm(dim=1).mean().item(),
        "estimate": (critic(real).mean() - w_fake.mean()).item(),
        "critic_gradient": by_critic.norm(dim=1).mean().item(),
    }


def compute() -> dict[str, Any]:
    fits = {theta: trained(theta) for theta in SHIFTS}
    rows = [
        (
            f"{t:g}",
            f"{f['accuracy']:.3f}",
            f"{f['loss']:.1e}",
            f"{f['gradient']:.1e}",
            f"{f['estimate']:.3f}",
            f"{f['critic_gradient']:.2f}",
        )
        for t, f in fits.items()
    ]
    head = ("θ", "D's accuracy", "D's loss", "gradient, minimax", "critic's estimate of W", "gradient, critic")
    kl, js, w = exact(0.5)
    return {
        "kl": kl,
        "js": js,
        "w": w,
        "at_zero": max(exact(0.0)),
        "exact": [exact(t) for t in GRID.tolist()],
        "fits": fits,
        "table": table(head, rows),
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, (first, second, third) = canvas(9, 3, columns=3)
    random = torch.Generator().manual_seed(0)
    for i, (theta, label) in enumerate(((0.0, "data, x = 0"), (0.5, "generator, x = θ"))):
        x, y = segment(theta, 60, random).T
        first.plot(x, y, linestyle="", marker="ox"[i], color=("#111111", "#c14a00")[i], markersize=4, label=label)
    first.set(xlim=(-0.6, 1.1), ylim=(-0.1, 1.45), xlabel="x", ylabel="y", title="two segments at θ = 0.5")
    _, js, w = zip(*found["exact"])
    second.axhline(1.3, **line(0), label="KL = ∞ (0 at θ = 0), off the scale")
    apart = [value if value else float("nan") for value in js]
    second.plot(GRID, apart, **line(2, True), label="JS = log 2 (0 at θ = 0)")
    second.plot(0, 0, **line(2, True))
    second.plot(GRID, w, **line(1, True), label="W = |θ|")
    second.set(ylim=(0, 2.2), xlabel="θ", title="exact distances")
    fits = found["fits"]
    estimates, losses_ = ([f[k] for f in fits.values()] for k in ("estimate", "loss"))
    third.plot(list(fits), estimates, **line(1, True), label="critic with a penalty")
    third.plot(list(fits), losses_, **line(2, True), label="loss of D, cross entropy")
    third.plot(list(fits), [f["gradient"] for f in fits.values()], **line(3, True), label="gradient, minimax")
    third.set(ylim=(-0.1, 2.0), xlabel="θ", title="trained networks")
    for axes in (first, second, third):
        axes.legend(loc="upper center")
    return figure
