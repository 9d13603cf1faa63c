"""Batch normalisation with the activation behind it, as torch.nn's modules are called and saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import gankern.functional as GF
from gankern.functional import _checks
from gankern.nn.modules._norm_act import WithActivation, behind


class BatchNormAct(WithActivation, _NormBase):
    """:class:`torch.nn.BatchNorm2d` and an activation in one pass: see its 1d, 2d and 3d forms below."""

    # Not a subclass of torch's _BatchNorm: SyncBatchNorm.convert_sync_batchnorm would put another module in its place,
    # without the activation.

    dimensions: tuple[int, ...] = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
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
        return self._normalize(input, self.weight, self.bias)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in self.dimensions or input.shape[1] != self.num_features:
            accepted = " or ".join(f"{n}-D" for n in self.dimensions)
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(input.shape)}; it must be {accepted} with "
                f"{self.num_features} channels"
            )

    def _normalize(self: BatchNormAct | BatchNorm2d, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        # Each of a module's tensors is looked up once: that goes through a function of torch's in Python.
        momentum, training, tracks = self.momentum, self.training, self.track_running_stats
        if training and tracks:
            batches = self.num_batches_tracked
            if batches is not None:
                batches.add_(1)
                if momentum is None:  # the mean over all batches so far
                    momentum = 1 / float(batches)
        return GF.batch_norm_act(
            x,
            self.running_mean if tracks or not training else None,
            self.running_var if tracks or not training else None,
            weight,
            bias,
            training,
            0.0 if momentum is None else momentum,
            self.eps,
            **behind(self),
        )


class BatchNormAct1d(BatchNormAct):
    """As :class:`BatchNormAct2d`, for x of [N, C] or [N, C, L]."""

    dimensions = (2, 3)


class BatchNormAct2d(BatchNormAct):
    """:class:`torch.nn.BatchNorm2d` and the activation behind it in one pass, exact to the second order.

    ``activation`` is None or "linear", "relu", "leaky_relu" (with ``negative_slope``) or "prelu", which has one slope,
    the parameter ``slope``, that starts at 0.25. All other arguments, their order and defaults, the statistics and the
    keys of the state_dict are BatchNorm2d's: a checkpoint of either loads into the other. Under DistributedDataParallel
    statistics are each process's own, as BatchNorm2d's are; there is no synchronised form.

    Formula, errors and gradient order: :func:`gankern.functional.batch_norm_act`.

    >>> norm = BatchNormAct2d(64, negative_slope=0.2)
    >>> norm(torch.randn(8, 64, 16, 16)).shape
    torch.Size([8, 64, 16, 16])
    """

    dimensions = (4,)


class BatchNormAct3d(BatchNormAct):
    """As :class:`BatchNormAct2d`, for x of [N, C, D, H, W]."""

    dimensions = (5,)


class BatchNorm2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` in every respect, on kernels whose second order is as fast as their first.

    ``SyncBatchNorm.convert_sync_batchnorm`` takes it for what it is. ``implementation``: see :mod:`gankern.functional`.

    >>> BatchNorm2d(64)(torch.randn(8, 64, 16, 16)).shape
    torch.Size([8, 64, 16, 16])
    """

    activation = None
    negative_slope = 1.0
    slope = None
    implementation: str | None = None
    _normalize = BatchNormAct._normalize

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        implementation: str | None = None,
    ) -> None:
        without: Any = {} if bias else {"bias": False}  # not every torch has the argument
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **without)
        self.implementation = _checks.implementation("BatchNorm2d", implementation)

    def forward(self, input: Tensor) -> Tensor:
        return self._normalize(input, self.weight, self.bias)


