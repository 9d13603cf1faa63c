"""What happens around the forward of the module that was accelerated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gankern.acceleration._compiled import has_compiled_parts
from gankern.acceleration._scope import Deferred, Interception, preserve, settle, state
from gankern.core.torch_internals import recomputed, transformed
from gankern.nn.utils._group import SpectralNormGroup


@dataclass(frozen=True)
class Plan:
    group: SpectralNormGroup | None
    pairs: bool  # whether torch's functions are met
    calls: bool  # whether they are where the gradient may be differentiated
    fast_double_backward: bool


_interception = Interception()


def root_forward(module: nn.Module, plan: Plan, inner: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or transformed() or recomputed():
        return type(module).forward(module, *args, **kwargs) if inner is None else inner(*args, **kwargs)
    double, intercepting = state.double, state.intercepting
    if plan.fast_double_backward and not double:
        state.double = torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())
        )
    compiled = has_compiled_parts(module)
    try:
        if plan.group is not None and not compiled:
            plan.group.prepare(module)
        if compiled:  # which may be given what a function mode sees, but not a value that waits
            return type(module).forward(module, *args, **kwargs) if inner is None else inner(*args, **kwargs)
        if intercepting or not (plan.pairs or (plan.calls and state.double)):
            return type(module).forward(module, *args, **kwargs) if inner is None else inner(*args, **kwargs)
        state.intercepting, state.grad_mode = True, torch.is_grad_enabled()
        with _interception:
            result = type(module).forward(module, *args, **kwargs) if inner is None else inner(*args, **kwargs)
        settle()
        preserve()
        return tree_map_only(Deferred, Deferred.value, result) if type(result) is not Tensor else result
    finally:
        state.double, state.intercepting = double, intercepting
        state.waiting, state.fused = (None, ()) if not intercepting else (state.waiting, state.fused)
        if plan.group is not None:
            plan.group.clear(module)
