"""A critic's step: its losses on real and generated samples, and its penalties, in the fewest passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gankern.nn as gnn
from gankern.core.arguments import shown
from gankern.core.torch_internals import modules_of, unwrapped
from gankern.nn import coupling
from gankern.penalties._common import Select, _Outputs, check_callable, check_conditions, pairs_of
from gankern.penalties._functions import Critic, Samples, dragan, drift, gradient_penalty, r1_penalty, r2_penalty
from gankern.tangent.convolutions import fast_convolutions


@dataclass(frozen=True)
class CriticStep:
    """The parts of a critic's loss. ``loss`` is their sum: ``step.loss.backward()``; the others are for the log."""

    loss: Tensor
    adversarial: Tensor
    penalty: Tensor
    drift: Tensor
    real_output: Tensor
    fake_output: Tensor


def wasserstein(real: Tensor, fake: Tensor) -> Tensor:
    """mean D(fake) - mean D(real), in fp32 or better."""
    wide = torch.promote_types(real.dtype, torch.float32)
    return fake.to(wide).mean() - real.to(wide).mean()


def critic_step(
    critic: Critic,
    real: Samples,
    fake: Samples,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = wasserstein,
    penalty: Callable[..., Tensor] | None = gradient_penalty,
    drift_weight: float = 0.0,
    joint: bool | None = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    fake_args: Sequence[Any] | None = None,
    fake_kwargs: Mapping[str, Any] | None = None,
    select: Select = None,
) -> CriticStep:
    """What one step of a critic minimises: the loss on real and generated samples, a gradient penalty, and drift.

    D(real) and D(fake) are one pass over both batches together, where it is known that nothing in the critic couples
    the samples of a batch (:mod:`gankern.nn.coupling`), else two. The penalty is computed before that graph is made, so
    both are never in memory together. On the CPU torch's convolutions run as :func:`gankern.functional.conv2d` in all
    passes, whatever layers the critic has.

    Args:
        critic: as :func:`gradient_penalty` takes it.
        real, fake: samples of one shape; generated ones are detached here.
        loss: of the outputs for real and for generated samples; Wasserstein's by default, or for example
            ``gankern.losses.get("hinge").discriminator``.
        penalty: called as ``penalty(critic, real, fake, critic_args=, critic_kwargs=, select=)``: a function or object
            of this package, such as ``GradientPenalty(weight=0.1)``; an :class:`R1Penalty`, :class:`R2Penalty` or
            :class:`Dragan`, or a functools.partial of their functions, is given the samples that it takes. None for
            none.
        drift_weight: weight of :func:`drift`.
        joint: whether D(real) and D(fake) share a batch. None decides: only where every module of the critic is one
            of torch's, of this library's or of its models that keeps samples apart, without hooks, and not with
            conditions, which belong to one batch. For modules of your own say True, or decorate their classes with
            :func:`gankern.nn.coupling.apart`. The batches are interleaved so that a group of
            :class:`gankern.nn.MinibatchStdDev` is all real or all generated, where its size divides the batch. With
            spectral norm a shared batch means one power iteration, not two.
        critic_args, critic_kwargs, select: as for :func:`gradient_penalty`.
        fake_args, fake_kwargs: the conditions of the generated samples, where they are others than those of the real
            ones, which then are critic_args and critic_kwargs. A penalty at generated samples (R2) has these, any other
            has the real ones.

    Returns:
        :class:`CriticStep`.

    >>> critic = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> step = critic_step(critic, *torch.randn(2, 4, 3))
    >>> step.loss.backward()
    """
    name = "critic_step"
    check_callable(name, "critic", critic)
    check_callable(name, "loss", loss)
    if penalty is not None:
        check_callable(name, "penalty", penalty)
    if joint is not None and not isinstance(joint, bool):
        raise TypeError(f"{name}: joint is {shown(joint)}; accepted are True, False and None")
    check_conditions(name, "critic_args", critic_args, "critic_kwargs", critic_kwargs)
    check_conditions(name, "fake_args", () if fake_args is None else fake_args, "fake_kwargs", fake_kwargs)
    reals, fakes = pairs_of(name, real, fake)
    fakes = tuple(f.detach() for f in fakes)
    critic_kwargs = dict(critic_kwargs or {})
    samples = reals[0].shape[0]
    of_real = tuple(critic_args), critic_kwargs
    of_fake = (
        of_real[0] if fake_args is None else tuple(fake_args),
        critic_kwargs if fake_kwargs is None else dict(fake_kwargs),
    )
    others = fake_args is not None or fake_kwargs is not None
    if joint and others:
        raise ValueError(
            f"{name}: joint=True with fake_args or fake_kwargs; a shared batch has one set of conditions, so leave "
            f"joint out"
        )
    penalized = None
    if penalty is not None:
        args, kwargs = of_fake if _function_of(penalty) is r2_penalty else of_real
        at: Any = _taken_by(penalty, reals, fakes)
        if isinstance(real, Tensor):  # and so to a penalty of somebody's own
            at = [x for (x,) in at]
        penalized = penalty(critic, *at, critic_args=args, critic_kwargs=kwargs, select=select)
        _check_number("penalty", penalized)

    def outputs(conditions: tuple, *xs: Tensor) -> Tensor:
        args, kwargs = conditions
        with fast_convolutions(critic, xs[0]):
            return _Outputs(name, select, xs[0].shape[0])(critic(*xs, *args, **kwargs))

    parts = _parts(critic, samples, reals[0].ndim)
    if joint is None:
        joint = not any((*of_real, *of_fake)) and parts is not None
    if joint and samples:
        # In as many parts as keep the groups of a minibatch stddev apart: real, fake, real, fake, ...
        chunks = [zip(real.chunk(parts or 1), fake.chunk(parts or 1)) for real, fake in zip(reals, fakes)]
        both = outputs(of_real, *(torch.cat([x for pair in pairs for x in pair]) for pairs in chunks)).chunk(
            2 * (parts or 1)
        )
        real_output, fake_output = torch.cat(both[::2]), torch.cat(both[1::2])
    else:
        real_output, fake_output = outputs(of_real, *reals), outputs(of_fake, *fakes)
    adversarial = loss(real_output, fake_output)
    _check_number("loss", adversarial)
    total, nothing = adversarial, adversarial.new_zeros(())
    penalized = nothing if penalized is None else penalized
    drifted = drift(real_output, weight=drift_weight) if drift_weight else nothing
    for part in (penalized, drifted):
        total = total if part is nothing else total + part
    return CriticStep(
        total, adversarial.detach(), penalized.detach(), drifted.detach(), real_output.detach(), fake_output.detach()
    )


