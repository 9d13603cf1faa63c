"""torch's spectral norm by torch's own operations, without the Python between them.

Where `accelerate` leaves a layer to torch, because no file says of the device that our kernels are worth it, the
numbers, the launches and the graph that is recorded stay torch's to the bit. What is left out is what the host spends
around a dozen small operations a layer: most of the time of a spectrally normalised forward on a GPU.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import tokenize
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook

from gankern.core.native import nodes
from gankern.core.torch_internals import functions_replaced, watch_functions

# The functions in Python that csrc/autograd/spectral_norm.cpp repeats, and what they look up in turn.
_REPEATED: dict[Any, str] = {
    _SpectralNorm: "forward _power_method _reshape_weight_to_matrix",
    TorchHook: "compute_weight reshape_weight_to_matrix",
    F: "normalize",
    torch.Tensor: "norm",
    torch: "norm",
}
_FUNCTIONS = tuple([vars(place).get(name) for place, names in _REPEATED.items() for name in names.split()])
_OF_METHODS = tuple([name for cls in (_SpectralNorm, TorchHook) for name in _REPEATED[cls].split()])
_LOOKED_UP: dict[Any, str] = {
    torch: "mv dot vdot div",
    torch.linalg: "vector_norm",
    torch.Tensor: "permute flatten reshape t clone clamp_min_ expand_as __truediv__",
}
for _place, _names in (*_REPEATED.items(), *_LOOKED_UP.items()):
    watch_functions(_place, _names.split())
# What _source gives of torch's versions that it was compared with.
KNOWN = {
    "85479ab32210adadcf03aba83bfcf7239f170244143c10fbd656a6dfc34af42b": "2.11.0",
    "8ea39c650aff80da6c31044609706c0f4ba96617243b223928d6514eec3d9722": "2.13.0",
}


def normalize(normalizer: Any, weight: Tensor, u: Tensor, v: Tensor, training: bool) -> Any:
    """The normalized weight, u and v written to while training; NotImplemented where only Python does what is asked.

    Args:
        normalizer: torch's, of either form: it has ``dim``, ``n_power_iterations`` and ``eps``.
    """
    if torch.compiler.is_compiling() or functions_replaced() or not _is_known():
        return NotImplemented
    if any(name in normalizer.__dict__ for name in _OF_METHODS):  # somebody's own, of this layer alone
        return NotImplemented
    iterations = normalizer.n_power_iterations if training else 0
    hook = isinstance(normalizer, TorchHook)
    return nodes.spectral_norm_by_torch(weight, u, v, normalizer.dim, iterations, normalizer.eps, hook)


@functools.cache
def _is_known() -> bool:
    try:
        return _source() in KNOWN
    except (OSError, TypeError):  # torch without its source or without one of them, or somebody else's in its place
        return False


def _source() -> str:
    """A number of what the repeated functions say, but for their comments."""
    words = []
    for function in _FUNCTIONS:
        lines = io.StringIO(inspect.cleandoc("\n" + inspect.getsource(function))).readline
        words += [t.string for t in tokenize.generate_tokens(lines) if t.type not in (tokenize.COMMENT, tokenize.NL)]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()
