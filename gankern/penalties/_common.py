"""What all penalties share: checks of their arguments, how the methods are called, and how gradients are handed out.

A method is a function

    penalty_gradients(critic, inputs, penalty, select, args, kwargs) -> (value, parameters, gradients)

which calls ``critic(*inputs, *args, **kwargs)``, picks the outputs with ``select``, takes the gradients of their sum by
the inputs, and hands these to ``penalty``, which returns the penalty and its derivative by each of them. It returns the
penalty, what has a gradient of it, behind these the other leaves that the outputs depend on, and the gradients.
``_double_backward`` has the one for any critic, ``gankern.tangent`` the one without double backward, which raises
:class:`NotCovered` with the reason where it cannot.

The gradients are computed inside of the call. So the critic's graph is gone when the penalty returns, and the scalar
that it returns only hands the gradients out, times the gradient that comes in: to the loss's backward, GradScaler and
DistributedDataParallel they are gradients like any other.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from gankern.core import autograd, devices
from gankern.core.arguments import shown
from gankern.core.devices import TANGENT
from gankern.core.dispatch import check_floating_on, short
from gankern.core.native import nodes
from gankern.core.torch_internals import ends_recomputation, functional, modules_of, unwrapped
from gankern.functional import _checks
from gankern.nn.coupling import BATCH_NORMS, is_training_batch_norm
from gankern.ops.gradient_penalty import penalty_and_direction
from gankern.penalties import _double_backward
from gankern.tangent import method as tangent
from gankern.tangent.nodes import NotCovered

METHODS = ("auto", "tangent", "double_backward")
WEIGHT = 10.0

Select = Callable[[Any], Tensor] | int | str | None
Tensors = Sequence[Tensor]
logger = logging.getLogger("gankern")


def penalize(
    name: str,
    critic: Callable[..., Any],
    inputs: Tensors,
    *,
    target: float,
    one_sided: bool,
    weight: float = WEIGHT,
    reduction: str = "mean",
    norm_dims: str | int | Sequence[int] = "sample",
    method: str = "auto",
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    select: Select = None,
) -> Tensor:
    """The penalty of the critic's gradients at ``inputs``: what every function of this package ends in."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction is {reduction!r}; accepted are 'mean' and 'sum'")
    if not isinstance(one_sided, bool):
        raise TypeError(f"{name}: one_sided is {shown(one_sided)}; accepted are True and False")
    if method not in METHODS:
        raise ValueError(f"{name}: method is {method!r}; accepted are {', '.join(map(repr, METHODS))}")
    _checks.number(name, "weight", weight)
    _checks.number(name, "target", target)
    check_callable(name, "critic", critic)
    check_conditions(name, "critic_args", critic_args, "critic_kwargs", critic_kwargs)
    if target < 0:
        raise ValueError(f"{name}: target is {target}; it must be 0 or more")
    compiling = torch.compiler.is_compiling()
    dims = _norm_dims(name, norm_dims, inputs)
    if not compiling:
        _warn_of_batch_norm(name, critic)
    samples = inputs[0].shape[0]
    if samples == 0:
        parameters = [p for p in critic.parameters() if p.requires_grad] if isinstance(critic, nn.Module) else []
        return hand_out(inputs[0].new_zeros((), dtype=_wide(inputs)), parameters, map(torch.zeros_like, parameters))

    # Named, since torch.compile passes on names and numbers to the tangent form, but no functions.
    penalty = ("norm", float(weight), float(target), bool(one_sided), reduction, dims or ())
    pick = ("outputs", name, tangent.NONE if select is None else select, samples)
    arguments = (critic, inputs, penalty, pick, tuple(critic_args), dict(critic_kwargs or {}))
    others = tree_leaves((arguments[4], arguments[5])) if critic_args or critic_kwargs else ()
    attached = any(isinstance(x, Tensor) and x.requires_grad for x in (*inputs, *others))
    if method == "auto" and not compiling and devices.host_decides(TANGENT, inputs[0]):
        method = "double_backward"  # the tangent form has the device do less and the host more
    if method == "tangent" and attached:
        raise ValueError(
            f"{name}: method='tangent' gives gradients to parameters only, and a sample or another argument of the "
            f"critic requires one; detach it, or use method='double_backward'"
        )
    parallel: Any = critic if isinstance(critic, nn.parallel.DistributedDataParallel) else None
    learns = parallel is not None and parallel.static_graph and not parallel._static_graph_delay_allreduce_enqueued
    if learns and not parallel.require_backward_grad_sync:
        raise ValueError(
            f"{name}: the first backward of a static graph cannot be within no_sync() of DistributedDataParallel: it "
            f"is the one that torch learns the graph of; run the first one outside"
        )
    known = tangent.refusal(critic) if method == "auto" and not compiling else None
    unexpected = None
    if method != "double_backward" and not attached and known is None:
        try:
            passed_by = unwrapped(critic) is not critic
            return _hand_out_to(critic, *tangent.penalty_gradients(*arguments), passed_by=passed_by)
        except NotCovered as reason:
            if method == "tangent":
                raise ValueError(f"{name}: method='tangent' does not cover this critic: {reason}") from reason
            _log_fallback(name, str(reason))
        except Exception as error:
            # Whatever it is: if it is the critic's own, double backward will raise it too.
            mine = not isinstance(error, torch.OutOfMemoryError) and not ends_recomputation(error)
            if method == "tangent" or compiling or not mine:
                raise
            unexpected = f"{type(error).__name__}: {error}"
            _log_fallback(name, unexpected)
    # A static graph takes the first backward through its forward for the one that fills all gradients: not this one.
    passed_by = isinstance(critic, nn.parallel.DistributedDataParallel) and critic.static_graph
    if isinstance(critic, nn.parallel.DistributedDataParallel) and passed_by:
        inside = unwrapped(critic)
        if inside is critic:
            raise ValueError(
                f"{name}: with static_graph=True the forward of DistributedDataParallel itself does not run, and "
                f"here it has hooks, or another forward; give them to the module inside"
            )
        arguments = (inside, *arguments[1:])
    handed = _hand_out_to(critic, *_by_double_backward(name, arguments), passed_by=passed_by)
    if unexpected is not None:
        tangent.refuse(critic, unexpected)
    return handed


