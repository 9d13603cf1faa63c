"""How every primitive is differentiated: it tells autograd its three functions in a :class:`Rule`, and
:func:`differentiate` runs them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from gankern.core.batching import one_gradient_at_a_time
from gankern.core.dispatch import refuse_gradient_order
from gankern.core.torch_internals import in_forward_mode, recomputed, transformed

Tensors = Sequence[Tensor | None]
Kept = Sequence[Any]  # the same, where a rule knows which of them are there
Run = Callable[..., Tensor]

RULES: dict[str, Rule] = {}


@dataclass(frozen=True)
class Rule:
    """How a primitive is computed and differentiated twice, on ``options``, a tuple of constants whose first is the
    implementation, and on tensors, any of which may be None.

    ``needed`` has an entry for each tensor that a gradient can be asked for: whether it is. A function returns None
    for what is not needed or does not exist; a gradient that came in as None does not exist either. A tensor that came
    in is not returned as it is (autograd forbids it), but as a view: ``x.view_as(x)``.
    """

    name: str
    # (options, *tensors) -> outputs
    forward: Callable[..., tuple[Tensor, ...]]
    # (options, tensors, outputs) -> what the backward reads: some of them
    saved: Callable[[tuple, Tensors, Tensors], Tensors]
    # (options, needed, gradients of the outputs, saved) -> gradients of the tensors
    backward: Callable[[tuple, Sequence[bool], Tensors, Tensors], Tensors]
    # (options, needed, gradients of what backward returned, gradients of the outputs, saved) -> gradients of the
    # gradients of the outputs, then of the saved ones; needed likewise
    double_backward: Callable[[tuple, Sequence[bool], Tensors, Tensors, Tensors], Tensors]
    non_differentiable: tuple[int, ...] = ()  # which outputs
    # Whether a gradient is worth the question to the engine if it is needed: up to 40 microseconds for a leaf. Without,
    # every tensor that requires a gradient needs one.
    asks_engine: bool = False
    # Of options: whether the result goes through a function that is linear in pieces. torch's second order then has
    # zeros for all tensors before it, where it has nothing else: for what is saved, which is those tensors or the
    # result. The C++ nodes give zeros to the leaves alone: gankern.core.zeros.
    pieces: Callable[[tuple], bool] = lambda options: False
    # (options, *saved) -> the first output in plain PyTorch, where the tensors are saved first. Then there is every
    # order: a second one that is itself differentiated is computed by it.
    plain: Callable[..., Tensor] | None = None
    # (options, *tensors) -> whether it keeps a result that torch's formulation does not. Where that was overwritten
    # before the backward, it is computed again, from the tensors.
    again: Callable[..., bool] = lambda options, *tensors: False
    # Of options: the number of layers, where each output comes of the tensor of the same number alone. What is kept is
    # then these tensors and one that belongs to all. Each layer is differentiated when its gradient comes, whatever
    # became of the others: of these ``saved`` has None.
    layers: Callable[[tuple], int] = lambda options: 0

    def __post_init__(self) -> None:
        RULES[self.name] = self


class Recorder(Protocol):
    """What hears of each primitive that a thread runs, and runs it in its place: the tape of :mod:`gankern.tangent`.
    Each function returns what the call without a recorder would."""

    def primitive(self, name: str, options: tuple, tensors: Tensors) -> tuple[Tensor, ...]:
        """One that is differentiated by its rule: :func:`run` of these."""

    def linear(self, x: Tensor, run: Run, forward: Run, transpose: Run) -> Tensor:
        """A linear map of x: ``run()`` is ``forward(x)`` with autograd."""

    def convolution(
        self, run: Run, options: tuple, height: int, width: int, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``run`` of the other arguments; gankern.ops.convolution has its three passes."""

    def pause(self) -> AbstractContextManager[Any]:
        """Within the block, nothing of the thread is recorded."""


class _Recording(threading.local):
    """Of this thread: who records, if anybody does."""

    recorder: Recorder | None = None


recording = _Recording()


