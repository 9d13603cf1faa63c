"""A double backward for torch's own operators that computes nothing it does not need.

The gradient of a gradient passes through the derivatives of ``convolution_backward``, ``leaky_relu_backward`` and
their like. torch 2.13 wastes most of the time there, in two ways:

- The second derivative of a convolution forms the weight gradient as a convolution whose kernel is a whole feature map,
  which is several times slower than the weight-gradient kernel every framework has.
- A derivative that does not exist is returned as a tensor of zeros by each piecewise-linear activation, by the poolings
  and paddings. The engine then drags these zeros through a complete backward of the network. Here the leaves that they
  would arrive at get zeros, and nothing else does: see ``zeros``.

:class:`fast_double_backward` replaces the kernels of these operators in torch's dispatcher (for CPU and CUDA tensors),
so it reaches the layers of anybody's model. The replacements are made of differentiable operators: gradients of every
order stay exact.

csrc/autograd/double_backward.cpp does this; without it, Python does the first.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gankern.core.native import nodes
from gankern.core.torch_internals import keep_in_thread, kept_in_thread

__all__ = ["fast_double_backward"]

_DEVICES = ("AutogradCPU", "AutogradCUDA") if torch.version.cuda or torch.version.hip else ("AutogradCPU",)
_aten = torch.ops.aten


def convolution_double_backward(
    grad_grad_input: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad: Tensor,
    weight: Tensor,
    input: Tensor,
    *options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """With y = conv(x, w) + b, the gradients of ``grad``, x and w for gradients of x's, w's and b's gradients.

    conv is bilinear, so each is one convolution, or one half of a convolution's backward:
    conv(hx, w) + conv(x, hw) + hb; the data gradient of ``grad`` by hw; the weight gradient of ``grad`` by hx.
    """
    # stride, padding, dilation, transposed, output_padding, groups; which of the three results are needed
    *convolution, needed = options
    to_grad = to_input = to_weight = None
    if needed[0]:
        bias = grad_grad_bias
        for x, w in ((grad_grad_input, weight), (input, grad_grad_weight)):
            if x is None or w is None:
                continue
            term = _aten.convolution(x, w, bias, *convolution)
            to_grad, bias = term if to_grad is None else to_grad + term, None
        if bias is not None:
            to_grad = bias.view(-1, *[1] * (grad.ndim - 2)).expand_as(grad)
    if needed[1] and grad_grad_weight is not None:
        mask = [True, False, False]
        to_input = _aten.convolution_backward(grad, input, grad_grad_weight, None, *convolution, mask)[0]
    if needed[2] and grad_grad_input is not None:
        mask = [False, True, False]
        to_weight = _aten.convolution_backward(grad, grad_grad_input, weight, None, *convolution, mask)[1]
    return to_grad, to_input, to_weight


# Of functions that are linear in pieces: these depend on the function's input through signs and places only, so their
# derivative by it is zero.
_CONSTANT_IN_INPUT = (
    "leaky_relu_backward",
    "threshold_backward",  # of relu
    "hardtanh_backward",  # of relu6 too
    "hardshrink_backward",
    "softshrink_backward",
    "rrelu_with_noise_backward",
    "avg_pool2d_backward",
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "adaptive_max_pool3d_backward",
    "max_pool2d_with_indices_backward",
    "max_pool3d_with_indices_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "replication_pad1d_backward",
    "replication_pad2d_backward",
    "replication_pad3d_backward",
)
_CONVOLUTION = "_convolution_double_backward"


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    """What runs in place of torch's kernel while that is replaced. Made once, from torch's own."""
    original: Any = torch.library.get_kernel(f"aten::{_CONVOLUTION}", device)

    def run(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        return convolution_double_backward(*args) if _is_on() else original.call_boxed(keys, *args)

    return run


_BLOCKS = "gankern.fast_double_backward"  # how many of them the running thread is in


def _blocks() -> int:
    return kept_in_thread(_BLOCKS) or 0


def _stash(blocks: int) -> None:
    keep_in_thread(_BLOCKS, blocks or None)  # C++ looks whether it is None


def _is_on() -> bool:
    return _switch.permanent or _blocks() > 0


class _Switch:
    """The state of the process: how many blocks there are, and whether Python's replacements are in torch's dispatcher.
    Those of C++ stay there, and ask themselves whether the thread wants them; Python's are taken out, since merely
    asking costs more than a kernel's launch."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0
        self.permanent = False
        self.library: torch.library.Library | None = None

    def update(self, blocks: int = 0, permanent: bool | None = None) -> None:
        with self.lock:
            self.blocks += blocks
            self.permanent = self.permanent if permanent is None else permanent
            names = (_CONVOLUTION, *_CONSTANT_IN_INPUT)
            in_cpp = nodes.fast_double_backward(self.permanent, names, _DEVICES) is None
            wanted = not in_cpp and (self.permanent or self.blocks > 0)
            if wanted and self.library is None:
                self.library = self._install()
            elif not wanted and self.library is not None and threading.active_count() == 1:
                # With other threads one of them may be on its way into a kernel, which must not vanish under it: then
                # the replacement stays, calls torch's kernel, and is taken out the next time.
                self.library._destroy()
                self.library = None

    @staticmethod
    def _install() -> torch.library.Library:
        library = torch.library.Library("aten", "IMPL")
        for device in _DEVICES:
            library.impl(_CONVOLUTION, _kernel(device), device, with_keyset=True)
        return library