def _log_fallback(name: str, reason: str) -> None:
    logger.info("%s: method 'double_backward' runs, since 'tangent' does not cover this critic: %s", name, reason)


def _by_double_backward(name: str, arguments: tuple) -> tuple[Tensor, Tensors, Tensors]:
    try:
        return _double_backward.penalty_gradients(name, *arguments)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _NO_SECOND_DERIVATIVE):
            raise
        raise RuntimeError(
            f"{name}: the network has an operator without a second derivative, which the penalty needs: {error}\n"
            f"Ways out: for torch's attention, call the penalty within torch.nn.attention.sdpa_kernel("
            f"torch.nn.attention.SDPBackend.MATH); for recurrent layers on a GPU, within "
            f"torch.backends.cudnn.flags(enabled=False); for an autograd.Function, write its backward of "
            f"differentiable operators, without once_differentiable; for a network compiled by torch.compile, give the "
            f"penalty the module inside (network._orig_mod), or call it outside of torch.compile"
        ) from error


# What torch says of an operator, a Function, a layer of cuDNN or compiled code that cannot be differentiated twice.
_NO_SECOND_DERIVATIVE = (
    "is not implemented",
    "once_differentiable",
    "Double backwards is not supported",
    "does not currently support double backward",
    "compiled with non-empty donated buffers",
)


