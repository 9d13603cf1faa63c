"""What the discriminator minimises, on either set of layers: as people write it, and as gankern computes it."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gankern import penalties
from gankern.core.torch_internals import autocasting
from gankern.losses import AdversarialLoss


@dataclass(frozen=True)
class Objective:
    """The adversarial loss, and the weights of WGAN-GP's gradient penalty and of the drift; 0 is without."""

    loss: AdversarialLoss
    gradient_penalty: float = 0.0
    drift: float = 0.0


def by_hand(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor,
    alpha: Tensor | None,
    labels: tuple[Tensor, ...],
    objective: Objective,
) -> Tensor:
    """The published formulas, one after the other."""
    penalty = 0.0
    if objective.gradient_penalty:  # first, so that its graph is gone before the next one is made
        assert alpha is not None  # drawn for it
        points = torch.lerp(real, fake, alpha.view(-1, *(1 for _ in real.shape[1:]))).requires_grad_()
        # Nothing scales these gradients: in half precision the small ones would be gone.
        with torch.autocast(real.device.type, enabled=False) if _half(real) else nullcontext():
            (gradient,) = torch.autograd.grad(critic(points, *labels).sum(), points, create_graph=True)
            norms = gradient.flatten(1).norm(dim=1)
            penalty = objective.gradient_penalty * (norms - 1.0).square().mean()
    real_logits = critic(real, *labels)
    loss = objective.loss.discriminator(real_logits, critic(fake, *labels)) + penalty
    if objective.drift:
        loss = loss + objective.drift * real_logits.float().square().mean()
    return loss


def by_gankern(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor,
    alpha: Tensor | None,
    labels: tuple[Tensor, ...],
    objective: Objective,
) -> Tensor:
    """``penalties.critic_step``: the penalty without double backward, and one pass for D(real) and D(fake)."""
    penalty = None
    if objective.gradient_penalty:
        penalty = penalties.GradientPenalty(weight=objective.gradient_penalty, alpha=alpha)
    step = penalties.critic_step(
        critic,
        real,
        fake,
        loss=objective.loss.discriminator,
        penalty=penalty,
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
