"""Penalties on a critic's gradients, each one call: a scalar to add to the loss.

>>> import torch, gankern.penalties as penalties
>>> critic = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 2, 1), torch.nn.LeakyReLU(0.2), torch.nn.Conv2d(8, 1, 4))
>>> real, fake = torch.randn(2, 4, 3, 8, 8)
>>> loss = critic(fake).mean() - critic(real).mean()
>>> loss = loss + penalties.gradient_penalty(critic, real, fake)
>>> loss.backward()

Each penalty is a function, and an object that remembers its options. Penalty and gradients are computed when it is
called, and handed out in the loss's backward; see docs/gradient_penalty.md for the cost and the methods.
"""

from gankern.penalties._common import NotCovered
from gankern.penalties._functions import (
    dragan,
    drift,
    gradient_penalty,
    interpolate_samples,
    lipschitz,
    r1_penalty,
    r2_penalty,
    zero_centered,
)
from gankern.penalties._objects import (
    Dragan,
    Drift,
    GradientPenalty,
    Lipschitz,
    Penalty,
    R1Penalty,
    R2Penalty,
    ZeroCentered,
)
from gankern.penalties._path import PathLength, path_length
from gankern.penalties._step import CriticStep, critic_step

__all__ = [
    "CriticStep",
    "Dragan",
    "Drift",
    "GradientPenalty",
    "Lipschitz",
    "NotCovered",
    "PathLength",
    "Penalty",
    "R1Penalty",
    "R2Penalty",
    "ZeroCentered",
    "critic_step",
    "dragan",
    "drift",
    "gradient_penalty",
    "interpolate_samples",
    "lipschitz",
    "path_length",
    "r1_penalty",
    "r2_penalty",
    "zero_centered",
]