def differentiate(name: str, options: tuple, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs of a primitive's kernels, with gradients of first and second order by its rule."""
    recorder = recording.recorder
    if recorder is not None:
        return recorder.primitive(name, options, tensors)
    return run(name, options, *tensors)


def run(name: str, options: tuple, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """:func:`differentiate`, without a word to a tape."""
    if not torch.compiler.is_compiling() and first_order_only():
        # Nobody will differentiate it: a small forward takes no longer than Function.apply does.
        return RULES[name].forward(options, *tensors)
    return apply(_Forward, name, options, *tensors)


class _Forward(Function):
    @staticmethod
    def forward(name: str, options: tuple, *tensors: Tensor | None) -> Any:
        return RULES[name].forward(options, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.name, ctx.options, *tensors = inputs
        rule = RULES[ctx.name]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[output[i] for i in rule.non_differentiable])
        ctx.present = tuple(x is not None for x in tensors)
        compiling = torch.compiler.is_compiling()
        _keep(ctx, rule, rule.saved(ctx.options, tensors, output))
        ctx.spares = None
        if not compiling and rule.again(ctx.options, *tensors):
            ctx.spares = [(x, _version(x)) for x in tensors]

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if all(g is None for g in grads):
            return (None,) * (2 + len(ctx.present))
        rule, saved = RULES[ctx.name], _saved_tensors(ctx, grads)
        needed = _needed(ctx, skip=2) if rule.asks_engine else ctx.needs_input_grad[2:]
        if first_order_only():
            result = rule.backward(ctx.options, needed, grads, saved)
        else:
            result = apply(_Backward, ctx.name, ctx.options, needed, len(grads), *grads, *saved)
        return None, None, *result


def _version(x: Tensor | None) -> int:
    """How often it was written to. Of what was made in inference mode nobody counts that, nor has it a gradient."""
    return 0 if x is None or x.is_inference() else x._version


def _keep(ctx: Any, rule: Rule, tensors: Tensors) -> None:
    watched = torch.compiler.is_compiling() or transformed() or recomputed()
    ctx.layers = 0 if watched else rule.layers(ctx.options)
    if ctx.layers:  # torch would release and check all together
        ctx.kept = [(x, _version(x)) for x in tensors]
    else:
        ctx.save_for_backward(*tensors)


def _kept(ctx: Any, arrived: Tensors) -> Tensors:
    if not ctx.layers:
        return ctx.saved_tensors
    found: list[Tensor | None] = []
    for i, (x, version) in enumerate(ctx.kept):
        layer = i % (ctx.layers + 1)
        reached = layer == ctx.layers or arrived[layer] is not None
        if reached and x is not None and _version(x) != version:
            raise RuntimeError(
                f"one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(x.shape)} that {ctx.name} was given is at version {x._version}; expected "
                f"version {version} instead"
            )
        found.append(x if reached else None)
    return found


def _saved_tensors(ctx: Any, arrived: Tensors) -> Tensors:
    if ctx.layers:
        return _kept(ctx, arrived)
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        overwritten = "modified by an inplace operation" in str(error)
        if not overwritten or ctx.spares is None:
            raise
        if any(_version(x) != version for x, version in ctx.spares):
            raise
    tensors = [x for x, _ in ctx.spares]
    return RULES[ctx.name].saved(ctx.options, tensors, run(ctx.name, ctx.options, *tensors))


class _Backward(Function):
    @staticmethod
    def forward(name: str, options: tuple, needed: Sequence[bool], outputs: int, *tensors: Any) -> Any:
        return tuple(RULES[name].backward(options, needed, tensors[:outputs], tensors[outputs:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.name, ctx.options, _, ctx.outputs, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.present = tuple(x is not None for x in tensors)
        _keep(ctx, RULES[ctx.name], tensors)

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
        if all(h is None for h in grad_grads):
            return (None,) * (4 + len(ctx.present))
        rule = RULES[ctx.name]
        needed = _needed(ctx, skip=4) if rule.asks_engine else ctx.needs_input_grad[4:]
        kept = _kept(ctx, grad_grads)
        tensors = (*grad_grads, *kept)
        if first_order_only():
            n, m = len(grad_grads), len(grad_grads) + ctx.outputs
            result = rule.double_backward(ctx.options, needed, tensors[:n], tensors[n:m], tensors[m:])
        elif rule.plain is not None:
            result = _plain_double_backward(rule, ctx.options, grad_grads, kept, ctx.outputs)
        else:
            result = apply(_DoubleBackward, ctx.name, ctx.options, needed, len(grad_grads), ctx.outputs, *tensors)
        if rule.pieces(ctx.options):
            before = zip(result, needed, tensors[len(grad_grads) :])
            result = [torch.zeros_like(t) if g is None and need and t is not None else g for g, need, t in before]
        return None, None, None, None, *result


class _DoubleBackward(Function):
    @staticmethod
    def forward(name: str, options: tuple, needed: Sequence[bool], inputs: int, outputs: int, *tensors: Any) -> Any:
        n, m = inputs, inputs + outputs
        return tuple(RULES[name].double_backward(options, needed, tensors[:n], tensors[n:m], tensors[m:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.name = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise refuse_gradient_order(ctx.name)


def _plain_double_backward(
    rule: Rule, options: tuple, grad_grads: Tensors, tensors: Tensors, outputs: int
) -> list[Tensor | None]:
    """Rule.double_backward in plain PyTorch, with gradients of its own. ``tensors``: gradients of the outputs, then
    what was saved. Views stand for them, so that a derivative by one leaves out how the others depend on it."""
    assert rule.plain is not None
    with torch.enable_grad():
        own = [t if t is None or not t.requires_grad else t.view_as(t) for t in tensors]
        y = rule.plain(options, *own[outputs:])
        pairs = [(t, h) for t, h in zip(own[outputs:], grad_grads) if t is not None and h is not None]
        wanted = [t for t, _ in pairs if t.requires_grad]
        found = torch.autograd.grad(y, wanted, own[0], create_graph=True, allow_unused=True) if wanted else ()
        directions = [h for t, h in pairs if t.requires_grad]
        flows = [(g, h) for g, h in zip(found, directions) if g is not None and g.requires_grad]
        asked = [t for t in own if t is not None and t.requires_grad]
        result: dict[int, Tensor | None] = {}
        if flows and asked:
            gradients, theirs = zip(*flows)
            second = torch.autograd.grad(gradients, asked, theirs, create_graph=True, allow_unused=True)
            result = {id(t): g for t, g in zip(asked, second)}
    return [None if t is None else result.get(id(t)) for t in own]


def _needed(ctx: Any, skip: int) -> tuple[bool, ...]:
    """For each tensor after the first ``skip`` inputs, whether the running backward has a use for its gradient.

    ctx.needs_input_grad says which tensors require one: under ``autograd.grad(y, x)`` that holds for the weights too.
    The engine knows better, but for a leaf that it was asked for: then it raises.
    """
    require = ctx.needs_input_grad[skip:]
    if torch.compiler.is_compiling():  # what is not needed will be removed as dead code
        return require
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return require
    edges = iter(ctx.next_functions)  # one for each input that is a tensor
    return tuple(
        need and _will_run(node)
        for need, (node, _) in zip(require, (next(edges) if present else (None, 0) for present in ctx.present))
    )


def _will_run(node: torch.autograd.graph.Node | None) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)  # type: ignore[arg-type]  # of None it raises
    except RuntimeError:
        return True


def first_order_only() -> bool:
    """Whether a backward that runs now can call its kernel without recording it: nobody will differentiate it
    again, in reverse (grad mode is off) or forward mode, or under a torch.func transform. torch.compile has no
    double backward, and cannot trace a Function inside another one's backward."""
    return torch.compiler.is_compiling() or not (
        (torch.is_grad_enabled() and not torch.is_inference_mode_enabled())
        or in_forward_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``. In eager mode outside torch.func this skips the binding of default arguments to
    forward's signature, which costs as much as a small kernel; there are none."""
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            # Dynamo would trace forward alone and lose the gradient.
            raise RuntimeError(
                "gankern's kernels cannot be compiled inside a torch.func transform: pass implementation='reference', "
                "or leave the transform out of torch.compile"
            )
        # Where nothing is to be differentiated, Dynamo would call forward with a context that it does not take.
        needed = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        return function.apply(*args) if needed else function.forward(*args)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return function.apply(*args)
    plain: Any = super(Function, function)  # torch's stubs leave the base's apply out
    if torch.is_inference_mode_enabled():  # which records nothing of torch's operators, and would of this
        with torch.no_grad():
            return plain.apply(*args)
    return plain.apply(*args)
