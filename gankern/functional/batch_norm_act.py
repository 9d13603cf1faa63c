"""Batch normalisation with an activation behind it."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gankern.core import activations
from gankern.core.native import nodes
from gankern.functional import _checks
from gankern.functional._norm_act import affine, check_options, check_running, update_running
from gankern.ops.batch_norm_act import batch_norm_act as _batch_norm_act

NAME = "batch_norm_act"


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    slope: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Batch normalisation as :func:`torch.nn.functional.batch_norm`, and an activation in the same pass.

    :math:`y = \mathrm{act}\big(\gamma\,(x - \mu)/\sqrt{\sigma^2 + \epsilon} + \beta\big)`. While training,
    :math:`\mu` and :math:`\sigma^2` are each channel's mean and biased variance over the batch and all positions, part
    of the gradient in every order; in evaluation they are ``running_mean`` and ``running_var``. With weight and bias of
    [N, C], each sample has its own affine values: *conditional* batch normalisation.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167; conditional: Dumoulin et al. 2017, arXiv 1610.07629.

    Args:
        x: [N, C] or [N, C, ...], up to any number of dimensions, float64, float32, bfloat16 or float16, any strides.
            Sums are in float32 and float64 (float64 alone for float64).
        running_mean, running_var: [C]; while training they are updated in place, to (1 - momentum) times themselves
            plus momentum times the batch's mean and unbiased variance. Both None: the batch's statistics are used in
            evaluation too.
        weight, bias: [C], or [N, C] for each sample's own; of x's dtype; or float32 where x is float16 or
            bfloat16, or of these where x is float32, as autocast makes conditions.
            None: ones, zeros.
        training: whether to use the batch's statistics.
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
    derivative is the negative slope's, and its second derivative does not exist. In evaluation the gradient of x does
    not depend on x: its second gradient is None, not zeros.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Also, as torch's, while training
            with one value a channel.

    >>> import torch
    >>> x, mean, var = torch.randn(8, 3, 4, 4), torch.zeros(3), torch.ones(3)
    >>> batch_norm_act(x, mean, var, training=True, activation="leaky_relu", negative_slope=0.2).shape
    torch.Size([8, 3, 4, 4])
    """
    if not is_dynamo_compiling():
        behind = activation, negative_slope, implementation, slope
        y = nodes.batch_norm_act(x, running_mean, running_var, weight, bias, training, momentum, eps, *behind)
        if y is not NotImplemented:
            return y
    _checks.floating(NAME, "x", x)
    shape = x.shape
    if len(shape) < 2 or shape[1] == 0:
        raise ValueError(f"{NAME}: x has shape {tuple(shape)}; it must be [N, C] or [N, C, ...] with a channel or more")
    check_options(NAME, momentum, eps, activation, negative_slope)
    weight, bias = affine(NAME, x, weight, bias)
    _checks.slope(NAME, activation, slope, x, shape[1])
    own = training or (running_mean is None and running_var is None)
    check_running(NAME, x, running_mean, running_var, updated=training)
    values = x.numel()
    if own and values == shape[1]:
        raise ValueError(f"{NAME}: expected more than 1 value per channel when training, got input size {tuple(shape)}")
    each = activations.slope(activation, negative_slope)
    running = running_mean, running_var
    y, stats = _batch_norm_act(x, (weight, bias, slope), running, (own, eps, each), implementation)
    if training and running_mean is not None and values:
        update_running(running_mean, running_var, stats, momentum)
    return y
