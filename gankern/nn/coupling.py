"""Whether the samples of a batch stay apart in a network: whether each result is a function of its own sample alone.

The one place that is asked: by a critic's step that would join two batches, by processes and parts of a batch (which
layers see a part of it), by penalties (batch norm). It is known of a network whose every module is of a type whose code
is known (torch's layers, this library's, its models, and what says so by :func:`apart` or :func:`coupled`), runs that
code, and has no hooks that could do more. Of anything else it is not known. No name of a class is read, and nothing is
tried out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as TorchSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

import gankern.nn as gnn
from gankern.core.torch_internals import unwrapped
from gankern.nn.modules import virtual_batch_norm
from gankern.nn.modules.batch_norm_act import BatchNormAct
from gankern.nn.utils._group import SpectralNormGroup
from gankern.nn.utils._spectral_norm import SpectralNorm

Class = TypeVar("Class", bound=type[nn.Module])
_APART: dict[type, Callable] = {}  # the types, with the forward that is known


def apart(cls: Class) -> Class:
    """Says of a module's class, as a decorator, that its own ``forward`` keeps the samples of a batch (dimension 0)
    apart, where the modules in it do. Subclasses are asked anew.

    >>> @apart
    ... class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(2, 2)
    ...
    ...     def forward(self, x):
    ...         return x + self.layer(x)
    >>> doubt(Residual(), 4, 2) is None
    True
    """
    _APART[cls] = cls.forward
    return cls


def coupled(cls: Class) -> Class:
    """Says of a module's class, as a decorator, that its ``forward`` couples the samples of a batch, and no more: given
    a batch (dimension 0 of each input), it gives a result for each sample, in their order, which may depend on all."""
    _COUPLED[cls] = cls.forward
    return cls


_COUPLED: dict[type, Callable] = {}
_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(gnn.Conv2d, gnn.ConvTranspose2d, gnn.ConvDownsample2d, gnn.UpsampleConv2d, gnn.EqualizedConv2d),
    *(gnn.EqualizedConv1d, gnn.EqualizedConv3d),
    *(gnn.SubpixelConv1d, gnn.SubpixelConv2d, gnn.SubpixelConv3d),
)
_POINTWISE = (
    *(nn.Identity, nn.Linear, nn.Embedding, nn.PReLU, nn.RReLU, nn.Threshold, gnn.EqualizedLinear),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softsign, nn.Softplus),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, gnn.ReLU, gnn.LeakyReLU, gnn.PReLU, gnn.BiasAct, gnn.BiasActPixelNorm),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_SPATIAL = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.AdaptiveMaxPool3d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.PixelShuffle),
    *(nn.PixelUnshuffle, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d),
    *(nn.ReplicationPad2d, nn.ReplicationPad3d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(gnn.Blur1d, gnn.Blur2d, gnn.Blur3d, gnn.FIRDownsample1d, gnn.FIRDownsample2d, gnn.FIRDownsample3d),
    *(gnn.FIRUpsample1d, gnn.FIRUpsample2d, gnn.FIRUpsample3d, gnn.SelfAttention2d),
)
_NORMS = (
    *(nn.GroupNorm, gnn.GroupNormAct, nn.LocalResponseNorm, gnn.PixelNorm),
    *(gnn.VirtualBatchNorm1d, gnn.VirtualBatchNorm2d, gnn.VirtualBatchNorm3d),  # by the reference batch, and its own
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_INSTANCE_NORMS = (
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, gnn.InstanceNorm2d),
    *(gnn.InstanceNormAct1d, gnn.InstanceNormAct2d, gnn.InstanceNormAct3d),
)
_BATCH_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, gnn.BatchNorm2d, gnn.BatchNormAct1d, gnn.BatchNormAct2d),
    *(gnn.BatchNormAct3d, gnn.ConditionalBatchNorm1d, gnn.ConditionalBatchNorm2d, gnn.ConditionalBatchNorm3d),
    *(gnn.LinearBatchNorm1d, gnn.LinearBatchNorm2d, gnn.LinearBatchNorm3d),
)
_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
_WITH_DIMENSION = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.Unflatten)
for _cls in (
    *_CONVOLUTIONS, *_POINTWISE, *_SPATIAL, *_NORMS, *_CONTAINERS, *_INSTANCE_NORMS, *_BATCH_NORMS, *_WITH_DIMENSION,
    *_RECURRENT, nn.Flatten, nn.LayerNorm, nn.RMSNorm,
):  # fmt: skip
    apart(_cls)
coupled(gnn.MinibatchDiscrimination)
coupled(gnn.MinibatchStdDev)

_HOOKS = (TorchSpectralNorm, SpectralNorm, WeightNorm)  # which see weights, and no samples


BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, BatchNormAct)  # torch's and this library's


def is_training_batch_norm(module: nn.Module) -> bool:
    """Whether a module normalises by the statistics of the batch that it is given."""
    return isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None)


def _counts_batches(module: nn.Module) -> bool:
    """Whether it has a part in the statistics of each batch while it trains."""
    return isinstance(module, _INSTANCE_NORMS) and module.track_running_stats


def coupled_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers, by name, that couple the samples of a batch while they train: in which a sample's result, or what the
    layer keeps, depends on the others."""
    return {
        name: module
        for name, module in _modules(unwrapped(network), "")
        if _class(module) in _COUPLED or isinstance(module, BATCH_NORMS) or _counts_batches(module)
    }


