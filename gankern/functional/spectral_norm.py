"""Spectral norm: of one weight, or of all weights of a network in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gankern.core.dispatch import check_floating_on, short
from gankern.core.native import nodes
from gankern.core.torch_internals import overwrite, transformed
from gankern.functional import _checks
from gankern.ops.spectral_norm import Rules
from gankern.ops.spectral_norm import spectral_norm_group as _spectral_norm_group


class SpectralNormDialect(NamedTuple):
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
    weight: Tensor, u: Tensor, v: Tensor, *, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12,
    training: bool = True, dialect: str = "parametrization", sigma: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
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
        implementation: see :mod:`gankern.functional`.

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
    rules = SPECTRAL_NORM_DIALECTS.get(dialect) if isinstance(dialect, str) else None
    if rules is not None and not is_dynamo_compiling():
        normalized = nodes.spectral_norm_group(
            weights, us, vs, dims, n_power_iterations, eps, training, *rules, sigmas, implementation
        )
        if normalized is not NotImplemented:
            return normalized
    dims, settings, stores = _settings(weights, us, vs, n_power_iterations, dims, eps, training, dialect)
    if not weights:
        return []
    sigmas = [None] * len(weights) if sigmas is None else sigmas
    dims = _check_tensors(weights, us, vs, dims, sigmas)
    if stores:
        for name, buffers in (("u", us), ("v", vs), ("sigma", sigmas)):
            for x in buffers:
                if x is not None:
                    _checks.writable("spectral_norm", name, x)

    normalized, vectors, new_sigma = _spectral_norm_group(weights, us, vs, dims, settings, implementation)
    if stores:
        with torch.no_grad():
            kept = [x for pair in zip(us, vs) for x in pair]
            scalars = [(sigma, new_sigma[i].expand(sigma.shape)) for i, sigma in enumerate(sigmas) if sigma is not None]
            if transformed():  # vmap has no rule for lists
                for x, new in (*zip(kept, vectors), *scalars):
                    overwrite(x, new)
            else:
                torch._foreach_copy_(kept, vectors)
                for x, new in scalars:
                    x.copy_(new)
    return normalized


def spectral_norm_ahead(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_power_iterations: int,
    dims: Sequence[int],
    eps: float,
    training: bool,
    dialect: str,
    sigmas: Sequence[Tensor | None],
    implementation: str | None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What :func:`spectral_norm_group` returns and would write: the normalized weights, u and v of each, their sigmas.
    It writes nothing."""
    if not is_dynamo_compiling():
        rules = SPECTRAL_NORM_DIALECTS[dialect]
        computed = nodes.spectral_norm_ahead(
            weights, us, vs, dims, n_power_iterations, eps, training, *rules, sigmas, implementation
        )
        if computed is not NotImplemented:
            return computed
    dims, settings, _ = _settings(weights, us, vs, n_power_iterations, dims, eps, training, dialect)
    dims = _check_tensors(weights, us, vs, dims, sigmas)
    return _spectral_norm_group(weights, us, vs, dims, settings, implementation)


def _settings(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    dims: Sequence[int] | None,
    eps: float,
    training: bool,
    dialect: str,
) -> tuple[list[int], Rules, bool]:
    """The dims, how u and v are iterated, and whether they are kept; of arguments that are checked here."""
    _checks.choice("spectral_norm", "dialect", dialect, SPECTRAL_NORM_DIALECTS)
    rules = SPECTRAL_NORM_DIALECTS[dialect]
    _checks.whole("spectral_norm", "n_power_iterations", n_power_iterations)
    _checks.number("spectral_norm", "eps", eps, above=0)
    dims = [0] * len(weights) if dims is None else list(dims)
    if not len(weights) == len(us) == len(vs) == len(dims):
        counts = f"{len(weights)} weights, {len(us)} u, {len(vs)} v, {len(dims)} dims"
        raise ValueError(f"spectral_norm: the lists have different lengths: {counts}")
    iterations = n_power_iterations if training or rules.iterates_in_eval else 0
    return dims, Rules(iterations, eps, rules.u_first, rules.add_eps), bool(training or rules.stores_in_eval)


def _check_tensors(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
    sigmas: Sequence[Tensor | None],
) -> list[int]:
    """The dims, counted from the front, of tensors that fit each other."""
    found = [_check_spectral_norm(*each, weights[0]) for each in zip(weights, us, vs, dims)]
    if len(sigmas) != len(weights):
        raise ValueError(f"spectral_norm: there are {len(sigmas)} sigmas for {len(weights)} weights")
    for sigma in sigmas:
        if sigma is not None:
            _checks.floating("spectral_norm", "sigma", sigma)
            if sigma.numel() != 1:
                raise ValueError(f"spectral_norm: sigma has shape {tuple(sigma.shape)}; it must have one value")
    return found


def _check_spectral_norm(weight: Tensor, u: Tensor, v: Tensor, dim: int, first: Tensor) -> int:
    _checks.floating("spectral_norm", "weight", weight)
    _checks.tensor("spectral_norm", "u", u)
    _checks.tensor("spectral_norm", "v", v)
    _checks.whole("spectral_norm", "dim", dim, least=-math.inf)
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
        check_floating_on("spectral_norm", name, x, weight.device)
    return dim % ndim
