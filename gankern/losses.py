"""The losses of generative adversarial networks, from logits.

Every discriminator here ends in a *logit* d (a number on the whole line); where a paper speaks of a
probability it is D = σ(d). Computing log σ(d) from d, instead of log(σ(d)), is what keeps these losses finite
and their gradients alive when the discriminator is sure of itself: in fp32 log σ(−200) is −200, and
log(σ(−200)) is −inf.

Logits in half precision are taken to fp32 first, so every loss is an fp32 (or fp64) scalar.

An adversarial loss is a pair of functions, one for each player, found by name:

>>> loss = get("hinge")
>>> real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
>>> loss.discriminator(real, fake).item(), loss.generator(fake).item()
(0.75, 1.0)
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.core.arguments import floats, shown, tensor, whole
from gankern.core.arguments import real as real_number
from gankern.core.names import look_up


@dataclass(frozen=True)
class AdversarialLoss:
    """What the discriminator and what the generator minimise.

    ``discriminator(real, fake)`` and ``generator(fake)`` take logits of any shape and return a scalar.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def _wide(logits: Tensor, name: str = "fake") -> Tensor:
    """The argument ``name`` in fp32 at least. Of no logits at all the mean would be NaN: that is refused."""
    if floats(name, logits).numel() == 0:
        raise ValueError(f"{name} is empty, a tensor {tuple(logits.shape)}; a loss is the mean of at least one number")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


# ------------------------------------------------------------------------------------------------------------
# Cross entropy: one discriminator, three generators (Goodfellow 2014, arXiv 1406.2661; 2016, 1701.00160)


def cross_entropy_discriminator(real: Tensor, fake: Tensor, real_target: float = 1.0) -> Tensor:
    """−E[t·log D(x) + (1−t)·log(1−D(x))] − E[log(1−D(G(z)))], D = σ(logit).

    ``real_target`` t is 1 in Goodfellow 2014. One-sided label smoothing (Salimans 2016, arXiv 1606.03498,
    §3.4) is t = 0.9 with the fakes left at 0.

    >>> round(cross_entropy_discriminator(torch.zeros(4), torch.zeros(4)).item(), 4)  # 2·log 2
    1.3863
    """
    if not 0.0 < real_number("real_target", real_target) <= 1.0:
        raise ValueError(f"real_target is a probability in (0, 1], got {real_target}")
    real, fake = _wide(real, "real"), _wide(fake)
    # 1 − σ(d) = σ(−d), so every logarithm is a logsigmoid. (softplus would be the same, but torch's rounds to
    # the identity beyond 20, which is wrong in fp64.)
    loss = -real_target * F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()
    if real_target < 1.0:
        loss = loss - (1.0 - real_target) * F.logsigmoid(-real).mean()
    return loss


def minimax_generator(fake: Tensor) -> Tensor:
    """E[log(1 − D(G(z)))]: the zero-sum game. Its gradient vanishes when the discriminator wins.

    >>> round(minimax_generator(torch.zeros(4)).item(), 4)  # −log 2
    -0.6931
    """
    return F.logsigmoid(-_wide(fake)).mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """−E[log D(G(z))]: the same fixed point as minimax, and a strong gradient when the discriminator wins.

    >>> round(non_saturating_generator(torch.zeros(4)).item(), 4)  # log 2
    0.6931
    """
    return -F.logsigmoid(_wide(fake)).mean()


def maximum_likelihood_generator(fake: Tensor) -> Tensor:
    """−½·E[exp(σ⁻¹(D(G(z))))] = −½·E[exp(logit)]: maximum likelihood if D is optimal (arXiv 1412.6515).

    σ⁻¹(σ(d)) is d, so nothing is lost to rounding where D is near 0 or 1. The loss itself is exponential in the logit,
    and infinite in fp32 from a logit of 88.7 on.

    >>> maximum_likelihood_generator(torch.zeros(4)).item()
    -0.5
    """
    return -0.5 * _wide(fake).exp().mean()


