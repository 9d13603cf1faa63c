"""Checks of arguments that several functions make."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gankern.core.dispatch import FLOATING, NAMES, short


def tensor(function: str, argument: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {argument} is {type(x).__name__}; it must be a tensor")


def floating(function: str, argument: str, x: Any) -> None:
    """Raises a TypeError where x is not a tensor of a dtype that the kernels take."""
    tensor(function, argument, x)
    if x.dtype not in FLOATING:
        accepted = ", ".join(short(d) for d in FLOATING)
        raise TypeError(f"{function}: {argument} is {short(x.dtype)}; accepted are {accepted}")


def writable(function: str, argument: str, x: Tensor) -> None:
    """Raises where a buffer cannot be updated in place: asked of all buffers before the first one is."""
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise ValueError(f"{function}: {argument} is updated in place, and requires a gradient; it must be a buffer")
    if is_dynamo_compiling():
        return
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{function}: {argument} is updated in place, and was made in inference mode; give a clone of it"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
        raise ValueError(f"{function}: {argument} is updated in place, and is an expanded view; give a clone of it")


def bias_of(function: str, bias: Tensor | None, x: Tensor, channels: int) -> None:
    """Raises where the bias would broadcast, or make a result of another dtype than x's."""
    if bias is None:
        return
    floating(function, "bias", bias)
    if bias.shape != (channels,):
        raise ValueError(f"{function}: bias has shape {tuple(bias.shape)}; it must be [{channels}]")
    if bias.device != x.device or (bias.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(
            f"{function}: x and bias must share dtype and device, got {short(x.dtype)} on {x.device} and "
            f"{short(bias.dtype)} on {bias.device}"
        )


def number(function: str, argument: str, value: Any, least: float = -math.inf, above: float = -math.inf) -> None:
    """Raises where value is not a finite number, of at least ``least`` and greater than ``above``."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{function}: {argument} is a tensor that requires a gradient, and would get none; detach it")
    try:
        finite = math.isfinite(value)
    except (TypeError, ValueError):  # the latter of a tensor of several
        raise TypeError(f"{function}: {argument} is {value!r}; it must be a number") from None
    if not finite:
        raise ValueError(f"{function}: {argument} is {value}; it must be finite")
    if value < least:
        raise ValueError(f"{function}: {argument} is {value}; it must be at least {least}")
    if value <= above:
        raise ValueError(f"{function}: {argument} is {value}; it must be greater than {above}")


def whole(function: str, argument: str, value: Any, least: float = 1) -> None:
    """Raises where value is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{function}: {argument} is {value!r}; it must be an integer")
    if not value >= least:
        raise ValueError(f"{function}: {argument} is {value}; it must be at least {least}")


def choice(function: str, argument: str, value: Any, accepted: Iterable[str | None]) -> None:
    """Raises where value is none of the names that are accepted."""
    accepted = tuple(accepted)
    if value not in accepted:
        listed = ", ".join(map(repr, accepted))
        raise ValueError(f"{function}: {argument} is {value!r}; accepted are {listed}")


def activation(function: str, value: Any, negative_slope: Any, accepted: Iterable[str]) -> None:
    """Raises where an activation is none of those accepted (None is "linear" everywhere), or its slope no number."""
    choice(function, "activation", value, (*accepted, None))
    number(function, "negative_slope", negative_slope)


def slope(function: str, activation: Any, value: Tensor | None, x: Tensor, channels: int) -> None:
    """Raises where PReLU has no slope of one value or one a channel, or another activation has one."""
    if activation == "prelu" and value is None:
        raise ValueError(f"{function}: slope is None; activation 'prelu' needs a tensor, of one value or one a channel")
    if activation != "prelu" and value is not None:
        raise ValueError(f"{function}: slope is given, and activation is {activation!r}; it is that of 'prelu'")
    if value is None:
        return
    floating(function, "slope", value)
    if value.shape not in ((1,), (channels,)):
        raise ValueError(f"{function}: slope has shape {tuple(value.shape)}; it must be (1,) or ({channels},)")
    half = x.dtype in (torch.float16, torch.bfloat16)
    if value.device != x.device or not (value.dtype == x.dtype or (half and value.dtype == torch.float32)):
        wanted = f"{short(x.dtype)}{' or float32' if half else ''} on {x.device}"
        raise ValueError(f"{function}: slope is {short(value.dtype)} on {value.device}; x needs {wanted}")


def implementation(function: str, value: str | None) -> str | None:
    """Raises where value names no implementation; returns it."""
    choice(function, "implementation", value, (None, *NAMES))
    return value
