"""WGAN-GP's gradient penalty for either set of layers: as people write it, and as gankern computes it."""

import torch
from torch import Tensor, nn

from gankern import penalties


def _handwritten(critic: nn.Module, real: Tensor, fake: Tensor, weight: float, alpha: Tensor) -> Tensor:
    points = torch.lerp(real, fake, alpha.view(-1, *(1 for _ in real.shape[1:]))).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return weight * (gradient.flatten(1).norm(dim=1) - 1.0).square().mean()


GRADIENT_PENALTIES = {"torch": _handwritten, "gankern": penalties.gradient_penalty}
