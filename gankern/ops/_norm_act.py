"""What normalisations with a (leaky) ReLU or PReLU behind them share, whatever they normalise over: their operators,
and how they are differentiated by these.

Such a primitive has options, tensors and operators of one shape, beside what is its own (written ... here):

    options   implementation, ..., eps, negative_slope
    tensors   x, weight, bias, slope, running_mean, running_var (the last two where it has running statistics)
    forward(x, weight, bias, [running_mean, running_var,] ..., eps, negative_slope, slope) -> y, stats
    backward(grad, x, weight, bias, stats, ..., negative_slope, affine, slope)
        -> gradients of x, weight, bias and slope
    double_backward(grad_grad_x, grad_grad_weight, grad_grad_bias, grad, x, weight, bias, stats, ..., negative_slope,
        affine) -> gradients of grad, x and weight

``stats`` is [3, ...], in the dtype that x is accumulated in: mean, 1 / sqrt(var + eps), and the variance that running
statistics take up. weight and bias are in that dtype too, [C] or [N, C]. ``affine``: whether gradients of these are
wanted. Kept for the backward: x, weight, bias, slope and stats; the activation's derivative is computed again.

PReLU's slope is a tensor, [C], beside which ``negative_slope`` is 0 and not read. Its second order is made of
that of the normalisation alone and of bias_act's: who uses it twice is rare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.core import autograd, registry
from gankern.core.autograd import Tensors
from gankern.core.layout import accumulation_dtype, is_dense_channels_last

_AFFINE = "Tensor x, Tensor? weight, Tensor? bias"


def empty_like(x: Tensor) -> Tensor:
    """What kernels write: as x lies in memory where they can read it as it lies, else contiguous."""
    if x.is_contiguous() or is_dense_channels_last(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_affine(like: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty((0,) if like is None else like.shape, dtype=accumulation_dtype(x))


def widened(x: Tensor, *values: Tensor | None) -> tuple[Tensor | None, ...]:
    """In the dtype that x is accumulated in."""
    dtype = accumulation_dtype(x)
    return tuple(v if v is None or v.dtype == dtype else v.to(dtype) for v in values)


def activated(y: Tensor, negative_slope: float, slope: Tensor | None) -> Tensor:
    if slope is not None:
        return F.prelu(y, slope.to(y.dtype))
    return y if negative_slope == 1 else F.leaky_relu(y, negative_slope)


class NormAct:
    """One of them, registered. ``reference`` takes what the forward does; ``groups(x, *own)`` is the shape of a
    statistic; ``plain(options, x, weight, bias, stats)`` the normalisation in plain PyTorch, to any order; ``own`` what
    the operators take of its own, as a schema has it. With ``running``, it has running statistics, and the first of its
    own is ``training``: whether the statistics are x's own, and not these. ``beyond_cuda``: of one that has kernels in
    CUDA C++, for large maps, why these do not take x, weight, bias and slope with its options; None where they do."""

    def __init__(
        self,
        name: str,
        reference: Callable[..., tuple[Tensor, Tensor]],
        groups: Callable[..., Sequence[int]],
        plain: Callable[[tuple, Tensor, Tensor | None, Tensor | None, Tensor], Tensor],
        own: tuple[str, ...] = (),
        running: bool = False,
        beyond_cuda: Callable[..., str | None] | None = None,
    ) -> None:
        self.name, self.reference, self.groups, self.plain, self.running = name, reference, groups, plain, running
        self.beyond_cuda = beyond_cuda
        self.any_order = f"{name}, any order"  # for who may not refuse a third one, at the price of nodes in Python
        self.primitive = registry.declare(name, gradient_order=2, cuda=beyond_cuda is not None, large_only=True)
        self.before_slope = len(own)
        self._define("".join(f"{argument}, " for argument in own))
        for rule, of_any_order in ((name, None), (self.any_order, self._plain)):
            autograd.Rule(
                rule,
                self._forward,
                lambda options, tensors, outputs: (*tensors[:4], outputs[1]),
                self._backward,
                self._double_backward,
                non_differentiable=(1,),
                pieces=lambda options: options[-1] != 1,  # the slope
                plain=of_any_order,
            )

    # ---- operators ----------------------------------------------------------------------------------------------

    def _define(self, own: str) -> None:
        statistics = "Tensor? running_mean, Tensor? running_var, " if self.running else ""
        registry.define(
            self.name,
            "forward",
            f"{self.name}({_AFFINE}, {statistics}{own}float eps, float negative_slope, Tensor? slope=None) -> "
            "(Tensor y, Tensor stats)",
            self._fake_forward,
        )
        registry.define(
            self.name,
            "backward",
            f"{self.name}_backward(Tensor grad, {_AFFINE}, Tensor stats, {own}float negative_slope, bool affine, "
            "Tensor? slope=None) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_slope)",
            self._fake_backward,
        )
        registry.define(
            self.name,
            "double_backward",
            f"{self.name}_double_backward(Tensor? grad_grad_x, Tensor? grad_grad_weight, Tensor? grad_grad_bias, "
            f"Tensor grad, {_AFFINE}, Tensor stats, {own}float negative_slope, bool affine) -> "
            "(Tensor grad_grad, Tensor grad_x, Tensor grad_weight)",
            self._fake_double_backward,
        )

    def _fake_forward(self, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        first = 4 if self.running else 2
        own = others[first : first + self.before_slope]
        return empty_like(x), x.new_empty((3, *self.groups(x, *own)), dtype=accumulation_dtype(x))

    def _fake_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, *options: Any
    ) -> tuple[Tensor, ...]:
        _, affine, *slope = options[self.before_slope :]  # torch leaves out a slope that is the schema's default
        of_affine = (empty_affine(v if affine else None, x) for v in (weight, bias))
        return empty_like(x), *of_affine, empty_affine(slope[0] if slope else None, x)

    def _fake_double_backward(
        self,
        h: Tensor | None,
        h_weight: Tensor | None,
        h_bias: Tensor | None,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        grad_x = empty_like(x) if self._moves_x(h, h_weight, options) else x.new_empty(0)
        return empty_like(x), grad_x, empty_affine(weight if options[-1] and h is not None else None, x)

    # ---- the rule -----------------------------------------------------------------------------------------------

    def _moves_x(self, h: Tensor | None, h_weight: Tensor | None, own: tuple) -> bool:
        """Whether the first gradients depend on x, other than by the activation's kink."""
        of_statistics = not self.running or own[0]
        return h_weight is not None or (h is not None and of_statistics)

    def _kernel(self, implementation: str, launcher: str, x: Tensor) -> Callable[..., Any]:
        return registry.kernel(implementation, self.name, launcher, x.device)

    def _forward(
        self,
        options: tuple,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        slope: Tensor | None,
        *running: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return self._kernel(options[0], "forward", x)(x, weight, bias, *running, *options[1:], slope)

    def _backward(self, options: tuple, needed: Sequence[bool], grads: Tensors, saved: Tensors) -> Tensors:
        implementation, *own, _, negative_slope = options
        x, weight, bias, slope, stats = saved
        assert x is not None
        affine = needed[1] or needed[2]
        kernel = self._kernel(implementation, "backward", x)
        grad_x, *others = kernel(grads[0], x, weight, bias, stats, *own, negative_slope, affine, slope)
        of_running = (None,) * (len(needed) - 4)
        return grad_x, *(value if need else None for value, need in zip(others, needed[1:4])), *of_running

    def _double_backward(
        self, options: tuple, needed: Sequence[bool], grad_grads: Tensors, grads: Tensors, saved: Tensors
    ) -> Tensors:
        implementation, *own, _, negative_slope = options
        x, weight, bias, slope, stats = saved
        assert x is not None
        if slope is not None:
            return self._prelu_double_backward(options, needed, grad_grads, grads, saved)
        h, h_weight, h_bias = grad_grads[:3]
        needed_weight = needed[3]  # of y, stats, x, weight, bias, slope, stats
        grad_grad, grad_x, grad_weight = self._kernel(implementation, "double_backward", x)(
            h, h_weight, h_bias, grads[0], x, weight, bias, stats, *own, negative_slope, needed_weight
        )
        grad_x = grad_x if self._moves_x(h, h_weight, tuple(own)) else None
        return grad_grad, None, grad_x, grad_weight if needed_weight and h is not None else None, None, None, None

    def _prelu_double_backward(
        self, options: tuple, needed: Sequence[bool], grad_grads: Tensors, grads: Tensors, saved: Tensors
    ) -> Tensors:
        """By the normalisation alone, z, and PReLU of it."""
        implementation, *own, eps, _ = options
        x, weight, bias, slope, stats = saved
        h, h_weight, h_bias, h_slope = grad_grads[:4]
        grad = grads[0]
        assert x is not None and slope is not None and stats is not None and grad is not None
        dtype, x, grad = x.dtype, x.to(slope.dtype), grad.to(slope.dtype)  # of half precision, wider
        h = None if h is None else h.to(slope.dtype)
        moves_x = self._moves_x(h, h_weight, tuple(own))

        def prelu(launcher: str) -> Callable[..., Any]:
            return registry.kernel(implementation, "bias_act", launcher, z.device)

        running = (stats[0], stats[2]) if self.running else ()
        z = self._kernel(implementation, "forward", x)(x, weight, bias, *running, *own, eps, 1.0, None)[0]
        constants = (1, 1.0, None)  # dim, gain, clamp
        grad_z = prelu("prelu_backward")(grad, z, None, slope, *constants, False, False)[0]
        of_grad_z = grad_x = grad_weight = grad_bias = None
        if h is not None or h_weight is not None or h_bias is not None:
            of_grad_z, grad_x, grad_weight = self._kernel(implementation, "double_backward", x)(
                h, h_weight, h_bias, grad_z, x, weight, bias, stats, *own, 1.0, needed[3]
            )
            grad_x, grad_weight = grad_x if moves_x else None, grad_weight if h is not None and needed[3] else None
        grad_grad, of_z, _, grad_slope = prelu("prelu_double_backward")(
            of_grad_z, None, h_slope, grad, z, None, slope, *constants, h_slope is not None, False, needed[5]
        )
        if h_slope is not None:
            affine = weight is not None or bias is not None
            others = self._kernel(implementation, "backward", x)(of_z, x, weight, bias, stats, *own, 1.0, affine, None)
            grad_x = others[0] if grad_x is None else grad_x + others[0]
            if needed[3]:
                grad_weight = others[1] if grad_weight is None else grad_weight + others[1]
            grad_bias = others[2] if needed[4] else None
        of_images = (None if t is None else t.to(dtype) for t in (grad_grad, None, grad_x))
        return *of_images, grad_weight, grad_bias, grad_slope if needed[5] else None, None

    def _plain(
        self, options: tuple, x: Tensor, weight: Tensor | None, bias: Tensor | None, slope: Tensor | None, stats: Tensor
    ) -> Tensor:
        return activated(self.plain(options, x, weight, bias, stats), options[-1], slope)

    # ---- the call -----------------------------------------------------------------------------------------------

    def __call__(
        self,
        x: Tensor,
        affine: tuple[Tensor | None, Tensor | None, Tensor | None],
        running: tuple[Tensor | None, ...],
        options: tuple,
        implementation: str | None = None,
        any_order: bool = False,
    ) -> tuple[Tensor, ...]:
        """The result and its statistics, for checked arguments. ``affine``: weight, bias and slope, of any dtype;
        slope, PReLU's in place of the last option, is [1] or [C]. ``options``: its own, eps and negative_slope."""
        weight, bias, slope = widened(x, *affine)
        if slope is not None:
            slope, options = slope.expand(x.shape[1]), (*options[:-1], 0.0)
        if self.running:
            running = (None, None) if options[0] else widened(x, *running)
        chosen = self.primitive.select(x, implementation)
        if chosen == "cuda" and self.beyond_cuda is not None:
            reason = self.beyond_cuda(x, weight, bias, slope, *options)
            if reason:
                chosen = self.primitive.instead(chosen, reason, x, implementation)
        if chosen == "reference":
            return self.reference(x, weight, bias, *running, *options, slope)
        name = self.any_order if any_order else self.name
        return autograd.differentiate(name, (chosen, *options), x, weight, bias, slope, *running)
