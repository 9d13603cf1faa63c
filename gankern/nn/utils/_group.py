"""All spectrally normalised layers of a network in one call a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

from gankern.core.threads import PerThread
from gankern.core.torch_internals import transformed
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


OURS = {torch_parametrizations._SpectralNorm: parametrizations.SpectralNorm, TorchHook: Hook}  # the same state


class SpectralNormGroup:
    """Runs before a network's forward and hands each layer its weight; after it, takes back what was not used."""

    def __init__(self, root: nn.Module, members: list[tuple[nn.Module, Prepared]]) -> None:
        self.root = root
        self.members = members
        for _, normalizer in members:
            normalizer._prepared = PerThread(list)
        # What a layer that the thread's running forward does not reach is given back: (its state, copies of it).
        self.before = PerThread(list)

    def __len__(self) -> int:
        return len(self.members)

    def prepare(self, root: nn.Module, inputs: Any = None) -> None:
        # A data-parallel replica shares this hook but not the layers: it goes layer by layer. So does a forward
        # within parametrize.cached(), where the weights of the first one are kept, one within itself, and one that is
        # traced, exported or under torch.func, where each layer is plain PyTorch.
        if root is not self.root or parametrize._cache_enabled or self.before.value or transformed():
            return
        requests = self._requests()
        states = [[t for t in (r.u, r.v, r.sigma) if t is not None] for r in requests]
        flat = [t for state in states for t in state]
        if not flat:
            return
        with torch.no_grad():
            copies = iter(torch._foreach_mul(flat, 1))
        self.before.value = [(state, [next(copies) for _ in state]) for state in states]
        place = _requests.gradient_place()
        for (_, normalizer), weight, ahead in zip(self.members, _requests.normalize(requests), self.before.value):
            normalizer._prepared.value.append(_requests.Ahead(weight, place, *ahead))

    def _requests(self) -> list[Request]:
        requests, members = [], []
        for owner, normalizer in self.members:
            try:
                weight = owner if normalizer.takes_layer else owner.original
                requests.append(normalizer.request(weight))
                members.append((owner, normalizer))
            except AttributeError:  # it was taken off the layer
                normalizer._prepared = None
        self.members = members
        return requests

    def clear(self, root: nn.Module, inputs: Any = None, output: Any = None) -> None:
        if root is not self.root:
            return
        with torch.no_grad():
            for (_, normalizer), (state, copies) in zip(self.members, self.before.value):
                if normalizer._prepared is not None and normalizer._prepared.value:
                    normalizer._prepared.value.clear()
                    torch._foreach_copy_(state, copies)
        self.before.value = []


def group_spectral_norm(module: nn.Module) -> nn.Module:
    """Computes all spectrally normalised layers of a module together, once a forward of that module.

    Takes gankern's and torch's own spectral norm, as parametrization and as hook; torch's layers get gankern's
    kernels. Results, buffers and state_dict are those of layer by layer, and so is what happens where a layer runs
    twice in a forward, not at all, or outside of the module's forward.

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
    members = normalizers(module)
    for _, normalizer in members:
        normalizer.__class__ = OURS.get(type(normalizer), type(normalizer))
    members = [(owner, normalizer) for owner, normalizer in members if isinstance(normalizer, Prepared)]
    if not members:
        raise ValueError(
            f"group_spectral_norm: {type(module).__name__} has no spectrally normalised layer; "
            "apply spectral_norm first"
        )
    group = SpectralNormGroup(module, members)
    module.register_forward_pre_hook(group.prepare, prepend=True)
    module.register_forward_hook(group.clear, always_call=True)
    return module
