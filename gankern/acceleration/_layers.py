"""How a layer's forward is replaced: what stands in its place, and when torch's own runs instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gankern.acceleration._code import original
from gankern.acceleration._scope import PLAIN_TYPES, Deferred, Followed, preserve, settle, state
from gankern.core.torch_internals import functions_replaced, recomputed, seen_by_others, transformed


class Replaced(functools.partial):
    """What stands in place of a method of one module: a function of the module (and further constants). It goes with
    the module into copies and pickles. ``name`` is the method's, and to who asks its signature is that too."""

    name = "forward"
    whole = False  # whether what it calls is a part of it, for the report

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.args[0]
        return inspect.signature(getattr(type(module), self.name).__get__(module))

    @property
    def __name__(self) -> str:
        return self.name

    keeps_results = True  # those of the class's method: for gankern.nn.coupling


_CONV = {"_conv_forward": nn.Conv2d._conv_forward}
_TRANSPOSED = {"_output_padding": nn.ConvTranspose2d._output_padding}
_NORM_OF_EACH = {name: getattr(nn.InstanceNorm2d, name) for name in ("_apply_instance_norm", "_handle_no_batch_input")}
# The methods that a forward of torch's calls, and in place of which ours runs: of a class with others it is another.
PARTS: dict[Any, dict[str, Any]] = {
    nn.Conv1d.forward: {"_conv_forward": nn.Conv1d._conv_forward},
    nn.Conv2d.forward: _CONV,
    nn.Conv3d.forward: {"_conv_forward": nn.Conv3d._conv_forward},
    nn.ConvTranspose1d.forward: _TRANSPOSED,
    nn.ConvTranspose2d.forward: _TRANSPOSED,
    nn.ConvTranspose3d.forward: _TRANSPOSED,
    nn.GroupNorm.forward: {},
    nn.InstanceNorm2d.forward: _NORM_OF_EACH,
    **{
        cls.forward: {}
        for cls in (
            nn.ReflectionPad2d, nn.ReplicationPad2d, nn.BatchNorm2d, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.AvgPool2d,
            nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Upsample,
        )
    },
}  # fmt: skip


def changed_part(module: nn.Module, parts: Iterable[tuple[str, Any]] | None = None) -> str | None:
    """The name of a method, of those its torch class's forward calls, that is the module's own; None: there is none."""
    cls = type(module)
    for name, method in PARTS[cls.forward].items() if parts is None else parts:
        if getattr(cls, name) is not method or name in module.__dict__:
            return name
    return None if cls.__getattr__ is nn.Module.__getattr__ else "__getattr__"


def _is_known(module: nn.Module, known: dict[Any, tuple[tuple[str, Any], ...]]) -> bool:
    parts = known.get(type(module).forward)
    return parts is not None and changed_part(module, parts) is None


def leaf(
    function: Callable[..., Tensor], constants: int = 0, stands_for: Sequence[type[nn.Module]] = ()
) -> Callable[..., Tensor]:
    """A module's forward, which tells the scope that an operation comes. ``constants`` of its arguments stand before
    those of torch's forward. ``stands_for``: the modules whose forward it replaces; where the module became one with
    another forward since, or with other methods that it calls, that runs."""
    known = {cls.forward: tuple(PARTS[cls.forward].items()) for cls in stands_for}

    @functools.wraps(function)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if known and not _is_known(module, known):
            return original(module)(*args[constants:], **kwargs)
        if torch.compiler.is_compiling():  # the compiler fuses by itself; it traces convolutions, see conv2d_forward
            return type(module).forward(module, *args[constants:], **kwargs)
        # torch's own has rules for it, saves what it saves again, and calls torch's functions or those in their place.
        # Tensors of somebody's class have functions of their own; of what is none, the error is torch's.
        taken = type(
            args[constants] if len(args) > constants else kwargs.get("input")
        ) in PLAIN_TYPES and _PLAIN_PARAMETERS.issuperset(map(type, module._parameters.values()))
        if not taken or transformed() or recomputed() or seen_by_others() or functions_replaced():
            args = tree_map_only(Deferred, Deferred.value, args[constants:])
            return type(module).forward(module, *args, **kwargs)
        if not state.intercepting:
            return function(module, *args, **kwargs)
        if state.waiting:
            settle(args[-1] if args else None, pure=not getattr(module, "inplace", False))
        if state.fused and getattr(module, "inplace", False):
            preserve()
        with torch._C.DisableTorchFunction():
            return function(module, *args, **kwargs)

    return forward


_PLAIN_PARAMETERS = {nn.Parameter, Tensor, type(None)}


def left_forward(module: nn.Module, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a module that is to stay as it is: what it calls is torch's, too, and nothing waits meanwhile."""
    forward = functools.partial(type(module).forward, module) if inner is None else inner
    if torch.compiler.is_compiling() or not state.intercepting or state.left:
        return forward(*args, **kwargs)
    args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs))
    settle()
    preserve()
    state.left = True
    try:
        return forward(*args, **kwargs)
    finally:
        state.left = False


def unwatched(module: nn.Module) -> bool:
    """Whether nobody but its caller sees a module's result."""
    everywhere = nn.modules.module
    return not (
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def own_forward(module: nn.Module, convolution: Followed, norm: Followed, *args: Any, **kwargs: Any) -> Any:
    """Of a module that calls convolutions or norms by itself."""
    if torch.compiler.is_compiling() or not state.intercepting:
        return type(module).forward(module, *args, **kwargs)
    before, state.followed = state.followed, (convolution, norm)
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        state.followed = before
