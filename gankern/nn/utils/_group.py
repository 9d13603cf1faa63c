"""All spectrally normalised layers of a network in one call a forward."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

from gankern.nn.utils import _requests, parametrizations
from gankern.nn.utils._spectral_norm import SpectralNorm as Hook


class SpectralNormGroup:
    """Runs before a network's forward and hands each layer its weight; after it, takes back what was not used."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.parametrized: list[tuple[nn.Module, parametrizations.SpectralNorm]] = []  # (list, its first member)
        self.hooked: list[tuple[nn.Module, Hook]] = []
        for module in root.modules():
            for members in getattr(module, "parametrizations", {}).values():
                first = members[0]
                if type(first) is torch_parametrizations._SpectralNorm:
                    first.__class__ = parametrizations.SpectralNorm  # torch's own: same state, our kernels
                if isinstance(first, parametrizations.SpectralNorm) and members.original.ndim > 1:
                    self.parametrized.append((members, first))
            for hook in module._forward_pre_hooks.values():
                if type(hook) is TorchHook:
                    hook.__class__ = Hook
                if isinstance(hook, Hook):
                    self.hooked.append((module, hook))

        self.normalizers = [first for _, first in self.parametrized] + [hook for _, hook in self.hooked]
        for normalizer in self.normalizers:
            normalizer._prepared = []

    def __len__(self) -> int:
        return len(self.normalizers)

    def prepare(self, root: nn.Module, inputs: Any) -> None:
        # A data-parallel replica shares this hook but not the layers: it goes layer by layer. So does a forward
        # within parametrize.cached(), where the weights of the first one are kept.
        if root is not self.root or parametrize._cache_enabled:
            return
        requests = [first.request(members.original) for members, first in self.parametrized]
        requests += [hook.request(module) for module, hook in self.hooked]
        for normalizer, weight in zip(self.normalizers, _requests.normalize(requests)):
            normalizer._prepared.append(weight)

    def clear(self, root: nn.Module, inputs: Any, output: Any) -> None:
        for normalizer in self.normalizers:
            normalizer._prepared.clear()


def group_spectral_norm(module: nn.Module) -> nn.Module:
    """Computes all spectrally normalised layers of a module together, once a forward of that module.

    Takes gankern's and torch's own spectral norm, as parametrization and as hook; torch's layers get gankern's
    kernels. Results, buffers and state_dict are those of layer by layer, and so is what happens where a layer runs
    twice in a forward, or outside of the module's forward. Only a layer that a forward skips differs: its u and v
    iterate all the same.

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
    group = SpectralNormGroup(module)
    if not len(group):
        raise ValueError(
            f"group_spectral_norm: {type(module).__name__} has no spectrally normalised layer; "
            "apply spectral_norm first"
        )
    module.register_forward_pre_hook(group.prepare, prepend=True)
    module.register_forward_hook(group.clear, always_call=True)
    return module
