"""Instance normalisation with the activation behind it, as torch.nn's modules are called and saved."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import gankern.functional as GF
from gankern.functional import _checks
from gankern.nn.modules._norm_act import WithActivation, behind


class InstanceNormAct(WithActivation, _NormBase):
    """:class:`torch.nn.InstanceNorm2d` and an activation in one pass: see its 1d, 2d and 3d forms below."""

    dimensions: tuple[int, ...] = ()  # of a batch

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.2,
        implementation: str | None = None,
    ) -> None:
        self._check("num_features", num_features, momentum, eps, activation, negative_slope, implementation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._put_behind(activation, negative_slope, implementation, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self._normalize(input)

    def _normalize(self, x: Tensor) -> Tensor:
        (batched,) = self.dimensions
        if x.ndim not in (batched - 1, batched):
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}; it must be {batched}-D, or {batched - 1}-D "
                "without a batch"
            )
        if x.ndim < batched:
            return self._normalize(x.unsqueeze(0)).squeeze(0)
        if x.shape[1] != self.num_features:
            says = f"{type(self).__name__}: x has shape {tuple(x.shape)}; num_features is {self.num_features}"
            if self.affine or self.running_mean is not None:
                raise ValueError(f"{says}, and weights and running statistics are of so many channels")
            warnings.warn(f"{says}: without weights it makes no difference", stacklevel=3)
        return _applied(self, x)


def _applied(layer: Any, x: Tensor) -> Tensor:
    """To a batch."""
    return GF.instance_norm_act(
        x,
        layer.running_mean,
        layer.running_var,
        layer.weight,
        layer.bias,
        layer.training or not layer.track_running_stats,
        0.0 if layer.momentum is None else layer.momentum,
        layer.eps,
        **behind(layer),
    )


class InstanceNormAct1d(InstanceNormAct):
    """As :class:`InstanceNormAct2d`, for x of [N, C, L] or [C, L]."""

    dimensions = (3,)


class InstanceNormAct2d(InstanceNormAct):
    """:class:`torch.nn.InstanceNorm2d` and the activation behind it in one pass, exact to the second order.

    ``activation`` is None or "linear", "relu", "leaky_relu" (with ``negative_slope``) or "prelu" (with one slope, the
    parameter ``slope``, which starts at 0.25). All other arguments, their order and defaults (no affine values, no
    running statistics), and the keys of the state_dict are InstanceNorm2d's: a checkpoint of either loads into the
    other. x is [N, C, H, W] or [C, H, W].
    Formula, errors and gradient order: :func:`gankern.functional.instance_norm_act`.

    >>> norm = InstanceNormAct2d(64, activation="relu")
    >>> norm(torch.randn(1, 64, 16, 16)).shape
    torch.Size([1, 64, 16, 16])
    """

    dimensions = (4,)


class InstanceNormAct3d(InstanceNormAct):
    """As :class:`InstanceNormAct2d`, for x of [N, C, D, H, W] or [C, D, H, W]."""

    dimensions = (5,)


class InstanceNorm2d(nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` in every respect but that a channels_last map's result is channels_last (torch's
    is contiguous), on kernels that read a map once, whose second order is as fast as their first.

    >>> InstanceNorm2d(64)(torch.randn(1, 64, 16, 16)).shape
    torch.Size([1, 64, 16, 16])
    """

    activation = None
    negative_slope = 1.0
    slope = None
    implementation: str | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        implementation: str | None = None,
    ) -> None:
        without: Any = {} if bias else {"bias": False}  # not every torch has the argument
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **without)
        self.implementation = _checks.implementation("InstanceNorm2d", implementation)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _applied(self, input)
