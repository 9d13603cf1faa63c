"""Checks of arguments that several functions make."""

from torch import Tensor

from gankern.core.dispatch import FLOATING, short


def floating(function: str, argument: str, x: Tensor) -> None:
    """Raises a TypeError where x is not a tensor of a dtype that the kernels take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {argument} is {type(x).__name__}; it must be a tensor")
    if x.dtype not in FLOATING:
        accepted = ", ".join(short(d) for d in FLOATING)
        raise TypeError(f"{function}: {argument} is {short(x.dtype)}; accepted are {accepted}")
