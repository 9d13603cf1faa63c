"""Minibatch standard deviation."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gankern.core.native import nodes
from gankern.functional import _checks
from gankern.ops.minibatch_stddev import minibatch_stddev as _minibatch_stddev

LAYOUTS = ("strided", "contiguous")
INDIVISIBLE = ("raise", "largest_divisor", "whole_batch")


def minibatch_stddev(
    x: Tensor,
    *,
    group_size: int = 4,
    num_channels: int = 1,
    layout: str = "strided",
    unbiased: bool = False,
    on_indivisible: str = "raise",
    eps: float = 1e-8,
    implementation: str | None = None,
) -> Tensor:
    r"""Appends to x how much the samples of a group vary, for a discriminator to see a lack of variety.

    The batch is cut into groups of G samples, and the C channels into F parts. For a part f of a group m,

    .. math::
        o_{mf} = \frac{1}{P} \sum_{c \in f,\, p} \sqrt{\operatorname{Var}_{i \in m}(x_{icp}) + \epsilon}

    with P = C / F times the number of pixels p. Every sample of the group gets F more channels, constant over the
    pixels, with these values. x is read once and the result written once.

    Source: Karras et al. 2018, arXiv 1710.10196, section 3.

    Args:
        x: [N, C, ...] with any number of further dimensions (and none), float64, float32, bfloat16 or float16, any
            strides. Variances are in float32, in float64 for float64.
        group_size: G, the samples of a group; of a smaller batch, all.
        num_channels: F, how many channels are appended; it must divide C.
        layout: "strided": sample i is in group i mod N / G; "contiguous": neighbouring samples make a group.
        unbiased: divide the sum of squares by G - 1 instead of G. A group of one sample then raises.
        on_indivisible: what to do where G does not divide N: "raise", take the "largest_divisor" of N that is not above
            G as group size, or take the "whole_batch" as one group.
        eps: not negative; added to each variance.
        implementation: see the module.

    Returns:
        [N, C + F, ...] of x's dtype; channels_last where x is.

    Gradient order: 2 (any order for "reference"). Where a variance and eps are both 0 the gradient is NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> import torch
    >>> minibatch_stddev(torch.randn(8, 512, 4, 4)).shape
    torch.Size([8, 513, 4, 4])
    """
    if not is_dynamo_compiling():
        y = nodes.minibatch_stddev(x, group_size, num_channels, layout, unbiased, on_indivisible, eps, implementation)
        if y is not NotImplemented:
            return y
    name = "minibatch_stddev"
    _checks.floating(name, "x", x)
    check_options(name, group_size, num_channels, layout, on_indivisible, eps)
    if x.ndim < 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; it must be [samples, channels, ...] with a channel")
    if x.shape[1] % num_channels:
        raise ValueError(f"{name}: num_channels is {num_channels}; it must divide the {x.shape[1]} channels of x")
    samples = x.shape[0]
    group = min(group_size, max(samples, 1))
    if samples % group:
        if on_indivisible == "raise":
            raise ValueError(
                f"{name}: a batch of {samples} is not divisible by group_size {group_size}; pass on_indivisible="
                f"'largest_divisor' or 'whole_batch', or choose another group_size"
            )
        if on_indivisible == "whole_batch":
            group = samples
        else:
            group = next(size for size in range(group, 0, -1) if samples % size == 0)
    if unbiased and group == 1 and samples:
        raise ValueError(
            f"{name}: unbiased variance needs groups of 2 samples or more, got group_size {group_size} for a batch of "
            f"{samples}; pass unbiased=False"
        )
    return _minibatch_stddev(x, group, num_channels, layout == "strided", bool(unbiased), float(eps), implementation)


def check_options(name: str, group_size: int, num_channels: int, layout: str, on_indivisible: str, eps: float) -> None:
    _checks.whole(name, "group_size", group_size)
    _checks.whole(name, "num_channels", num_channels)
    _checks.choice(name, "layout", layout, LAYOUTS)
    _checks.choice(name, "on_indivisible", on_indivisible, INDIVISIBLE)
    _checks.number(name, "eps", eps, least=0)
