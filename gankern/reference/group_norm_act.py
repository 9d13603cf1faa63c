"""Group normalisation and a (leaky) ReLU in plain PyTorch: the definition that the kernels are held against."""

from __future__ import annotations

from torch import Tensor

from gankern.reference._norm_act import Affine, moments, normalized, widened


def group_norm_act(
    x: Tensor, weight: Affine, bias: Affine, groups: int, eps: float, negative_slope: float, slope: Affine = None
) -> tuple[Tensor, Tensor]:
    """act((x - mean) / sqrt(var + eps) * weight + bias) of x [N, C, ...], and the statistics [3, N, groups] that it was
    computed with: mean, 1 / sqrt(var + eps), and the unbiased variance.

    mean and var are those of each sample's group of C / groups neighbouring channels, over these and their positions
    (the variance divides by their number). weight and bias are [C], or [N, C] for each sample's own. ``negative_slope``
    is that of a leaky ReLU: 1 for no activation, 0 for ReLU. ``slope`` [C] is PReLU's, in its place. float16 and
    bfloat16 are computed in float32.
    """
    values = widened(x)
    of_groups = values.reshape(x.shape[0], groups, -1) if x.numel() else values.new_zeros(x.shape[0], groups, 2)
    mean, var, kept_var = (
        s.repeat_interleave(x.shape[1] // groups, 1) for s in moments(of_groups, [2], of_groups.shape[2])
    )
    y, stats = normalized(values, (mean, var, kept_var), (weight, bias), eps, negative_slope, slope, x.dtype)
    return y, stats[:, :, :: x.shape[1] // groups]
