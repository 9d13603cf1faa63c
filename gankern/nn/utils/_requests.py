"""What a spectrally normalised layer asks for, and how many layers ask together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

import gankern.functional as GF
from gankern.core import devices
from gankern.core.dispatch import FLOATING, short
from gankern.core.native import nodes
from gankern.core.threads import PerThread
from gankern.core.torch_internals import recomputed, seen_by_own_modes, transformed
from gankern.functional import _checks
from gankern.functional.spectral_norm import spectral_norm_ahead

# What layers must share, beside dtype and device, to be computed in one call: the dialect, n_power_iterations, eps,
# whether the layer trains, the implementation.
Rules = tuple[str, int, float, bool, str | None]


class Request(NamedTuple):
    rules: Rules
    weight: Tensor
    u: Tensor  # of as many values as the weight has outputs, in any shape
    v: Tensor | None  # None: not kept; the iteration does not read it
    dim: int
    sigma: Tensor | None = None
    # Whether the gradient goes another way than through what is computed here, and u and v become other tensors'
    # memory (.data) instead of being written to.
    replaces: bool = False

    def state(self) -> list[Tensor]:
        """What the layer keeps from forward to forward."""
        return [x for x in (self.u, self.v, self.sigma) if x is not None]

    def stores(self) -> bool:
        """Whether the state goes on by what is computed; in evaluation torch's forms leave it."""
        dialect, _, _, training, _ = self.rules
        return training or GF.SPECTRAL_NORM_DIALECTS[dialect].stores_in_eval


def normalize(request: Request) -> Tensor:
    """The normalized weight; the layer's state goes on."""
    if request.replaces:
        [(weight, state)] = _ahead([request._replace(weight=request.weight.detach())])
        for x, new in zip(request.state(), state):
            x.data = new.to(x.dtype, copy=True)
        return weight
    weights, us, vs, options = _arguments([request])
    return GF.spectral_norm_group(weights, us, vs, **options)[0]