_switch = _Switch()


class fast_double_backward(contextlib.ContextDecorator):
    """Makes the second derivative of torch's own layers cheap, in any model, without a change to it.

    Within the block (or the decorated function), and everywhere after ``fast_double_backward.enable()``:

    - the second derivative of every convolution of torch (1, 2 and 3 dimensions, groups, dilation, transposed, any
      dtype) takes the weight gradient from the framework's weight-gradient kernel;
    - a derivative that does not exist (of ReLU, LeakyReLU, the other piecewise-linear activations, poolings and
      paddings) is absent instead of a tensor of zeros that goes back through the network; the leaves that it would
      arrive at get their zeros directly.

    All other values stay what they are, up to rounding in the weight gradients. The block must hold both the backward
    that makes a gradient with ``create_graph=True`` and the backward of what is made of that gradient. CPU and CUDA
    tensors.

    Each leaf has a gradient, one of zeros, or none, as it has with torch's own. Hooks of tensors and modules, and
    Functions of somebody's own, are called with what torch calls them with: what is above them is left as it is. What
    one can notice: an intermediate tensor that nobody watches has no gradient where torch has zeros, so that
    ``torch.autograd.grad`` by it asks for ``allow_unused=True``. (Without the compiled library zeros go
    through the network as torch's do: hooks of tensors are not seen from there.)

    Off until it is asked for. A block holds for its thread (and for the engine's threads while they run its backwards),
    ``enable()`` for the process; blocks may be nested, and may overlap in several threads. The first one puts entries
    into torch's table, which stay there and outside of blocks call torch's kernels. (Without the compiled library the
    last block to end takes its one entry out, unless other Python threads are alive: one of those may be on its way
    into it. There, start the first block before threads that run backwards; entering and leaving cost about 0.2 ms.)

    >>> import torch, gankern
    >>> critic = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 2, 1), torch.nn.LeakyReLU(0.2), torch.nn.Conv2d(8, 1, 4))
    >>> x = torch.randn(2, 3, 8, 8, requires_grad=True)
    >>> with gankern.fast_double_backward():
    ...     (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    ...     gradient.square().sum().backward()
    >>> critic[0].weight.grad.shape
    torch.Size([8, 3, 4, 4])
    """

    def __enter__(self) -> None:
        _switch.update(blocks=1)
        _stash(_blocks() + 1)

    def __exit__(self, *exception: Any) -> None:
        _stash(_blocks() - 1)
        _switch.update(blocks=-1)

    @staticmethod
    def enable() -> None:
        """Switches it on for good, in all threads."""
        _switch.update(permanent=True)

    @staticmethod
    def disable() -> None:
        """Undoes :meth:`enable`; blocks keep it on until they end."""
        _switch.update(permanent=False)

    @staticmethod
    def is_enabled() -> bool:
        """Whether it is on in this thread, in whatever way."""
        return _is_on()
