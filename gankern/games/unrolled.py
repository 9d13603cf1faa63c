"""Unrolled GAN: the generator sees where the discriminator is going (Metz 2016, arXiv 1611.02163).

V(G, D) = E softplus(-D(x)) + E softplus(D(G(z))) is what the discriminator minimises. His own rule, as a function,

    theta^0 = theta_D,    theta^(k+1) = theta^k - Adam of dV(theta_G, theta^k) / dtheta^k,    slots and all,

leads to theta^K, and the generator minimises -V(theta_G, theta^K(theta_G, theta_D)) through all K updates, while the
discriminator takes one ordinary step from theta^0. The gradient has two terms, the usual one and dV / dtheta^K times
dtheta^K / dtheta_G, which is what keeps the generator from running to the one point that the discriminator likes at
the moment. K = 0 is the usual GAN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gankern.games._game import Loss, Player, Run
from gankern.games._points import OnPoints
from gankern.models._record import Preset

TINY = 1e-30  # in the root of Adam's second moment, which has no derivative at 0


@dataclass
class Adam:
    """Adam's rule (Kingma & Ba 2015) as a function of weights and gradients that can be differentiated, from the slots
    that an optimiser has at the moment."""

    lr: float
    betas: tuple[float, float]
    eps: float
    step: list[Tensor]
    mean: list[Tensor]
    square: list[Tensor]

    @classmethod
    def of(cls, optimiser: torch.optim.Optimizer) -> Adam:
        (group,) = optimiser.param_groups
        slots = [optimiser.state.get(p) or _empty(p) for p in group["params"]]
        kept = ([slot[name] for slot in slots] for name in ("step", "exp_avg", "exp_avg_sq"))
        return cls(group["lr"], group["betas"], group["eps"], *kept)

    def __call__(self, weights: list[Tensor], gradients: tuple[Tensor, ...]) -> list[Tensor]:
        """The weights after a step; the slots are moved on."""
        first, second = self.betas
        self.step = [t.double() + 1 for t in self.step]  # 1 - 0.999^t has no digits to lose
        self.mean = [first * m + (1 - first) * g for m, g in zip(self.mean, gradients)]
        self.square = [second * v + (1 - second) * g * g for v, g in zip(self.square, gradients)]
        return [
            w - self.lr / (1 - first**t) * m / (((v + TINY) / (1 - second**t)).sqrt() + self.eps)
            for w, m, v, t in zip(weights, self.mean, self.square, self.step)
        ]


def _empty(parameter: Tensor) -> dict[str, Tensor]:
    zeros = torch.zeros_like(parameter, requires_grad=False)
    return {"step": torch.zeros((), device=parameter.device), "exp_avg": zeros, "exp_avg_sq": zeros}


def value(discriminator: nn.Module, weights: dict[str, Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """V, the discriminator's loss, with the weights (and buffers) that are given in place of his own."""
    of_real, of_fake = (functional_call(discriminator, weights, (x,)) for x in (real, fake))
    return F.softplus(-of_real).mean() + F.softplus(of_fake).mean()


def unrolled_value(discriminator: nn.Module, rule: Adam, real: Tensor, fake: Tensor, steps: int) -> Tensor:
    """V at the discriminator's weights ``steps`` steps on, as a function of ``fake`` through all of them.

    Nothing of his is changed: what a pass writes, running statistics or vectors of power iterations, goes into copies.
    """
    names = [name for name, _ in discriminator.named_parameters()]
    weights = [p.detach().requires_grad_() for p in discriminator.parameters()]
    buffers = {name: buffer.clone() for name, buffer in discriminator.named_buffers()}
    for _ in range(steps):
        now = value(discriminator, dict(zip(names, weights)) | buffers, real, fake)
        weights = rule(weights, torch.autograd.grad(now, weights, create_graph=True))
    return value(discriminator, dict(zip(names, weights)) | buffers, real, fake)


class Unrolled(OnPoints):
    """A generator that looks ahead."""

    own_loss: ClassVar[bool] = True
    preset = Preset(OnPoints.preset, steps=1500)  # of the 2,500 over which the rates fall: see docs/models/unrolled.md
    same_work = True

    @dataclass(frozen=True)
    class Options:
        unroll: int = 5  # K
        g_lr: float = 1e-2

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        if self.config.optimiser != "adam":
            raise ValueError(
                f"unrolled: the steps ahead are Adam's: optimiser must be adam, got {self.config.optimiser}"
            )
        if run.share[1] > 1:
            raise ValueError(f"unrolled: the steps ahead are of the whole batch, in one process; got {run.share[1]}")
        self.players = {
            "d": Player(("discriminator",), "discriminator"),
            "g": Player(("generator",), "generator", lr=self.options.g_lr),
        }

    def moves(self) -> Iterator[tuple[str, Loss]]:
        generator, discriminator = self.networks["generator"], self.networks["discriminator"]
        (real,), latents = self.run.batch(), self.run.normal(self.config.latent)
        with torch.no_grad():
            fake = generator(latents)
        yield "d", value(discriminator, {}, real, fake)

        rule = Adam.of(self.optimisers["d"])
        yield "g", -unrolled_value(discriminator, rule, real, generator(latents), self.options.unroll)
