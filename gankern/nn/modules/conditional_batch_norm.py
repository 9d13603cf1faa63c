"""Batch normalisation whose affine values are each class's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gankern.functional import _checks
from gankern.nn.modules.batch_norm_act import BatchNormAct


class ConditionalBatchNorm2d(BatchNormAct):
    r"""Batch normalisation with a weight and a bias for each class, and an activation, in one pass.

    :math:`y_n = \mathrm{act}\big(\gamma_{c(n)} (x_n - \mu)/\sqrt{\sigma^2 + \epsilon} + \beta_{c(n)}\big)`, where
    :math:`c(n)` is sample n's class; the statistics are those of all samples together, as
    :class:`torch.nn.BatchNorm2d`'s.

    Sources: Dumoulin et al. 2017, arXiv 1610.07629; Miyato and Koyama 2018, arXiv 1802.05637. ``weight`` and ``bias``
    are [num_classes, num_features], ones and zeros at the start. ``forward(x, y)`` takes classes y [N] of an integer
    dtype, or weights over the classes [N, num_classes], for mixtures of them. Where affine values come from something
    else, such as BigGAN's linear maps of latent and embedding, call
    ``gankern.functional.batch_norm_act(x, mean, var, 1 + gain(z), bias(z), training)`` with [N, C] of each.

    >>> norm = ConditionalBatchNorm2d(64, 10, activation="relu")
    >>> norm(torch.randn(8, 64, 16, 16), torch.randint(10, (8,))).shape
    torch.Size([8, 64, 16, 16])
    """

    dimensions = (4,)

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
        negative_slope: float = 0.01,
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
        _checks.whole("ConditionalBatchNorm2d", "num_classes", num_classes)
        self.num_classes = num_classes
        self.affine = True
        self.weight = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # it has an argument more
        if y.is_floating_point():
            if y.shape != (x.shape[0], self.num_classes):
                raise ValueError(
                    f"ConditionalBatchNorm2d: y has shape {tuple(y.shape)}; weights over classes must be "
                    f"[{x.shape[0]}, {self.num_classes}]"
                )
            return self._normalize(x, y.to(self.weight.dtype) @ self.weight, y.to(self.bias.dtype) @ self.bias)
        if y.shape != (x.shape[0],) or y.dtype == torch.bool:
            raise ValueError(
                f"ConditionalBatchNorm2d: y is {y.dtype} of shape {tuple(y.shape)}; it must be [{x.shape[0]}] of "
                f"integers, the samples' classes"
            )
        # On a GPU looking would wait for it; there the lookup itself stops with an assertion.
        looks = y.device.type == "cpu" and len(y) and not torch.compiler.is_compiling()
        if looks and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise ValueError(
                f"ConditionalBatchNorm2d: y has classes from {int(y.min())} to {int(y.max())}; they must be from 0 to "
                f"{self.num_classes - 1}"
            )
        return self._normalize(x, nn.functional.embedding(y, self.weight), nn.functional.embedding(y, self.bias))

    def extra_repr(self) -> str:
        features, rest = super().extra_repr().split(", ", 1)
        return f"{features}, num_classes={self.num_classes}, {rest}"
