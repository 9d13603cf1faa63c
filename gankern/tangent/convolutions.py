"""torch's convolutions by this library's, wherever a critic calls them and without a change to it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gankern import functional as GF
from gankern.core.torch_internals import is_compiled

_OURS = {torch.conv2d: GF.conv2d, torch.conv_transpose2d: GF.conv_transpose2d}


class _Convolutions(TorchFunctionMode):
    """Within it torch.conv2d is gankern.functional's, which is torch's again where no row of the engine is faster."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        ours = _OURS.get(func)
        if ours is not None and not _left_to_torch():
            func = ours
        return func(*args, **(kwargs or {}))


def _left_to_torch() -> bool:
    """Within a checkpoint, which runs again in the backward, outside of the mode; and under autocast, which casts a
    weight once for all its uses."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or torch.is_autocast_enabled("cpu")


def fast_convolutions(critic: Any, x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block in which a critic is called with x. The engine's rows are for the CPU; torch.compile has kernels of its
    own, and what is compiled would be so again with the mode in it."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not isinstance(critic, nn.Module):
        return contextlib.nullcontext()
    modules = list(critic.modules())
    if any(map(is_compiled, modules)):
        return contextlib.nullcontext()
    return _Convolutions() if any(map(_may_call_torchs, modules)) else contextlib.nullcontext()


def _may_call_torchs(module: nn.Module) -> bool:
    """Whether a module's own code may call one of torch's convolutions. Without such a module there is nothing to do,
    and the mode, in whose sight everything goes through Python, is spared."""
    cls: Any = type(module)
    if "forward" in module.__dict__:
        return True
    if isinstance(module, torch.jit.ScriptModule):  # calls them out of the mode's sight, and has no forward to look at
        return False
    if isinstance(module, nn.Conv2d):
        return cls._conv_forward is nn.Conv2d._conv_forward
    if isinstance(module, nn.ConvTranspose2d):
        return cls.forward is nn.ConvTranspose2d.forward
    home, code = getattr(cls.forward, "__module__", None) or "", getattr(cls.forward, "__code__", None)
    if code is None or not home.startswith(("torch.nn.modules.", "gankern.")):
        return True
    return not {"conv2d", "conv_transpose2d"}.isdisjoint(code.co_names)
