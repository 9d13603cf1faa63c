"""Spectral norm as a forward pre-hook: torch's own form, and the two that GAN repositories copied from each other."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import (
    SpectralNorm as TorchHook,
)
from torch.nn.utils.spectral_norm import (
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)

from gankern.core.dispatch import FLOATING
from gankern.core.torch_internals import functions_replaced, refuse_scripting
from gankern.core.torch_names import stand_in
from gankern.functional import _checks
from gankern.nn.utils import _by_torch
from gankern.nn.utils._requests import Prepared, Request, check, default_dim


@dataclass(frozen=True)
class StateNames:
    """Where a dialect keeps its state in the module; {} is the parameter's name."""

    original: str
    u: str
    v: str | None  # None: not kept
    sigma: str | None = None
    saved_as: str | None = None  # the original's key in a state_dict, where it differs


STATE_NAMES = {
    "hook": StateNames("{}_orig", "{}_u", "{}_v"),
    "wrapper": StateNames("{}_bar", "{}_u", "{}_v"),
    "biggan": StateNames("{}_orig", "u0", None, "sv0", saved_as="{}"),
}


class SpectralNorm(Prepared, TorchHook):
    """The hook that :func:`spectral_norm` registers. It is a subclass of torch's, so that
    ``torch.nn.utils.remove_spectral_norm`` and torch's state_dict hooks know it."""

    dialect = "hook"
    implementation: str | None = None

    @property
    def _names(self) -> StateNames:
        return STATE_NAMES[self.dialect]

    def _state(self, module: nn.Module, pattern: str) -> Tensor:
        return getattr(module, pattern.format(self.name))

    def original(self, owner: nn.Module) -> Tensor:
        return self._state(owner, self._names.original)

    def ready(self, weight: Tensor) -> bool:
        # What says no most often is asked first.
        if not self.is_worth(weight) or weight.dtype not in FLOATING:
            return False
        return self.dialect != "hook" or self.implementation is not None or not functions_replaced()

    def request(self, owner: nn.Module, weight: Tensor, training: bool | None = None) -> Request:
        names = self._names
        u = self._state(owner, names.u)
        v = None if names.v is None else self._state(owner, names.v)
        sigma = None if names.sigma is None else self._state(owner, names.sigma)
        training = owner.training if training is None else training
        rules = self.dialect, self.n_power_iterations, self.eps, training, self.implementation
        return Request(rules, weight, u, v, self.dim % weight.ndim, sigma)

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        weight = self.original(module)
        if self.dialect == "hook" and not self.ready(weight):  # it may be complex now, or not worth it: torch's way
            names = self._names
            u, v = self._state(module, names.u), self._state(module, cast(str, names.v))
            result = _by_torch.normalize(self, weight, u, v, do_power_iteration)
            return super().compute_weight(module, do_power_iteration) if result is NotImplemented else result
        return self._weight(self.request(module, weight, do_power_iteration))

    def remove(self, module: nn.Module) -> None:
        with torch.no_grad():
            weight = self.compute_weight(module, do_power_iteration=False)
        names = self._names
        for pattern in ("{}", names.original, names.u, names.v, names.sigma):
            if pattern is not None:
                delattr(module, pattern.format(self.name))
        module.__dict__.pop("__prepare_scriptable__", None)
        module.register_parameter(self.name, nn.Parameter(weight.detach()))
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(getattr(hook, "hook", hook), "fn", None) is self:
                    del hooks[key]


class _SaveAs:
    """Renames the original's key when a state_dict is made (``saving``) or loaded: BigGAN's is ``weight``."""

    def __init__(self, fn: SpectralNorm, saving: bool) -> None:
        self.fn, self.saving = fn, saving

    def __call__(self, *args: Any) -> None:
        state_dict, prefix = args[1:3] if self.saving else args[:2]
        names = self.fn._names
        inside, outside = (prefix + p.format(self.fn.name) for p in (names.original, names.saved_as or names.original))
        old, new = (inside, outside) if self.saving else (outside, inside)
        if old in state_dict:
            state_dict[new] = state_dict.pop(old)