def _arguments(requests: Sequence[Request]) -> tuple[list[Tensor], list[Tensor], list[Tensor], dict[str, Any]]:
    """The arguments of a call for layers of the same rules."""
    dialect, n_power_iterations, eps, training, implementation = requests[0].rules
    options = {
        "n_power_iterations": n_power_iterations,
        "dims": [r.dim for r in requests],
        "eps": eps,
        "training": training,
        "dialect": dialect,
        "sigmas": [r.sigma for r in requests],
        "implementation": implementation,
    }
    us = [_vector(r.u) for r in requests]
    vs = [r.weight.new_zeros(r.weight.numel() // r.u.numel()) if r.v is None else _vector(r.v) for r in requests]
    return [r.weight for r in requests], us, vs, options


def _vector(x: Tensor) -> Tensor:
    x = x.detach() if x.requires_grad else x
    return x if x.ndim == 1 else x.view(-1)


def _ahead(requests: Sequence[Request]) -> list[tuple[Tensor, list[Tensor]]]:
    """Of each request the normalized weight, and the state after it; in as few calls as the rules allow. Their states
    stay what they are."""
    together: dict[Any, list[int]] = {}
    for i, request in enumerate(requests):
        together.setdefault((request.rules, request.weight.dtype, request.weight.device), []).append(i)
    results: list[Any] = [None] * len(requests)
    for members in together.values():
        asked = [requests[i] for i in members]
        weights, us, vs, options = _arguments(asked)
        normalized, vectors, sigmas = spectral_norm_ahead(weights, us, vs, **options)
        for k, (i, request) in enumerate(zip(members, asked)):
            u, v = vectors[2 * k : 2 * k + 2]
            state = [u if request.u.ndim == 1 else u.view(request.u.shape)]
            if request.v is not None:
                state.append(v if request.v.ndim == 1 else v.view(request.v.shape))
            if request.sigma is not None:
                state.append(sigmas[k].expand(request.sigma.shape))
            results[i] = normalized[k], state
    return results


class Prepared:
    """Mixed into both forms of spectral norm: a weight that a group has computed ahead, to be taken once.

    Taken once, because torch iterates at every use of the weight: a layer used twice in a forward gets its second
    weight from a second iteration, with a group as without.
    """

    # Set by a group: for each thread a list, empty or with what it prepared.
    _prepared: PerThread | None = None
    # Set by `accelerate`: on a device whose file does not say that ours is worth it, the layer is torch's as it was.
    where_known = False

    # The weight as it is trained, of the layer that has this hook or the list that this parametrization is in.
    original: Callable[[Any], Tensor]
    # Whether `request` of that weight may be called now; else the layer computes its weight where that is used.
    ready: Callable[[Tensor], bool]
    request: Callable[[Any, Tensor], Request]  # of both

    def is_worth(self, weight: Tensor) -> bool:
        """Whether ours is what somebody asked for, or known to be worth it for such a weight."""
        return not self.where_known or devices.is_known(devices.SPECTRAL, weight)

    def take_later(self, ahead: Ahead) -> None:
        if self._prepared is not None:
            self._prepared.value.append(ahead)

    def forget(self) -> None:
        """What was not taken; the layer may have been taken out of the group meanwhile."""
        if self._prepared is not None:
            self._prepared.value.clear()

    def _weight(self, request: Request) -> Tensor:
        """The normalized weight that a layer asks for where it is used."""
        if self._prepared is not None and self._prepared.value and not transformed():
            ahead = self._prepared.value.pop()
            # Where the layer will be run again by itself, it is run by itself now too.
            if not recomputed() and ahead.is_for(request):
                if request.stores():
                    torch._foreach_copy_(request.state(), ahead.state)
                return ahead.weight
        if not torch.compiler.is_compiling() and seen_by_own_modes():  # what waits has nothing to do with it
            with torch._C.DisableTorchFunction():
                return normalize(request)
        return normalize(request)


class Ahead(NamedTuple):
    """A weight that a group has computed: for what request, with what state after it."""

    request: Request  # which keeps the tensors: no other one has their place in memory
    seen: Any  # of the request's tensors, before
    weight: Tensor
    state: list[Tensor]

    def is_for(self, request: Request) -> bool:
        """Whether a layer that asks now would compute this very weight and state, and record the same gradients."""
        before = self.request
        return request.rules == before.rules and request.dim == before.dim and self.seen == _seen(request)


def _seen(request: Request) -> Any:
    """What autograd knows of a request's tensors: which ones they are, how often written to, of what kind, and whether
    trained; and whether it records. torch.utils.swap_tensors exchanges what the address is of."""
    tensors = request.weight, request.u, request.v, request.sigma
    facts = nodes.spectral_norm_seen(*tensors)
    if facts is not NotImplemented:
        return facts
    kept = [x for x in tensors if x is not None]
    of_each = [(x._cdata, 0 if x.is_inference() else x._version, x.dtype, x.device, x.requires_grad) for x in kept]
    return of_each, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def prepare(requests: Sequence[Request]) -> list[Ahead]:
    """The normalized weights of all requests, for the case that nothing of what they ask for changes before they are
    used. Their states stay what they are."""
    before = [_seen(request) for request in requests]
    return [Ahead(request, seen, *ahead) for request, seen, ahead in zip(requests, before, _ahead(requests))]


def default_dim(module: nn.Module) -> int:
    """The dimension of the outputs: 1 for transposed convolutions, else 0."""
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return 1 if isinstance(module, transposed) else 0


def check(module: nn.Module, name: str, n_power_iterations: int, eps: float, dim: int) -> Tensor:
    """The weight to normalize; raises where the arguments do not fit it."""
    if is_normalized(module, name):
        raise ValueError(f"spectral_norm: {name!r} of this {type(module).__name__} is spectrally normalized already")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        names = [n for n, _ in module.named_parameters(recurse=False)] or ["none"]
        raise ValueError(
            f"spectral_norm: {type(module).__name__} has no parameter {name!r}; its parameters are {', '.join(names)}"
        )
    if is_lazy(weight):
        raise ValueError(f"spectral_norm: {name!r} is not initialized yet; run one forward pass first")
    if weight.dtype not in FLOATING:
        accepted = ", ".join(short(d) for d in FLOATING)
        raise TypeError(f"spectral_norm: {name!r} is {short(weight.dtype)}; accepted are {accepted}")
    _checks.whole("spectral_norm", "n_power_iterations", n_power_iterations)
    _checks.number("spectral_norm", "eps", eps, above=0)
    _checks.whole("spectral_norm", "dim", dim, least=-math.inf)
    if not -weight.ndim <= dim < weight.ndim:
        accepted = f"{-weight.ndim} to {weight.ndim - 1}"
        raise IndexError(f"spectral_norm: dim is {dim}; {name!r} of shape {tuple(weight.shape)} accepts {accepted}")
    return weight


def is_normalized(module: nn.Module, name: str) -> bool:
    """Whether a parameter is spectrally normalized by torch or by gankern, as hook or as parametrization."""
    hooked = any(isinstance(hook, TorchHook) and hook.name == name for hook in module._forward_pre_hooks.values())
    if hooked or not nn.utils.parametrize.is_parametrized(module, name):
        return hooked
    parametrizations: Any = module.parametrizations
    return any(isinstance(p, nn.utils.parametrizations._SpectralNorm) for p in parametrizations[name])