# ------------------------------------------------------------------------------------------------------------
# Hinge (Lim & Ye 2017, arXiv 1705.02894; Miyato 2018), least squares (Mao 2017, arXiv 1611.04076) and
# Wasserstein (Arjovsky 2017, arXiv 1701.07875)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E[max(0, 1 − d(x))] + E[max(0, 1 + d(G(z)))].

    >>> hinge_discriminator(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])).item()
    0.75
    """
    return F.relu(1.0 - _wide(real, "real")).mean() + F.relu(1.0 + _wide(fake)).mean()


def least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """½·E[(d(x) − 1)²] + ½·E[d(G(z))²]: Mao's a = 0, b = c = 1.

    >>> least_squares_discriminator(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])).item()
    2.0
    """
    return 0.5 * (_wide(real, "real") - 1.0).square().mean() + 0.5 * _wide(fake).square().mean()


def least_squares_generator(fake: Tensor) -> Tensor:
    """½·E[(d(G(z)) − 1)²].

    >>> least_squares_generator(torch.tensor([1.0, 3.0])).item()
    1.0
    """
    return 0.5 * (_wide(fake) - 1.0).square().mean()


def wasserstein_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E[d(G(z))] − E[d(x)]: minus the estimate of the Wasserstein-1 distance, for a 1-Lipschitz d.

    >>> wasserstein_discriminator(torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 0.0])).item()
    -1.5
    """
    return _wide(fake).mean() - _wide(real, "real").mean()


def mean_logit_generator(fake: Tensor) -> Tensor:
    """−E[d(G(z))]: the generator of the hinge and of the Wasserstein loss.

    >>> mean_logit_generator(torch.tensor([-2.0, 1.0])).item()
    0.5
    """
    return -_wide(fake).mean()


LOSSES = {
    "minimax": AdversarialLoss(cross_entropy_discriminator, minimax_generator),
    "non_saturating": AdversarialLoss(cross_entropy_discriminator, non_saturating_generator),
    "maximum_likelihood": AdversarialLoss(cross_entropy_discriminator, maximum_likelihood_generator),
    "hinge": AdversarialLoss(hinge_discriminator, mean_logit_generator),
    "least_squares": AdversarialLoss(least_squares_discriminator, least_squares_generator),
    "wasserstein": AdversarialLoss(wasserstein_discriminator, mean_logit_generator),
}


def get(name: str, real_target: float = 1.0) -> AdversarialLoss:
    """The adversarial loss of that name; a ValueError with the nearest names if there is none.

    ``real_target`` below 1 is one-sided label smoothing, for the losses whose discriminator is the cross entropy.

    >>> loss = get("non_saturating", real_target=0.9)
    >>> round(loss.discriminator(torch.zeros(4), torch.zeros(4)).item(), 4)
    1.3863
    """
    loss = look_up(LOSSES, name, "loss")
    if real_number("real_target", real_target) == 1.0:
        return loss
    if loss.discriminator is not cross_entropy_discriminator:
        smoothed = [n for n, pair in LOSSES.items() if pair.discriminator is cross_entropy_discriminator]
        raise ValueError(
            f"the {name} loss has no labels to smooth (real_target={real_target}); {', '.join(smoothed)} have"
        )
    return replace(loss, discriminator=partial(cross_entropy_discriminator, real_target=real_target))


# ------------------------------------------------------------------------------------------------------------
# Terms that are added to, or steps that go with, an adversarial loss


def feature_matching(real: Tensor, fake: Tensor) -> Tensor:
    """‖E f(x) − E f(G(z))‖² (Salimans 2016, §3.1), f an intermediate layer of the discriminator.

    ``real`` and ``fake`` are [N, ...] and [M, ...]; the expectation is over the first dimension only. The
    real features are a target, so no gradient flows into them.

    >>> feature_matching(torch.ones(8, 3), torch.zeros(4, 3)).item()
    3.0
    """
    for name, features in (("real", real), ("fake", fake)):
        if floats(f"feature_matching: {name}", features).ndim == 0:
            raise ValueError(f"feature_matching: {name} must be [N, ...], got {shown(features)}")
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(
            f"feature_matching: real has features of shape {tuple(real.shape[1:])}, fake of shape "
            f"{tuple(fake.shape[1:])}; they must be of one layer"
        )
    return (_wide(real.detach(), "real").mean(0) - _wide(fake).mean(0)).square().sum()


