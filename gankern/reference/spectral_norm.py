"""Spectral norm in plain PyTorch: the definition that the kernels are held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gankern.reference._eps import plus_eps


def spectral_norm(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    dim: int,
    n_power_iterations: int,
    eps: float,
    u_first: bool,
    add_eps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (weight / sigma, u, v, sigma) with the u and v that the power iteration ends with.

    With M the weight as a matrix, ``dim`` first: one iteration is u <- n(Mv), v <- n(M^T u) where ``u_first``,
    else v <- n(M^T u), u <- n(Mv); sigma = u^T M v; n(x) = x / max(|x|, eps), or x / (|x| + eps) where ``add_eps``.
    u and v are constants for the gradient. Where sigma is 0 the result is 0.
    """
    matrix = weight.movedim(dim, 0).flatten(1)

    def normalize(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x)
        return x / (plus_eps(norm, eps) if add_eps else norm.clamp_min(eps))

    with torch.no_grad():
        constant = matrix.detach()  # of forward mode too
        u, v = u.to(matrix.dtype), v.to(matrix.dtype)
        for _ in range(n_power_iterations):
            if u_first:
                u = normalize(torch.mv(constant, v))
                v = normalize(torch.mv(constant.t(), u))
            else:
                v = normalize(torch.mv(constant.t(), u))
                u = normalize(torch.mv(constant, v))
        u, v = u.clone(), v.clone()

    sigma = torch.dot(u, torch.mv(matrix, v))
    # By infinity the gradients are zeros too, and sparse ones (an embedding's) are divided as they are.
    return weight / torch.where(sigma == 0, math.inf, sigma), u, v, sigma
