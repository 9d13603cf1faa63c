"""One function a primitive, in torch.nn.functional's conventions.

Every function takes ``implementation=``: None (what :func:`gankern.use_implementation` or the variable
GANKERN_IMPLEMENTATION says), "auto", "reference", "cpu", "triton" or "cuda".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gankern.dispatch import FLOATING, short
from gankern.ops.minibatch_discrimination import l1_similarity as _l1_similarity
from gankern.ops.spectral_norm import spectral_norm_group as _spectral_norm_group

__all__ = [
    "SPECTRAL_NORM_DIALECTS",
    "SpectralNormDialect",
    "l1_similarity",
    "minibatch_discrimination",
    "spectral_norm",
    "spectral_norm_group",
]


@dataclass(frozen=True)
class SpectralNormDialect:
    """How one family of public code runs the power iteration."""

    u_first: bool  # u <- n(Wv) then v <- n(W^T u); otherwise v first
    add_eps: bool  # n(x) = x / (|x| + eps); otherwise x / max(|x|, eps)
    iterates_in_eval: bool
    stores_in_eval: bool  # whether what evaluation iterates is kept


SPECTRAL_NORM_DIALECTS = {
    # torch.nn.utils.parametrizations.spectral_norm
    "parametrization": SpectralNormDialect(True, False, False, False),
    # torch.nn.utils.spectral_norm
    "hook": SpectralNormDialect(False, False, False, False),
    # the wrapper class with weight_bar, weight_u, weight_v that many repositories copied
    "wrapper": SpectralNormDialect(False, True, True, True),
    # BigGAN's SN layers with u0, sv0
    "biggan": SpectralNormDialect(False, False, True, False),
}


def spectral_norm(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    n_power_iterations: int = 1,
    dim: int = 0,
    eps: float = 1e-12,
    training: bool = True,
    dialect: str = "parametrization",
    sigma: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Divides a weight by its spectral norm, estimated by power iteration.

    With :math:`W` the weight as a matrix :math:`[h, w]`, ``dim`` first, one iteration is
    :math:`u \leftarrow n(Wv),\; v \leftarrow n(W^\top u)` with :math:`n(x) = x / \max(\lVert x\rVert_2, \epsilon)`;
    then :math:`\sigma = u^\top W v` and the result is :math:`W/\sigma`. ``u`` and ``v`` are updated in place while
    training and are constants for the gradient,
    :math:`dW = g/\sigma - \langle g, W\rangle/\sigma^2\; u v^\top`. Two forwards before one backward work: each
    backward uses the pair its own forward ended with.

    Source: Miyato et al. 2018, arXiv 1802.05957, Algorithm 1.

    Args:
        weight: 2-D or more, float64, float32, bfloat16 or float16, any strides.
        u: [h], h = weight.shape[dim]; updated in place.
        v: [w], w = weight.numel() / h; updated in place.
        n_power_iterations: at least 1.
        dim: the dimension of the outputs: 0, and 1 for transposed convolutions.
        eps: greater than 0; the least norm that u and v are divided by.
        training: whether to iterate. In evaluation sigma comes from the given u and v (the dialects "wrapper" and
            "biggan" iterate there too, as the code they are named for does).
        dialect: "parametrization" (torch's parametrization), "hook" (torch's hook: v before u), "wrapper", "biggan".
        sigma: a buffer of one value that receives sigma wherever u and v are updated; for logging.
        implementation: see the module.

    Returns:
        ``weight / sigma``, with weight's shape, dtype and strides. A weight of zeros gives zeros and gradients of
        zero (torch gives NaN); NaN stays NaN.

    Gradient order: 2 (any order for "reference").

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> w, u, v = torch.randn(8, 4, 3, 3), torch.randn(8), torch.randn(36)
    >>> spectral_norm(w, u, v).shape
    torch.Size([8, 4, 3, 3])
    """
    return spectral_norm_group(
        [weight],
        [u],
        [v],
        n_power_iterations=n_power_iterations,
        dims=[dim],
        eps=eps,
        training=training,
        dialect=dialect,
        sigmas=[sigma],
        implementation=implementation,
    )[0]


