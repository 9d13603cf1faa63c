"""The four passes over a critic, as :mod:`gankern.tangent.method` describes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gankern.core.torch_internals import autocasting
from gankern.tangent.nodes import NotCovered
from gankern.tangent.state import State
from gankern.tangent.tape import Tape

# Takes the gradients, one for each input; returns the penalty, and its derivative with respect to each of them.
Penalty = Callable[[list[Tensor]], tuple[Tensor, Sequence[Tensor]]]

# By name, what makes a penalty or a selector from its options, all of them numbers, strings and bools: torch.compile
# passes these on, but no functions.
MAKERS: dict[str, Callable[..., Callable]] = {}

# Stands for None, which torch.compile does not pass on.
NONE = "gankern: None"


def resolve(function: Callable | tuple) -> Callable:
    """What a tuple (name, *options) stands for."""
    return MAKERS[function[0]](*function[1:]) if isinstance(function, tuple) else function


def run(
    critic: Any,
    parameters: Sequence[Tensor],
    inputs: Sequence[Tensor],
    penalty: Penalty | tuple,
    select: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    relay: bool = True,
    before: State | None = None,
) -> Any:
    """(penalty, parameters beside the given ones, indices of the given ones, gradients: first for those). Behind the
    parameters are those without a gradient that the output depends on. ``before`` is told what the critic is about to
    overwrite."""
    penalty, select = resolve(penalty), resolve(select)
    tape = Tape(parameters, critic, before)
    half = _in_half(inputs)
    xs = [(laid_out(x.detach()) if relay else x.detach()).requires_grad_() for x in inputs]
    tape.relaid = any(x.stride() != y.stride() for x, y in zip(xs, inputs)) and not torch.compiler.is_compiling()
    if tape.relaid:  # what would be a copy for the caller's layout may be the input itself
        tape.detached.update(x.untyped_storage().data_ptr() for x in xs)
    starts = [tape.input(x) for x in xs]
    output = record(tape, critic, xs, select, args, kwargs)
    end: Any = tape.find(output)
    tape.close()
    seed, no_autocast = torch.ones_like(output), _no_autocast(output)
    del output
    shapes = [x.detach() for x in xs]
    del xs
    with torch.no_grad(), no_autocast, _explained():
        deltas = tape.delta({end: seed})
        grads = [deltas[i] if i in deltas else torch.zeros_like(x) for i, x in zip(starts, shapes)]
        del deltas, seed, shapes
        value, directions = penalty(grads)
        del grads
        scale = _largest(directions) if half else None
        tape.push(dict(zip(starts, directions if scale is None else [d / scale for d in directions])))
        del directions
        tape.pull()
        found = tape.gradients(end)
        if scale is not None:
            found = {p: g * scale.to(g.dtype) for p, g in found.items()}
    others = [p for p in tape.reached if p not in found]
    position = {id(p): i for i, p in enumerate(parameters)}
    indices = [position[id(p)] for p in found if id(p) in position]
    rest = [p for p in found if id(p) not in position]
    gradients = [_like(found.pop(p), p) for p in (*(parameters[i] for i in indices), *rest)]
    return value, [*rest, *others], indices, gradients


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """An operator of the passes that fails is one that this form does not have after all."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise NotCovered(f"a pass of the tangent form fails: {error}") from error


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's own strides, where optimizers want it."""
    if grad.layout != parameter.layout:
        raise NotCovered("a gradient of a parameter is sparse")
    if grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)


def record(
    tape: Tape, critic: Any, xs: Sequence[Tensor], select: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
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
    if not torch.compiler.is_compiling():
        tape.survey(output)
    return output


def laid_out(x: Tensor) -> Tensor:
    """x in the memory format that its device convolves fastest in. A ``view`` that then is none becomes a reshape."""
    if x.device.type == "cpu" and x.dim() == 4 and x.shape[1] > 1:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _in_half(inputs: Sequence[Tensor]) -> bool:
    """Whether tangents may be fp16, whose range is narrow."""
    device = inputs[0].device.type
    cast = autocasting(device) and torch.get_autocast_dtype(device) == torch.float16
    return cast or any(x.dtype == torch.float16 for x in inputs)


def _largest(directions: Sequence[Tensor]) -> Tensor:
    """The largest power of two below the largest direction: what a pass is linear in can be scaled for free."""
    largest = torch.stack([d.abs().amax().float() for d in directions]).amax()
    return torch.where((largest > 0) & largest.isfinite(), largest.log2().floor().exp2(), 1.0)


def none(x: Any) -> Any:
    return None if isinstance(x, str) and x == NONE else x


def _no_autocast(like: Tensor) -> Any:
    """The passes run in the types that the forward ran in."""
    device = like.device.type
    if autocasting(device):
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
