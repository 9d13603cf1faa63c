"""Operator and gradients of up, FIR filter, down.

On each axis the operator is out[o] = gain sum_j taps[j] z[o down + j - start], where z is the input with up - 1 zeros
after each sample and taps the filter in the order of a correlation; ``size`` outputs are made. Its transpose is

    dx[i] = gain sum_o g[o] taps[i up - o down + start]

which is the same operator with up and down exchanged, the filter in the other order, and start' = taps - 1 - start. So
one kernel serves every order of gradient: csrc/cpu/upfirdn2d.cpp, csrc/cuda/upfirdn2d.cu and
gankern/triton/upfirdn2d.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from gankern.core import autograd, registry
from gankern.core.batching import one_gradient_at_a_time
from gankern.core.dispatch import ANY_ORDER
from gankern.core.layout import has_whole_pixels
from gankern.reference.upfirdn2d import upfirdn2d as reference

NAME = "upfirdn2d"
primitive = registry.declare(NAME, gradient_order=ANY_ORDER, cuda=True)


class Geometry(NamedTuple):
    """The operator's arguments behind its tensors; pairs are (vertical, horizontal)."""

    up: tuple[int, int]
    down: tuple[int, int]
    start: tuple[int, int]
    size: tuple[int, int]  # of the output
    flip_filter: bool
    gain: float

    def transposed(self, taps: Sequence[int], size: Sequence[int]) -> Geometry:
        """Of the transpose, for a filter of ``taps`` and inputs of ``size``."""
        start = taps[0] - 1 - self.start[0], taps[1] - 1 - self.start[1]
        return Geometry(self.down, self.up, start, (size[0], size[1]), not self.flip_filter, self.gain)


def taps_of(filter: Tensor) -> tuple[int, int]:
    return filter.shape[0], filter.shape[-1]


def _fake(
    x: Tensor,
    filter: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    start: Sequence[int],
    size: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> Any:
    layout = torch.channels_last if has_whole_pixels(x) else torch.contiguous_format
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=layout)


registry.define(
    NAME,
    "forward",
    "upfirdn2d(Tensor x, Tensor filter, SymInt[] up, SymInt[] down, SymInt[] start, SymInt[] size, bool flip_filter, "
    "float gain) -> Tensor",
    _fake,
)


class Upfirdn2d(Function):
    """Inputs: implementation, x, filter (a constant), geometry. Output: the filtered images. Its gradient is itself
    with the transposed geometry, and so on: exact in any order."""

    @staticmethod
    def forward(implementation: str, x: Tensor, filter: Tensor, geometry: Geometry) -> Any:
        return registry.kernel(implementation, NAME, "forward", x.device)(x, filter, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.implementation, x, filter, geometry = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(filter)
        ctx.geometry = geometry.transposed(taps_of(filter), x.shape[2:])

    @staticmethod
    @one_gradient_at_a_time
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return None, None, None, None
        (filter,) = ctx.saved_tensors
        run = Upfirdn2d.forward if autograd.first_order_only() else Upfirdn2d.apply
        return None, run(ctx.implementation, grad, filter, ctx.geometry), None, None


def upfirdn2d(
    x: Tensor,
    filter: Tensor,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
    implementation: str | None,
) -> Tensor:
    """The filtered images for checked arguments, whose padding is (left, right, top, bottom) and leaves something."""
    chosen = primitive.select(x, implementation)
    if chosen == "reference":
        return reference(x, filter, up, down, padding, flip_filter, gain)
    if filter.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"upfirdn2d: filter requires grad, and for the {chosen} implementation it is a constant; detach() it, or "
            f"pass implementation='reference', which has its gradient"
        )
    left, right, top, bottom = padding
    taps = taps_of(filter)
    padded = x.shape[2] * up[0] + top + bottom, x.shape[3] * up[1] + left + right
    size = (padded[0] - taps[0]) // down[0] + 1, (padded[1] - taps[1]) // down[1] + 1
    there = Geometry(up, down, (top, left), size, flip_filter, gain)
    arguments = chosen, x, filter, there
    recorder = autograd.recording.recorder
    if recorder is not None:
        back = there.transposed(taps, x.shape[2:])
        return recorder.linear(
            x,
            lambda: _run(arguments),
            lambda t: Upfirdn2d.forward(chosen, t, filter, there),
            lambda g: Upfirdn2d.forward(chosen, g, filter, back),
        )
    return _run(arguments)


def _run(arguments: tuple) -> Tensor:
    if not torch.compiler.is_compiling() and autograd.first_order_only():
        return Upfirdn2d.forward(*arguments)
    return autograd.apply(Upfirdn2d, *arguments)