def spectral_norm_group(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_power_iterations: int = 1,
    dims: Sequence[int] | None = None,
    eps: float = 1e-12,
    training: bool = True,
    dialect: str = "parametrization",
    sigmas: Sequence[Tensor | None] | None = None,
    implementation: str | None = None,
) -> list[Tensor]:
    """:func:`spectral_norm` of many weights in one call: one parallel region on the CPU, a handful of launches on
    the GPU, whatever their number. The results are those of one call a weight.

    All weights have one dtype and one device; ``dims`` defaults to 0 and ``sigmas`` to None for each. Other arguments,
    gradient order and errors are :func:`spectral_norm`'s.

    >>> ws = [torch.randn(8, 4), torch.randn(16, 8)]
    >>> us, vs = [torch.randn(8), torch.randn(16)], [torch.randn(4), torch.randn(8)]
    >>> [w.shape for w in spectral_norm_group(ws, us, vs)]
    [torch.Size([8, 4]), torch.Size([16, 8])]
    """
    rules = SPECTRAL_NORM_DIALECTS.get(dialect)
    if rules is None:
        accepted = ", ".join(SPECTRAL_NORM_DIALECTS)
        raise ValueError(f"spectral_norm: dialect is {dialect!r}; accepted are {accepted}")
    if n_power_iterations < 1:
        raise ValueError(f"spectral_norm: n_power_iterations is {n_power_iterations}; it must be at least 1")
    if not eps > 0:
        raise ValueError(f"spectral_norm: eps is {eps}; it must be greater than 0")
    dims = [0] * len(weights) if dims is None else list(dims)
    if not len(weights) == len(us) == len(vs) == len(dims):
        counts = f"{len(weights)} weights, {len(us)} u, {len(vs)} v, {len(dims)} dims"
        raise ValueError(f"spectral_norm: the lists have different lengths: {counts}")
    if not weights:
        return []
    for i, (weight, u, v) in enumerate(zip(weights, us, vs)):
        dims[i] = _check_spectral_norm(weight, u, v, dims[i], weights[0])

    iterates = training or rules.iterates_in_eval
    normalized, vectors, new_sigma = _spectral_norm_group(
        weights, us, vs, dims, n_power_iterations if iterates else 0, eps, rules.u_first, rules.add_eps, implementation
    )
    if training or rules.stores_in_eval:
        with torch.no_grad():
            torch._foreach_copy_([x for pair in zip(us, vs) for x in pair], vectors)
            for i, sigma in enumerate(sigmas or ()):
                if sigma is not None:
                    sigma.copy_(new_sigma[i].expand(sigma.shape))
    return normalized


def _check_spectral_norm(weight: Tensor, u: Tensor, v: Tensor, dim: int, first: Tensor) -> int:
    if weight.dtype not in FLOATING:
        accepted = ", ".join(short(d) for d in FLOATING)
        raise TypeError(f"spectral_norm: weight is {short(weight.dtype)}; accepted are {accepted}")
    if weight.dtype != first.dtype or weight.device != first.device:
        raise ValueError(
            f"spectral_norm: weights of one group must share dtype and device, got {short(weight.dtype)} on "
            f"{weight.device} beside {short(first.dtype)} on {first.device}"
        )
    ndim = weight.ndim
    if ndim < 2:
        raise ValueError(f"spectral_norm: weight has shape {tuple(weight.shape)}; it needs 2 dimensions or more")
    if not -ndim <= dim < ndim:
        raise ValueError(f"spectral_norm: dim is {dim}; a {ndim}-D weight accepts {-ndim} to {ndim - 1}")
    height = weight.shape[dim]
    if height == 0 or weight.numel() == 0:
        raise ValueError(f"spectral_norm: weight has shape {tuple(weight.shape)}; it must not be empty")
    for name, x, size in (("u", u, height), ("v", v, weight.numel() // height)):
        if x.shape != (size,):
            raise ValueError(
                f"spectral_norm: {name} has shape {tuple(x.shape)}; a weight of shape {tuple(weight.shape)} with "
                f"dim {dim} needs ({size},)"
            )
        if x.device != weight.device or not x.is_floating_point():
            raise ValueError(
                f"spectral_norm: {name} is {short(x.dtype)} on {x.device}; it must be floating point on {weight.device}"
            )
    return dim % ndim


# ---- minibatch discrimination ---------------------------------------------------------------------------------


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
        implementation: see the module.

    Returns:
        [N, B]; of one sample without itself, zeros. :class:`gankern.nn.MinibatchDiscrimination` appends it to x.

    Gradient order: 2 (any order for "reference").

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> minibatch_discrimination(torch.randn(16, 64), 0.1 * torch.randn(64, 20, 5)).shape
    torch.Size([16, 20])
    """
    name = "minibatch_discrimination"
    if reduction not in ("sum", "mean"):
        raise ValueError(f"{name}: reduction is {reduction!r}; accepted are 'sum' and 'mean'")
    _check_floating(name, "x", x)
    _check_floating(name, "kernel", kernel)
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
    autocast = torch.is_autocast_enabled(x.device.type)  # which makes the types equal
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
        implementation: see the module.

    Returns:
        [N, B]. A pair with NaN in it is NaN, and so is a pair of equal infinities (their difference is); an infinite
        point is not at all similar to finite ones.

    Gradient order: 2 (any order for "reference"), for m and other.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    >>> l1_similarity(torch.zeros(4, 2, 3))
    tensor([[3., 3.],
            [3., 3.],
            [3., 3.],
            [3., 3.]])
    >>> l1_similarity(torch.randn(4, 2, 3), torch.randn(7, 2, 3)).shape
    torch.Size([4, 2])
    """
    name = "l1_similarity"
    for argument, points in (("m", m), ("other", other)):
        if points is None:
            continue
        _check_floating(name, argument, points)
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


def _check_floating(function: str, argument: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {argument} is {type(x).__name__}; it must be a tensor")
    if x.dtype not in FLOATING:
        accepted = ", ".join(short(d) for d in FLOATING)
        raise TypeError(f"{function}: {argument} is {short(x.dtype)}; accepted are {accepted}")
