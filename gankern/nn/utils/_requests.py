"""What a spectrally normalised layer asks for, and how many layers ask together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

import gankern.functional as GF
from gankern.core import devices
from gankern.core.dispatch import FLOATING, short
from gankern.core.threads import PerThread
from gankern.core.torch_internals import recomputed, seen_by_own_modes, transformed
from gankern.functional import _checks


class Rules(NamedTuple):
    """What layers must share to be computed in one call."""

    dialect: str
    n_power_iterations: int
    eps: float
    training: bool
    dtype: torch.dtype
    device: torch.device
    implementation: str | None = None


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
        return self.rules.training or GF.SPECTRAL_NORM_DIALECTS[self.rules.dialect].stores_in_eval

    def on(self, state: Sequence[Tensor]) -> Request:
        """The same of another state."""
        rest: Any = iter(state)
        parts = {name: next(rest) for name in ("u", "v", "sigma") if getattr(self, name) is not None}
        return self._replace(**parts)


def normalize(request: Request) -> Tensor:
    """The normalized weight; the layer's state goes on."""
    if not request.replaces:
        return _normalize([request])[0]
    own = request.on([x.detach().clone() for x in request.state()])
    weight = _normalize([own])[0]
    _become(request, own.state())
    return weight


def _normalize(requests: Sequence[Request]) -> list[Tensor]:
    """The normalized weights of all requests, in as few calls as their rules allow."""
    together: dict[Rules, list[int]] = {}
    for i, request in enumerate(requests):
        together.setdefault(request.rules, []).append(i)
    results: list[Any] = [None] * len(requests)
    for rules, members in together.items():
        asked = [requests[i] for i in members]
        weights = GF.spectral_norm_group(
            [r.weight.detach() if r.replaces else r.weight for r in asked],
            [_vector(r.u) for r in asked],
            [r.weight.new_zeros(r.weight.numel() // r.u.numel()) if r.v is None else _vector(r.v) for r in asked],
            n_power_iterations=rules.n_power_iterations,
            dims=[r.dim for r in asked],
            eps=rules.eps,
            training=rules.training,
            dialect=rules.dialect,
            sigmas=[r.sigma for r in asked],
            implementation=rules.implementation,
        )
        for i, weight in zip(members, weights):
            results[i] = weight
    return results


def _vector(x: Tensor) -> Tensor:
    x = x.detach() if x.requires_grad else x
    return x if x.ndim == 1 else x.view(-1)


def _become(request: Request, state: list[Tensor]) -> None:
    """The layer's state takes the values of another one, which no graph knows."""
    if not request.replaces:
        torch._foreach_copy_(request.state(), state)
        return
    for x, new in zip(request.state(), state):
        x.data = new.clone().view(x.shape)


class Prepared:
    """Mixed into both forms of spectral norm: a weight that a group has computed ahead, to be taken once.

    Taken once, because torch iterates at every use of the weight: a layer used twice in a forward gets its second
    weight from a second iteration, with a group as without.
    """

    # Set by a group: for each thread a list, empty or with what it prepared.
    _prepared: PerThread | None = None
    takes_layer = True  # what request() is given: the layer, or its weight
    # Set by `accelerate`: on a device whose file does not say that ours is worth it, the layer is torch's as it was.
    where_known = False

    def ready(self, owner: Any) -> bool:
        """Whether it may be asked now; else it computes its weight by itself where that is used. ``owner`` is what
        :meth:`request` is given."""
        return True

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
                if ahead.request.stores():
                    _become(request, ahead.state)
                return ahead.weight
        if not torch.compiler.is_compiling() and seen_by_own_modes():  # what waits has nothing to do with it
            with torch._C.DisableTorchFunction():
                return normalize(request)
        return normalize(request)


class Ahead(NamedTuple):
    """A weight that a group has computed: for what request, with what state after it."""

    weight: Tensor
    request: Request  # which keeps the tensors: no other one has their place in memory
    state: list[Tensor]
    seen: tuple  # of the request's tensors, before

    def is_for(self, request: Request) -> bool:
        """Whether a layer that asks now would compute this very weight and state, and record the same gradients."""
        before = self.request
        return request.rules == before.rules and request.dim == before.dim and self.seen == _seen(request)


def _seen(request: Request) -> tuple:
    """What autograd knows of a request's tensors: which ones they are, how often written to, and whether trained.
    torch.utils.swap_tensors exchanges what the address is of."""
    tensors = [request.weight, *request.state()]
    facts = [(x._cdata, 0 if x.is_inference() else x._version, x.requires_grad) for x in tensors]
    return facts, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def prepare(requests: Sequence[Request]) -> list[Ahead]:
    """The normalized weights of all requests, for the case that nothing of what they ask for changes before they are
    used. Their states stay what they are."""
    seen = [_seen(request) for request in requests]
    states = _copies([request.state() for request in requests])
    weights = _normalize([request.on(state) for request, state in zip(requests, states)])
    return [Ahead(*each) for each in zip(weights, requests, states, seen)]


def _copies(states: list[list[Tensor]]) -> list[list[Tensor]]:
    """By one operation, where all are alike: each would cost the host as much as a layer's power iteration."""
    flat = [x for state in states for x in state]
    if any(x.dtype != flat[0].dtype or x.device != flat[0].device for x in flat):
        return [[x.detach().clone() for x in state] for state in states]
    with torch.no_grad():
        parts = iter(torch.cat([x.reshape(-1) for x in flat]).split([x.numel() for x in flat]))
        return [[next(parts).view(x.shape) for x in state] for state in states]


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
