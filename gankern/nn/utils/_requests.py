"""What a spectrally normalised layer asks for, and how many layers ask together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

import gankern.functional as GF
from gankern.core.dispatch import FLOATING, short
from gankern.core.threads import PerThread
from gankern.core.torch_internals import recomputed, transformed


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
    u: Tensor
    v: Tensor
    dim: int
    sigma: Tensor | None = None
    parameter: Tensor | None = None  # where ``weight`` is a detached one


def normalize(requests: Sequence[Request]) -> list[Tensor]:
    """The normalized weights of all requests, in as few calls as their rules allow."""
    together: dict[Rules, list[int]] = {}
    for i, request in enumerate(requests):
        together.setdefault(request.rules, []).append(i)
    results: list[Any] = [None] * len(requests)
    for rules, members in together.items():
        asked = [requests[i] for i in members]
        weights = GF.spectral_norm_group(
            [r.weight for r in asked],
            [r.u for r in asked],
            [r.v for r in asked],
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


class Prepared:
    """Mixed into both forms of spectral norm: a weight that a group has computed ahead, to be taken once.

    Taken once, because torch iterates at every use of the weight: a layer used twice in a forward gets its second
    weight from a second iteration, with a group as without.
    """

    # Set by a group: for each thread a list, empty or with what it prepared.
    _prepared: PerThread | None = None
    takes_layer = True  # what request() is given: the layer, or its weight
    stands_for: str | None = None  # the method of the layer that it takes the place of, where it is one

    def ready(self, owner: Any) -> bool:
        """Whether it may be asked now; else it computes its weight by itself where that is used. ``owner`` is what
        :meth:`request` is given."""
        return True

    def _take(self, parameter: Tensor, training: bool) -> Tensor | None:
        if self._prepared is None or transformed() or not self._prepared.value:
            return None
        ahead = self._prepared.value.pop()
        # torch.compile keeps or recomputes what it likes, in one graph: nobody runs a layer again there, and what a
        # forward does to its own parameters breaks the graph.
        same = torch.compiler.is_compiling() or (ahead.seen.is_now(parameter) and not recomputed())
        if same and ahead.training == training and ahead.place == gradient_place():
            return ahead.weight
        # It was made in another mode, of a parameter that was frozen, replaced or written to since, or the layer will
        # be run again by itself: then by itself now too.
        ahead.before.restore(ahead.number)
        return None


class Before:
    """What the states of layers, each a list of vectors, were at first.

    One operation copies them all: each would cost the host as much as its power iteration. What it copies into has a
    dtype that holds each of theirs exactly.
    """

    def __init__(self, states: list[list[Tensor]]) -> None:
        self.states = states
        flat = [t if t.ndim == 1 else t.reshape(-1) for state in states for t in state]
        self.devices = {t.device for t in flat}
        with torch.no_grad():
            self.values = {
                device: torch.cat(flat if len(self.devices) == 1 else [t for t in flat if t.device == device])
                for device in self.devices
            }

    def restore(self, index: int) -> None:
        """The states of one layer, as they were."""
        start = dict.fromkeys(self.devices, 0)
        with torch.no_grad():
            for i, state in enumerate(self.states[: index + 1]):
                for t in state:
                    if i == index:
                        t.copy_(self.values[t.device].narrow(0, start[t.device], t.numel()).view(t.shape))
                    start[t.device] += t.numel()


class Seen(NamedTuple):
    """What tells whether a parameter is still the same, with the same values, and trained as it was."""

    parameter: Tensor  # itself: so that no other one has its place in memory
    memory: int  # of its tensor, which torch.utils.swap_tensors exchanges
    version: int
    requires_grad: bool

    @classmethod
    def of(cls, parameter: Tensor) -> Seen:
        version = 0 if parameter.is_inference() else parameter._version
        return cls(parameter, parameter._cdata, version, parameter.requires_grad)

    def is_now(self, parameter: Tensor) -> bool:
        return parameter is self.parameter and self[1:] == Seen.of(parameter)[1:]


class Ahead(NamedTuple):
    """A weight that a group has computed, of what and in which mode, and where what its state was before stands."""

    weight: Tensor
    place: tuple[bool, bool]
    training: bool
    seen: Any  # Seen; None where torch.compile traces
    before: Before
    number: int  # of the layer there


def gradient_place() -> tuple[bool, bool]:
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()  # Dynamo traces within neither
    return torch.is_grad_enabled(), inference


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
    if n_power_iterations < 1:
        raise ValueError(f"spectral_norm: n_power_iterations is {n_power_iterations}; it must be at least 1")
    if not eps > 0:
        raise ValueError(f"spectral_norm: eps is {eps}; it must be greater than 0")
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
