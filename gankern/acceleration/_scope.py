"""What is known while an accelerated module runs, and values that wait one operation before they are computed.

Functions that a model calls by itself (``F.interpolate``, ``F.avg_pool2d``, ``F.leaky_relu``, ...) are met by a
:class:`Interception`, a torch function mode that is on during the forward of a module with such calls in its code. A
call that may be the first half of a fused pair is deferred: a :class:`Deferred` tensor stands for its result until the
next operation, which either completes the pair or makes it compute what was called for. So nothing has to be known or
proved about the code between the two, and it does not matter who else holds the tensor:

- a value waits until the next operation that is not known to leave everything else as it is (a closed list: PURE), so
  nothing can overwrite what it is to be computed from; one that changes something itself (a batch norm's running
  statistics) waits for the very next operation alone;
- whoever else uses it later gets the value, computed then with the same gradient;
- it is a node of the autograd graph by itself, for the case that it meets an operation that does not announce itself
  (a custom ``autograd.Function``); a gradient that arrives there goes back through plain PyTorch's form of it (PLAIN).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._functorch import pyfunctorch
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from gankern.core import autograd, devices, dispatch, precision
from gankern.core.native import nodes
from gankern.core.torch_internals import (
    OWN_MODES,
    above_autograd,
    as_called,
    autocasting,
    functions_replaced,
    recomputed,
    torchs_own_functions,
    transformed,
)
from gankern.ops.convolution import primitive


class Kept:
    """Of one accelerated module, by the kind of its call, their own and size: first halves that were met, and those
    that somebody had kept when the forward was over, who may ask for their gradient. These run by themselves, as all
    do in the forward in which they are met first. It goes with no copy, but is found out anew."""

    most = 1024

    def __init__(self) -> None:
        self.met: set[Any] = set()
        self.alone: set[Any] = set()

    def __reduce__(self) -> Any:
        return Kept, ()


class Followed:
    """Whether a first half has a second one behind it (a convolution a 2x2 mean, a norm an activation), wherever
    in the model that is called: found out while it runs, until it is clear that it has none."""

    patience = 4

    def __init__(self) -> None:
        self.misses = 0

    @property
    def waits(self) -> bool:
        return self.misses < self.patience

    def __reduce__(self) -> Any:
        return Followed, ()


class _State(threading.local):
    """Of the accelerated module that runs in this thread."""

    def __init__(self) -> None:
        self.intercepting = False
        self.left = False  # within a module that is to stay as it is
        self.grad_mode = True  # when that began; another one is of a block without gradients, or a Function's forward
        self.exposed = False  # whether somebody got at a tensor's memory, and may write to it unseen
        self.double = False  # whether the gradient may be differentiated
        self.waiting: tuple[Callable[[], Deferred | None], ...] = ()  # what is deferred, in the order of the calls
        # Of the convolutions and of the norms that a module calls by itself.
        self.followed: tuple[Followed | None, Followed | None] = (None, None)
        self.log: Any = None  # _log.Log, while a forward is listed
        self.chains: Any = None  # _chains.Chains of the module
        # Since the root's forward began, in microseconds: what is taken to be gained, the part of it for which torch's
        # functions had to be watched, and how many of them were.
        self.gained = self.gained_by_watching = 0.0
        self.watched = 0
        self.fused: tuple[Callable[[], Deferred | None], ...] = ()  # halves of pairs that ran, which one may still hold
        self.kept = Kept()  # of the module
        self.call: Any = None  # what kind of call of it runs: modes, sizes, arguments that decide
        self.tried: tuple[tuple[weakref.ref[Deferred], Any], ...] = ()  # first halves whose kind was not met before


state = _State()


def place(device: torch.device) -> tuple:
    """What a computation depends on besides its arguments, where it is called."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return torch.is_grad_enabled(), primitive.wish(), precision.get_convolution_precision(), stream, _disturbed(device)


