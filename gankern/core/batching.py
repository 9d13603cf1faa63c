"""Operators on lists of tensors under a backward of several gradients at once: one entry of the batch after the other.

Forwards under vmap do not come here: they are plain PyTorch, see gankern.core.torch_internals. torch loops by itself
over operators without lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    leaves, structure = tree_flatten(args)
    batched = [isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x) for x in leaves]
    # The size is read for tensors without a batch only.
    leaves = [torch._remove_batch_dim(x, level, 0, 0) if b else x for x, b in zip(leaves, batched)]
    size = next(len(x) for x, b in zip(leaves, batched) if b)
    in_dims = tree_unflatten([0 if b else None for b in batched], structure)
    results, _ = rule(_Info(size), in_dims, *tree_unflatten(leaves, structure))
    return tree_map(lambda x: torch._add_batch_dim(x, 0, level), results)