def spectral_norm(
    module: nn.Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None,
    *, dialect: str = "hook", implementation: str | None = None,
) -> nn.Module:  # fmt: skip
    r"""Divides a parameter by its spectral norm before every forward: :func:`torch.nn.utils.spectral_norm`, faster.

    Arguments, random draws, state_dict keys and the numbers of every step are torch's, so that checkpoints move both
    ways; ``torch.nn.utils.remove_spectral_norm`` takes it off. The formula is
    :func:`gankern.functional.spectral_norm`'s.

    Source: Miyato et al. 2018, arXiv 1802.05957.

    Args:
        module: any module; its parameter is floating point, 2-D or more.
        name: the parameter.
        n_power_iterations: iterations a training forward, at least 1.
        eps: greater than 0.
        dim: the dimension of the outputs; None is 0, and 1 for transposed convolutions ("wrapper" and "biggan":
            always 0, as in the code they are named for).
        dialect: whose numbers and state_dict keys to keep: "hook" (torch: ``weight_orig``, ``weight_u``, ``weight_v``),
            "wrapper" (``weight_bar``, ``weight_u``, ``weight_v``; iterates in evaluation too), "biggan" (``weight``,
            ``u0``, ``sv0``; evaluation iterates without keeping u).
        implementation: see :mod:`gankern.functional`.

    Returns: the module. Gradient order: 2.

    Raises: ValueError, TypeError, IndexError naming the argument; also for a parameter normalized already.

    >>> layer = spectral_norm(nn.Linear(20, 40))
    >>> sorted(layer.state_dict())
    ['bias', 'weight_orig', 'weight_u', 'weight_v']
    """
    _checks.choice("spectral_norm", "dialect", dialect, STATE_NAMES)
    _checks.implementation("spectral_norm", implementation)
    if dim is None:
        dim = default_dim(module) if dialect == "hook" else 0
    weight = check(module, name, n_power_iterations, eps, dim)
    if weight.ndim < 2:
        raise ValueError(f"spectral_norm: {name!r} has shape {tuple(weight.shape)}; it needs 2 dimensions or more")

    refuse_scripting(module, "spectral_norm", "take it off with torch.nn.utils.remove_spectral_norm")
    hook = SpectralNorm(name, n_power_iterations, dim, eps)
    hook.dialect = dialect
    hook.implementation = implementation
    names = STATE_NAMES[dialect]
    height = weight.shape[dim]
    with torch.no_grad():
        u = F.normalize(weight.new_empty(height).normal_(0, 1), dim=0, eps=eps)
        v = F.normalize(weight.new_empty(weight.numel() // height).normal_(0, 1), dim=0, eps=eps)
    delattr(module, name)
    module.register_parameter(names.original.format(name), cast(nn.Parameter, weight))  # torch raises for another
    # A plain attribute, as torch does it: data_parallel and weight initialisers look for it before the first forward.
    setattr(module, name, weight.data)
    module.register_buffer(names.u.format(name), u.unsqueeze(0) if dialect == "biggan" else u)
    if names.v is not None:
        module.register_buffer(names.v.format(name), v)
    if names.sigma is not None:
        module.register_buffer(names.sigma.format(name), weight.new_ones(1).detach())
    module.register_forward_pre_hook(hook)
    if dialect == "hook":
        module._register_state_dict_hook(SpectralNormStateDictHook(hook))
        module._register_load_state_dict_pre_hook(SpectralNormLoadStateDictPreHook(hook))
    elif names.saved_as is not None:
        module._register_state_dict_hook(_SaveAs(hook, saving=True))
        module._register_load_state_dict_pre_hook(_SaveAs(hook, saving=False))
    return module


# It is imported by the name of torch's module too.
__getattr__, __dir__, __all__ = stand_in(__name__, sys.modules[TorchHook.__module__], ["SpectralNorm", "spectral_norm"])
