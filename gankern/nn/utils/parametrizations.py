"""torch.nn.utils.parametrizations with gankern's spectral norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import gankern.functional as GF
from gankern.core.dispatch import FLOATING
from gankern.core.torch_internals import functions_replaced, is_hooked, refuse_scripting
from gankern.core.torch_names import stand_in
from gankern.functional import _checks
from gankern.nn.utils import _by_torch
from gankern.nn.utils._requests import Prepared, Request, check, default_dim

__getattr__, __dir__, __all__ = stand_in(__name__, torch_parametrizations, ["SpectralNorm", "spectral_norm"])


class SpectralNorm(Prepared, torch_parametrizations._SpectralNorm):
    """The parametrization that :func:`spectral_norm` registers: torch's, with its buffers ``_u`` and ``_v``."""

    implementation: str | None = None

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        *,
        implementation: str | None = None,
    ) -> None:
        self.implementation = _checks.implementation("spectral_norm", implementation)
        super().__init__(weight, n_power_iterations, dim, eps)

    def _power_method(self, weight_mat: Tensor, n_power_iterations: int) -> None:
        if not self.ready(weight_mat):
            return super()._power_method(weight_mat, n_power_iterations)
        GF.spectral_norm(
            weight_mat.detach(),
            self._u,
            self._v,
            n_power_iterations=n_power_iterations,
            eps=self.eps,
            implementation=self.implementation,
        )

    def original(self, owner: Any) -> Tensor:
        return owner.original

    def ready(self, weight: Tensor) -> bool:
        # What says no most often is asked first.
        if not self.is_worth(weight) or weight.dtype not in FLOATING:
            return False
        return self.implementation is not None or not functions_replaced()

    def request(self, owner: Any, weight: Tensor) -> Request:
        rules = "parametrization", self.n_power_iterations, self.eps, self.training, self.implementation
        return Request(rules, weight, self._u, self._v, self.dim)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.ready(weight):  # it may be complex now: torch's way
            if weight.ndim > 1:
                result = _by_torch.normalize(self, weight, self._u, self._v, self.training)
                if result is not NotImplemented:
                    return result
            return super().forward(weight)
        if weight.ndim == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        return self._weight(self.request(None, weight))


refuse_scripting(SpectralNorm, "spectral_norm", "take it off with torch.nn.utils.parametrize.remove_parametrizations")


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    implementation: str | None = None,
) -> nn.Module:
    r"""Keeps a parameter divided by its spectral norm: :func:`torch.nn.utils.parametrizations.spectral_norm`, faster.

    Arguments, random draws, warm-up iterations, state_dict keys and the numbers of every step are torch's, so that
    checkpoints move both ways; ``torch.nn.utils.parametrize.remove_parametrizations`` takes it off. The formula is
    :func:`gankern.functional.spectral_norm`'s, dialect "parametrization". See :func:`group_spectral_norm` for a whole
    network in one call.

    Source: Miyato et al. 2018, arXiv 1802.05957.

    Args:
        module: any module; its parameter is floating point. A 1-D parameter is divided by its 2-norm.
        name: the parameter.
        n_power_iterations: iterations at each use of the parameter while training, at least 1.
        eps: greater than 0.
        dim: the dimension of the outputs; None is 0, and 1 for transposed convolutions.
        implementation: see :mod:`gankern.functional`.

    Returns: the module. Gradient order: 2.

    Raises: ValueError, TypeError, IndexError naming the argument; also for a parameter normalized already.

    >>> layer = spectral_norm(nn.Conv2d(3, 64, 4))
    >>> sorted(layer.state_dict())
    ['bias', 'parametrizations.weight.0._u', 'parametrizations.weight.0._v', 'parametrizations.weight.original']
    """
    dim = default_dim(module) if dim is None else dim
    weight = check(module, name, n_power_iterations, eps, dim)
    normalizer = SpectralNorm(weight, n_power_iterations, dim, eps, implementation=implementation)
    nn.utils.parametrize.register_parametrization(module, name, normalizer)
    shorten(type(module), name)
    return module


# What torch's property comes to: where somebody put something else in their place, that is asked.
_CALL, _FORWARD = nn.Module.__call__, parametrize.ParametrizationList.forward


def shorten(owner: type[nn.Module], name: str) -> None:
    """Makes reading the parameter cost no more than computing it, where nothing else hangs on it: torch's property goes
    through two modules' calls, 5 microseconds. ``owner`` is the class that torch has made for this one layer (and that
    its copies share)."""
    theirs = owner.__dict__[name]
    if isinstance(theirs, _Shortened):
        return

    def get(self: Any) -> Tensor:
        if not is_dynamo_compiling() and not parametrize._cache_enabled:
            members = self._modules["parametrizations"]._modules[name]
            first = members._modules.get("0")
            if (
                type(first) is SpectralNorm
                and len(members._modules) == 1
                and nn.Module.__call__ is _CALL
                and parametrize.ParametrizationList.forward is _FORWARD
                and "forward" not in members.__dict__
                and not (is_hooked(members) or is_hooked(first))
            ):
                weight = members._parameters.get("original")
                if weight is not None:
                    return first.forward(weight)
        return theirs.fget(self)

    shortened = _Shortened(get, theirs.fset, theirs.fdel, theirs.__doc__)
    shortened.theirs = theirs
    setattr(owner, name, shortened)


def lengthen(owner: type[nn.Module], name: str) -> None:
    """Takes :func:`shorten` back."""
    shortened = owner.__dict__.get(name)
    if isinstance(shortened, _Shortened):
        setattr(owner, name, shortened.theirs)


class _Shortened(property):
    theirs: property


if TYPE_CHECKING:  # a name that is above stays gankern's
    from torch.nn.utils.parametrizations import *  # type: ignore[assignment]  # noqa: F403
