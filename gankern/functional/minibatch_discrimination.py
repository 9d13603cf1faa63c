"""Minibatch discrimination, and the sums of similarities that it is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gankern.core.dispatch import short
from gankern.core.native import nodes
from gankern.core.torch_internals import autocasting
from gankern.functional import _checks
from gankern.ops.minibatch_discrimination import l1_similarity as _l1_similarity


def minibatch_discrimination(
    x: Tensor,
    kernel: Tensor,
    *,
    include_self: bool = False,
    reduction: str = "sum",
    implementation: str | None = None,
) -> Tensor:
    r"""How close each sample is to the other samples of its batch, for a discriminator to see a lack of variety.

    With :math:`M_{ibc} = \sum_a x_{ia} T_{abc}` the result is
    :math:`o_{ib} = \sum_{j \ne i} \exp(-\sum_c |M_{ibc} - M_{jbc}|)`. No tensor of pairs is made: memory grows as N,
    in every gradient order.

    Source: Salimans et al. 2016, arXiv 1606.03498, section 3.2.

    Args:
        x: [N, A], float64, float32, bfloat16 or float16, any strides.
        kernel: the tensor T, [A, B, C]: B kernels of dimension C.
        include_self: add the sample's similarity to itself, which is 1.
        reduction: "sum", or "mean" for the mean over the terms of the sum: N - 1, or N with ``include_self``.
        implementation: see :mod:`gankern.functional`.

    Returns:
        [N, B]; of one sample without itself, zeros. :class:`gankern.nn.MinibatchDiscrimination` appends it to x.

    Gradient order: 2 (any order for "reference").

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> import torch
    >>> minibatch_discrimination(torch.randn(16, 64), 0.1 * torch.randn(64, 20, 5)).shape
    torch.Size([16, 20])
    """
    if not is_dynamo_compiling():
        y = nodes.minibatch_discrimination(x, kernel, include_self, reduction, implementation)
        if y is not NotImplemented:
            return y
    name = "minibatch_discrimination"
    if reduction not in ("sum", "mean"):
        raise ValueError(f"{name}: reduction is {reduction!r}; accepted are 'sum' and 'mean'")
    _checks.floating(name, "x", x)
    _checks.floating(name, "kernel", kernel)
    if x.ndim != 2:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; it must be [samples, features]")
    if kernel.ndim != 3 or 0 in kernel.shape[1:]:
        raise ValueError(
            f"{name}: kernel has shape {tuple(kernel.shape)}; it must be [features, kernels, kernel_dim] with at least "
            f"one kernel and one kernel_dim"
        )
    if x.shape[1] != kernel.shape[0]:
        raise ValueError(
            f"{name}: x has {x.shape[1]} features (shape {tuple(x.shape)}), kernel takes {kernel.shape[0]} (shape "
            f"{tuple(kernel.shape)})"
        )
    autocast = autocasting(x.device.type)  # which makes the types equal
    if x.device != kernel.device or (x.dtype != kernel.dtype and not autocast):
        raise ValueError(
            f"{name}: x and kernel must share dtype and device, got {short(x.dtype)} on {x.device} and "
            f"{short(kernel.dtype)} on {kernel.device}"
        )
    m = (x @ kernel.flatten(1)).unflatten(1, kernel.shape[1:])
    similarity = _l1_similarity(m, None, include_self, implementation)
    if reduction == "sum":
        return similarity
    return similarity / max(len(x) if include_self else len(x) - 1, 1)


def l1_similarity(
    m: Tensor, other: Tensor | None = None, *, include_self: bool = False, implementation: str | None = None
) -> Tensor:
    r"""The sum of each point's similarities to the other points, :math:`\exp` of minus the L1 distance, for each of B
    kernels.

    Within one set :math:`o_{ib} = \sum_{j \ne i} \exp(-\sum_c |m_{ibc} - m_{jbc}|)`, and between two sets
    :math:`o_{ib} = \sum_j \exp(-\sum_c |m_{ibc} - m'_{jbc}|)` over all of the other's points. The gradient at a
    distance's kink (two equal coordinates) is 0.

    Source: the core of minibatch discrimination, Salimans et al. 2016, arXiv 1606.03498, section 3.2.

    Args:
        m: [N, B, C], float64, float32, bfloat16 or float16, any strides; sums are in float32 (float64 for float64).
        other: [K, B, C] of m's dtype and device, for similarities between the two sets.
        include_self: within one set, add each point's similarity to itself, which is 1.
        implementation: see :mod:`gankern.functional`.

    Returns:
        [N, B]. A pair with NaN in it is NaN, and so is a pair of equal infinities (their difference is); an infinite
        point is not at all similar to finite ones.

    Gradient order: 2 (any order for "reference"), for m and other.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> import torch
    >>> l1_similarity(torch.zeros(4, 2, 3))
    tensor([[3., 3.],
            [3., 3.],
            [3., 3.],
            [3., 3.]])
    >>> l1_similarity(torch.randn(4, 2, 3), torch.randn(7, 2, 3)).shape
    torch.Size([4, 2])
    """
    if not is_dynamo_compiling():
        y = nodes.l1_similarity(m, other, include_self, implementation)
        if y is not NotImplemented:
            return y
    name = "l1_similarity"
    points: Any
    for argument, points in (("m", m), ("other", other)):
        if points is None and argument == "other":
            continue
        _checks.floating(name, argument, points)
        if points.ndim != 3 or 0 in points.shape[1:]:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(points.shape)}; it must be [points, kernels, kernel_dim] with at "
                f"least one kernel and one kernel_dim"
            )
    if other is not None:
        if include_self:
            raise ValueError(f"{name}: include_self is for one set of points; between two sets every pair counts")
        if m.shape[1:] != other.shape[1:]:
            raise ValueError(
                f"{name}: m has shape {tuple(m.shape)} and other {tuple(other.shape)}; they may differ in their first "
                f"dimension only"
            )
        if m.dtype != other.dtype or m.device != other.device:
            raise ValueError(
                f"{name}: m and other must share dtype and device, got {short(m.dtype)} on {m.device} and "
                f"{short(other.dtype)} on {other.device}"
            )
    return _l1_similarity(m, other, include_self, implementation)
