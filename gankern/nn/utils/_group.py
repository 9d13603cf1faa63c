"""All spectrally normalised layers of a network in one call a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook
from torch.utils.hooks import RemovableHandle

from gankern.core.dispatch import FLOATING
from gankern.core.threads import PerThread
from gankern.core.torch_internals import transformed
from gankern.nn.utils import _requests, parametrizations
from gankern.nn.utils._requests import Prepared, Request
from gankern.nn.utils._spectral_norm import SpectralNorm as Hook
from gankern.nn.utils._unseen import may_write


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


class SpectralNormGroup:
    """Runs before a network's forward and hands each layer its weight; after it, takes back what was not used."""

    def __init__(self, root: nn.Module, members: list[tuple[Any, Any]]) -> None:
        self.root = root
        self.members = members
        for _, normalizer in members:
            normalizer._prepared = PerThread(list)
        # What a layer that the thread's running forward does not reach is given back: (it, its state, copies).
        self.before = PerThread(list)
        self.hooks = -1  # how many there had been, of any module, when it was asked:
        self.writes = False  # whether the network may write to weights unseen, and then none is computed ahead

    def __len__(self) -> int:
        return len(self.members)

    def one_by_one(self) -> bool:
        """Whether none is computed ahead, since the network's code may write to weights unseen; asked again where a
        hook was registered since, anywhere."""
        if not torch.compiler.is_compiling() and self.hooks != RemovableHandle.next_id:
            self.hooks = RemovableHandle.next_id
            known = {owner: n.stands_for for owner, n in self.members if n.stands_for is not None}
            self.writes = may_write(self.root, known)
        return self.writes

    def prepare(self, root: nn.Module, inputs: Any = None) -> None:
        # A data-parallel replica shares this hook but not the layers: it goes layer by layer. So does a forward
        # within parametrize.cached(), where the weights of the first one are kept, one within itself, and one that is
        # traced, exported or under torch.func, where each layer is plain PyTorch.
        if root is not self.root or parametrize._cache_enabled or self.before.value or transformed():
            return
        if self.one_by_one():
            return
        asked, requests = self._requests()
        if not requests:
            return
        states = [[t for t in (r.u, r.v, r.sigma) if t is not None] for r in requests]
        before = _requests.Before(states)
        self.before.value = [(each, before, i) for i, each in enumerate(asked)]
        place = _requests.gradient_place()
        compiling = torch.compiler.is_compiling()
        for request, weight, (normalizer, *ahead) in zip(requests, _requests.normalize(requests), self.before.value):
            parameter = request.weight if request.parameter is None else request.parameter
            seen = None if compiling else _requests.Seen.of(parameter)
            normalizer._prepared.value.append(_requests.Ahead(weight, place, request.rules.training, seen, *ahead))

    def _requests(self) -> tuple[list[Prepared], list[Request]]:
        requests, members, asked = [], [], []
        for owner, normalizer in self.members:
            try:
                weight = owner if normalizer.takes_layer else owner.original
                if normalizer.ready(weight):
                    requests.append(normalizer.request(weight))
                    asked.append(normalizer)
                members.append((owner, normalizer))
            except AttributeError:  # it was taken off the layer
                normalizer._prepared = None
        self.members = members
        return asked, requests

    def clear(self, root: nn.Module, inputs: Any = None, output: Any = None) -> None:
        if root is not self.root:
            return
        with torch.no_grad():
            for normalizer, before, i in self.before.value:
                if normalizer._prepared is not None and normalizer._prepared.value:
                    normalizer._prepared.value.clear()
                    before.restore(i)
        self.before.value = []


def group_spectral_norm(module: nn.Module) -> nn.Module:
    """Computes all spectrally normalised layers of a module together, once a forward of that module.

    Takes gankern's and torch's own spectral norm, as parametrization and as hook; torch's layers get gankern's
    kernels. Results, buffers and state_dict are those of layer by layer, and so is what happens where a layer runs
    twice in a forward, not at all, or outside of the module's forward. Complex layers are left as they are. Where the
    forward (or a hook) of a network may write to its weights through ``.data`` or an array, which nobody can see, its
    layers are computed one by one.

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
    members = [(owner, normalizer) for owner, normalizer in found if isinstance(normalizer, Prepared)]
    if not members and len(normalizers(module)) > len(found):
        return module  # all of them are torch's business
    if not members:
        raise ValueError(
            f"group_spectral_norm: {type(module).__name__} has no spectrally normalised layer; "
            "apply spectral_norm first"
        )
    group = SpectralNormGroup(module, members)
    module.register_forward_pre_hook(group.prepare, prepend=True)
    module.register_forward_hook(group.clear, always_call=True)
    return module
