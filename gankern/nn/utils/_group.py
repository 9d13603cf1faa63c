"""All spectrally normalised layers of a network in one call a forward, where that is what costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

from gankern.core.dispatch import FLOATING
from gankern.core.threads import PerThread
from gankern.core.torch_internals import dispatch_mode, transformed
from gankern.nn.utils import _requests, parametrizations
from gankern.nn.utils._requests import Prepared, Request
from gankern.nn.utils._spectral_norm import SpectralNorm as Hook


def normalizers(root: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Every spectral norm of torch and of gankern in a network: (its list of parametrizations or the layer, itself)."""
    found: list[tuple[nn.Module, Any]] = []
    for module in root.modules():
        for members in getattr(module, "parametrizations", {}).values():
            first = members[0]
            if isinstance(first, torch_parametrizations._SpectralNorm) and members.original.ndim > 1:
                found.append((members, first))
        found += [(module, hook) for hook in module._forward_pre_hooks.values() if isinstance(hook, TorchHook)]
    return found


def is_taken(owner: nn.Module, normalizer: Any) -> bool:
    """Whether the parameter is of a type that our kernels have; a complex one, for instance, is left to torch."""
    weight = owner.original if isinstance(owner, parametrize.ParametrizationList) else None
    weight = getattr(owner, f"{normalizer.name}_orig", weight) if weight is None else weight
    return weight is None or weight.dtype in FLOATING


OURS = {torch_parametrizations._SpectralNorm: parametrizations.SpectralNorm, TorchHook: Hook}  # the same state


_AHEAD_ON = {"cuda"}  # devices


class SpectralNormGroup:
    """Runs before a network's forward and hands each layer its weight; after it, forgets what was not used."""

    def __init__(self, root: nn.Module, members: list[tuple[Any, Any]]) -> None:
        self.root = root
        self.members = members
        for _, normalizer in members:
            normalizer._prepared = PerThread(list)
        self.handed = PerThread(list)  # to whom, in the thread's running forward

    def before_forward(self, root: nn.Module, inputs: Any = None) -> None:
        """The hook: computes the layers' weights together, where what many small calls cost the host is what counts.
        On the CPU that would gain next to nothing, so there nothing can come between."""
        # A data-parallel replica shares the group but not the layers: it goes layer by layer. So does a forward
        # within parametrize.cached(), where the weights of the first one are kept, one within itself, and one that is
        # compiled, traced or under torch.func.
        if root is not self.root or parametrize._cache_enabled or self.handed.value:
            return
        if torch.compiler.is_compiling() or transformed() or dispatch_mode():
            return
        asked, requests = self._requests()
        if not requests:
            return
        self.handed.value = asked
        for normalizer, ahead in zip(asked, _requests.prepare(requests)):
            normalizer.take_later(ahead)

    def _requests(self) -> tuple[list[Prepared], list[Request]]:
        """Who asks for a weight, and what for; nobody, where a weight is not on such a device."""
        asked, requests, members = [], [], []
        for owner, normalizer in self.members:
            try:
                weight = normalizer.original(owner)
                if weight.device.type not in _AHEAD_ON:
                    return [], []
                if normalizer.ready(weight):
                    requests.append(normalizer.request(owner, weight))
                    asked.append(normalizer)
            except AttributeError:  # it was taken off the layer
                normalizer._prepared = None
            else:
                members.append((owner, normalizer))
        self.members = members
        return asked, requests

    def clear(self, root: nn.Module, inputs: Any = None, output: Any = None) -> None:
        if root is not self.root:
            return
        for normalizer in self.handed.value:
            normalizer.forget()
        self.handed.value = []


def group_spectral_norm(module: nn.Module) -> nn.Module:
    """Computes all spectrally normalised layers of a module together on CUDA, once a forward of that module.

    Takes gankern's and torch's own spectral norm, as parametrization and as hook; torch's layers get gankern's
    kernels. Results, buffers and state_dict are those of layer by layer, and so is what happens where a layer runs
    twice in a forward, not at all, or outside of the module's forward, and where the forward changes a layer before it
    uses it: a layer that is not what it was is computed anew. On the CPU, where one call would gain next to nothing,
    and under torch.compile each layer is computed where it is used. Complex layers are left as they are.

    Who calls it says one thing: on CUDA the module's forward (and its hooks) does not write to a weight or vector
    through ``.data``, a storage or an array, for which autograd counts no version, between its own begin and the use
    of the layer. Nobody could see that; :func:`gankern.accelerate`, to which nobody says it, groups nothing.

    Call it on the network whose forward is called, before wrapping that in DistributedDataParallel.

    Returns: the module. Gradient order: 2.

    Raises: ValueError where there is no spectrally normalised layer, or where the module (or one inside it) is grouped
    already.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> for layer in (net[0], net[2]):
    ...     _ = parametrizations.spectral_norm(layer)
    >>> _ = group_spectral_norm(net)
    """
    for inner in module.modules():
        if any(isinstance(getattr(h, "__self__", None), SpectralNormGroup) for h in inner._forward_pre_hooks.values()):
            raise ValueError(f"group_spectral_norm: {type(inner).__name__} is grouped already")
    found = [(owner, normalizer) for owner, normalizer in normalizers(module) if is_taken(owner, normalizer)]
    for _, normalizer in found:
        normalizer.__class__ = OURS.get(type(normalizer), type(normalizer))
        normalizer.__dict__.pop("where_known", None)  # accelerate's: now somebody asks for it
    members = [(owner, normalizer) for owner, normalizer in found if isinstance(normalizer, Prepared)]
    if not members and len(normalizers(module)) > len(found):
        return module  # all of them are torch's business
    if not members:
        raise ValueError(
            f"group_spectral_norm: {type(module).__name__} has no spectrally normalised layer; "
            "apply spectral_norm first"
        )
    group = SpectralNormGroup(module, members)
    module.register_forward_pre_hook(group.before_forward, prepend=True)
    module.register_forward_hook(group.clear, always_call=True)
    return module