def _check_number(argument: str, returned: Any) -> None:
    if not isinstance(returned, Tensor) or returned.numel() != 1:
        raise ValueError(f"critic_step: {argument} returned {shown(returned)}; it must be a tensor of one number")


def _function_of(penalty: Any) -> Any:
    """The function that a penalty with options, an object or a functools.partial, is of."""
    while isinstance(penalty, functools.partial):
        penalty = penalty.func
    return getattr(penalty, "function", penalty)


def _taken_by(penalty: Any, reals: Sequence[Tensor], fakes: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """The samples that a penalty is called with."""
    function = _function_of(penalty)
    if function is r2_penalty:
        return (fakes,)
    return (reals,) if function in (r1_penalty, dragan) else (reals, fakes)


def _parts(critic: Any, samples: int, dimensions: int) -> int | None:
    """Into how many parts real and generated samples are cut to alternate in a shared batch, which then gives what two
    batches give; None where that is not known."""
    if coupling.doubt(critic, samples, dimensions, but=(gnn.MinibatchStdDev,)) is not None:
        return None
    groups = {(m.group_size, m.layout) for m in modules_of(unwrapped(critic), gnn.MinibatchStdDev)}
    if not groups:
        return 1
    ((size, layout), *others) = groups
    if others or size < 1 or samples % size:  # the layer itself has the message for a size below 1
        return None
    # Strided: sample i of N is in group i mod N / G, so of G runs of N / G samples each group has one of each.
    return size if layout == "strided" else 1