class HistoricalAverage:
    """‖θ − (1/t)·Σᵢ θᵢ‖² over the parameters θ of one player (Salimans 2016, §3.3).

    Call it once a step: it takes the present θ into the average (i = 1..t, the present one included) and
    returns the penalty, whose gradient flows into θ and not into the average. ``update`` and ``penalty`` are the two
    halves of that, for a step whose batch goes through the networks in parts.

    >>> theta = torch.nn.Parameter(torch.tensor([1.0]))
    >>> average = HistoricalAverage([theta])
    >>> average().item()
    0.0
    >>> theta.data += 2.0
    >>> average().item()  # (3 − (1 + 3)/2)²
    1.0
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self.parameters = _parameters("HistoricalAverage", parameters)
        self.averages = [torch.zeros_like(p) for p in self.parameters]
        self.steps = 0

    def update(self) -> None:
        """Takes the present parameters into the average."""
        self.steps += 1
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            average.lerp_(parameter.detach(), 1.0 / self.steps)

    def penalty(self) -> Tensor:
        """The squared distance to the average as it is, a scalar."""
        pairs = zip(self.parameters, self.averages, strict=True)
        return torch.stack([(parameter - average).square().sum() for parameter, average in pairs]).sum()

    def __call__(self) -> Tensor:
        self.update()
        return self.penalty()

    def state_dict(self) -> dict:
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state: dict) -> None:
        steps, averages = whole("steps", state["steps"], least=0), state["averages"]
        shapes = [tuple(average.shape) for average in self.averages]
        if [tuple(tensor("an average", average).shape) for average in averages] != shapes:
            raise ValueError(f"the saved averages are of other parameters than these, whose shapes are {shapes}")
        self.steps = steps
        for average, saved in zip(self.averages, averages):
            average.copy_(saved)


def _parameters(function: str, parameters: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(parameters, Tensor | str) or not isinstance(parameters, Iterable):
        raise TypeError(f"{function}: parameters must be several tensors, got {shown(parameters)}")
    found = [floats(f"{function}: each of parameters", parameter) for parameter in parameters]
    if not found:
        raise ValueError(f"{function}: parameters is empty")
    return found


def orthogonal_penalty(weights: Iterable[Tensor], diagonal: bool = False) -> Tensor:
    r"""The sum over the weights W [outputs, ...] of :math:`\lVert W W^T \circ (1 - I) \rVert_F^2`, W as a matrix of
    a row for each output: rows are to be orthogonal, of whatever length (Brock 2018, arXiv 1809.11096, section 3.1).

    ``diagonal``: the original form, :math:`\lVert W W^T - I \rVert_F^2` (Brock 2017, arXiv 1609.07093), which holds
    the lengths at 1 too. A weight of spectral norm is the one that is trained, before it is normalised.

    >>> orthogonal_penalty([torch.tensor([[3.0, 0.0], [0.0, 2.0]])]).item()
    0.0
    >>> orthogonal_penalty([torch.tensor([[3.0, 0.0], [1.0, 2.0]])]).item()  # 2 · 3²
    18.0
    """
    total = []
    for weight in _parameters("orthogonal_penalty", weights):
        if weight.ndim < 2:
            raise ValueError(f"orthogonal_penalty: a weight has shape {tuple(weight.shape)}; it must be [outputs, ...]")
        rows = _wide(weight, "orthogonal_penalty: a weight").flatten(1)
        products = rows @ rows.mT
        if diagonal:
            excess = products - torch.eye(len(products), dtype=products.dtype, device=products.device)
        else:
            excess = products - torch.diag(products.diagonal())
        total.append(excess.square().sum())
    return torch.stack(total).sum()


@torch.no_grad()
def clip_weights_(parameters: Iterable[Tensor], limit: float = 0.01) -> None:
    """Clamp every parameter to [−limit, limit], in place (Arjovsky 2017: after each step, at 0.01).

    >>> weight = torch.tensor([0.5, -0.002])
    >>> clip_weights_([weight])
    >>> weight
    tensor([ 0.0100, -0.0020])
    """
    if not (math.isfinite(real_number("clip_weights_: limit", limit)) and limit > 0):
        raise ValueError(f"clip_weights_: limit must be a positive number, got {limit}")
    for parameter in _parameters("clip_weights_", parameters):
        parameter.clamp_(-limit, limit)
