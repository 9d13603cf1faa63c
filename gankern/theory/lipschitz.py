"""How steep a network can be: spectral norms, their power iteration, and the slope that is really there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gankern.core.arguments import floats, shown, whole
from gankern.core.arguments import seed as check_seed
from gankern.core.evaluation import evaluating
from gankern.theory._checks import numbers


@dataclass(frozen=True)
class PowerIteration:
    """After each of K iterations: ``sigma`` [K], the estimate of σ₁, and ``tangent`` [K], that of the angle of v to v₁.

    ``singular_values`` are the exact ones, in falling order.
    """

    sigma: Tensor
    tangent: Tensor
    singular_values: Tensor


def power_iteration(weight: Tensor, steps: int = 10, *, start: Tensor | None = None, seed: int = 0) -> PowerIteration:
    """u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖, σ ≈ ‖Wv‖, the iteration of spectral norm (Miyato 2018, arXiv 1802.05957).

    With start v = Σ aᵢvᵢ each step multiplies aᵢ by σᵢ²: the tangent of the angle between v and v₁ falls by (σ₂/σ₁)² a
    step at least, and the relative error of σ is at most half its square.

    Args:
        weight: [M, N].
        steps: how many.
        start: v, [N]; None draws it from N(0, I) with ``seed``.

    Returns:
        a :class:`PowerIteration`, fp64.

    Raises:
        TypeError, ValueError: weight is no matrix of finite numbers or is zero, start is not [N] or is zero.

    >>> found = power_iteration(torch.diag(torch.tensor([2.0, 1.0])), 3, start=torch.tensor([1.0, 1.0]))
    >>> found.tangent.tolist()  # a quarter each step
    [0.25, 0.0625, 0.015625]
    """
    w = numbers("power_iteration", "weight", weight, 2)
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    if sigma[0] == 0:
        raise ValueError("power_iteration: weight is zero: it has no direction of largest gain")
    if start is None:
        random = torch.Generator().manual_seed(check_seed("power_iteration: seed", seed))
        v = torch.randn(w.shape[1], generator=random, dtype=torch.float64)
    else:
        v = numbers("power_iteration", "start", start, 1)
        if v.shape != (w.shape[1],) or not bool((v != 0).any()):
            raise ValueError(f"power_iteration: start must be [{w.shape[1]}] and not zero, got {shown(start)}")
    estimates, tangents = [], []
    for _ in range(whole("power_iteration: steps", steps, least=1)):
        u = w @ v
        if u.norm() == 0:
            raise ValueError("power_iteration: weight takes start to zero")
        v = w.T @ (u / u.norm())
        v = v / v.norm()
        estimates.append((w @ v).norm())
        along = vh[0] @ v
        tangents.append((v - along * vh[0]).norm() / along.abs())
    return PowerIteration(torch.stack(estimates), torch.stack(tangents), sigma)


def lipschitz_bound(network: nn.Module) -> float:
    """The product of the largest singular values of the linear layers: with 1-Lipschitz activations between them, no
    chain of them is steeper (Miyato 2018, §2.1).

    Args:
        network: a chain of ``nn.Linear`` and activations that are 1-Lipschitz (ReLU, LeakyReLU, tanh, ...). Its weights
            are taken as a forward pass in evaluation mode would use them.

    Raises:
        TypeError: it has a layer with weights that is not linear: the product would mean nothing. ValueError: it has no
        linear layer.

    >>> lipschitz_bound(nn.Sequential(nn.Linear(1, 1), nn.ReLU())) > 0
    True
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"lipschitz_bound: network must be a module, got {shown(network)}")
    bound, found = 1.0, False
    with evaluating(network):  # spectral norm moves on in training mode, wherever its weight is looked at
        for name, module in network.named_modules(remove_duplicate=False):  # a layer that comes twice counts twice
            if "parametrizations" in name.split("."):  # what a weight is made of, as it is used is looked at
                continue
            if isinstance(module, nn.Linear):
                bound *= torch.linalg.matrix_norm(module.weight.detach().double(), 2).item()
                found = True
            elif next(module.parameters(recurse=False), None) is not None:
                raise TypeError(f"lipschitz_bound: network has a {type(module).__name__}; only linear layers are known")
    if not found:
        raise ValueError("lipschitz_bound: network has no linear layer")
    return bound


def steepest_slope(function: Callable[[Tensor], Tensor], points: Tensor) -> float:
    """max ‖∇f(x)‖ over the ``points`` [N, ...]: a lower bound of the Lipschitz constant of f.

    Args:
        function: [N, ...] → [N] or [N, 1], each value of its own row alone.
        points: floating point.

    Raises:
        TypeError, ValueError: points are no floating-point tensor or none, or function gave something else.

    >>> steepest_slope(lambda x: 3.0 * x[:, 0] + 4.0 * x[:, 1], torch.zeros(5, 2))
    5.0
    """
    if len(floats("steepest_slope: points", points)) == 0:
        raise ValueError("steepest_slope: there are no points")
    x = points.detach().requires_grad_()
    with torch.enable_grad():
        values = function(x)
        if not isinstance(values, Tensor) or values.numel() != len(points):
            raise ValueError(f"steepest_slope: function must give one number for each of {len(points)} points")
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return gradient.flatten(1).norm(dim=1).max().item()
