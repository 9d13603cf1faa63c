"""The optimal discriminator, the value of the game, and the divergences that it stands for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.core.arguments import floats
from gankern.core.names import look_up
from gankern.losses import LOSSES
from gankern.theory._checks import distribution, numbers, same_shape


def _pair(function: str, p: Tensor, q: Tensor, dx: float) -> tuple[Tensor, Tensor]:
    same_shape(function, p=numbers(function, "p", p), q=numbers(function, "q", q))
    return distribution(function, "p", p, dx), distribution(function, "q", q, dx)


def _densities(function: str, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Two densities at the same points, of any mass."""
    p, q = numbers(function, "p", p), numbers(function, "q", q)
    same_shape(function, p=p, q=q)
    for name, values in (("p", p), ("q", q)):
        if bool((values < 0).any()):
            raise ValueError(f"{function}: {name} must not be negative, got {values.min().item():g}")
    return p, q


def optimal_discriminator(p: Tensor, q: Tensor) -> Tensor:
    """D*(x) = p(x) / (p(x) + q(x)), which maximises E_p log D + E_q log(1 − D) point by point.

    Source: Goodfellow 2014, arXiv 1406.2661, proposition 1.

    Args:
        p, q: densities of the data and of the generator at the same points, any one shape, not negative; they need not
            have the mass 1, since only their ratio counts.

    Returns:
        fp64, p's shape, in [0, 1]; NaN where both are 0: no sample ever asks there, so any value is optimal.

    Raises:
        TypeError, ValueError: p or q is no tensor of finite numbers of at least 0, or the shapes differ.

    >>> optimal_discriminator(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 0.0]))
    tensor([0.5000, 0.0000, 1.0000], dtype=torch.float64)
    """
    p, q = _densities("optimal_discriminator", p, q)
    larger = torch.maximum(p, q)  # keeps the ratio where both are near the least number that there is
    p, q = p / larger, q / larger
    return p / (p + q)


def optimal_logit(p: Tensor, q: Tensor) -> Tensor:
    """d*(x) = log p(x) − log q(x), the logit of :func:`optimal_discriminator`: D* = σ(d*).

    A logit still tells apart what a probability has rounded to 0 or 1.

    Args and errors: those of :func:`optimal_discriminator`.

    Returns:
        fp64, p's shape; ±∞ where only one of the densities is 0, NaN where both are.

    >>> optimal_logit(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.0]))
    tensor([0., inf], dtype=torch.float64)
    """
    p, q = _densities("optimal_logit", p, q)
    return p.log() - q.log()


def game_value(p: Tensor, q: Tensor, logits: Tensor | None = None, dx: float = 1.0) -> float:
    """V(D, G) = E_p log D + E_q log(1 − D), D = σ(logits); without ``logits`` its largest value, 2·JS(p, q) − log 4.

    Source: Goodfellow 2014, arXiv 1406.2661, equation 1 and theorem 1.

    Args:
        p, q: densities on a grid, or probabilities; one shape, mass 1.
        logits: the discriminator's at the same points, ±∞ among them; None is the optimal one's.
        dx: width of a cell of the grid; 1 for probabilities.

    Returns:
        nats; −inf where D is 0 at a point of the data, or 1 at a generated one.

    Raises:
        TypeError, ValueError: a mass is not 1 (to 1e-5), a logit is NaN where there is mass, or the shapes differ.

    >>> p = torch.tensor([0.5, 0.5])
    >>> round(game_value(p, p), 6), round(game_value(p, p, torch.zeros(2)), 6)  # −log 4
    (-1.386294, -1.386294)
    """
    a, b = _pair("game_value", p, q, dx)
    if logits is None:
        return 2.0 * jensen_shannon(p, q, dx) - math.log(4.0)
    d = floats("game_value: logits", logits).detach().to("cpu", torch.float64)
    same_shape("game_value", p=a, logits=d)
    there = a + b > 0
    if bool(d[there].isnan().any()):
        raise ValueError("game_value: logits are NaN where there is mass")
    real, fake = a > 0, b > 0  # elsewhere 0·log 0 = 0
    value = (a[real] * F.logsigmoid(d[real])).sum() + (b[fake] * F.logsigmoid(-d[fake])).sum()
    return value.item() * dx


def kullback_leibler(p: Tensor, q: Tensor, dx: float = 1.0) -> float:
    """KL(p ‖ q) = E_p log(p/q), in nats: what maximum likelihood minimises, with p the data and q the model.

    ``kullback_leibler(q, p)`` is the other direction. Infinite where p has mass and q has none.

    Args:
        p, q: densities on a grid, or probabilities; one shape, mass 1.
        dx: width of a cell of the grid; 1 for probabilities.

    Raises:
        TypeError, ValueError: a mass is not 1 (to 1e-5), a value is negative or not finite, or the shapes differ.

    >>> kullback_leibler(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
    inf
    """
    a, b = _pair("kullback_leibler", p, q, dx)
    return max(0.0, _kl(a, b, dx))


def _kl(p: Tensor, q: Tensor, dx: float) -> float:
    """Σ p·(log p − log q)·dx, 0 where p is 0. Of two logarithms: p/q itself may be more than there are numbers."""
    there = p > 0
    return ((p[there] * (p[there].log() - q[there].log())).sum() * dx).item()


def jensen_shannon(p: Tensor, q: Tensor, dx: float = 1.0) -> float:
    """JS(p, q) = ½·KL(p ‖ m) + ½·KL(q ‖ m), m = (p + q)/2; between 0 and log 2, which it is when p and q never meet.

    Source: Lin 1991; Goodfellow 2014, arXiv 1406.2661, theorem 1, for what it is to a GAN.

    Arguments and errors: :func:`kullback_leibler`'s.

    >>> round(jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])), 6)  # log 2
    0.693147
    """
    a, b = _pair("jensen_shannon", p, q, dx)
    # log(p/m) = log 2 + log(p/(p + q)): the halves stay exact where p or q is tiny.
    middle = 0.5 * a + 0.5 * b
    return max(0.0, 0.5 * _kl(a, middle, dx) + 0.5 * _kl(b, middle, dx))


def total_variation(p: Tensor, q: Tensor, dx: float = 1.0) -> float:
    """TV(p, q) = ½·∫|p − q|: the largest difference of the probabilities that p and q give one event; 0 to 1.

    Half of what the best classifier's accuracy is above chance comes from it: accuracy = ½ + TV/2.

    Arguments and errors: :func:`kullback_leibler`'s.

    >>> total_variation(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
    0.5
    """
    a, b = _pair("total_variation", p, q, dx)
    return (0.5 * (a - b).abs().sum() * dx).item()


def generator_slopes(loss: str, logits: Tensor) -> Tensor:
    """∂L_G/∂d at each logit d of a generated sample: how hard that sample is pushed.

    minimax −σ(d); non_saturating −σ(−d); maximum_likelihood −½·eᵈ; least_squares d − 1; wasserstein and hinge −1.
    Computed by autograd from :mod:`gankern.losses`, as training would.

    Source: Goodfellow 2016, arXiv 1701.00160, §3.2.

    Args:
        loss: a name in ``gankern.losses.LOSSES``.
        logits: any shape, floating point.

    Returns:
        the logits' shape and dtype.

    Raises:
        ValueError: there is no loss of that name. TypeError: logits are no floating-point tensor.

    >>> generator_slopes("minimax", torch.tensor([0.0]))
    tensor([-0.5000])
    """
    found = look_up(LOSSES, loss, "loss")
    d = floats("generator_slopes: logits", logits).detach().requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(found.generator(d) * d.numel(), d)  # a loss is a mean
    return slopes
