"""Virtual batch norm as layers, and how a network gets its reference batch."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import gankern.functional as GF
from gankern.core import activations
from gankern.core.threads import PerThread
from gankern.core.torch_internals import functional, transformed
from gankern.functional import _checks
from gankern.functional.virtual_batch_norm import check_options
from gankern.reference.virtual_batch_norm import virtual_batch_norm as reference

_HOW = (
    "call gankern.nn.set_reference_batch(network, batch) once, with the network whose forward is called and a batch of "
    "what it takes"
)


class _VirtualBatchNorm(nn.Module):
    """What the layers share; see :class:`VirtualBatchNorm2d`."""

    _dimensions: ClassVar[tuple[int, ...]]
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    ref_mean: Tensor
    ref_mean_square: Tensor
    ref_count: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, affine: bool = True, *, activation: str | None = None,
        negative_slope: float = 0.2, count_itself: bool = True, implementation: str | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        _checks.whole(type(self).__name__, "num_features", num_features)
        check_options(type(self).__name__, eps, activation, negative_slope)
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        self.activation = activation
        self.negative_slope = negative_slope
        self.count_itself = count_itself
        self.implementation = _checks.implementation(type(self).__name__, implementation)
        for name in ("weight", "bias"):
            value = torch.empty(num_features, device=device, dtype=dtype) if affine else None
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.register_buffer("ref_mean", torch.zeros(num_features, device=device, dtype=torch.float64))
        self.register_buffer("ref_mean_square", torch.zeros(num_features, device=device, dtype=torch.float64))
        self.register_buffer("ref_count", torch.zeros((), device=device, dtype=torch.int64))  # 0: never computed
        self._network: _Reference | None = None  # the network's, where a reference batch is set
        # The statistics of the forward that is running: (mean, mean of squares, count) or None.
        self._now = PerThread(type(None))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None and self.bias is not None:
            nn.init.normal_(self.weight, 1, 0.02)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in self._dimensions or x.shape[1] != self.num_features:
            dimensions = " or ".join(f"{d}-D" for d in self._dimensions)
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}; it must be {dimensions} with "
                f"{self.num_features} channels"
            )
        if self._network is not None and self._network.forward.value.running:
            return self._normalize_reference(x)
        mean, mean_square, count = self._statistics()
        return self._normalize(x, mean, mean_square, count if self.count_itself else None)

    def _normalize_reference(self, x: Tensor) -> Tensor:
        """The reference batch itself: its statistics, kept for the forward that follows, and alone."""
        if self._now.value is not None:
            raise RuntimeError(
                f"{type(self).__name__}: the layer was called twice in one forward of the network; one layer has one "
                f"set of reference statistics: use a layer for each place"
            )
        mean, mean_square = GF.virtual_batch_norm_statistics(x, implementation=self.implementation)
        self._now.value = mean, mean_square, len(x)
        if not functional():  # where nothing may be written to; state_dict() brings the buffers up to date
            with torch.no_grad():
                self.ref_mean.copy_(mean)
                self.ref_mean_square.copy_(mean_square)
                self.ref_count.fill_(len(x))
        return self._normalize(x, mean, mean_square, None)

    def _statistics(self) -> tuple[Tensor, Tensor, int | Tensor]:
        name = type(self).__name__
        if self._now.value is not None:
            return self._now.value
        if self._network is not None and self._network.forward.value.called:
            raise RuntimeError(f"{name}: the reference batch did not come through this layer, so it has no statistics")
        if self._network is not None:
            raise RuntimeError(
                f"{name}: called outside of the forward of the {self._network.name} that a reference batch was set "
                f"for: its statistics would be those of other weights. Call that network, or set the reference batch "
                f"for the part that you call"
            )
        if self.training:
            raise RuntimeError(f"{name}: there is no reference batch to train with: {_HOW}")
        if self.ref_count.is_meta or transformed():  # where nobody may look into a tensor
            return self.ref_mean, self.ref_mean_square, self.ref_count
        count = int(self.ref_count)
        if count == 0:
            raise RuntimeError(f"{name}: there are no reference statistics: load a checkpoint that has them, or {_HOW}")
        return self.ref_mean, self.ref_mean_square, count

    def _normalize(self, x: Tensor, mean: Tensor, mean_square: Tensor, count: int | Tensor | None) -> Tensor:
        if isinstance(count, Tensor):
            slope = activations.slope(self.activation, self.negative_slope)
            share = 1 / (count.double() + 1)
            return reference(x, mean, mean_square, share, self.weight, self.bias, self.eps, slope)
        return GF.virtual_batch_norm(
            x, mean, mean_square, count, self.weight, self.bias, eps=self.eps, activation=self.activation,
            negative_slope=self.negative_slope, implementation=self.implementation,
        )  # fmt: skip

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """``half()``, ``to(dtype)`` and the like leave the statistics in float64: less would lose the variance."""
        before = {name: getattr(self, name) for name in ("ref_mean", "ref_mean_square")}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def extra_repr(self) -> str:
        parts = [f"{self.num_features}, eps={self.eps}"]
        if not self.affine:
            parts.append("affine=False")
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        if self.activation == "leaky_relu":
            parts.append(f"negative_slope={self.negative_slope}")
        if not self.count_itself:
            parts.append("count_itself=False")
        return ", ".join(parts)


class VirtualBatchNorm1d(_VirtualBatchNorm):
    """Virtual batch norm of [N, C] or [N, C, L]; see :class:`VirtualBatchNorm2d`.

    >>> layer = VirtualBatchNorm1d(16)
    """

    _dimensions = (2, 3)


class VirtualBatchNorm2d(_VirtualBatchNorm):
    r"""Batch norm without the batch: each example is normalised with the statistics of a fixed reference batch and of
    itself, so that nothing depends on what else is in the batch.

    The reference batch is set once, for the whole network::

        network = nn.Sequential(nn.Conv2d(3, 64, 4, 2, 1), gnn.VirtualBatchNorm2d(64, activation="leaky_relu"), ...)
        gnn.set_reference_batch(network, batch)

    From then on every call of the network first runs the reference batch through it, which computes each layer's
    statistics anew, with the weights of now, with gradients. The layer's place is not important, nor whether the
    network trains or evaluates. See :func:`set_reference_batch`.

    Formula, source (Salimans et al. 2016, arXiv 1606.03498, section 3.6) and gradient order (2):
    :func:`gankern.functional.virtual_batch_norm`.

    Args:
        num_features: C.
        eps: not negative; added to the variance.
        affine: have a weight and a bias.
        activation: None or "linear" for none, "relu" or "leaky_relu", in the same pass.
        negative_slope: of "leaky_relu".
        count_itself: an example is part of its own statistics; without, it is reference batch norm.
        implementation: see :mod:`gankern.functional`.

    Parameters and buffers:
        weight [C], from N(1, 0.02), and bias [C], 0; ref_mean, ref_mean_square [C], float64, and ref_count: the last
        reference statistics, with which a loaded network evaluates.

    Raises:
        RuntimeError: in training without a reference batch, in evaluation without one and without statistics of a
            checkpoint, and where a part of the network is called on its own: each says what to do.

    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), VirtualBatchNorm2d(8, activation="relu"))
    >>> _ = set_reference_batch(network, torch.randn(32, 3, 16, 16))
    >>> network(torch.randn(4, 3, 16, 16)).shape
    torch.Size([4, 8, 14, 14])
    """

    _dimensions = (4,)


class VirtualBatchNorm3d(_VirtualBatchNorm):
    """Virtual batch norm of [N, C, D, H, W]; see :class:`VirtualBatchNorm2d`.

    >>> layer = VirtualBatchNorm3d(16)
    """

    _dimensions = (5,)


# ---- the network's reference batch -----------------------------------------------------------------------------

_BUFFER = "_reference_batch_{}"


class _Forward:
    """Of a network's forward in one thread."""

    def __init__(self) -> None:
        self.running = False  # the reference batch is on its way through the network
        self.called = False  # what the network was called with is


