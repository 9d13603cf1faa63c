"""The penalty of each sample's gradient norm."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gankern.core.native import nodes
from gankern.functional import _checks
from gankern.ops.gradient_penalty import gradient_penalty as _gradient_penalty


def gradient_penalty(
    gradient: Tensor, *, target: float = 1.0, one_sided: bool = False, implementation: str | None = None
) -> Tensor:
    r"""How far the norm of each sample's gradient is from a target, squared.

    :math:`p_n = (\lVert g_n \rVert_2 - t)^2`, or :math:`\max(0, \lVert g_n \rVert_2 - t)^2` one-sided; the norm is over
    all dimensions but the first. Where a gradient is zero, the norm's derivative there is taken as 0, and it is exact
    everywhere else: no epsilon. With target 0 it is :math:`\lVert g_n \rVert^2`.

    :func:`gankern.penalties.gradient_penalty` is the whole penalty of a critic.

    Source: Gulrajani et al. 2017, arXiv 1704.00028, equation 3; one-sided: Petzka et al. 2018, arXiv 1709.08894.

    Args:
        gradient: [N, ...], float64, float32, bfloat16 or float16, any strides.
        target: the norm that costs nothing, 0 or more.
        one_sided: whether only norms above the target cost.
        implementation: see the module.

    Returns:
        [N], in fp32 (fp64 for fp64), as are all sums.

    Gradient order: 2 (any order for "reference").

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> import torch
    >>> gradient_penalty(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([16.,  1.])
    """
    if not is_dynamo_compiling():
        values = nodes.gradient_penalty(gradient, target, one_sided, implementation)
        if values is not NotImplemented:
            return values
    name = "gradient_penalty"
    _checks.floating(name, "gradient", gradient)
    if gradient.ndim == 0:
        raise ValueError(f"{name}: gradient has no dimensions; it must be [samples, ...]")
    _checks.number(name, "target", target, least=0)
    return _gradient_penalty(gradient, float(target), one_sided, implementation)
