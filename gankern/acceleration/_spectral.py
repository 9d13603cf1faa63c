"""Spectral norm that repositories wrote (or copied) themselves: recognised by its parts, proved by its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gankern.acceleration._scope import settle, state
from gankern.acceleration._verify import copy_of
from gankern.core.torch_internals import transformed
from gankern.nn.utils._requests import Prepared, Request, Rules, normalize

TOLERANCE = 1e-4  # relative; of weights and vectors after two iterations, which fp32 reproduces to about 1e-6


@dataclass(frozen=True)
class Family:
    """Where one family of code keeps its state and which method of it iterates."""

    name: str
    dialect: str
    method: str  # that is replaced
    returns_weight: bool  # by the method; else it is set on the inner layer
    weight: Callable[[nn.Module], Tensor]
    u: Callable[[nn.Module], Tensor]
    v: Callable[[nn.Module], Tensor | None]
    sigma: Callable[[nn.Module], Tensor | None]
    options: Callable[[nn.Module], tuple[int, float]]  # iterations, eps
    runs_inner: bool = False  # the method is the whole forward
    # Whether its gradient uses the vectors of the last forward, whichever forward it belongs to: u and v are replaced
    # through .data, which autograd does not see.
    last_vectors: bool = False


def _bar(part: str) -> Callable[[nn.Module], Tensor]:
    return lambda m: getattr(m.module, m.name + part)


FAMILIES = {
    "wrapper": Family(
        "a wrapper with weight_bar, weight_u, weight_v",
        "wrapper",
        "_update_u_v",
        False,
        _bar("_bar"),
        _bar("_u"),
        _bar("_v"),
        lambda m: None,
        lambda m: (m.power_iterations, 1e-12),
        last_vectors=True,
    ),
    "torchgan": Family(
        "a wrapper with w_bar, u, v (torchgan)",
        "wrapper",
        "forward",
        False,
        lambda m: m.w_bar,
        lambda m: m.u,
        lambda m: m.v,
        lambda m: None,
        lambda m: (m.power_iterations, 1e-12),
        runs_inner=True,
        last_vectors=True,
    ),
    "mimicry": Family(
        "a layer with sn_u, sn_sigma",
        "biggan",
        "sn_weights",
        True,
        lambda m: m.weight,
        lambda m: m.sn_u,
        lambda m: None,
        lambda m: m.sn_sigma,
        lambda m: (m.num_iters, m.eps),
    ),
    "biggan": Family(
        "a layer with u0, sv0 (BigGAN)",
        "biggan",
        "W_",
        True,
        lambda m: m.weight,
        lambda m: m.u0,
        lambda m: None,
        lambda m: m.sv0,
        lambda m: (1, m.eps),
    ),
}


class Normalizer(Prepared):
    """Computes the weight of one layer of a family, alone or with a group."""

    def __init__(self, family: str) -> None:
        self.family = family

        self.vectors: tuple[Tensor, Tensor] | None = None  # of the last request, for those with last_vectors

    def request(self, module: nn.Module) -> Request:
        family = FAMILIES[self.family]
        weight, u, v = family.weight(module), family.u(module).detach().view(-1), family.v(module)
        # Where v comes first and is not kept, the iteration does not read it: any values do.
        v = weight.new_zeros(weight.numel() // u.numel()) if v is None else v.detach()
        if family.last_vectors:
            weight, u, v = weight.detach(), u.clone(), v.clone()
            self.vectors = u, v
        iterations, eps = family.options(module)
        rules = Rules(family.dialect, iterations, eps, module.training, weight.dtype, weight.device)
        return Request(rules, weight, u, v, 0, family.sigma(module))

    def weight(self, module: nn.Module) -> Tensor:
        family = FAMILIES[self.family]
        prepared = self._take()
        normalized = normalize([self.request(module)])[0] if prepared is None else prepared
        if not family.last_vectors:
            return normalized
        weight, u, v = family.weight(module), family.u(module), family.v(module)
        u.data, v.data = self.vectors
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return normalized
        sigma = u.dot(weight.view(len(u), -1).mv(v))
        return weight / sigma.expand_as(weight)


def method(module: nn.Module, normalizer: Normalizer, *args: Any, **kwargs: Any) -> Any:
    """In place of the family's method."""
    family = FAMILIES[normalizer.family]
    if torch.compiler.is_compiling() or transformed():  # as it is written
        return getattr(type(module), family.method)(module, *args, **kwargs)
    if state.waiting is not None:
        settle(args[0] if args else None)
    with torch._C.DisableTorchFunction():
        weight = normalizer.weight(module)
    if family.returns_weight:
        return weight
    setattr(module.module, module.name, weight)
    return module.module.forward(*args, **kwargs) if family.runs_inner else None


def recognise(module: nn.Module) -> tuple[str | None, str | None]:
    """The family of a module that normalises spectrally by itself; or why it is of none (None: it does not look so)."""
    for name, family in FAMILIES.items():
        if not callable(getattr(type(module), family.method, None)) or not _has_parts(module, family):
            continue
        try:
            return (name, None) if _same_numbers(module, name) else (None, "its numbers are those of none of ours")
        except Exception as error:  # somebody else's code, called in a way of ours: anything may come
            return None, f"it could not be tried ({type(error).__name__}: {str(error)[:80]})"
    cls = type(module)
    named = any(word in cls.__name__.lower() for word in ("spectral", "snconv", "snlinear", "snembedding"))
    if named and cls.__module__.split(".")[0] not in ("torch", "gankern"):
        return None, "it does not look like any of ours"
    return None, None


def _has_parts(module: nn.Module, family: Family) -> bool:
    try:
        weight, u, v = family.weight(module), family.u(module), family.v(module)
        family.sigma(module)
        iterations, eps = family.options(module)
    except (AttributeError, TypeError):
        return False
    parts = all(isinstance(x, Tensor) for x in (weight, u) + (() if v is None else (v,)))
    return parts and weight.ndim >= 2 and u.numel() == weight.shape[0] and iterations >= 1 and eps > 0


def _same_numbers(module: nn.Module, name: str) -> bool:
    """Whether two training iterations and one in evaluation give the same weight and leave the same state."""
    family, normalizer = FAMILIES[name], Normalizer(name)
    theirs, ours = copy_of(module), copy_of(module)
    if family.runs_inner:
        for trial in (theirs, ours):
            trial.module.forward = lambda *args, **kwargs: None
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        for training in (True, True, False):
            results = []
            for trial, run in ((theirs, getattr(theirs, family.method)), (ours, None)):
                trial.train(training)
                result = run() if run is not None else method(ours, normalizer)
                weight = result if family.returns_weight else getattr(trial.module, trial.name)
                again = run() if run is not None else method(ours, normalizer)  # before the backward of the first one
                again = again if family.returns_weight else getattr(trial.module, trial.name)
                seed = torch.ones_like(weight).cumsum(0)
                grad = torch.autograd.grad((weight * seed).sum(), family.weight(trial))[0]
                kept = (family.u(trial), family.v(trial), family.sigma(trial))
                results.append([x.detach().flatten().double() for x in (weight, again, grad, *kept) if x is not None])
            for a, b in zip(*results, strict=True):
                if not (a - b).norm() <= TOLERANCE * a.norm():
                    return False
    return True
