"""Virtual batch norm, and the statistics of its reference batch."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gankern.core import activations
from gankern.core.dispatch import short
from gankern.core.native import nodes
from gankern.functional import _checks
from gankern.ops.virtual_batch_norm import virtual_batch_norm as _virtual_batch_norm
from gankern.ops.virtual_batch_norm import virtual_batch_norm_statistics as _virtual_batch_norm_statistics


def virtual_batch_norm(
    x: Tensor,
    ref_mean: Tensor,
    ref_mean_square: Tensor,
    ref_count: float | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.2,
    implementation: str | None = None,
) -> Tensor:
    r"""Normalises each example with statistics of a fixed reference batch and of itself, then applies an activation.

    With :math:`c = 1 / (B + 1)` for a reference batch of B examples, and with the example's own mean :math:`a_n` and
    mean of squares :math:`q_n` over its pixels, for each channel

    .. math::
        \mu_n = c\,a_n + (1 - c)\,m_r, \quad s_n = c\,q_n + (1 - c)\,s_r, \quad
        y = \gamma\, \frac{x - \mu_n}{\sqrt{s_n - \mu_n^2 + \epsilon}} + \beta

    No example's result depends on the other examples of its batch, to the last bit. :math:`s_n - \mu_n^2` is computed
    as :math:`c\,v_n + (1 - c)(s_r - m_r^2) + c(1 - c)(a_n - m_r)^2` with the example's variance :math:`v_n`, where only
    :math:`s_r - m_r^2` can cancel (it is taken as 0 where rounding makes it negative). Therefore pass the statistics in
    float64, whatever x's dtype is, as :func:`virtual_batch_norm_statistics` returns them: at a mean of 1e4 and a
    standard deviation of 1 the mean of squares in float32 would leave nothing of the variance, in float64 it leaves
    8 digits.

    Source: Salimans et al. 2016, arXiv 1606.03498, section 3.6.

    Args:
        x: [N, C, ...] with any number of further dimensions (and none), float64, float32, bfloat16 or float16, any
            strides.
        ref_mean: [C], the mean of the reference batch's features, of any floating dtype.
        ref_mean_square: [C], the mean of their squares.
        ref_count: B, at least 1; or None where an example does not count itself (c = 0): reference batch norm, and how
            the reference batch itself is normalised.
        weight, bias: [C] or None, of any floating dtype: gamma (None: 1) and beta (None: 0).
        eps: not negative; added to the variance.
        activation: None or "linear" for none, "relu" or "leaky_relu": applied to y, in the same pass.
        negative_slope: of "leaky_relu".
        implementation: see the module.

    Returns:
        y of x's shape and dtype; channels_last where x is.

    Gradient order: 2 (any order for "reference"), for x, ref_mean, ref_mean_square, weight and bias.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> import torch
    >>> reference, x = torch.randn(64, 16, 8, 8), torch.randn(4, 16, 8, 8)
    >>> mean, mean_square = virtual_batch_norm_statistics(reference)
    >>> virtual_batch_norm(x, mean, mean_square, len(reference), activation="leaky_relu").shape
    torch.Size([4, 16, 8, 8])
    """
    if not is_dynamo_compiling():
        y = nodes.virtual_batch_norm(
            x, ref_mean, ref_mean_square, ref_count, weight, bias, eps, activation, negative_slope, implementation
        )
        if y is not NotImplemented:
            return y
    name = "virtual_batch_norm"
    _check_map(name, x)
    channels = x.shape[1]
    vectors: dict[str, Any] = {"ref_mean": ref_mean, "ref_mean_square": ref_mean_square, "weight": weight, "bias": bias}
    for argument, vector in vectors.items():
        if vector is None and argument in ("weight", "bias"):
            continue
        _checks.floating(name, argument, vector)
        if vector.shape != (channels,):
            raise ValueError(
                f"{name}: {argument} has shape {tuple(vector.shape)}; x of shape {tuple(x.shape)} has {channels} "
                f"channels and needs ({channels},)"
            )
        if vector.device != x.device:
            raise ValueError(f"{name}: {argument} is on {vector.device}, x on {x.device}; they must share a device")
    if ref_count is not None and not (isinstance(ref_count, (int, float)) and 1 <= ref_count < math.inf):
        raise ValueError(
            f"{name}: ref_count is {ref_count}; it must be the number of examples of the reference batch, at least 1, "
            f"or None where an example does not count itself"
        )
    check_options(name, eps, activation, negative_slope)
    own_share = 0.0 if ref_count is None else 1 / (ref_count + 1)
    slope = activations.slope(activation, negative_slope)
    return _virtual_batch_norm(x, ref_mean, ref_mean_square, own_share, weight, bias, float(eps), slope, implementation)


def virtual_batch_norm_statistics(x: Tensor, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    r"""The mean and the mean of squares of each channel of a reference batch, :math:`m_r` and :math:`s_r`.

    In float64 whatever x's dtype is, from a variance that is computed about the mean: :math:`s_r - m_r^2` still has the
    variance's digits where :func:`virtual_batch_norm` takes it apart again.

    Source: Salimans et al. 2016, arXiv 1606.03498, section 3.6.

    Args:
        x: [N, C, ...] with at least one value a channel, float64, float32, bfloat16 or float16, any strides.
        implementation: see the module.

    Returns:
        Two float64 tensors [C].

    Gradient order: 2 (any order for "reference").

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> import torch
    >>> mean, mean_square = virtual_batch_norm_statistics(torch.full((2, 3, 4, 4), 2.0))
    >>> mean_square
    tensor([4., 4., 4.], dtype=torch.float64)
    """
    if not is_dynamo_compiling():
        both = nodes.virtual_batch_norm_statistics(x, implementation)
        if both is not NotImplemented:
            return both
    name = "virtual_batch_norm_statistics"
    _check_map(name, x)
    if x.numel() == 0:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; an empty batch has no statistics")
    return _virtual_batch_norm_statistics(x, implementation)


def check_options(name: str, eps: float, activation: str | None, negative_slope: float) -> None:
    _checks.number(name, "eps", eps, least=0)
    _checks.activation(name, activation, negative_slope, activations.PIECEWISE)


def _check_map(name: str, x: Tensor) -> None:
    _checks.floating(name, "x", x)
    if x.ndim < 2:
        raise ValueError(
            f"{name}: x is {short(x.dtype)} of shape {tuple(x.shape)}; it must be [samples, channels, ...]"
        )
