"""A backward of several gradients at once (torch.func.vmap of it, ``is_grads_batched=True``): one entry of the batch
after the other.

Forwards under vmap do not come here: they are plain PyTorch, see gankern.core.torch_internals. Among operators, torch
loops by itself over those without lists.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def one_by_one(name: str, info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """The rule of the operator ``namespace::name`` for torch.func.vmap: (results, where their batch is)."""
    namespace, _, own = name.partition("::")
    operator = getattr(getattr(torch.ops, namespace), own).default
    leaves, structure = tree_flatten(args)
    dims, _ = tree_flatten(in_dims)

    def entry(i: int) -> Any:
        values = [x if d is None else x.select(d, i) for x, d in zip(leaves, dims, strict=True)]
        return tree_unflatten(values, structure)

    results = [operator(*entry(i)) for i in range(info.batch_size)]
    stacked = tree_map(lambda *x: torch.stack(x), results[0], *results[1:])
    return stacked, tree_map(lambda x: 0, stacked)


class _Info:
    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size


def of_batched_gradients(rule: Callable[..., tuple[Any, Any]], *args: Any) -> Any:
    """The same for ``torch.autograd.grad(..., is_grads_batched=True)``, which has batched tensors of its own kind."""
    level = _legacy_level()
    leaves, structure = tree_flatten(args)
    batched = [isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x) for x in leaves]
    # The size is read for tensors without a batch only.
    leaves = [torch._remove_batch_dim(x, level, 0, 0) if b else x for x, b in zip(leaves, batched)]
    size = next(len(x) for x, b in zip(leaves, batched) if b)
    in_dims = tree_unflatten([0 if b else None for b in batched], structure)
    results, _ = rule(_Info(size), in_dims, *tree_unflatten(leaves, structure))
    return tree_map(lambda x: torch._add_batch_dim(x, 0, level), results)


def _legacy_level() -> int:
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def one_gradient_at_a_time(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd.Function: where gradients stand for a batch of them, it runs for one after
    the other. What it computes and records then are ordinary tensors, through which a further gradient passes. The
    nodes in csrc/autograd do the same."""

    @functools.wraps(backward)
    def each(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        functorch = torch._C._functorch
        there = [g for g in grads if g is not None]
        if any(map(functorch.is_legacy_batchedtensor, there)):
            level = _legacy_level()
            values = [
                torch._remove_batch_dim(g, level, 0, 0)
                if g is not None and functorch.is_legacy_batchedtensor(g)
                else None
                for g in grads
            ]
            return _stacked(each, ctx, grads, values, lambda y: torch._add_batch_dim(y, 0, level))
        if any(map(functorch.is_batchedtensor, there)):
            interpreter = retrieve_current_functorch_interpreter()
            level = interpreter.level()
            values = [
                functorch.get_unwrapped(g).movedim(functorch.maybe_get_bdim(g), 0)
                if g is not None and functorch.is_batchedtensor(g) and functorch.maybe_get_level(g) == level
                else None
                for g in grads
            ]
            if any(v is not None for v in values):
                with interpreter.lower():
                    return _stacked(each, ctx, grads, values, lambda y: functorch._add_batch_dim(y, 0, level))
        return backward(ctx, *grads)

    return each


def _stacked(
    backward: Callable[..., Any], ctx: Any, grads: Any, values: list[Tensor | None], batch: Callable[[Tensor], Tensor]
) -> tuple[Any, ...]:
    """``values``: of each gradient those of the batch, or None where it is the same for all entries."""
    size = next(len(v) for v in values if v is not None)

    def entry(v: Tensor, i: int) -> Tensor:
        return v[i] if size else torch.zeros_like(v[:0].sum(0))  # for its results' sizes

    rows = [
        backward(ctx, *(g if v is None else entry(v, i) for g, v in zip(grads, values))) for i in range(max(size, 1))
    ]
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return tuple(None if y[0] is None else batch(torch.stack(y)[:size]) for y in zip(*rows))
