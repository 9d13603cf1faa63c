"""Group normalisation with an activation behind it."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gankern.core import activations
from gankern.core.native import nodes
from gankern.functional import _checks
from gankern.functional._norm_act import affine, check_options
from gankern.ops.group_norm_act import group_norm_act as _group_norm_act

NAME = "group_norm_act"


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    slope: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Group normalisation as :func:`torch.nn.functional.group_norm`, and an activation in the same pass.

    :math:`y = \mathrm{act}\big(\gamma_c\,(x - \mu)/\sqrt{\sigma^2 + \epsilon} + \beta_c\big)`, where :math:`\mu` and
    :math:`\sigma^2` are the mean and biased variance of each sample's group of C / num_groups neighbouring channels,
    over these and their positions, part of the gradient in every order. One group is the layer normalisation over
    channels and positions, with affine values of each channel, that critics under a gradient penalty have in place of
    batch norm; C groups are :func:`instance_norm_act`.

    Source: Wu and He 2018, arXiv 1803.08494; of one group: Ba et al. 2016, arXiv 1607.06450, and Gulrajani et al. 2017,
    arXiv 1704.00028.

    Args:
        x: [N, C, ...], float64, float32, bfloat16 or float16, any strides. Sums are in float32 and float64 (float64
            alone for float64).
        num_groups: at least 1; a divisor of C.
        weight, bias: [C], or [N, C] for each sample's own; of x's dtype; or float32 where x is float16 or
            bfloat16, or of these where x is float32, as autocast makes conditions.
            None: ones, zeros.
        eps: at least 0; added to the variance.
        activation: None or "linear" for none, "relu", "leaky_relu" or "prelu".
        negative_slope: of "leaky_relu".
        slope: of "prelu", [1] or [C], of x's dtype, or float32 where that is float16 or bfloat16.
        implementation: see :mod:`gankern.functional`.

    Returns:
        As x in shape and dtype; channels_last where x is, contiguous for a tensor with gaps. An empty batch gives an
        empty result.

    Gradient order: 2 (any order for "reference"), for x, weight, bias and slope. At the activation's kink the
    derivative is the negative slope's, and its second derivative does not exist.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Also where all groups have one value
            alone: its own mean is all that there is in it.

    >>> import torch
    >>> x = torch.randn(2, 64, 16, 16)
    >>> group_norm_act(x, 32, activation="relu").shape
    torch.Size([2, 64, 16, 16])
    """
    if not is_dynamo_compiling():
        behind = activation, negative_slope, implementation, slope
        y = nodes.group_norm_act(x, num_groups, weight, bias, eps, *behind)
        if y is not NotImplemented:
            return y
    _checks.floating(NAME, "x", x)
    shape = x.shape
    if len(shape) < 2 or shape[1] == 0:
        raise ValueError(f"{NAME}: x has shape {tuple(shape)}; it must be [N, C, ...] with a channel")
    _checks.whole(NAME, "num_groups", num_groups)
    if shape[1] % num_groups:
        raise ValueError(f"{NAME}: num_groups is {num_groups}; it must divide x's {shape[1]} channels")
    check_options(NAME, 0.0, eps, activation, negative_slope)
    weight, bias = affine(NAME, x, weight, bias)
    _checks.slope(NAME, activation, slope, x, shape[1])
    if x.numel() == shape[0] * num_groups and x.numel():
        raise ValueError(
            f"{NAME}: x has shape {tuple(shape)}; with {num_groups} groups each has one value, and its own mean would "
            "be all that there is in it"
        )
    each = activations.slope(activation, negative_slope)
    return _group_norm_act(x, (weight, bias, slope), (), (num_groups, eps, each), implementation)[0]
