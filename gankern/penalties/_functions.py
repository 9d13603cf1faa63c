"""The penalties themselves; see the package for what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from gankern.core.dispatch import short
from gankern.core.names import with_options_of
from gankern.functional import _checks
from gankern.penalties._common import (
    WEIGHT,
    Select,
    check_generator,
    check_surroundings,
    pairs_of,
    penalize,
    random_alpha,
    samples_of,
)

Critic = Callable[..., Any]
Samples = Tensor | Sequence[Tensor]


class Shared(TypedDict, total=False):
    """The options that all penalties of gradients have."""

    weight: float
    reduction: str
    norm_dims: str | int | Sequence[int]
    method: str
    critic_args: Sequence[Any]
    critic_kwargs: Mapping[str, Any] | None
    select: Select


_SHARED = frozenset(Shared.__annotations__)


class Between(Shared, total=False):
    """The options of penalties between two sets of samples."""

    target: float
    one_sided: bool
    alpha: Tensor | None
    generator: torch.Generator | None


def gradient_penalty(
    critic: Critic,
    real: Samples,
    fake: Samples,
    *,
    weight: float = WEIGHT,
    target: float = 1.0,
    one_sided: bool = False,
    alpha: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    norm_dims: str | int | Sequence[int] = "sample",
    method: str = "auto",
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    select: Select = None,
) -> Tensor:
    r"""WGAN-GP's penalty: the critic's gradient shall have norm 1 between real and generated samples.

    :math:`\lambda\,\mathrm{mean}_n(\lVert\nabla D(\hat x_n)\rVert_2 - t)^2` at
    :math:`\hat x_n = r_n + \alpha_n (f_n - r_n)`, :math:`\alpha_n` uniform in [0, 1), one number a sample.

    Source: Gulrajani et al. 2017, arXiv 1704.00028, algorithm 1.

    Args:
        critic: a module or function; called as ``critic(x, *critic_args, **critic_kwargs)``, or ``critic(*xs, ...)``
            where real and fake are several tensors.
        real, fake: samples of one shape and device, [N, ...] of any rank; or as many tensors each, with one batch
            size, whose gradients together make the norm. A sample that requires a gradient gets one.
        weight: λ.
        target: t, 0 or more. Some code divides λ by t²: do so in ``weight``.
        one_sided: only norms above the target cost: max(0, ·)².
        alpha: the α to use, [N] or [N, 1, ...]; drawn from ``generator`` otherwise.
        reduction: "mean" or "sum" over the samples.
        norm_dims: "sample": the norm is over all dimensions of a sample, which is what the paper's penalty is. Other
            dimensions reproduce code that takes the norm over those alone, such as 1.
        method: "double_backward" for any critic; "tangent" for one that it covers, else a ValueError
            with the reason; "auto": the tangent form where it covers the critic, else double_backward. On a GPU, where
            the tangent form spares the device work and costs the host some, "auto" has it in steps that GraphedStep
            captures, under torch.compile, and from so many values on as the device's file says.
        critic_args, critic_kwargs: labels and other conditions. A tensor among them that requires a gradient gets one.
        select: where the critic returns several things: the index, the key or a function that picks its outputs.

    Returns:
        A scalar, in fp32 (fp64 for fp64). It is added to the loss, whose backward gives the critic its gradients;
        they are computed here, and the critic's graph is gone when this returns; where the critic has weights that the
        caller has computed, it stays until that backward, which goes by them. A parameter that the penalty does not
        depend on gets zeros where torch's double backward has zeros (most biases), and none where that has none (the
        last bias). The scalar cannot be differentiated twice: a backward through its gradients is an error.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted; also where the critic does not give
            one number a sample.
        RuntimeError: inside torch.no_grad(), torch.inference_mode() and the transformations of torch.func.

    Warns once of a critic with batch norm in training mode, where the outputs are not functions of single samples.

    >>> critic = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> real, fake = torch.randn(2, 4, 3)
    >>> loss = critic(fake).mean() - critic(real).mean() + gradient_penalty(critic, real, fake)
    >>> loss.backward()
    """
    name = "gradient_penalty"
    check_surroundings(name, "critic")
    reals, fakes = pairs_of(name, real, fake)
    alpha = random_alpha(name, alpha, generator, reals[0])
    points = [_between(r, f, alpha) for r, f in zip(reals, fakes)]
    return penalize(
        name,
        critic,
        points,
        weight=weight,
        target=target,
        one_sided=one_sided,
        reduction=reduction,
        norm_dims=norm_dims,
        method=method,
        critic_args=critic_args,
        critic_kwargs=critic_kwargs,
        select=select,
    )


@with_options_of(gradient_penalty, one_sided=True)
def lipschitz(critic: Critic, real: Samples, fake: Samples, **options: Unpack[Between]) -> Tensor:
    r"""WGAN-LP's penalty: :func:`gradient_penalty` one-sided, only norms above 1 cost.

    :math:`\lambda\,\mathrm{mean}_n\max(0, \lVert\nabla D(\hat x_n)\rVert_2 - 1)^2`. Source: Petzka et al. 2018,
    arXiv 1709.08894. Options, result and errors are :func:`gradient_penalty`'s; ``one_sided`` is True.

    >>> critic = torch.nn.Linear(3, 1)
    >>> _ = torch.nn.init.constant_(critic.weight, 0.1)  # a gradient of norm 0.17
    >>> lipschitz(critic, torch.zeros(4, 3), torch.ones(4, 3)).item()
    0.0
    """
    options.setdefault("one_sided", True)
    return gradient_penalty(critic, real, fake, **options)


@with_options_of(gradient_penalty, target=0.0)
def zero_centered(critic: Critic, real: Samples, fake: Samples, **options: Unpack[Between]) -> Tensor:
    r"""The zero-centred penalty between samples: :func:`gradient_penalty` with target 0.

    :math:`\lambda\,\mathrm{mean}_n\lVert\nabla D(\hat x_n)\rVert_2^2`. Source: Thanh-Tung et al. 2019,
    arXiv 1902.03984. Options, result and errors are :func:`gradient_penalty`'s; ``target`` is 0.

    >>> zero_centered(torch.nn.Linear(3, 1), *torch.randn(2, 4, 3)).shape
    torch.Size([])
    """
    options.setdefault("target", 0.0)
    return gradient_penalty(critic, real, fake, **options)


@with_options_of(penalize)
def r1_penalty(critic: Critic, real: Samples, *, half: bool = True, **options: Unpack[Shared]) -> Tensor:
    r"""R1: the squared norm of the critic's gradient at real samples, :math:`(\gamma/2)\,\mathrm{mean}\lVert\nabla
    D(r_n)\rVert_2^2`.

    Source: Mescheder et al. 2018, arXiv 1801.04406, equation 9.

    Args:
        real: samples, [N, ...], or several tensors.
        half: False leaves the ½ out, as some code does.
        weight: γ.

    The other arguments, result and errors are :func:`gradient_penalty`'s.

    >>> r1_penalty(torch.nn.Linear(3, 1), torch.randn(4, 3)).shape
    torch.Size([])
    """
    return _at_samples("r1_penalty", "real", critic, real, half, options)


@with_options_of(penalize)
def r2_penalty(critic: Critic, fake: Samples, *, half: bool = True, **options: Unpack[Shared]) -> Tensor:
    r"""R2: :func:`r1_penalty` at generated samples. Detach them: what requires a gradient gets one.

    Source: Mescheder et al. 2018, arXiv 1801.04406, equation 10.

    >>> r2_penalty(torch.nn.Linear(3, 1), torch.randn(4, 3)).shape
    torch.Size([])
    """
    return _at_samples("r2_penalty", "fake", critic, fake, half, options)


def _at_samples(name: str, argument: str, critic: Critic, samples: Samples, half: bool, options: Shared) -> Tensor:
    for option in options:
        if option not in _SHARED:
            raise TypeError(f"{name}() got an unexpected keyword argument {option!r}")
    check_surroundings(name, "critic")
    weight = options.get("weight", WEIGHT)
    _checks.number(name, "weight", weight)
    options["weight"] = weight / 2 if half else weight
    return penalize(name, critic, samples_of(name, argument, samples), target=0.0, one_sided=False, **options)


@with_options_of(gradient_penalty)
def dragan(critic: Critic, real: Samples, *, noise: float = 0.5, **options: Unpack[Between]) -> Tensor:
    r"""DRAGAN's penalty: :func:`gradient_penalty` between real samples and noisy ones.

    The other end of each line is :math:`r_n + c\,\sigma u_n` with :math:`\sigma` the standard deviation of the whole
    batch and :math:`u_n` uniform in [0, 1) in each element. No generated samples are needed.

    Source: Kodali et al. 2017, arXiv 1705.07215, as its authors' code computes it.

    Args:
        real: samples, [N, ...], or several tensors.
        noise: c.
        generator: for u and α.

    Other options, result and errors are :func:`gradient_penalty`'s.

    >>> dragan(torch.nn.Linear(3, 1), torch.randn(4, 3)).shape
    torch.Size([])
    """
    check_surroundings("dragan", "critic")
    _checks.number("dragan", "noise", noise)
    generator = options.get("generator")
    check_generator("dragan", "generator", generator)
    reals = samples_of("dragan", "real", real)
    noisy = []
    for r in reals:
        u = torch.rand(r.shape, generator=generator, device=r.device, dtype=r.dtype)
        deviation = r.detach().std() if r.numel() > 1 else r.new_zeros(())
        noisy.append(r.detach() + noise * deviation * u)
    return gradient_penalty(critic, reals, noisy, **options)


def drift(outputs: Tensor, *, weight: float = 0.001, reduction: str = "mean") -> Tensor:
    r"""ProGAN's penalty on the critic's outputs for real samples, which keeps them near zero:
    :math:`\epsilon\,\mathrm{mean}\,D(r_n)^2`.

    Source: Karras et al. 2018, arXiv 1710.10196, appendix A.1.

    Args:
        outputs: of the critic, any shape.
        weight: ε.
        reduction: "mean" or "sum".

    Returns:
        A scalar in fp32 (fp64 for fp64), differentiable like any of torch's.

    >>> drift(torch.tensor([1.0, 3.0]), weight=0.5).item()
    2.5
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"drift: reduction is {reduction!r}; accepted are 'mean' and 'sum'")
    _checks.number("drift", "weight", weight)
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        came = short(outputs.dtype) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"drift: outputs is {came}; it must be a floating-point tensor: what the critic returned")
    squares = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).square()
    return weight * (squares.sum() / (max(outputs.numel(), 1) if reduction == "mean" else 1))


def interpolate_samples(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    r"""One point on the line between each pair of samples: :math:`r_n + \alpha_n (f_n - r_n)`.

    Exactly real where alpha is 0 and exactly fake where it is 1. It is ``torch.lerp`` with an alpha a sample, not one a
    batch or an element: one pass over memory, which no kernel of ours was faster than.

    Source: Gulrajani et al. 2017, arXiv 1704.00028, algorithm 1.

    Args:
        real, fake: [N, ...], of one shape and device; the points are in the wider of their dtypes.
        alpha: [N] or [N, 1, ...], floating point.

    Returns:
        As real. Gradient order: any.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> interpolate_samples(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.25, 1.0]))
    tensor([[0.2500, 0.2500, 0.2500],
            [1.0000, 1.0000, 1.0000]])
    """
    name = "interpolate_samples"
    (real,), (fake,) = pairs_of(name, (real,), (fake,))
    return _between(real, fake, random_alpha(name, alpha, None, real))


def _between(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """The points for checked arguments. Under autocast a generator gives half precision: in the wider of both."""
    dtype = torch.promote_types(real.dtype, fake.dtype)
    weight = alpha.to(dtype).view(-1, *[1] * (real.ndim - 1))
    return real.to(dtype).lerp(fake.to(dtype), weight)