def unknown_layers(network: nn.Module) -> dict[str, str]:
    """The layers, by name, of which it is not known whether they couple the samples of a batch; and why."""
    found = ((name, module, _unknown(module, _class(module))) for name, module in _modules(unwrapped(network), ""))
    return {name: f"{type(module).__name__} {reason}" for name, module, reason in found if reason is not None}


def doubt(network: Any, samples: int, dimensions: int, but: tuple[type, ...] = ()) -> str | None:
    """Why it is not known that the samples of a batch stay apart in the network; None where it is known.

    Args:
        network: a module; of a function nothing is known.
        samples: N, of a batch [N, ...].
        dimensions: how many the network's input has.
        but: types of modules that the caller answers for.
    """
    if not isinstance(network, nn.Module):
        return "it is not a module, and what a function does is not known"
    everywhere = nn.modules.module
    forward = everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
    if forward or everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks:
        return "hooks of all modules are registered"
    if dimensions < 2:
        return "its input has one dimension"
    root = unwrapped(network)
    waiting = [root]
    while waiting:  # in the order of _modules, without the names, which most networks are asked for at no call
        module = waiting.pop()
        if type(module) not in but or _changed(module, _class(module)):
            reason = _doubt(module, samples, dimensions)
            if reason is not None:
                name = next(name for name, each in _modules(root, "") if each is module)
                return f"{type(module).__name__}{f' {name!r}' if name else ''} {reason}"
        waiting += [child for _, child in _children(module)][::-1]
    return None


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those in it but parametrizations, which see weights alone."""
    inner = module._modules
    return [(n, m) for n, m in inner.items() if m is not None and n != "parametrizations"] if inner else []


def _modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    for child_name, child in _children(module):
        yield from _modules(child, f"{name}.{child_name}" if name else child_name)


def _class(module: nn.Module) -> Any:
    cls = type(module)
    return cls.__bases__[0] if "parametrizations" in module._modules and parametrize.is_parametrized(module) else cls


def _unknown(module: nn.Module, cls: Any) -> str | None:
    known = _APART.get(cls, _COUPLED.get(cls))
    if known is None or known is not cls.forward:
        return "is of a type whose code is not known to keep samples apart"
    if _changed(module, cls):
        return "has hooks, or methods of its own, that are not known to keep samples apart"
    return None


# What is asked of modules of a type, each (module, samples, dimensions) -> why samples may not stay apart, if so.
_Question = Callable[[Any, int, int], str | None]
_QUESTIONS: tuple[tuple[tuple[type, ...], _Question], ...] = (
    (BATCH_NORMS,
     lambda m, n, d: "normalises by the batch" if is_training_batch_norm(m) else None),
    (_INSTANCE_NORMS, lambda m, n, d: "keeps statistics of each batch" if m.training and _counts_batches(m) else None),
    ((nn.modules.conv._ConvNd,),
     lambda m, n, d: "may be called without a batch dimension" if d != len(m.kernel_size) + 2 else None),
    (_RECURRENT, lambda m, n, d: "may be called without a batch dimension, with the samples as steps"),
    ((nn.LayerNorm, nn.RMSNorm),
     lambda m, n, d: "may normalise over the batch" if m.normalized_shape[0] == n else None),
    ((nn.Flatten,), lambda m, n, d: "flattens the batch, or may" if m.start_dim < 1 else None),
    (_WITH_DIMENSION,
     lambda m, n, d: None if isinstance(m.dim, int) and m.dim > 0 else "may work along the batch"),
)  # fmt: skip


@functools.cache
def _questions(cls: type) -> tuple[_Question, ...]:
    return tuple([question for types, question in _QUESTIONS if issubclass(cls, types)])


def _doubt(module: nn.Module, samples: int, dimensions: int) -> str | None:
    cls = _class(module)
    if cls in _COUPLED:
        return "couples the samples of a batch"
    unknown = _unknown(module, cls)
    if unknown is not None:
        return unknown
    for question in _questions(cls):
        reason = question(module, samples, dimensions)
        if reason is not None:
            return reason
    return None


@functools.cache
def _methods(cls: type) -> frozenset[str]:
    return frozenset(name for name in dir(cls) if callable(getattr(cls, name, None)))


def _changed(module: nn.Module, cls: Any) -> bool:
    """Whether a module may do more, or other things, than its class says; ``cls`` is that without parametrizations."""
    own = vars(module)
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    for hooks in (own["_forward_pre_hooks"], own["_forward_hooks"]):
        if hooks and not all(map(_is_known, hooks.values())):
            return True
    if torch.compiler.is_compiling():  # which cannot look through a class
        names = frozenset([name for name in own if callable(getattr(type(module), name, None))])
    else:
        names = _methods(cls).intersection(own)
    return bool(names) and not all(getattr(own[name], "keeps_results", False) for name in names)


def _is_known(hook: Any) -> bool:
    if type(getattr(hook, "__self__", None)) is SpectralNormGroup:
        return True
    return type(hook) in _HOOKS or hook in (virtual_batch_norm._before_forward, virtual_batch_norm._after_forward)
