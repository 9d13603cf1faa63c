"""What the discriminator minimises, on either set of layers: as people write it, and as gankern computes it."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gankern import penalties
from gankern.core.torch_internals import autocasting
from gankern.losses import AdversarialLoss

DRAGAN_NOISE = 0.5  # of the standard deviation of the real images


@dataclass(frozen=True)
class Objective:
    """The adversarial loss, and the weights of the penalties and of the drift; 0 is without.

    ``gradient_penalty``, ``zero_centered`` and ``dragan`` are λ mean (|∇D| - t)² with t 1, 0 and 1, between real and
    generated samples, the same, and between real and noisy ones; ``r1`` and ``r2`` are γ/2 mean |∇D|² at real and at
    generated samples.
    """

    loss: AdversarialLoss
    gradient_penalty: float = 0.0
    drift: float = 0.0
    zero_centered: float = 0.0
    dragan: float = 0.0
    r1: float = 0.0
    r2: float = 0.0

    def penalties(self) -> dict[str, float]:
        """The penalties' weights, by name."""
        names = ("gradient_penalty", "zero_centered", "dragan", "r1", "r2")
        return {name: weight for name in names if (weight := getattr(self, name))}

    def in_turn(self, step: int, every: int) -> "Objective":
        """The objective of a discriminator's step: penalties ``every`` so many steps, with so many times the weight."""
        factor = 0.0 if step % every else float(every)
        weights: dict[str, Any] = {name: factor * weight for name, weight in self.penalties().items()}
        return replace(self, **weights)

    def swapped(self) -> "Objective":
        """Real and generated samples with each other's labels."""
        loss = replace(self.loss, discriminator=lambda real, fake: self.loss.discriminator(fake, real))
        return replace(self, loss=loss)


Draws = Mapping[str, Tensor]  # "NAME_alpha" [N] of a penalty between two samples, and DRAGAN's "noise", as the samples


def by_hand(
    critic: nn.Module, real: Tensor, fake: Tensor, draws: Draws, labels: tuple[Tensor, ...], objective: Objective
) -> Tensor:
    """The published formulas, one after the other."""
    total: Tensor | float = 0.0
    for name, weight in objective.penalties().items():  # first, so that their graphs are gone before the next is made
        if name in ("r1", "r2"):
            points, weight, target = (real if name == "r1" else fake).detach(), weight / 2, 0.0
        else:
            end = real + draws["noise"] if name == "dragan" else fake
            points = torch.lerp(real, end, draws[f"{name}_alpha"].view(-1, *(1 for _ in real.shape[1:])))
            target = 0.0 if name == "zero_centered" else 1.0
        points.requires_grad_()
        # Nothing scales these gradients: in half precision the small ones would be gone.
        with torch.autocast(real.device.type, enabled=False) if _half(real) else nullcontext():
            (gradient,) = torch.autograd.grad(critic(points, *labels).sum(), points, create_graph=True)
            if target:
                size = (gradient.flatten(1).norm(dim=1) - target).square()
            else:
                size = gradient.flatten(1).square().sum(1)  # a norm has no derivative at 0
            total = total + weight * size.mean()
    real_logits = critic(real, *labels)
    loss = objective.loss.discriminator(real_logits, critic(fake, *labels)) + total
    if objective.drift:
        loss = loss + objective.drift * real_logits.float().square().mean()
    return loss


def by_gankern(
    critic: nn.Module, real: Tensor, fake: Tensor, draws: Draws, labels: tuple[Tensor, ...], objective: Objective
) -> Tensor:
    """``penalties.critic_step``: penalties without double backward, and one pass for D(real) and D(fake)."""

    def penalty(critic: nn.Module, real: Tensor, fake: Tensor, **conditions: Any) -> Tensor:
        parts = []
        for name, weight in objective.penalties().items():
            if name in ("r1", "r2"):
                function, samples = (penalties.r1_penalty, real) if name == "r1" else (penalties.r2_penalty, fake)
                parts.append(function(critic, samples, weight=weight, **conditions))
            else:
                end = real + draws["noise"] if name == "dragan" else fake
                target, alpha = 0.0 if name == "zero_centered" else 1.0, draws[f"{name}_alpha"]
                parts.append(
                    penalties.gradient_penalty(
                        critic, real, end, weight=weight, target=target, alpha=alpha, **conditions
                    )
                )
        return torch.stack(parts).sum()

    step = penalties.critic_step(
        critic,
        real,
        fake,
        loss=objective.loss.discriminator,
        penalty=penalty if objective.penalties() else None,
        drift_weight=objective.drift,
        joint=False if _counts_passes(critic) else None,
        critic_args=labels,
    )
    return step.loss


def _half(x: Tensor) -> bool:
    device = x.device.type
    return autocasting(device) and torch.get_autocast_dtype(device) == torch.float16


def _counts_passes(critic: nn.Module) -> bool:
    """Whether one pass over two batches would give other numbers than two passes: other random draws in dropout, one
    power iteration instead of two in spectral norm. The sides of a comparison must not differ in these."""
    return any(isinstance(module, nn.Dropout) or hasattr(module, "parametrizations") for module in critic.modules())


DISCRIMINATOR_LOSSES: dict[str, Callable[..., Tensor]] = {"torch": by_hand, "gankern": by_gankern}
