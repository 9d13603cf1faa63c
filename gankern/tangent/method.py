"""The gradient of a gradient penalty in four passes over the critic, without double backward.

For a critic D with parameters theta, inputs x, g = d(sum of D(x))/dx and a penalty P(g), v = dP/dg,

    dP/dtheta = d/dtheta <v, g> = d/dtheta (sum of the tangents of D's outputs, for the tangent v at x),

with v held constant. Forward (recorded), data gradient (keeps delta at each layer), tangent forward (with each layer's
weight gradient, from its input's tangent and its output's delta). Where the critic has curvature, what flows back below
it is added exactly, at the cost of one more data and weight gradient of the layers below. See ``tape`` and ``nodes``.

Source: the formula is Pearlmutter's R-operator (Neural Computation 6, 1994) with a direction that depends on the
gradient, applied to the penalty of Gulrajani et al. 2017, arXiv 1704.00028.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gankern.tangent.nodes import NotCovered
from gankern.tangent.tape import Tape

__all__ = ["NotCovered", "penalty_gradients"]

# Takes the gradients, one for each input; returns the penalty, and its derivative with respect to each of them.
Penalty = Callable[[list[Tensor]], tuple[Tensor, Sequence[Tensor]]]


# By name, what makes a penalty or a selector from its options, all of them numbers, strings and bools: torch.compile
# passes these on, but no functions.
MAKERS: dict[str, Callable[..., Callable]] = {}

# Stands for None, which torch.compile does not pass on.
NONE = "gankern: None"


def penalty_gradients(
    critic: Callable[..., Any],
    inputs: Sequence[Tensor],
    penalty: Penalty | tuple,
    select: Callable[[Any], Tensor] | tuple | int | str | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The penalty of the critic's gradients at ``inputs``, and its gradient.

    Args:
        critic: called once, as ``critic(*inputs, *args, **kwargs)``.
        inputs: what the outputs are differentiated by.
        penalty: a :data:`Penalty`, which runs without recording; or (name, *options) of :data:`MAKERS`.
        select: which of what the critic returns is differentiated, as its sum: a key or index, a function, or (name,
            *options) of :data:`MAKERS`.
        args, kwargs: other arguments of the critic; constants.

    Returns:
        The penalty, the parameters that it has a gradient for, and these gradients.

    Within torch.compile this is one region of the graph. It is traced as the critic is at that time: attributes of the
    critic's that are no tensors count as constants, and a change of theirs does not compile it anew by itself.

    Raises:
        NotCovered: says what is not covered, and in which module. The critic has then run, partly or wholly.
    """
    critic = _plain(critic)
    parameters = [p for p in critic.parameters() if p.requires_grad] if isinstance(critic, nn.Module) else []
    select = NONE if select is None else select
    args = [NONE if x is None else x for x in args]
    kwargs = {name: NONE if x is None else x for name, x in (kwargs or {}).items()}
    if torch.compiler.is_dynamo_compiling():
        from gankern.tangent import traced  # which loads Dynamo

        run = traced.penalty_gradients
    else:
        run = _with_verdict
    value, rest, indices, gradients = run(critic, parameters, list(inputs), penalty, select, args, kwargs)
    return value, [*(parameters[i] for i in indices), *rest], gradients


# What is known of critics: whether in training mode, and in evaluation, they are covered, with the reason where not.
_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[bool, str | None]] = weakref.WeakKeyDictionary()


def refusal(critic: Any) -> str | None:
    """Why the critic was not covered the last time, in the mode that it is in; None if it was, or was never tried."""
    critic = _plain(critic)
    return _verdicts.get(critic, {}).get(critic.training) if isinstance(critic, nn.Module) else None


def _with_verdict(critic, *arguments):
    """_penalty_gradients, after whose first refusal buffers and random numbers are as they were before."""
    if not isinstance(critic, nn.Module):
        return _penalty_gradients(critic, *arguments)
    verdicts = _verdicts.setdefault(critic, {})
    before = None
    if verdicts.get(critic.training, "untried") is not None:
        before = [b.clone() for b in critic.buffers()], torch.get_rng_state()
    try:
        result = _penalty_gradients(critic, *arguments)
    except NotCovered as error:
        verdicts[critic.training] = str(error)
        if before is not None:
            with torch.no_grad():
                for buffer, old in zip(critic.buffers(), before[0]):
                    buffer.copy_(old)
            torch.set_rng_state(before[1])
        raise
    verdicts[critic.training] = None
    return result