def _norm_penalty(
    weight: float, target: float, one_sided: bool, reduction: str, dims: tuple[int, ...]
) -> Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]]:
    """weight · (norm of each sample's gradient - target)², with its derivative."""

    def penalty(gradients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        rows, restore = _rows(gradients, dims or None)
        scale = weight / (rows.shape[0] if reduction == "mean" else 1)
        values, direction = penalty_and_direction(rows, scale, target, one_sided)
        return values.sum() * scale, restore(direction)

    return penalty


tangent.MAKERS["norm"] = _norm_penalty
tangent.MAKERS["outputs"] = lambda name, select, samples: _Outputs(name, tangent.none(select), samples)


# ---- gradients, handed out ---------------------------------------------------------------------------------


def hand_out(value: Tensor, targets: Sequence[Tensor], gradients: Any) -> Tensor:
    """``value``, with the given gradients for ``targets``."""
    if not targets:
        return value
    targets, gradients = tuple(targets), tuple(gradients)
    if not torch.compiler.is_compiling():
        handed = nodes.hand_out(value, targets, gradients)
        if handed is not NotImplemented:
            return handed
    return autograd.apply(_HandOut, value, len(targets), *targets, *gradients)


def _hand_out_to(
    critic: Any, value: Tensor, targets: Sequence[Tensor], gradients: Sequence[Tensor], passed_by: bool
) -> Tensor:
    """:func:`hand_out`, in step with DistributedDataParallel, which waits in each backward for all parameters, or for
    those that the outputs depend on where it finds the unused ones: those without a gradient are told to it too.
    ``passed_by``: its forward did not run, which would have told it that gradients will come; without that they would
    not be reduced."""
    if not isinstance(critic, nn.parallel.DistributedDataParallel):
        return hand_out(value, targets[: len(gradients)], gradients)
    if not critic.find_unused_parameters:
        known = {id(target) for target in targets}
        targets = [*targets, *(p for p in critic.parameters() if p.requires_grad and id(p) not in known)]
    handed = hand_out(value, targets, [*gradients, *[None] * (len(targets) - len(gradients))])
    if passed_by and critic.require_backward_grad_sync:
        critic.reducer._rebuild_buckets()  # after the first step, once: not possible when gradients are expected
        critic.require_forward_param_sync = True
        critic.reducer.prepare_for_backward([handed] if critic.find_unused_parameters else [])
        if critic.static_graph and not critic._static_graph_delay_allreduce_enqueued:
            handed = autograd.apply(_FirstOfStaticGraph, handed, weakref.ref(critic))
    return handed


class _FirstOfStaticGraph(Function):
    """Inputs: value, DistributedDataParallel by a weak reference. Output: the value. As in torch's own forward: in the
    first backward of a static graph all gradients are reduced together, at its end."""

    @staticmethod
    def forward(value: Tensor, reference: Any) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _, ctx.reference = inputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        parallel = ctx.reference()
        if parallel is not None and not parallel._static_graph_delay_allreduce_enqueued:
            parallel._static_graph_delay_allreduce_enqueued = True
            torch.autograd.Variable._execution_engine.queue_callback(parallel.reducer._delay_all_reduce)
        return grad, None


class _HandOut(Function):
    """Inputs: value, how many targets, targets, their gradients or None. Output: the value.
    csrc/autograd/gradient_penalty.cpp does the same without Python."""

    @staticmethod
    def forward(value: Tensor, count: int, *tensors: Tensor | None) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _, ctx.count, *tensors = inputs
        ctx.targets = tensors[: ctx.count]  # for their places in the graph alone: saved, they could not be trained
        ctx.save_for_backward(*tensors[ctx.count :])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.no_grad():
            found = [None if g is None else _scaled(g, grad) for g in ctx.saved_tensors]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # With create_graph, whatever comes: in a sum of losses the other parts can be differentiated again, and
            # this one would be left out without a word.
            found = [g if g is None else autograd.apply(_NotTwice, g, grad, *ctx.targets) for g in found]
        return None, None, *found, *[None] * ctx.count


class _NotTwice(Function):
    """Inputs: a gradient, what it is to be differentiated by: what came to the penalty, and all targets. Output: the
    gradient. It is on the way to these, since torch.autograd.grad goes no other."""

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("trying to differentiate twice a penalty, whose gradients are computed where it is called")


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """The product, in the gradient's dtype; the factor may be outside of fp16's range."""
    wide = torch.float32 if gradient.dtype == torch.float16 else gradient.dtype
    return (gradient.to(wide) * factor.to(wide)).to(gradient.dtype)


# ---- the critic's outputs ----------------------------------------------------------------------------------


class _Outputs:
    """Picks what is differentiated from what the critic returns: one number a sample."""

    def __init__(self, name: str, select: Select, samples: int) -> None:
        if not (select is None or callable(select) or isinstance(select, int | str)):
            raise TypeError(
                f"{name}: select is {type(select).__name__}; it must be a function of what the critic returns, or an "
                f"index or key into it"
            )
        self.name, self.select, self.samples = name, select, samples

    def __call__(self, returned: Any) -> Tensor:
        out = returned
        if callable(self.select):
            out = self.select(out)
        elif self.select is not None:
            out = self._picked(out)
        if not isinstance(out, Tensor):
            what = f"a {type(out).__name__}"
            if isinstance(out, Mapping):
                what += f" with the keys {', '.join(map(repr, out))}"
            elif isinstance(out, Sequence):
                what += f" of {len(out)}"
            raise TypeError(
                f"{self.name}: the critic returned {what}; pass select=, an index, a key or a function that picks the "
                f"tensor of its outputs"
            )
        if out.ndim == 0 and self.samples == 1:  # a critic that ends in squeeze(), and the last batch of an epoch
            out = out.reshape(1)
        one_each = out.ndim > 0 and out.shape[0] == out.numel() == self.samples
        if not one_each or not out.is_floating_point():
            raise ValueError(
                f"{self.name}: the critic must give one number a sample, [{self.samples}] or [{self.samples}, 1]; "
                f"it gave {short(out.dtype)} of shape {tuple(out.shape)}. A critic of patches needs a "
                f"select= that takes their mean or sum a sample: select=lambda out: out.flatten(1).mean(1). To a "
                f"critic that packs several images into one sample pass them packed, [N / m, m C, H, W]. For one whose "
                f"batch is not the first dimension pass samples with the batch first, and a critic that turns them: "
                f"lambda x: critic(x.transpose(0, 1))"
            )
        return out

    def _picked(self, returned: Any) -> Any:
        """What the index or key picks of several things."""
        by_key = isinstance(returned, Tensor) and isinstance(self.select, str)
        if by_key or not hasattr(type(returned), "__getitem__"):
            raise TypeError(
                f"{self.name}: select is {self.select!r}, and the critic returned {shown(returned)}, of which nothing "
                f"is to be picked; leave it out, or pass a function"
            )
        try:
            return returned[self.select]
        except (KeyError, IndexError, TypeError):
            there = f"the keys {', '.join(map(repr, returned))}" if isinstance(returned, Mapping) else len(returned)
            kind = type(returned).__name__
            raise ValueError(
                f"{self.name}: select is {self.select!r}, and the critic returned a {kind} of {there}"
            ) from None


# ---- other arguments ---------------------------------------------------------------------------------------


def check_callable(name: str, argument: str, value: Any) -> None:
    if not callable(value) or isinstance(value, type):
        came = f"the class {value.__name__}, not an instance of it" if isinstance(value, type) else shown(value)
        raise TypeError(f"{name}: {argument} is {came}; it must be a module or a function")


def check_surroundings(name: str, argument: str) -> None:
    """Where no gradient can be computed: that of the network ``argument``."""
    compiling = torch.compiler.is_compiling()
    if not torch.is_grad_enabled() or (not compiling and torch.is_inference_mode_enabled()):
        where = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
        raise RuntimeError(f"{name}: called inside {where}, where the {argument} has no gradient; call it outside")
    if functional():
        raise RuntimeError(
            f"{name}: called inside a transformation of torch.func (grad, vmap, jvp, ...), which goes another way than "
            f"the gradients that are computed here. There take the {argument}'s gradient by torch.func.grad, and write "
            f"the penalty of it; for gradients of single samples call {name} outside, with one sample at a time"
        )


def check_generator(name: str, argument: str, value: Any) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{name}: {argument} is {shown(value)}; it must be a torch.Generator, or None")


def check_conditions(name: str, of_args: str, args: Any, of_kwargs: str, kwargs: Any) -> None:
    """Of a tensor, each sample would be an argument."""
    if isinstance(args, Tensor | str | Mapping) or not isinstance(args, Iterable):
        raise TypeError(f"{name}: {of_args} is {shown(args)}; it must be a sequence of arguments: (x,) for one")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"{name}: {of_kwargs} is {shown(kwargs)}; it must be a dict of arguments by name, or None")


