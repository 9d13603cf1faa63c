"""Instance normalisation with an activation behind it."""

from __future__ import annotations

import math

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gankern.core import activations
from gankern.core.native import nodes
from gankern.functional import _checks
from gankern.functional._norm_act import affine, check_options, check_running, update_running
from gankern.ops.batch_norm_act import batch_norm_act as _batch_norm_act
from gankern.ops.instance_norm_act import instance_norm_act as _instance_norm_act
from gankern.ops.instance_norm_act import primitive

NAME = "instance_norm_act"


def instance_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    slope: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Instance normalisation as :func:`torch.nn.functional.instance_norm`, and an activation in the same pass.

    :math:`y = \mathrm{act}\big(\gamma\,(x - \mu)/\sqrt{\sigma^2 + \epsilon} + \beta\big)`, where :math:`\mu` and
    :math:`\sigma^2` are the mean and biased variance of each channel of each sample over its positions, part of the
    gradient in every order. With weight and bias of [N, C], each sample has its own affine values: *adaptive* instance
    normalisation.

    Source: Ulyanov et al. 2016, arXiv 1607.08022; adaptive: Huang and Belongie 2017, arXiv 1703.06868.

    Args:
        x: [N, C, ...] with one dimension of positions or more, float64, float32, bfloat16 or float16, any strides. Sums
            are in float32 and float64 (float64 alone for float64).
        running_mean, running_var: [C], or both None. With use_input_stats they are updated in place, to (1 - momentum)
            times themselves plus momentum times the mean over the samples of means and of unbiased variances; without,
            they stand for every sample's mean and variance.
        weight, bias: [C], or [N, C] for each sample's own; of x's dtype; or float32 where x is float16 or
            bfloat16, or of these where x is float32, as autocast makes conditions.
            None: ones, zeros.
        use_input_stats: whether to use each sample's own statistics.
        momentum: see running_mean.
        eps: at least 0; added to the variance.
        activation: None or "linear" for none, "relu", "leaky_relu" or "prelu".
        negative_slope: of "leaky_relu".
        slope: of "prelu", [1] or [C], of x's dtype, or float32 where that is float16 or bfloat16.
        implementation: see :mod:`gankern.functional`.

    Returns:
        As x in shape and dtype; channels_last where x is, contiguous for a tensor with gaps. An empty batch gives an
        empty result and leaves the running statistics as they are.

    Gradient order: 2 (any order for "reference"), for x, weight, bias and slope. At the activation's kink the
    derivative is the negative slope's, and its second derivative does not exist.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Also, as torch's, where a channel of
            a sample has one position alone: its own mean is all that there is in it.

    >>> import torch
    >>> x = torch.randn(1, 64, 16, 16)
    >>> instance_norm_act(x, activation="relu").shape
    torch.Size([1, 64, 16, 16])
    """
    if not is_dynamo_compiling():
        behind = activation, negative_slope, implementation, slope
        y = nodes.instance_norm_act(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, *behind)
        if y is not NotImplemented:
            return y
    _checks.floating(NAME, "x", x)
    shape = x.shape
    if len(shape) < 3 or shape[1] == 0:
        raise ValueError(f"{NAME}: x has shape {tuple(shape)}; it must be [N, C, ...] with a channel and a position")
    check_options(NAME, momentum, eps, activation, negative_slope)
    weight, bias = affine(NAME, x, weight, bias)
    _checks.slope(NAME, activation, slope, x, shape[1])
    check_running(NAME, x, running_mean, running_var, updated=bool(use_input_stats))
    each = activations.slope(activation, negative_slope)
    if not use_input_stats:
        if running_mean is None:
            raise ValueError(f"{NAME}: running_mean and running_var are None; use_input_stats=False needs them")
        chosen = primitive.select(x, implementation)
        running = running_mean, running_var
        return _batch_norm_act(x, (weight, bias, slope), running, (False, eps, each), chosen)[0]
    if math.prod(shape[2:]) == 1:
        raise ValueError(
            f"{NAME}: x has shape {tuple(shape)}; with use_input_stats a channel needs more than one position, since "
            "its own mean would be all that there is in it"
        )
    y, stats = _instance_norm_act(x, (weight, bias, slope), (), (eps, each), implementation)
    if running_mean is not None and x.numel():
        update_running(running_mean, running_var, stats.mean(1), momentum)
    return y
