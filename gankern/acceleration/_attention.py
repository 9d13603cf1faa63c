"""The attention between the positions of a map that a model writes out, as SAGAN's and BigGAN's blocks do:

    weights = softmax(bmm(queries, keys), -1)        [N, n, d] by [N, d, m]
    result = bmm(values, weights^T)                  [N, e, m], or bmm(weights, values) of [N, m, e]

Each of these operations waits (:mod:`gankern.acceleration._scope`) until the next one is known. Where they come in this
order, on each other's results, all of them run as :func:`gankern.functional.self_attention2d` computes them, which
stores no table of n by m and has a second derivative of its own; else each runs as it came, and so does one whose
result somebody wants besides. What is around them (convolutions with or without spectral norm, pooling, a residual) is
the model's own: nothing is concluded from names or from what a module looks like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.acceleration._scope import PLAIN, STEPS, Pair, defer, is_half, joined, may_defer, settle, state, waits
from gankern.core import native
from gankern.core.dispatch import last_implementation
from gankern.ops.self_attention2d import attention

SCORES, WEIGHTS, TURNED = "scores", "weights", "weights, turned"
# Measured on the CPU: from so many scores on, for at most so many channels of keys and values together, ours is faster,
# forward and backward.
FROM = ((2**18, 96), (2**22, 320))
WORTH = {False: 2e-4, True: 5e-4}  # microseconds that it is worth for a score, without and with a gradient
PATIENCE = 4  # how often a product of the same sizes may turn out to be no attention before none of them waits


def called(module: nn.Module, names: frozenset[str]) -> set[str]:
    """What a module calls that attention may be written with; ``names``: those in its code."""
    softmax = "softmax" in names or any(isinstance(child, nn.Softmax) for child in module.children())
    return {"softmax"} if softmax else set()


def _fits(x: Any, like: Tensor, size: tuple[int, int]) -> bool:
    return (
        type(x) is Tensor
        and x.ndim == 3
        and (x.shape[0], x.shape[1]) == (like.shape[0], size[0])
        and (size[1] in (-1, x.shape[2]))
        and x.dtype == like.dtype
        and x.device == like.device
    )


def _product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    a, b = args
    if is_half(b, TURNED):
        queries, keys, *_ = b.pair.arguments
        if type(a) is Tensor and a.ndim == 3 and _fits(a, queries, (a.shape[1], keys.shape[2])):
            return _attend(b.pair, a)
    elif is_half(a, WEIGHTS):
        queries, keys, *_ = a.pair.arguments
        if type(b) is Tensor and _fits(b, queries, (keys.shape[2], -1)):
            return _attend(a.pair, b.mT).mT.contiguous()
    elif _begins(a, b):
        settle(pure=True)
        return defer(SCORES, torch.Size((*a.shape[:2], b.shape[2])), _scores, a, b, func, state.chains)
    return NotImplemented


def _begins(a: Any, b: Any) -> bool:
    if type(a) is not Tensor or a.ndim != 3 or a.dtype not in (torch.float32, torch.float64):
        return False
    if not _fits(b, a, (a.shape[2], -1)) or a.device.type != "cpu" or native.NATIVE_MISSING is not None:
        return False
    if a.shape[2] >= _widest(a, b) or not may_defer(a):
        return False
    return state.chains is not None and state.chains.misses.get(_sizes(a, b), 0) < PATIENCE


def _widest(a: Tensor, b: Tensor) -> int:
    """How many channels keys and values may have together."""
    scores = a.shape[0] * a.shape[1] * b.shape[2]
    return max((channels for least, channels in FROM if scores >= least), default=0)


def _sizes(a: Tensor, b: Tensor) -> Any:
    return SCORES, a.shape, b.shape


def _softmax(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *rest = args or (kwargs.get("input"),)
    dim = rest[0] if rest else kwargs.get("dim")
    others = {k: v for k, v in kwargs.items() if k not in ("input", "dim", "_stacklevel") and v is not None}
    if len(rest) > 1 or others or type(dim) is not int or dim not in (-1, 2) or not waits(x, SCORES):
        return NotImplemented
    a, b, *_ = x.pair.arguments
    settle(pure=True)
    return defer(WEIGHTS, torch.Size((*a.shape[:2], b.shape[2])), _weights, a, b, x.pair)


def _turn(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *rest = args or (None,)
    if kwargs or not waits(x, WEIGHTS):
        return NotImplemented
    order = list(rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest)
    if not all(type(d) is int and -3 <= d < 3 for d in order):
        return NotImplemented
    order = [d % 3 for d in order]
    if order != [0, 2, 1] if func in PERMUTATIONS else sorted(order) != [1, 2] if order else func not in TRANSPOSES:
        return NotImplemented
    a, b, *_ = x.pair.arguments
    settle(pure=True)
    return defer(TURNED, torch.Size((a.shape[0], b.shape[2], a.shape[1])), _turned, a, b, x.pair)


# ---- each alone -------------------------------------------------------------------------------------------------


def _scores(a: Tensor, b: Tensor, func: Callable[..., Tensor], chains: Any) -> Tensor:
    chains.misses[_sizes(a, b)] = chains.misses.get(_sizes(a, b), 0) + 1
    return func(a, b)


def _weights(a: Tensor, b: Tensor, scores: Pair) -> Tensor:
    return torch.softmax(scores.value(), -1)


def _turned(a: Tensor, b: Tensor, weights: Pair) -> Tensor:
    return weights.value().mT


# ---- in one -----------------------------------------------------------------------------------------------------


def _attend(last: Pair, values: Tensor) -> Tensor:
    """The means of ``values``, [N, e, m], by the weights that wait."""
    a, b, *_ = last.arguments
    if a.shape[2] + values.shape[1] > _widest(a, b):
        return NotImplemented
    pairs = [last]
    while pairs[-1].kind != SCORES:
        pairs.append(pairs[-1].arguments[2])
    if any(pair.result is not None or pair.alone for pair in pairs):  # somebody wanted it, or may: the table is there
        return NotImplemented
    for pair in pairs:
        pair.check()
    settle(pure=True)
    result = attention(a.mT, torch.cat((b, values), 1), None, any_order=True)
    chains = pairs[-1].arguments[3]
    chains.misses[_sizes(a, b)] = 0
    for pair in pairs:
        pair.spent = True
        if pair.frame is not None:
            pair.frame.now, pair.frame.why = "in one with what follows", ""
    worth = a.shape[0] * a.shape[1] * b.shape[2] * WORTH[result.requires_grad]
    joined(None, f"gankern: self_attention2d ({last_implementation('self_attention2d')}), no table stored", worth)
    return result


_tensor: Any = Tensor  # whose attributes, on the class, are descriptors: the stubs show what a tensor has there
PERMUTATIONS = {torch.permute, Tensor.permute}
TRANSPOSES = {_tensor.mT.__get__}  # of no arguments
KINDS: dict[Any, Any] = {
    **dict.fromkeys((torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__), _product),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    **dict.fromkeys((torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes), _turn),
    **dict.fromkeys((*PERMUTATIONS, *TRANSPOSES), _turn),
}


def _listed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One of these operations, where somebody lists what runs too."""
    if state.log is None:
        return KINDS[func](func, args, kwargs)
    before = len(state.log.frames)
    with state.log.function(func):
        result = KINDS[func](func, args, kwargs)
    if result is NotImplemented:
        del state.log.frames[before:]
    return result


STEPS.update(dict.fromkeys(KINDS, _listed))
PLAIN[SCORES] = lambda new, a, b, *_: new(a) @ new(b)
PLAIN[WEIGHTS] = lambda new, a, b, _: torch.softmax(new(a) @ new(b), -1)
PLAIN[TURNED] = lambda new, a, b, _: torch.softmax(new(a) @ new(b), -1).mT
