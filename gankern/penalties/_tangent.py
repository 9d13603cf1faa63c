"""The gradient of a gradient penalty in four passes over the critic, without double backward.

For a critic D with parameters theta, inputs x, g = d(sum of D(x))/dx and a penalty P(g), v = dP/dg,

    dP/dtheta = d/dtheta <v, g> = d/dtheta (sum of the tangents of D's outputs, for the tangent v at x),

with v held constant. Forward (recorded), data gradient (keeps delta at each layer), tangent forward (with each layer's
weight gradient, from its input's tangent and its output's delta). Where the critic has curvature, what flows back below
it is added exactly, at the cost of one more data and weight gradient of the layers below. See ``_tape`` and ``_nodes``.

Source: the formula is Pearlmutter's R-operator (Neural Computation 6, 1994) with a direction that depends on the
gradient, applied to the penalty of Gulrajani et al. 2017, arXiv 1704.00028.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gankern.ops import _tiers
from gankern.penalties._nodes import NotCovered
from gankern.penalties._tape import Tape

__all__ = ["NotCovered", "penalty_gradients"]

# Takes the gradients, one for each input; returns the penalty, and its derivative with respect to each of them.
Penalty = Callable[[list[Tensor]], tuple[Tensor, Sequence[Tensor]]]


# By name, what makes a penalty or a selector from its options, all of them numbers, strings and bools: torch.compile
# passes these on, but no functions.
MAKERS: dict[str, Callable[..., Callable]] = {}

# Stands for None, which torch.compile does not pass on.
_NONE = "gankern: None"


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
    select = _NONE if select is None else select
    args = [_NONE if x is None else x for x in args]
    kwargs = {name: _NONE if x is None else x for name, x in (kwargs or {}).items()}
    run = _traced if torch.compiler.is_dynamo_compiling() else _penalty_gradients
    value, rest, indices, gradients = run(critic, parameters, list(inputs), penalty, select, args, kwargs)
    return value, [*(parameters[i] for i in indices), *rest], gradients


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
    if isinstance(penalty, tuple):
        penalty = MAKERS[penalty[0]](*penalty[1:])
    if isinstance(select, tuple):
        select = MAKERS[select[0]](*select[1:])
    with _constant(parameters):
        tape = Tape(parameters, critic)
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
            tape.push(dict(zip(starts, directions)))
            del directions
            tape.pull()
            found = tape.gradients()
    position = {id(p): i for i, p in enumerate(parameters)}
    indices = [position[id(p)] for p in found if id(p) in position]
    rest = [p for p in found if id(p) not in position]
    gradients = [_like(found[p], p) for p in (*(parameters[i] for i in indices), *rest)]
    return value, rest, indices, gradients


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's own strides, where optimizers want it."""
    if grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)


def record(tape: Tape, critic, xs, select, args, kwargs) -> Tensor:
    """Runs the critic on the tape; the tensor of outputs, which depends on the inputs."""
    if _tiers.interpreting():
        raise NotCovered("Triton's interpreter is on: its kernels are no operators that could be recorded")
    if isinstance(critic, torch.jit.ScriptModule):
        raise NotCovered("the critic is a ScriptModule")
    with torch.enable_grad(), _no_autocast_cache(), tape:
        output = critic(*xs, *(_none(x) for x in args), **{name: _none(x) for name, x in kwargs.items()})
        if callable(select):
            output = select(output)
        elif not (isinstance(select, str) and select == _NONE):
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


def _none(x):
    return None if isinstance(x, str) and x == _NONE else x


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


_traced = torch._dynamo.nonstrict_trace(_penalty_gradients)