def resolve(function: Callable | tuple) -> Callable:
    """What a tuple (name, *options) stands for."""
    return MAKERS[function[0]](*function[1:]) if isinstance(function, tuple) else function


def _plain(critic):
    """The critic itself, out of what torch.compile and DistributedDataParallel wrap around it."""
    while True:
        if isinstance(critic, torch.nn.parallel.DistributedDataParallel):
            critic = critic.module
        elif hasattr(critic, "_orig_mod"):
            critic = critic._orig_mod
        else:
            return critic


def _penalty_gradients(critic, parameters, inputs, penalty, select, args, kwargs):
    """(penalty, parameters beside the given ones, indices of the given ones, gradients: first for those)."""
    penalty, select = resolve(penalty), resolve(select)
    with _constant(parameters):
        tape = Tape(parameters, critic)
        half = _in_half(inputs)
        xs = [_laid_out(x.detach()) for x in inputs]
        starts = [tape.input(x) for x in xs]
        output = record(tape, critic, xs, select, args, kwargs)
        end = tape.find(output)
        tape.close()
        with torch.no_grad(), _no_autocast(output):
            deltas = tape.delta({end: torch.ones_like(output)})
            del output
            grads = [deltas[i] if i in deltas else torch.zeros_like(x) for i, x in zip(starts, xs)]
            del deltas
            value, directions = penalty(grads)
            del grads
            scale = _largest(directions) if half else None
            tape.push(dict(zip(starts, directions if scale is None else [d / scale for d in directions])))
            del directions
            tape.pull()
            found = tape.gradients()
            if scale is not None:
                found = {p: g * scale.to(g.dtype) for p, g in found.items()}
    position = {id(p): i for i, p in enumerate(parameters)}
    indices = [position[id(p)] for p in found if id(p) in position]
    rest = [p for p in found if id(p) not in position]
    gradients = [_like(found.pop(p), p) for p in (*(parameters[i] for i in indices), *rest)]
    return value, rest, indices, gradients


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's own strides, where optimizers want it."""
    if grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)


def record(tape: Tape, critic, xs, select, args, kwargs) -> Tensor:
    """Runs the critic on the tape; the tensor of outputs, which depends on the inputs."""
    if isinstance(critic, torch.jit.ScriptModule):
        raise NotCovered("the critic is a ScriptModule")
    with torch.enable_grad(), _no_autocast_cache(), tape:
        output = critic(*xs, *(none(x) for x in args), **{name: none(x) for name, x in kwargs.items()})
        if callable(select):
            output = select(output)
        elif none(select) is not None:
            output = output[select]
    if not isinstance(output, Tensor):
        raise TypeError(f"the critic returns a {type(output).__name__}; it must be a tensor, or select must pick one")
    number = tape.find(output)
    if number is None or not tape.kind([number]) & 1:
        raise NotCovered("the critic's output does not depend on its input by operators that can be recorded")
    tape.check([number])
    return output


def _laid_out(x: Tensor) -> Tensor:
    """x in the memory format that its device convolves fastest in. A ``view`` that then is none becomes a reshape."""
    if x.device.type == "cpu" and x.dim() == 4 and x.shape[1] > 1:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _in_half(inputs: Sequence[Tensor]) -> bool:
    """Whether tangents may be fp16, whose range is narrow."""
    device = inputs[0].device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return cast or any(x.dtype == torch.float16 for x in inputs)


def _largest(directions: Sequence[Tensor]) -> Tensor:
    """The largest power of two below the largest direction: what a pass is linear in can be scaled for free."""
    largest = torch.stack([d.abs().amax().float() for d in directions]).amax()
    return torch.where((largest > 0) & largest.isfinite(), largest.log2().floor().exp2(), 1.0)


def none(x):
    return None if isinstance(x, str) and x == NONE else x


@contextlib.contextmanager
def _constant(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within it the parameters do not require a gradient: autograd then keeps nothing."""
    if torch.compiler.is_compiling():  # parameters are no leaves there, and what autograd keeps is never made
        yield
        return
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _no_autocast(like: Tensor):
    """The passes run in the types that the forward ran in."""
    device = like.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A weight that autocast has cast already would come from its cache, unrecorded."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
