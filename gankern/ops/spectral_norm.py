"""Operators and gradients of spectral norm.

All take lists, one entry a layer: a whole network costs one operator call forward and one backward. Kernels:
csrc/cpu/spectral_norm.cpp and gankern/triton/spectral_norm.py; the formulas stand there.

What a forward leaves for its backward is one vector, the *state*, in the accumulation dtype: sigma of all layers,
then u and v of each layer. It holds the pair that this forward ended with, whatever the buffers become later.
A layer that a loss does not reach has no gradient: None goes in, and an empty tensor comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gankern import dispatch
from gankern.ops import _tiers
from gankern.reference.spectral_norm import spectral_norm as reference

NAME = "spectral_norm"
GRADIENT_ORDER = 2
primitive = _tiers.declare(NAME, gradient_order=GRADIENT_ORDER)


def state_sizes(weights: Sequence[Tensor], dims: Sequence[int]) -> list[int]:
    """The lengths of the state's parts: the sigmas, then u and v of each layer."""
    sizes = [len(weights)]
    for weight, dim in zip(weights, dims):
        height = weight.shape[dim]
        sizes += (height, weight.numel() // height)
    return sizes


def _fake_forward(weights, us, vs, dims, n_power_iterations, eps, u_first, add_eps):
    accumulation = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    state = weights[0].new_empty(sum(state_sizes(weights, dims)), dtype=accumulation)
    return [torch.empty_like(w) for w in weights], state


def _fake_gradients(grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor]:
    return [w.new_empty(0) if g is None else torch.empty_like(w) for g, w in zip(grads, weights)]


_tiers.define(
    NAME,
    "forward",
    "spectral_norm(Tensor[] weights, Tensor[] us, Tensor[] vs, int[] dims, int n_power_iterations, float eps, "
    "bool u_first, bool add_eps) -> (Tensor[] normalized, Tensor state)",
    _fake_forward,
)
_tiers.define(
    NAME,
    "backward",
    "spectral_norm_backward(Tensor?[] grads, Tensor[] weights, Tensor state, int[] dims) -> Tensor[]",
    lambda grads, weights, state, dims: _fake_gradients(grads, weights),
)
_tiers.define(
    NAME,
    "double_backward",
    "spectral_norm_double_backward(Tensor?[] grad_grad_weights, Tensor?[] grads, Tensor[] weights, Tensor state, "
    "int[] dims) -> (Tensor[] grad_grads, Tensor[] grad_weights)",
    lambda hs, grads, weights, state, dims: tuple(
        _fake_gradients([None if h is None else g for h, g in zip(hs, grads)], weights) for _ in range(2)
    ),
)


def _kernel(implementation: str, launcher: str, device: str):
    op = NAME if launcher == "forward" else f"{NAME}_{launcher}"
    return _tiers.kernel(implementation, NAME, launcher, getattr(torch.ops.gankern, op).default, device)


class SpectralNorm(Function):
    """Inputs: (implementation, dims, iterations, eps, u_first, add_eps), then L weights, L us, L vs.
    Outputs: L normalized weights, then the state (not differentiable)."""

    @staticmethod
    def forward(options, *tensors):
        implementation, *rest = options
        layers = len(tensors) // 3
        weights, us, vs = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
        normalized, state = _kernel(implementation, "forward", weights[0].device.type)(weights, us, vs, *rest)
        return *normalized, state

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        options, *tensors = inputs
        ctx.options = options[:2]
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: len(output) - 1], output[-1])

    @staticmethod
    def backward(ctx: Any, *grads):
        *weights, state = ctx.saved_tensors
        layers = len(weights)
        grads = [g if need else None for g, need in zip(grads[:layers], ctx.needs_input_grad[1:])]
        if _tiers.first_order_only():
            implementation, dims = ctx.options
            result = _kernel(implementation, "backward", state.device.type)(grads, weights, state, dims)
        else:
            result = SpectralNormBackward.apply(ctx.options, *grads, *weights, state)
        return None, *_present(result, grads), *[None] * (2 * layers)


class SpectralNormBackward(Function):
    """Inputs: (implementation, dims), then L gradients (or None), L weights, the state. Outputs: L gradients of the
    weights, empty where the gradient was None."""

    @staticmethod
    def forward(options, *tensors):
        implementation, dims = options
        *lists, state = tensors
        layers = len(lists) // 2
        backward = _kernel(implementation, "backward", state.device.type)
        return tuple(backward(lists[:layers], lists[layers:], state, dims))

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.options, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_grad_weights):
        *lists, state = ctx.saved_tensors
        layers = len(grad_grad_weights)
        grads = lists[:layers]
        hs = [None if g is None else h for h, g in zip(grad_grad_weights, grads)]
        both = SpectralNormDoubleBackward.apply(ctx.options, *hs, *lists, state)
        return None, *_present(both[:layers], hs), *_present(both[layers:], hs), None


class SpectralNormDoubleBackward(Function):
    """Inputs: (implementation, dims), then L gradients of the weights' gradients (or None), and the tensors of
    SpectralNormBackward. Outputs: L gradients of the gradients, L gradients of the weights."""

    @staticmethod
    def forward(options, *tensors):
        implementation, dims = options
        *lists, state = tensors
        n = len(lists) // 3
        double_backward = _kernel(implementation, "double_backward", state.device.type)
        grad_grads, grad_weights = double_backward(lists[:n], lists[n : 2 * n], lists[2 * n :], state, dims)
        return *grad_grads, *grad_weights

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads):
        raise dispatch.refuse_gradient_order(NAME, GRADIENT_ORDER)


def _present(results: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None else r for r, g in zip(results, grads)]


def spectral_norm_group(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
    u_first: bool,
    add_eps: bool,
    implementation: str | None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(normalized weights, [u, v of each layer after the iteration], sigma [L]) of checked arguments; writes
    nothing."""
    chosen = primitive.select(weights[0], implementation)
    if chosen == "reference":
        rules = (n_power_iterations, eps, u_first, add_eps)
        rows = [reference(w, u, v, d, *rules) for w, u, v, d in zip(weights, us, vs, dims)]
        vectors = [vector for row in rows for vector in row[1:3]]
        return [row[0] for row in rows], vectors, torch.stack([row[3].detach() for row in rows])
    options = (chosen, tuple(dims), n_power_iterations, eps, u_first, add_eps)
    *normalized, state = _tiers.apply(SpectralNorm, options, *weights, *us, *vs)
    with torch.no_grad():
        sigma, *vectors = state.split(state_sizes(weights, dims))
        return normalized, vectors, sigma
