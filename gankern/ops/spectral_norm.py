"""Operators and gradients of spectral norm.

All take lists, one entry a layer: a whole network costs one operator call forward and one backward. Kernels:
csrc/cpu/spectral_norm.cpp, csrc/cuda/spectral_norm.cu and gankern/triton/spectral_norm.py; the formulas stand there.

What a forward leaves for its backward is one vector, the *state*, in the accumulation dtype: sigma of all layers,
then u and v of each layer. It holds the pair that this forward ended with, whatever the buffers become later.
A layer that a loss does not reach has no gradient: None goes in, and an empty tensor comes out. To autograd each layer
is by itself, as if it had a node of its own: see ``layers`` of :class:`gankern.core.autograd.Rule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gankern.core import autograd, registry
from gankern.core.autograd import Kept, Tensors
from gankern.core.layout import accumulation_dtype
from gankern.reference.spectral_norm import spectral_norm as reference

NAME = "spectral_norm"
primitive = registry.declare(NAME, gradient_order=2, cuda=True)


class Rules(NamedTuple):
    """How u and v are iterated: the operator's arguments behind its lists."""

    n_power_iterations: int
    eps: float
    u_first: bool  # whether an iteration computes u before v
    add_eps: bool  # whether eps is added to a norm; else it is the least


def state_sizes(weights: Sequence[Tensor], dims: Sequence[int]) -> list[int]:
    """The lengths of the state's parts: the sigmas, then u and v of each layer."""
    sizes = [len(weights)]
    for weight, dim in zip(weights, dims):
        height = weight.shape[dim]
        sizes += (height, weight.numel() // height)
    return sizes


def _fake_forward(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], dims: Sequence[int], *rules: Any
) -> Any:
    state = weights[0].new_empty(sum(state_sizes(weights, dims)), dtype=accumulation_dtype(weights[0]))
    return [torch.empty_like(w) for w in weights], state


def _fake_gradients(grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor]:
    return [w.new_empty(0) if g is None else torch.empty_like(w) for g, w in zip(grads, weights)]


registry.define(
    NAME,
    "forward",
    "spectral_norm(Tensor[] weights, Tensor[] us, Tensor[] vs, int[] dims, int n_power_iterations, float eps, "
    "bool u_first, bool add_eps) -> (Tensor[] normalized, Tensor state)",
    _fake_forward,
)
registry.define(
    NAME,
    "backward",
    "spectral_norm_backward(Tensor?[] grads, Tensor[] weights, Tensor state, int[] dims) -> Tensor[]",
    lambda grads, weights, state, dims: _fake_gradients(grads, weights),
)
registry.define(
    NAME,
    "double_backward",
    "spectral_norm_double_backward(Tensor?[] grad_grad_weights, Tensor?[] grads, Tensor[] weights, Tensor state, "
    "int[] dims) -> (Tensor[] grad_grads, Tensor[] grad_weights)",
    lambda hs, grads, weights, state, dims: tuple(
        _fake_gradients([None if h is None else g for h, g in zip(hs, grads)], weights) for _ in range(2)
    ),
)


# Tensors: L weights, L us, L vs. Outputs: L normalized weights, then the state.


def _forward(options: tuple, *tensors: Tensor) -> tuple[Tensor, ...]:
    implementation, *rest, _ = options
    layers = len(tensors) // 3
    lists = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
    normalized, state = registry.kernel(implementation, NAME, "forward", tensors[0].device)(*lists, *rest)
    return *normalized, state


def _saved(options: tuple, tensors: Tensors, outputs: Tensors) -> Tensors:
    return *tensors[: len(outputs) - 1], outputs[-1]


def _backward(options: tuple, needed: Sequence[bool], grads: Kept, saved: Kept) -> Tensors:
    implementation, dims, *_ = options
    layers = len(dims)
    reached = [i for i in range(layers) if needed[i] and grads[i] is not None]
    if not reached:
        return (None,) * (3 * layers)
    kernel = registry.kernel(implementation, NAME, "backward", saved[layers].device)
    # An embedding with sparse=True has sparse gradients.
    result = kernel([grads[i].to_dense() for i in reached], *_of(reached, options, saved))
    return *_spread(reached, result, layers), *[None] * (2 * layers)


def _double_backward(
    options: tuple, needed: Sequence[bool], grad_grads: Tensors, grads: Tensors, saved: Kept
) -> Tensors:
    implementation, dims, *_ = options
    layers = len(dims)
    reached = [i for i in range(layers) if grad_grads[i] is not None and grads[i] is not None]
    if not reached:
        return (None,) * (2 * layers + 2)
    kernel = registry.kernel(implementation, NAME, "double_backward", saved[layers].device)
    gradients = [[each[i] for i in reached] for each in (grad_grads, grads)]
    of_grads, of_weights = kernel(*gradients, *_of(reached, options, saved))
    return *_spread(reached, of_grads, layers), None, *_spread(reached, of_weights, layers), None


def _of(reached: Sequence[int], options: tuple, saved: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, list[int]]:
    """Weights, state and dims of some layers."""
    _, dims, *_, lengths = options
    weights, state = [saved[i] for i in reached], saved[len(dims)]
    if len(reached) < len(dims):
        sigmas, *vectors = state.split([len(dims), *lengths])
        state = torch.cat([*(sigmas[i : i + 1] for i in reached), *(vectors[i] for i in reached)])
    return weights, state, [dims[i] for i in reached]


def _spread(reached: Sequence[int], results: Sequence[Tensor], layers: int) -> list[Tensor | None]:
    found = dict(zip(reached, results))
    return [found.get(i) for i in range(layers)]


# u and v are constants, and the state is none of the user's.
autograd.Rule(
    NAME,
    _forward,
    _saved,
    _backward,
    _double_backward,
    non_differentiable=(-1,),
    layers=lambda options: len(options[1]),
)


def spectral_norm_group(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    rules: Rules,
    implementation: str | None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(normalized weights, [u, v of each layer after the iteration], sigma [L]) of checked arguments; writes
    nothing."""
    chosen = primitive.select(weights[0], implementation)
    if chosen == "reference":
        rows = [reference(w, u, v, d, *rules) for w, u, v, d in zip(weights, us, vs, dims)]
        vectors = [vector for row in rows for vector in row[1:3]]
        return [row[0] for row in rows], vectors, torch.stack([row[3].detach() for row in rows])
    lengths = tuple(u.numel() + v.numel() for u, v in zip(us, vs))
    options = (chosen, tuple(dims), *rules, lengths)
    *normalized, state = autograd.differentiate(NAME, options, *weights, *us, *vs)
    with torch.no_grad():
        sigma, *vectors = state.split(state_sizes(weights, dims))
        return normalized, vectors, sigma