# ---- samples -----------------------------------------------------------------------------------------------


def samples_of(name: str, argument: str, samples: Tensor | Tensors) -> tuple[Tensor, ...]:
    """One tensor or several, checked, as a tuple."""
    if not isinstance(samples, Iterable) or isinstance(samples, str | Mapping):
        raise TypeError(f"{name}: {argument} is {shown(samples)}; it must be a floating-point tensor, or several")
    tensors = (samples,) if isinstance(samples, Tensor) else tuple(samples)
    if not tensors:
        raise ValueError(f"{name}: {argument} is empty; it must be a tensor, or several")
    for x in tensors:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = short(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: {argument} holds {came}; it must be a floating-point tensor, or several")
        if x.ndim == 0 or x.shape[0] != tensors[0].shape[0]:
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
            raise ValueError(f"{name}: {argument} has shapes {shapes}; all must have one batch size, first")
    if not torch.compiler.is_compiling() and any(x.is_inference() for x in tensors):
        tensors = tuple(x.clone() if x.is_inference() else x for x in tensors)  # which autograd takes
    return tensors


def pairs_of(name: str, real: Tensor | Tensors, fake: Tensor | Tensors) -> tuple[Tensors, Tensors]:
    """Real and fake samples that fit each other."""
    reals, fakes = samples_of(name, "real", real), samples_of(name, "fake", fake)
    if len(reals) != len(fakes):
        raise ValueError(f"{name}: real has {len(reals)} tensors and fake has {len(fakes)}; they must be as many")
    for r, f in zip(reals, fakes):
        if r.shape != f.shape:
            raise ValueError(
                f"{name}: real has shape {tuple(r.shape)} and fake has {tuple(f.shape)}; they must be equal (for "
                f"a shorter last batch of reals take as many fakes)"
            )
        if r.device != f.device:
            raise ValueError(f"{name}: real is on {r.device} and fake on {f.device}; they must be on one device")
    return reals, fakes


def random_alpha(name: str, alpha: Tensor | None, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """One number a sample, [N]: those given, or new ones from [0, 1)."""
    samples = like.shape[0]
    check_generator(name, "generator", generator)
    if alpha is None:
        return torch.rand(samples, generator=generator, device=like.device, dtype=_wide([like]))
    if not isinstance(alpha, Tensor) or alpha.ndim == 0 or alpha.shape[0] != samples or alpha.numel() != samples:
        came = f"shape {tuple(alpha.shape)}" if isinstance(alpha, Tensor) else type(alpha).__name__
        raise ValueError(
            f"{name}: alpha has {came}; it must be one number a sample, a tensor of shape "
            f"{(samples, *[1] * (like.ndim - 1))} or [{samples}]"
        )
    check_floating_on(name, "alpha", alpha, like.device)
    return alpha.reshape(samples)


def _wide(tensors: Tensors) -> torch.dtype:
    return torch.promote_types(tensors[0].dtype, torch.float32)


def _norm_dims(name: str, norm_dims: str | int | Sequence[int], inputs: Tensors) -> tuple[int, ...] | None:
    """The dimensions to take norms over; None for all but the first."""
    if norm_dims == "sample":
        return None
    dims = (norm_dims,) if isinstance(norm_dims, int) else norm_dims
    ndim = inputs[0].ndim
    are_whole = isinstance(dims, Sequence) and all(isinstance(d, int) and not isinstance(d, bool) for d in dims)
    if isinstance(dims, str) or not dims or not are_whole or not all(-ndim <= d < ndim for d in dims):
        raise ValueError(
            f"{name}: norm_dims is {norm_dims!r}; it must be 'sample', or dimensions of the input, which has {ndim}"
        )
    if len(inputs) > 1:
        raise ValueError(f"{name}: norm_dims is {norm_dims!r}; with several inputs only 'sample' is possible")
    dims = tuple(sorted({d % ndim for d in dims}))
    if 0 in dims:
        raise ValueError(f"{name}: norm_dims is {norm_dims!r}; dimension 0 is the batch, which has no norm of its own")
    return None if dims == tuple(range(1, ndim)) else dims


def _rows(gradients: list[Tensor], dims: tuple[int, ...] | None) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """One tensor whose first dimension counts the norms and whose others are what each is taken over; and the way
    back for a tensor like it."""
    first = gradients[0]
    if dims is not None:
        kept = tuple(d for d in range(first.ndim) if d not in dims)
        moved = first.permute(*kept, *dims)
        back = [(*kept, *dims).index(d) for d in range(first.ndim)]
        return moved.flatten(0, len(kept) - 1), lambda rows: [rows.view(moved.shape).permute(back)]
    if len(gradients) == 1:
        return first, lambda rows: [rows]
    flat = [g.flatten(1) if g.ndim > 1 else g[:, None] for g in gradients]

    def restore(rows: Tensor) -> list[Tensor]:
        parts = rows.split([f.shape[1] for f in flat], 1)
        return [part.reshape(g.shape).to(g.dtype) for part, g in zip(parts, gradients)]

    return torch.cat(flat, 1), restore


# ---- batch norm --------------------------------------------------------------------------------------------

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_of_batch_norm(name: str, critic: Any) -> None:
    if not isinstance(critic, nn.Module):
        return
    if not any(map(is_training_batch_norm, modules_of(critic, *BATCH_NORMS))) or critic in _warned:
        return
    for where, module in critic.named_modules():
        if is_training_batch_norm(module):
            _warned.add(critic)
            warnings.warn(
                f"{name}: the critic has batch norm in training mode ({where or 'itself'}: {type(module).__name__}). "
                f"Each output then depends on the whole batch, and the penalty is not one of single samples; use layer "
                f"norm, instance norm, spectral norm or none in a critic with a gradient penalty",
                stacklevel=4,
            )
            return
