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
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gankern.core import autograd
from gankern.core.torch_internals import autocasting
from gankern.tangent.nodes import LayoutMatters, NotCovered
from gankern.tangent.state import State, modules_of
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


# What is known of critics: for each mode, training or evaluation, why they are not covered; None where they are.
_verdicts: weakref.WeakKeyDictionary[Callable, dict[bool, str | None]] = weakref.WeakKeyDictionary()
# Those whose results depend on how their input lies in memory.
_laid_out_already: weakref.WeakSet[Callable] = weakref.WeakSet()


def refusal(critic: Any) -> str | None:
    """Why the critic was not covered the last time, in the mode that it is in; None if it was, or was never tried."""
    critic = _plain(critic)
    return _verdicts.get(critic, {}).get(_mode(critic)) if _can_be_remembered(critic) else None


def refuse(critic: Any, reason: str | None) -> None:
    """Remembers why a critic is not covered in its present mode; or, with None, that it is."""
    critic = _plain(critic)
    if _can_be_remembered(critic):
        _verdicts.setdefault(critic, {})[_mode(critic)] = reason


def _mode(critic: Any) -> bool:
    return getattr(critic, "training", False)


def _can_be_remembered(critic: Any) -> bool:
    """Lambdas and bound methods are made anew for each call."""
    return isinstance(critic, (nn.Module, types.FunctionType))


def _with_verdict(critic, parameters, inputs, *arguments):
    """_penalty_gradients; where it cannot, the critic and the random numbers are afterwards what they were before."""
    outer = autograd.recording.recorder
    if outer is not None:  # a penalty within a critic that is penalised: what it computes is a constant to that
        with outer.pause():
            return _with_verdict(critic, parameters, inputs, *arguments)
    modules = modules_of(critic)
    _check_hooks(critic, modules)
    before = State(modules, inputs)
    relay = not _can_be_remembered(critic) or critic not in _laid_out_already
    try:
        try:
            result = _penalty_gradients(critic, parameters, inputs, *arguments, relay=relay)
        except (LayoutMatters, RuntimeError) as error:
            # An error, too, may be one of a layout, such as of what is written to a copy that now is none.
            another = isinstance(error, LayoutMatters) or (relay and any(_laid_out(x) is not x for x in inputs))
            if isinstance(error, torch.OutOfMemoryError) or not another:
                raise
            before.restore()
            result = _penalty_gradients(critic, parameters, inputs, *arguments, relay=False)
            if _can_be_remembered(critic):
                _laid_out_already.add(critic)
    except NotCovered as error:
        refuse(critic, str(error))
        before.restore()
        raise
    except BaseException:
        before.restore()
        raise
    refuse(critic, None)
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


def _penalty_gradients(critic, parameters, inputs, penalty, select, args, kwargs, relay=True):
    """(penalty, parameters beside the given ones, indices of the given ones, gradients: first for those)."""
    penalty, select = resolve(penalty), resolve(select)
    tape = Tape(parameters, critic)
    half = _in_half(inputs)
    xs = [(_laid_out(x.detach()) if relay else x.detach()).requires_grad_() for x in inputs]
    tape.relaid = any(x.stride() != y.stride() for x, y in zip(xs, inputs)) and not torch.compiler.is_compiling()
    if tape.relaid:  # what would be a copy for the caller's layout may be the input itself
        tape.detached.update(x.untyped_storage().data_ptr() for x in xs)
    starts = [tape.input(x) for x in xs]
    output = record(tape, critic, xs, select, args, kwargs)
    end = tape.find(output)
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
    position = {id(p): i for i, p in enumerate(parameters)}
    indices = [position[id(p)] for p in found if id(p) in position]
    rest = [p for p in found if id(p) not in position]
    gradients = [_like(found.pop(p), p) for p in (*(parameters[i] for i in indices), *rest)]
    return value, rest, indices, gradients


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """An operator of the passes that fails is one that this form does not have after all."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise NotCovered(f"a pass of the tangent form fails: {error}") from error


def _check_hooks(critic, modules: Sequence[nn.Module]) -> None:
    """Of the modules that are known before the critic runs; the tape sees those of others."""
    everywhere = torch.nn.modules.module
    if everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks:
        raise NotCovered("backward hooks of all modules are registered, which can change the gradient")
    for module in modules:
        if module._backward_hooks or module._backward_pre_hooks:
            names = critic.named_modules() if isinstance(critic, nn.Module) else ()
            name = next((name for name, m in names if m is module), "")
            where = f"{type(module).__name__} {name!r}" if name else type(module).__name__
            raise NotCovered(f"a backward hook of a module, which can change the gradient (in {where})")
        for parameter in module._parameters.values():
            if parameter is not None and is_lazy(parameter):
                raise NotCovered(f"a parameter of {type(module).__name__} has no shape yet; a forward gives it one")


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the parameter's own strides, where optimizers want it."""
    if grad.layout != parameter.layout:
        raise NotCovered("a gradient of a parameter is sparse")
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
    if not torch.compiler.is_compiling():
        tape.survey(output)
    return output


def _laid_out(x: Tensor) -> Tensor:
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


def none(x):
    return None if isinstance(x, str) and x == NONE else x


def _no_autocast(like: Tensor):
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
