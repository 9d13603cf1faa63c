"""Group normalisation with the activation behind it, as torch.nn's module is called and saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gankern.functional as GF
from gankern.functional import _checks
from gankern.nn.modules._norm_act import WithActivation, behind


class GroupNormAct(WithActivation, nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` and the activation behind it in one pass, exact to the second order.

    ``activation`` is None or "linear", "relu", "leaky_relu" (with ``negative_slope``) or "prelu" (with one slope, the
    parameter ``slope``, which starts at 0.25). All other arguments, their order and defaults, and the keys of the
    state_dict are GroupNorm's: a checkpoint of either loads into the other. ``GroupNormAct(1, C)`` is the layer norm of
    WGAN-GP's critics. x is [N, C, ...].
    Formula, errors and gradient order: :func:`gankern.functional.group_norm_act`.

    >>> norm = GroupNormAct(32, 64, activation="relu")
    >>> norm(torch.randn(2, 64, 16, 16)).shape
    torch.Size([2, 64, 16, 16])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.2,
        implementation: str | None = None,
    ) -> None:
        _checks.whole(type(self).__name__, "num_groups", num_groups)
        self._check("num_channels", num_channels, 0.0, eps, activation, negative_slope, implementation)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:  # not every torch has the argument
            self.register_parameter("bias", None)
        self._put_behind(activation, negative_slope, implementation, device, dtype)

    def reset_parameters(self) -> None:
        if self.affine and self.bias is None:
            nn.init.ones_(self.weight)
        else:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim < 2 or input.shape[1] != self.num_channels:
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(input.shape)}; it must be [N, {self.num_channels}, ...]"
            )
        return GF.group_norm_act(input, self.num_groups, self.weight, self.bias, self.eps, **behind(self))
