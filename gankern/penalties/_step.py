"""A critic's step: its losses on real and generated samples, and its penalties, in the fewest passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gankern.penalties._common import Select, _Outputs, is_training_batch_norm, pairs_of
from gankern.penalties._convolutions import fast_convolutions
from gankern.penalties._functions import Critic, Samples, dragan, drift, gradient_penalty, r1_penalty, r2_penalty

# Layers whose result for one sample depends on its batch, beside batch norm in training mode.
_COUPLED = ("MinibatchStddev", "MinibatchStdDev", "MinibatchDiscrimination")


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
    select: Select = None,
) -> CriticStep:
    """What one step of a critic minimises: the loss on real and generated samples, a gradient penalty, and drift.

    D(real) and D(fake) are one pass over both batches together, where nothing in the critic couples the samples of a
    batch; the penalty is computed before that graph is made, so both are never in memory together. On the CPU torch's
    convolutions run as :func:`gankern.functional.conv2d` in all passes, whatever layers the critic has.

    Args:
        critic: as :func:`gradient_penalty` takes it.
        real, fake: samples of one shape; generated ones are detached here.
        loss: of the outputs for real and for generated samples; Wasserstein's by default, or for example
            ``gankern.losses.get("hinge").discriminator``.
        penalty: called as ``penalty(critic, real, fake, critic_args=, critic_kwargs=, select=)``: a function or object
            of this package, such as ``GradientPenalty(weight=0.1)``; an :class:`R1Penalty`, :class:`R2Penalty` or
            :class:`Dragan` is given the samples that it takes. None for none.
        drift_weight: weight of :func:`drift`.
        joint: whether D(real) and D(fake) share a batch. None decides: not where the critic has batch norm in training
            mode, minibatch stddev or minibatch discrimination, and not with critic_args or critic_kwargs, which belong
            to one batch. With spectral norm a shared batch means one power iteration instead of two.
        critic_args, critic_kwargs, select: as for :func:`gradient_penalty`.

    Returns:
        :class:`CriticStep`.

    >>> critic = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> step = critic_step(critic, *torch.randn(2, 4, 3))
    >>> step.loss.backward()
    """
    name = "critic_step"
    reals, fakes = pairs_of(name, real, fake)
    fakes = tuple(f.detach() for f in fakes)
    critic_kwargs = dict(critic_kwargs or {})
    samples = reals[0].shape[0]
    options = dict(critic_args=critic_args, critic_kwargs=critic_kwargs, select=select)
    penalized = None
    if penalty is not None:
        penalized = penalty(critic, *_taken_by(penalty, reals, fakes), **options)

    def outputs(*xs: Tensor) -> Tensor:
        with fast_convolutions(critic, xs[0]):
            return _Outputs(name, select, xs[0].shape[0])(critic(*xs, *critic_args, **critic_kwargs))

    if joint is None:
        joint = not critic_args and not critic_kwargs and not _couples_samples(critic)
    if joint and samples:
        both = outputs(*(torch.cat(pair) for pair in zip(reals, fakes)))
        real_output, fake_output = both[:samples], both[samples:]
    else:
        real_output, fake_output = outputs(*reals), outputs(*fakes)
    adversarial = loss(real_output, fake_output)
    total, nothing = adversarial, adversarial.new_zeros(())
    penalized = nothing if penalized is None else penalized
    drifted = drift(real_output, weight=drift_weight) if drift_weight else nothing
    for part in (penalized, drifted):
        total = total if part is nothing else total + part
    return CriticStep(
        total, adversarial.detach(), penalized.detach(), drifted.detach(), real_output.detach(), fake_output.detach()
    )


def _taken_by(penalty: Any, reals: Sequence[Tensor], fakes: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """The samples that a penalty is called with."""
    function = getattr(penalty, "function", penalty)
    if function is r2_penalty:
        return (fakes,)
    return (reals,) if function in (r1_penalty, dragan) else (reals, fakes)


def _couples_samples(critic: Any) -> bool:
    if not isinstance(critic, nn.Module):
        return True  # nobody knows
    return any(is_training_batch_norm(module) or type(module).__name__ in _COUPLED for module in critic.modules())
