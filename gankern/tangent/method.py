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

import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gankern.core import autograd
from gankern.core.torch_internals import in_forward_mode, is_compiled, unwrapped
from gankern.tangent import passes
from gankern.tangent.nodes import LayoutMatters, NotCovered
from gankern.tangent.passes import MAKERS, NONE, Penalty, laid_out, none, resolve
from gankern.tangent.state import State, modules_of

__all__ = ["MAKERS", "NONE", "NotCovered", "none", "penalty_gradients", "refusal", "refuse", "resolve"]


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
        The penalty, the parameters that it has a gradient for, behind these the others that the output depends on, and
        the gradients.

    Within torch.compile this is one region of the graph. It is traced as the critic is at that time: attributes of the
    critic's that are no tensors count as constants, and a change of theirs does not compile it anew by itself.

    Raises:
        NotCovered: says what is not covered, and in which module. The critic has then run, partly or wholly.
    """
    if not torch.compiler.is_dynamo_compiling() and in_forward_mode():
        raise NotCovered("a level of forward-mode differentiation is open, whose tangents go another way")
    critic = unwrapped(critic)
    parameters = [p for p in critic.parameters() if p.requires_grad] if isinstance(critic, nn.Module) else []
    select = NONE if select is None else select
    args = [NONE if x is None else x for x in args]
    kwargs = {name: NONE if x is None else x for name, x in (kwargs or {}).items()}
    if torch.compiler.is_dynamo_compiling():
        from gankern.tangent import traced  # which loads Dynamo

        run: Callable[..., Any] = traced.penalty_gradients
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
    critic = unwrapped(critic)
    return _verdicts.get(critic, {}).get(_mode(critic)) if _can_be_remembered(critic) else None


def refuse(critic: Any, reason: str | None) -> None:
    """Remembers why a critic is not covered in its present mode; or, with None, that it is."""
    critic = unwrapped(critic)
    if _can_be_remembered(critic):
        _verdicts.setdefault(critic, {})[_mode(critic)] = reason


def _mode(critic: Any) -> bool:
    return getattr(critic, "training", False)


def _can_be_remembered(critic: Any) -> bool:
    """Lambdas and bound methods are made anew for each call."""
    return isinstance(critic, (nn.Module, types.FunctionType))


def _with_verdict(critic: Any, parameters: Sequence[Tensor], inputs: Sequence[Tensor], *rest: Any) -> Any:
    """passes.run; where it cannot, the critic and the random numbers are afterwards what they were before."""
    arguments = critic, parameters, inputs, *rest
    outer = autograd.recording.recorder
    if outer is not None:  # a penalty within a critic that is penalised: what it computes is a constant to that
        with outer.pause():
            return _with_verdict(*arguments)
    modules = modules_of(critic)
    _check_hooks(critic, modules)
    before = State(modules, inputs, (*rest[-2], *rest[-1].values()), critic)
    relay = not _can_be_remembered(critic) or critic not in _laid_out_already
    try:
        try:
            result = passes.run(*arguments, relay=relay, before=before)
        except (LayoutMatters, RuntimeError) as error:
            # An error, too, may be one of a layout, such as of what is written to a copy that now is none.
            another = isinstance(error, LayoutMatters) or (relay and any(laid_out(x) is not x for x in inputs))
            if isinstance(error, torch.OutOfMemoryError) or not another:
                raise
            before.restore()
            result = passes.run(*arguments, relay=False, before=before)
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


def _check_hooks(critic: Any, modules: Sequence[nn.Module]) -> None:
    """Of the modules that are known before the critic runs; the tape sees those of others."""
    everywhere = torch.nn.modules.module
    if everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks:
        raise NotCovered("backward hooks of all modules are registered, which can change the gradient")
    for module in modules:
        if is_compiled(module):  # and Dynamo would compile the tape with it
            raise NotCovered("a part of the critic is compiled by torch.compile")
        if module._backward_hooks or module._backward_pre_hooks:
            names = critic.named_modules() if isinstance(critic, nn.Module) else ()
            name = next((name for name, m in names if m is module), "")
            where = f"{type(module).__name__} {name!r}" if name else type(module).__name__
            raise NotCovered(f"a backward hook of a module, which can change the gradient (in {where})")
        for parameter in module._parameters.values():
            if parameter is not None and is_lazy(parameter):
                raise NotCovered(f"a parameter of {type(module).__name__} has no shape yet; a forward gives it one")