class ConditionalBatchNorm2d(BatchNormAct):
    r"""Batch normalisation with a weight and a bias for each class, and an activation, in one pass.

    :math:`y_n = \mathrm{act}\big(\gamma_{c(n)} (x_n - \mu)/\sqrt{\sigma^2 + \epsilon} + \beta_{c(n)}\big)`, where
    :math:`c(n)` is sample n's class; the statistics are those of all samples together, as
    :class:`torch.nn.BatchNorm2d`'s.

    Sources: Dumoulin et al. 2017, arXiv 1610.07629; Miyato and Koyama 2018, arXiv 1802.05637. ``weight`` and ``bias``
    are [num_classes, num_features], ones and zeros at the start. ``forward(x, y)`` takes classes y [N] of an integer
    dtype, or weights over the classes [N, num_classes], for mixtures of them. Where affine values come from something
    else, such as BigGAN's linear maps of latent and embedding, call
    ``gankern.functional.batch_norm_act(x, mean, var, 1 + gain(z), bias(z), training)`` with [N, C] of each, or see
    :class:`LinearBatchNorm2d`.

    >>> norm = ConditionalBatchNorm2d(64, 10, activation="relu")
    >>> norm(torch.randn(8, 64, 16, 16), torch.randint(10, (8,))).shape
    torch.Size([8, 64, 16, 16])
    """

    dimensions: tuple[int, ...] = (4,)

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.2,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            False,
            track_running_stats,
            device,
            dtype,
            activation=activation,
            negative_slope=negative_slope,
            implementation=implementation,
        )
        _checks.whole(type(self).__name__, "num_classes", num_classes)
        self.num_classes = num_classes
        self.affine = True
        self.weight = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # it has an argument more
        if y.is_floating_point():
            if y.shape != (x.shape[0], self.num_classes):
                raise ValueError(
                    f"{type(self).__name__}: y has shape {tuple(y.shape)}; weights over classes must be "
                    f"[{x.shape[0]}, {self.num_classes}]"
                )
            return self._normalize(x, y.to(self.weight.dtype) @ self.weight, y.to(self.bias.dtype) @ self.bias)
        if y.shape != (x.shape[0],) or y.dtype == torch.bool:
            raise ValueError(
                f"{type(self).__name__}: y is {y.dtype} of shape {tuple(y.shape)}; it must be [{x.shape[0]}] of "
                f"integers, the samples' classes"
            )
        # On a GPU looking would wait for it; there the lookup itself stops with an assertion.
        looks = y.device.type == "cpu" and len(y) and not torch.compiler.is_compiling()
        if looks and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise ValueError(
                f"{type(self).__name__}: y has classes from {int(y.min())} to {int(y.max())}; they must be from 0 to "
                f"{self.num_classes - 1}"
            )
        return self._normalize(x, nn.functional.embedding(y, self.weight), nn.functional.embedding(y, self.bias))

    def extra_repr(self) -> str:
        features, rest = super().extra_repr().split(", ", 1)
        return f"{features}, num_classes={self.num_classes}, {rest}"


class _LinearBatchNorm(BatchNormAct):
    """See :class:`LinearBatchNorm2d`."""

    def __init__(
        self,
        num_features: int,
        condition_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.2,
        implementation: str | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            False,
            track_running_stats,
            device,
            dtype,
            activation=activation,
            negative_slope=negative_slope,
            implementation=implementation,
        )
        _checks.whole(type(self).__name__, "condition_features", condition_features)
        self.condition_features = condition_features
        self.gain = nn.Linear(condition_features, num_features, bias=False, device=device, dtype=dtype)
        self.shift = nn.Linear(condition_features, num_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]  # it has an argument more
        if not c.is_floating_point() or c.shape != (x.shape[0], self.condition_features):
            raise ValueError(
                f"{type(self).__name__}: c is {c.dtype} of shape {tuple(c.shape)}; it must be floating point, "
                f"[{x.shape[0]}, {self.condition_features}]"
            )
        return self._normalize(x, 1 + self.gain(c), self.shift(c))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, condition_features={self.condition_features}"


class LinearBatchNorm1d(_LinearBatchNorm):
    """As :class:`LinearBatchNorm2d`, for x of [N, C] or [N, C, L]."""

    dimensions = (2, 3)


class LinearBatchNorm2d(_LinearBatchNorm):
    r"""Conditional batch normalisation by a vector of each sample's, as BigGAN has it, and an activation, in one pass.

    :math:`y_n = \mathrm{act}\big((1 + W_\gamma c_n) (x_n - \mu)/\sqrt{\sigma^2 + \epsilon} + W_\beta c_n\big)`; the
    statistics are those of all samples together, as :class:`torch.nn.BatchNorm2d`'s.

    Source: Brock et al. 2018, arXiv 1809.11096. ``gain`` and ``shift`` are linear layers without a bias, so that
    spectral norm finds them. ``forward(x, c)`` takes c [N, condition_features] of a floating-point dtype.

    >>> norm = LinearBatchNorm2d(64, 20, activation="relu")
    >>> norm(torch.randn(8, 64, 16, 16), torch.randn(8, 20)).shape
    torch.Size([8, 64, 16, 16])
    """

    dimensions = (4,)


class LinearBatchNorm3d(_LinearBatchNorm):
    """As :class:`LinearBatchNorm2d`, for x of [N, C, D, H, W]."""

    dimensions = (5,)


class ConditionalBatchNorm1d(ConditionalBatchNorm2d):
    """As :class:`ConditionalBatchNorm2d`, for x of [N, C] or [N, C, L]."""

    dimensions = (2, 3)


class ConditionalBatchNorm3d(ConditionalBatchNorm2d):
    """As :class:`ConditionalBatchNorm2d`, for x of [N, C, D, H, W]."""

    dimensions = (5,)