class _Reference:
    """What a network with a reference batch keeps beside it, as its attribute ``_reference``. The hooks below are plain
    functions that find it there: a copied or unpickled network has its own."""

    def __init__(self, network: nn.Module, arguments: int, layers: list[_VirtualBatchNorm]) -> None:
        self.name = type(network).__name__
        self.arguments = arguments  # of the network: its buffers _reference_batch_0, ...
        self.layers = layers
        self.forward = PerThread(_Forward)

    def forget(self) -> None:
        for layer in self.layers:
            layer._now.value = None

    def run(self, network: nn.Module) -> None:
        self.forget()
        self.forward.value.running = True
        try:
            network(*[getattr(network, _BUFFER.format(i)) for i in range(self.arguments)])
        except BaseException:
            self.forget()
            raise
        finally:
            self.forward.value.running = False


def _before_forward(network: nn.Module, args: Any) -> None:
    reference = network.__dict__.get("_reference")
    if reference is not None and not reference.forward.value.running:
        reference.run(network)
        reference.forward.value.called = True


def _after_forward(network: nn.Module, args: Any, output: Any) -> None:
    reference = network.__dict__.get("_reference")
    if reference is not None and not reference.forward.value.running:
        reference.forward.value.called = False
        reference.forget()


def _before_state_dict(network: nn.Module, prefix: str, keep_vars: bool) -> None:
    _refresh(network)


