"""Self-attention over the positions of a feature map, as SAGAN and BigGAN have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gankern.core.layout import memory_format
from gankern.core.native import nodes
from gankern.core.torch_internals import autocasting
from gankern.functional import _checks
from gankern.ops.self_attention2d import attention

NAME = "self_attention2d"


def self_attention2d(
    x: Tensor,
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    out: Tensor,
    gamma: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    r"""The non-local block of SAGAN and BigGAN: :math:`x + \gamma\,W_o\,(g A^T)`,
    :math:`A = \mathrm{softmax}(\theta^T \phi)` over the keys.

    Queries :math:`\theta = W_\theta x` are of every position; keys :math:`\phi` and values :math:`g` are
    :math:`W_\phi x` and :math:`W_g x` after 2x2 max pooling. There is no factor of :math:`1/\sqrt d`.

    Source: Zhang et al. 2018, arXiv 1805.08318; Wang et al. 2017, arXiv 1711.07971.

    The table of queries by keys, [H W, H W / 4] of each sample, is never stored: tiles of it are computed, and
    computed again in the backward. Attention in torch's fused form has no second derivative; this one has.

    Args:
        x: [N, C, H, W], floating point, H and W at least 2 (of an odd number the last row or column is in no key).
        theta, phi: [D, C] or [D, C, 1, 1], of x's dtype, or any under autocast; spectrally normalised where a
            network's other weights are.
        g: [E, C] or [E, C, 1, 1].
        out: [C, E] or [C, E, 1, 1].
        gamma: one number, [] or [1]; zero at the start, where the other weights have no gradient.
        implementation: see the module. "reference" is the formula with the whole table.

    Returns:
        As x in shape, dtype and memory format; in half precision the table and its sums are float32.

    Gradient order: 2 (any order for "reference"), for all tensors.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> import torch
    >>> x, gamma = torch.randn(2, 16, 8, 8), torch.zeros(())
    >>> theta, phi, g, out = (torch.randn(*size) for size in ((2, 16), (2, 16), (8, 16), (16, 8)))
    >>> torch.equal(self_attention2d(x, theta, phi, g, out, gamma), x)
    True
    """
    if not is_dynamo_compiling():
        y = nodes.self_attention2d(x, theta, phi, g, out, gamma, implementation)
        if y is not NotImplemented:
            return y
    _checks.floating(NAME, "x", x)
    if x.ndim != 4 or min(x.shape[2:]) < 2 or x.shape[1] == 0:
        raise ValueError(
            f"{NAME}: x has shape {tuple(x.shape)}; it must be [N, C, H, W] with a channel and a height and width of 2 "
            "or more, since keys are pooled by 2x2"
        )
    channels = x.shape[1]
    weights = {"theta": theta, "phi": phi, "g": g, "out": out}
    autocast = autocasting(x.device.type)  # whose convolutions make the types equal
    for name, weight in weights.items():
        _checks.floating(NAME, name, weight)
        if weight.device != x.device or (weight.dtype != x.dtype and not autocast):
            raise ValueError(
                f"{NAME}: {name} is {weight.dtype} on {weight.device}; x is {x.dtype} on {x.device}, and it must be too"
            )
        fits = weight.ndim == 2 or (weight.ndim == 4 and tuple(weight.shape[2:]) == (1, 1))
        inner = channels if name != "out" else g.shape[0]
        outer = {"phi": theta.shape[0], "out": channels}.get(name, weight.shape[0] if weight.ndim else 0)
        if not fits or weight.shape[1] != inner or weight.shape[0] != outer or outer == 0:
            raise ValueError(
                f"{NAME}: {name} has shape {tuple(weight.shape)}; for x of {channels} channels it must be "
                f"[{outer or 'D'}, {inner}] or [{outer or 'D'}, {inner}, 1, 1]"
            )
    _checks.floating(NAME, "gamma", gamma)
    if gamma.numel() != 1 or gamma.ndim > 1:
        raise ValueError(f"{NAME}: gamma has shape {tuple(gamma.shape)}; it must be one number, [] or [1]")

    theta, phi, g, out = (w.reshape(w.shape[0], w.shape[1], 1, 1) for w in (theta, phi, g, out))
    queries = F.conv2d(x, theta).flatten(2)
    # Keys and values are pooled alike: one convolution and one pooling make them.
    pooled = F.max_pool2d(F.conv2d(x, torch.cat((phi, g))), 2).flatten(2)
    found = attention(queries, pooled, implementation).unflatten(2, x.shape[2:])
    # gamma in the weight: a product of maps less, and one that need not be kept for gamma's gradient.
    return x + F.conv2d(found.contiguous(memory_format=memory_format(x)), gamma * out)