def _disturbed(device: torch.device) -> bool:
    """Whether anything is at work under which nothing is deferred."""
    return transformed() or recomputed() or autocasting(device.type) or torch.is_inference_mode_enabled()


@contextlib.contextmanager
def at(place: tuple, device: torch.device) -> Iterator[None]:
    """Makes the place of a call that was deferred there the present one: the gradient mode, the settings, the stream,
    and nothing of autocast, inference mode, torch.func and hooks on what autograd saves."""
    grad_mode, implementation, level, stream, _ = place
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch._C._functorch.peek_interpreter_stack() is not None:
            stack.enter_context(pyfunctorch.temporarily_clear_interpreter_stack())
        if autocasting(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if recomputed():
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        stack.enter_context(dispatch.use_implementation(implementation))
        stack.enter_context(precision.convolution_precision(level))
        stack.enter_context(torch.set_grad_enabled(grad_mode))
        yield


def functions_as_called() -> contextlib.AbstractContextManager[None]:
    """Nothing waits while somebody's function stands in the place of one of torch's: one that does was put there
    later."""
    return torchs_own_functions() if functions_replaced() else contextlib.nullcontext()


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _versions(arguments: tuple[Any, ...]) -> list[tuple[int, int]]:
    """Of the tensors among them, which they are, for torch.utils.swap_tensors exchanges that, and how often they were
    written to."""
    return [(x._cdata, x._version) for x in arguments if isinstance(x, Tensor)]


class Pair:
    """The first half of a pair: how to compute it alone, and what its second half has to know. ``lasts``: whether it
    changes nothing, so that it does not matter when it is computed as long as its arguments are what they were."""

    __slots__ = (
        "after", "alone", "arguments", "compute", "frame", "kind", "lasts", "node", "origin", "place", "result",
        "spent", "versions",
    )  # fmt: skip

    def __init__(self, kind: str, compute: Callable[..., Tensor], arguments: tuple) -> None:
        self.kind, self.compute, self.arguments = kind, compute, arguments
        self.lasts = kind in LASTING
        self.frame = None if state.log is None else state.log.top
        self.place = place(arguments[0].device)
        self.versions = _versions(arguments)
        self.origin: Origin | None = None  # where gradients may be asked for
        self.node: Any = None  # where autograd has the tensor that stands for it
        self.result: Tensor | None = None
        self.spent = False  # whether what follows ran in one with it, so that perhaps nobody asks for it
        self.alone = False  # whether nothing is to run in one with it
        # Where autograd has the result of what ran in one with it, and that operation by itself.
        self.after: tuple[tuple[GradientEdge, Callable[[Tensor], Tensor]], ...] = ()

    def check(self) -> None:
        if self.versions != _versions(self.arguments):
            raise RuntimeError(
                "gankern.accelerate: a tensor was overwritten between two operations that run as one, in a way that "
                "could not be seen; pass the module's name in exclude= (gankern.restore undoes all), and report this"
            )

    def value(self) -> Tensor:
        if self.result is None:
            with torch._C.DisableTorchFunction():  # else what is called here would compute what waits: this
                self.check()
                device, log = self.arguments[0].device, state.log
                listed = contextlib.nullcontext() if log is None else log.resumed(self.frame)
                elsewhere = contextlib.nullcontext() if place(device) == self.place else at(self.place, device)
                with listed, elsewhere, functions_as_called():
                    self.result = self.compute(*self.arguments)
            self.arguments = ()
        return self.result


# By kind: what a first half computes, of the same arguments, by torch's own operations: without a word to anybody, with
# no part in running statistics, and differentiable to any order. The first argument says what to take for a tensor.
PLAIN: dict[str, Callable[..., Tensor]] = {}


class Origin:
    """What a first half is made of, for gradients that reach it through an operation that does not announce itself. It
    refers to no tensor that is made of it, so that all of them go when the last one of them does."""

    def __init__(self, pair: Pair) -> None:
        self.kind, self.arguments, self.place = pair.kind, pair.arguments, pair.place
        # What torch's operation would have kept for its backward.
        fixed = pair.arguments[3].fixed if pair.kind == "norm" else ()
        self.saved = () if pair.kind in ("upsample", "pad") else (*pair.arguments[:2], *fixed)
        self.versions = _versions(self.saved)

    def backward(self, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of its inputs, by a graph of its own: the one that was made in the forward may be released."""
        if self.versions != _versions(self.saved):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: an "
                "input of an operation that gankern.accelerate let wait was written to before the backward"
            )
        with torch._C.DisableTorchFunction():
            with at(self.place, inputs[0].device), functions_as_called():
                # One of them may be made of another one: that is autograd's affair, behind this.
                own = {id(x): x.view_as(x) for x in inputs}
                value = PLAIN[self.kind](lambda x: own.get(id(x), x), *self.arguments)
            return torch.autograd.grad(
                value, list(own.values()), grad, create_graph=torch.is_grad_enabled(), allow_unused=True
            )


class Deferred(Tensor):
    """A tensor that is computed by the next operation on it, or together with that."""

    pair: Pair

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is torch.autograd.grad:
            return _grad(*args, **(kwargs or {}))
        if func in _ANCHORS:
            _refuse_anchors(kwargs.get("inputs") if func in _BACKWARDS and kwargs else args[:1])
        first = args[0] if args else None
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs or {}))
        return _itself(first, func(*args, **kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as what it is without the decorator
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # An operation that did not announce itself: its gradient arrives at _Connection. Autograd is behind us here.
        def plain(x: Deferred) -> Tensor:
            with above_autograd():
                value = x.pair.value()
            return value.detach()

        with torch.no_grad():
            args, kwargs = tree_map_only(Deferred, plain, (args, kwargs or {}))
            return func(*args, **kwargs)

    def value(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            if not torch.compiler.is_compiling() and self.is_rewritten():
                self.pair.result, self.pair.node = _Rewritten.apply(self, self.pair.value()), self.grad_fn
            return self.pair.value()

    def is_rewritten(self) -> bool:
        """Whether a Function took it for one that it writes to (``mark_dirty``) and made it its own result."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn is not self.pair.node

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.value().__deepcopy__(memo)


def _itself(first: Any, result: Any) -> Any:
    """What an operation in place returns: the tensor that it was given, which a Function may have marked as dirty."""
    return first if type(first) is Deferred and result is first.pair.result else result


class _Connection(torch.autograd.Function):
    """Makes the tensor that stands for a pair's result; a gradient that arrives at it goes on to what the result is
    computed from. The inputs are all tensors of it that may have a gradient."""

    @staticmethod
    def forward(ctx: Any, origin: Origin, size: torch.Size, like: Tensor, *inputs: Tensor) -> Tensor:
        ctx.origin, ctx.inputs = origin, inputs
        return Tensor._make_wrapper_subclass(Deferred, size, dtype=like.dtype, device=like.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, None, *ctx.origin.backward(ctx.inputs, grad)


class _Rewritten(torch.autograd.Function):
    """The value of a tensor that waited and that a Function wrote to, as that Function's result."""

    @staticmethod
    def forward(ctx: Any, deferred: Deferred, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


# ---- gradients at a value that was computed in one with what follows ----------------------------------------------

_tensor: Any = Tensor  # whose attributes, on the class, are descriptors: the stubs show what a tensor has there
_BACKWARDS = (torch.autograd.backward, Tensor.backward)
# What makes a gradient arrive at a value, or changes it there.
_ANCHORS = {*_BACKWARDS, Tensor.register_hook, Tensor.retain_grad, _tensor.grad_fn.__get__}


def _is_passed_by(x: Any) -> bool:
    """Whether there is a result that autograd does not know to be made of x."""
    return type(x) is Deferred and bool(x.pair.after or x.pair.spent)


def _refuse_anchors(values: Any) -> None:
    if any(map(_is_passed_by, values if isinstance(values, (list, tuple)) else [values])):
        raise RuntimeError(
            "gankern.accelerate: a gradient is asked for, or a hook registered, at a value after what follows it was "
            "computed in one with it, where that gradient does not pass; register the hook before the next operation, "
            "or pass the name of the layer in exclude="
        )


def _grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.autograd.grad, where inputs may have run in one with what follows: the gradient at the result of that is
    taken back by the second half alone."""
    single = isinstance(inputs, (Tensor, GradientEdge))
    inputs = [inputs] if single else list(inputs)
    if any(_is_passed_by(x) and x.pair.spent for x in inputs):
        _refuse_anchors(inputs)
    outputs = tree_map_only(Deferred, Deferred.value, outputs)
    args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs))
    values = [x.value() if type(x) is Deferred else x for x in inputs]
    after = [(i, *pair) for i, x in enumerate(inputs) if type(x) is Deferred for pair in x.pair.after]
    if not after:
        return torch.autograd.grad(outputs, values, *args, **kwargs)
    names = ("grad_outputs", "retain_graph", "create_graph", "only_inputs", "allow_unused")
    options = {**dict(zip(names, args)), **kwargs}
    if options.pop("is_grads_batched", False):
        _refuse_anchors(inputs)
    allowed, zeros = options.pop("allow_unused", None), options.pop("materialize_grads", False)
    wanted: Any = [*values, *(edge for _, edge, _ in after)]
    found: list[Any] = list(torch.autograd.grad(outputs, wanted, allow_unused=True, **options))
    of_values, of_edges = found[: len(values)], found[len(values) :]
    for (i, _, function), grad in zip(after, of_edges):
        if grad is not None:
            with torch.enable_grad():
                x = values[i] if options.get("create_graph") else values[i].detach().requires_grad_()
                (more,) = torch.autograd.grad(function(x), x, grad, create_graph=bool(options.get("create_graph")))
            of_values[i] = more if of_values[i] is None else of_values[i] + more
    if zeros:
        of_values = [torch.zeros_like(x) if g is None else g for x, g in zip(values, of_values)]
    elif not allowed and (unused := next((i for i, g in enumerate(of_values) if g is None), None)) is not None:
        raise RuntimeError(
            f"The differentiated Tensor at index {unused} appears to not have been used in the graph. Set "
            f"allow_unused=True if this is the desired behavior."
        )
    return tuple(of_values)


def followed_by(first: Deferred, result: Tensor, function: Callable[[Tensor], Tensor]) -> None:
    """Says that ``result`` is ``function`` of what the first half would have made, and ran in one with it."""
    if result.grad_fn is not None:
        first.pair.after = (*first.pair.after, (GradientEdge(result.grad_fn, result.output_nr), function))


# Kinds of pairs whose first half changes nothing.
LASTING = ("upsample", "convolution", "chain", "pad", "scores", "weights", "weights, turned")

METADATA = {
    _tensor.shape.__get__,
    _tensor.ndim.__get__,
    _tensor.dtype.__get__,
    _tensor.device.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.is_floating_point,
}


def defer(kind: str, size: torch.Size, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """A tensor of that size which is ``compute(*arguments)``, later. The first argument is a tensor. Now, where one of
    them was made in inference mode: of such a tensor nobody counts how often it is written to."""
    if any(isinstance(x, Tensor) and x.is_inference() for x in arguments):
        return compute(*arguments)
    pair = Pair(kind, compute, arguments)
    like = arguments[0]
    inputs: list[Tensor] = []
    if torch.is_grad_enabled():  # each once
        inputs = list({id(x): x for x in arguments if isinstance(x, Tensor) and x.requires_grad}.values())
    result: Deferred
    if inputs:
        pair.origin = Origin(pair)
        result = _Connection.apply(pair.origin, size, like, *inputs)
    else:
        result = Tensor._make_wrapper_subclass(Deferred, size, dtype=like.dtype, device=like.device)
    result.pair = pair
    with torch._C.DisableTorchFunction():
        pair.node = result.grad_fn
    if kind != "chain" and state.log is None:  # for a report a copy of the module runs, whose values nobody keeps
        key, kept = (state.call, kind, size), state.kept
        if key not in kept.met and len(kept.met) < Kept.most:
            pair.alone = True
            state.tried = (*state.tried, (weakref.ref(result), key))
        else:
            pair.alone = key in kept.alone
    # What changes something itself is held: its next operation computes it, also where nobody wants its result.
    reference = weakref.ref(result) if pair.lasts else lambda: result
    state.waiting = (*state.waiting, reference)
    return result


PAIRS, SECOND = "pairs", "second derivative"  # what a device's file decides, of all values of a map


def may_defer(x: Tensor) -> bool:
    """Whether deferring is possible here at all."""
    return (
        state.intercepting
        and not state.left
        and not state.exposed
        and torch.is_grad_enabled() == state.grad_mode
        and type(x) is Tensor
        and x.is_floating_point()
        and devices.is_known(PAIRS, x)
        and plain()
        and not autocasting(x.device.type)
        and not torch.is_inference_mode_enabled()
    )


def plain() -> bool:
    """Whether nothing but autograd watches: no tape, no transformation of programs, no compiler, nobody who runs it
    again and counts what is saved."""
    return autograd.recording.recorder is None and not (torch.compiler.is_compiling() or transformed() or recomputed())


def settle(but: Any = None, pure: bool = False) -> None:
    """Before an operation: computes what waits, except ``but``, which is about to be used; and of what lasts only that
    which the operation could touch: nothing, where it is ``pure``."""
    waiting, state.waiting = state.waiting, ()
    kept = []
    for reference in waiting:
        first = reference()
        if first is None or first is but or first.pair.result is not None:
            continue
        if first.pair.spent:
            state.fused = (*state.fused, reference)
        elif pure and first.pair.lasts:
            kept.append(reference)
        else:
            first.value()
    state.waiting = tuple(kept)


def settled(x: Any) -> Any:
    """x, computed if it is deferred."""
    return x.value() if type(x) is Deferred else x


def is_half(x: Any, kind: str) -> TypeGuard[Deferred]:
    """Whether x is the first half of such a pair, and was not computed meanwhile."""
    return waits(x, kind) and not x.pair.alone


def waits(x: Any, kind: str) -> TypeGuard[Deferred]:
    """The same, also of one that nothing is to run in one with."""
    return (
        type(x) is Deferred
        and x.pair.kind == kind
        and x.pair.result is None
        and not x.is_rewritten()
        and place(x.pair.arguments[0].device) == x.pair.place  # else each half runs where it was called
    )


def fuse(first: Deferred) -> tuple:
    """The arguments of the first half of a pair that runs now."""
    first.pair.check()
    state.fused = (*state.fused, weakref.ref(first))
    return first.pair.arguments


def gain(microseconds: float) -> None:
    """Says what something of ours is taken to be worth, by its size alone: nothing depends on what a clock says."""
    state.gained += microseconds


def joined(first: Deferred | None, now: str, worth: float) -> None:
    """Says that operations ran as one: ``now``; ``first`` is that half of a pair."""
    state.gained += worth
    state.gained_by_watching += worth
    if state.log is not None:
        state.log.say(now, "")
        if first is not None and first.pair.frame is not None:
            first.pair.frame.now, first.pair.frame.why = "in one with what follows", ""


def listed(operation: str) -> contextlib.AbstractContextManager[None]:
    """While an operation of ours runs that is no function of torch, where somebody lists what runs."""
    return contextlib.nullcontext() if state.log is None else state.log.part(operation)


def say(now: str, why: str = "") -> None:
    """What runs for the operation at hand and why not more, where somebody lists it."""
    if state.log is not None:
        state.log.say(now, why)


def preserve() -> None:
    """Before anything that may overwrite a tensor: computes first halves of pairs that somebody still holds."""
    references, state.fused = state.fused, ()
    for reference in references:
        first = reference()
        if first is not None:
            first.value()


def note_kept() -> None:
    """When the forward is over: of what was met first in it, what is still there."""
    for reference, key in state.tried:
        state.kept.met.add(key)
        if reference() is not None:
            state.kept.alone.add(key)


def _may_overwrite(func: Any, args: tuple, kwargs: dict) -> bool:
    name = getattr(func, "__name__", "_")
    inplace = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    return inplace or name == "__set__" or "out" in kwargs or any(x is True for x in (*args[1:], *kwargs.values()))


def _listed(names: str, *owners: Any) -> set[Any]:
    return {getattr(owner, name) for name in names.split() for owner in owners if hasattr(owner, name)}


# Operations that change nothing: no tensor, no buffer, no state of random numbers.
PURE = METADATA | {
    *_listed(
        "add sub mul div true_divide neg abs square sqrt rsqrt exp log pow reciprocal tanh sigmoid mean sum var norm "
        "matmul mm mv bmm dot view reshape view_as reshape_as flatten permute transpose t squeeze unsqueeze expand "
        "expand_as chunk split narrow contiguous detach cat stack numel clone to type_as float double "
        "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __neg__ __matmul__ "
        "__getitem__",
        torch,
        Tensor,
    ),
    *_listed("linear normalize softmax softplus tanh sigmoid conv1d conv2d conv3d", torch.nn.functional, torch),
    *(getattr(_tensor, name).__get__ for name in ("data", "requires_grad", "is_cuda", "grad_fn", "T", "mT")),
    torch._C._set_grad_enabled,
}


def _expose(*args: Any, **kwargs: Any) -> Any:
    settle()
    state.exposed = True
    return NotImplemented


HANDLERS: dict[Any, Callable[..., Any]] = dict.fromkeys(
    _listed("numpy __array__ __dlpack__ data_ptr storage untyped_storage", Tensor), _expose
)
STEPS: dict[Any, Callable[..., Any]] = {}  # of operations that may be a part of a chain: (function, args, kwargs)


# Of tensors on which torch's functions are torch's own.
PLAIN_TYPES = {Tensor, torch.nn.Parameter, Deferred}


class Interception(TorchFunctionMode):
    """Sends torch's functions to those of HANDLERS, which return NotImplemented for what they leave to torch."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func in METADATA or state.left:
            return func(*args, **kwargs)
        state.watched += 1
        func = as_called(func)
        handler, pure = HANDLERS.get(func), func in PURE
        others = not PLAIN_TYPES.issuperset(types)  # tensors of a class of somebody's, with functions of its own
        if others or transformed() or recomputed() or functions_replaced():
            handler, pure = None, False
            if others and func is not torch.autograd.grad and func not in _ANCHORS:
                args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs))
        elif func in STEPS and (result := STEPS[func](func, args, kwargs)) is not NotImplemented:
            return result
        if state.waiting:
            if handler is None:
                settle(pure=pure and kwargs.get("out") is None)
            else:
                settle(args[0] if args else kwargs.get("input"), not _may_overwrite(func, args, kwargs))
        if state.fused and _may_overwrite(func, args, kwargs):
            preserve()
        if handler is not None:
            before = state.gained - state.gained_by_watching
            with contextlib.nullcontext() if state.log is None else state.log.function(func):
                result = handler(*args, **kwargs)
            state.gained_by_watching += state.gained - state.gained_by_watching - before
            if result is not NotImplemented:
                # Where nothing is fused, within a Function for one, what is done in place returns what it was given.
                return result if torch.is_grad_enabled() == state.grad_mode else _itself(args and args[0], result)
        return func(*args, **kwargs)


OWN_MODES.add(Interception)
nodes.set_own_mode(Interception)  # it watches torch's functions, not this library's
