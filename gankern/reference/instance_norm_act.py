"""Instance normalisation and a (leaky) ReLU in plain PyTorch: the definition that the kernels are held against."""

from __future__ import annotations

from torch import Tensor

from gankern.reference._norm_act import Affine, moments, normalized, widened


def instance_norm_act(
    x: Tensor, weight: Affine, bias: Affine, eps: float, negative_slope: float, slope: Affine = None
) -> tuple[Tensor, Tensor]:
    """act((x - mean) / sqrt(var + eps) * weight + bias) of x [N, C, ...], and the statistics [3, N, C] that it was
    computed with: mean, 1 / sqrt(var + eps), and the variance that running statistics take up.

    mean and var are those of each sample's channel over its positions (the variance divides by their number; what
    running statistics take up divides by one less). weight and bias are [C], or [N, C] for each sample's own.
    ``negative_slope`` is that of a leaky ReLU: 1 for no activation, 0 for ReLU. ``slope`` [C] is PReLU's, in its place.
    float16 and bfloat16 are computed in float32.
    """
    values = widened(x)
    if x.numel():
        statistics = moments(values, list(range(2, x.ndim)), x[0, 0].numel())
    else:
        zeros = values.new_zeros(x.shape[:2])
        statistics = zeros, zeros, zeros
    return normalized(values, statistics, (weight, bias), eps, negative_slope, slope, x.dtype)