def _refresh(network: nn.Module) -> None:
    """The layers' buffers become the statistics of the weights of now, in evaluation."""
    reference = network.__dict__.get("_reference")
    if reference is None or reference.forward.value.running or reference.forward.value.called:
        return
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            reference.run(network)
    finally:
        reference.forget()
        for module in training:
            module.training = True


def _unwrapped(network: nn.Module) -> nn.Module:
    """The network itself: a wrapper's forward calls it, and with it the hooks."""
    while True:
        if isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            network = network.module
        elif isinstance(network, torch._dynamo.eval_frame.OptimizedModule):
            network = network._orig_mod
        else:
            return network


def set_reference_batch(network: nn.Module, *batch: Tensor) -> nn.Module:
    """Gives all virtual batch norms of a network their reference batch. Call it once, before training.

    Every call of the network then runs the reference batch through it first. So each layer's statistics are always
    those of the current weights, and gradients flow through them; the price is a second forward, and backward, of B
    examples. The statistics are kept in the layers' buffers, and brought up to date before ``state_dict()``: a
    checkpoint has those of its own weights, and a network that loads it evaluates without a batch. The batch itself is
    no part of the state_dict (set it again to continue training), it moves with the network (``to``, ``half``), and
    copies of the network have it too, with their own statistics.

    To evaluate many times without the second forward, see :func:`freeze_reference_batch`.

    Args:
        network: a module with virtual batch norm layers, the one whose forward is called; not a part of it. May be
            wrapped in DistributedDataParallel; each process then sets the same batch.
        batch: what the network is called with, one tensor an argument: a generator's fixed noise, a discriminator's
            fixed real images. A copy of it is kept.

    Returns:
        The network.

    Raises:
        ValueError, TypeError: where the network has no such layers, or one that has its reference batch through another
            network; or the batch is empty or no tensors.

    >>> network = torch.nn.Sequential(torch.nn.Linear(2, 8), VirtualBatchNorm1d(8))
    >>> _ = set_reference_batch(network, torch.randn(64, 2))
    >>> network(torch.randn(3, 2)).shape
    torch.Size([3, 8])
    """
    name = "set_reference_batch"
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name}: network is {type(network).__name__}; it must be a module")
    network = _unwrapped(network)
    if not batch:
        raise ValueError(f"{name}: there is no batch; pass what the network is called with")
    for i, x in enumerate(batch):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: argument {i} of the batch is {type(x).__name__}; it must be a tensor")
        if x.numel() == 0:
            raise ValueError(f"{name}: argument {i} of the batch has shape {tuple(x.shape)}; it must not be empty")
    layers = {path: m for path, m in network.named_modules() if isinstance(m, _VirtualBatchNorm)}
    if not layers:
        raise ValueError(f"{name}: {type(network).__name__} has no virtual batch norm layers")
    before = network.__dict__.get("_reference")
    for path, layer in layers.items():
        if layer._network is not None and layer._network is not before:
            raise ValueError(
                f"{name}: layer {path!r} has a reference batch already, through the {layer._network.name} that it was "
                f"set for; freeze_reference_batch(...) takes it away there"
            )
    if before is not None:
        _remove(network)
    reference = _Reference(network, len(batch), list(layers.values()))
    network.__dict__["_reference"] = reference
    for layer in layers.values():
        layer._network = reference
    for i, x in enumerate(batch):
        network.register_buffer(_BUFFER.format(i), x.detach().clone(), persistent=False)
    if before is None and _before_forward not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(_before_forward)
        network.register_forward_hook(_after_forward, always_call=True)
        network.register_state_dict_pre_hook(_before_state_dict)
    return network


def freeze_reference_batch(network: nn.Module) -> nn.Module:
    """Computes the reference statistics a last time, of the weights as they are, and lets the reference batch go.

    For evaluation: the network then runs its forward once a call. Training it raises until
    :func:`set_reference_batch` is called again.

    >>> network = torch.nn.Sequential(torch.nn.Linear(2, 8), VirtualBatchNorm1d(8))
    >>> _ = set_reference_batch(network, torch.randn(64, 2))
    >>> freeze_reference_batch(network).eval()(torch.randn(3, 2)).shape
    torch.Size([3, 8])
    """
    network = _unwrapped(network)
    if network.__dict__.get("_reference") is None:
        raise ValueError(f"freeze_reference_batch: {type(network).__name__} has no reference batch: {_HOW}")
    _refresh(network)
    _remove(network)
    return network


def _remove(network: nn.Module) -> None:
    reference: _Reference = network.__dict__["_reference"]
    for layer in reference.layers:
        layer._network = layer._now.value = None
    for i in range(reference.arguments):
        delattr(network, _BUFFER.format(i))
    network.__dict__["_reference"] = None
