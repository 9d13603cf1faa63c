"""Activations as layers, with and without a bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gankern.functional as GF
from gankern.functional import _checks
from gankern.functional.bias_act import check_options


class ReLU(nn.ReLU):
    """:class:`torch.nn.ReLU`, computed by :func:`gankern.functional.relu`: its second derivative does not exist, rather
    than being zeros. ``implementation``: see :mod:`gankern.functional`.

    >>> ReLU(inplace=True)(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    implementation: str | None = None  # also of pickles that are older than it

    def __init__(self, inplace: bool = False, *, implementation: str | None = None) -> None:
        super().__init__(inplace)
        self.implementation = _checks.implementation("ReLU", implementation)

    def forward(self, input: Tensor) -> Tensor:
        return GF.relu(input, self.inplace, implementation=self.implementation)


class LeakyReLU(nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU`, computed by :func:`gankern.functional.leaky_relu`: its second derivative does not
    exist, rather than being zeros. ``implementation``: see :mod:`gankern.functional`.

    >>> LeakyReLU(0.5)(torch.tensor([-1.0, 2.0]))
    tensor([-0.5000,  2.0000])
    """

    implementation: str | None = None

    def __init__(
        self, negative_slope: float = 1e-2, inplace: bool = False, *, implementation: str | None = None
    ) -> None:
        _checks.number("LeakyReLU", "negative_slope", negative_slope)
        super().__init__(negative_slope, inplace)
        self.implementation = _checks.implementation("LeakyReLU", implementation)

    def forward(self, input: Tensor) -> Tensor:
        return GF.leaky_relu(input, self.negative_slope, self.inplace, implementation=self.implementation)


class PReLU(nn.PReLU):
    """:class:`torch.nn.PReLU`, computed by :func:`gankern.functional.prelu`: one slope or one a channel, ``weight``,
    which starts at 0.25. ``implementation``: see :mod:`gankern.functional`.

    >>> PReLU()(torch.tensor([[-1.0, 2.0]])).tolist()
    [[-0.25, 2.0]]
    """

    implementation: str | None = None

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        implementation: str | None = None,
    ) -> None:
        _checks.whole("PReLU", "num_parameters", num_parameters)
        _checks.number("PReLU", "init", init)
        super().__init__(num_parameters, init, device, dtype)
        self.implementation = _checks.implementation("PReLU", implementation)

    def forward(self, input: Tensor) -> Tensor:
        return GF.prelu(input, self.weight, implementation=self.implementation)


def slope_of_prelu(
    activation: str | None, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter | None:
    """The slope that a layer with a PReLU behind it has: one number, which starts at 0.25, as torch.nn.PReLU's."""
    return nn.Parameter(torch.full((1,), 0.25, device=device, dtype=dtype)) if activation == "prelu" else None


class Biased(nn.Module):
    """A bias, which starts at zero, and what the function that uses it is told."""

    implementation: str | None = None

    def __init__(
        self,
        num_channels: int,
        bias: bool,
        implementation: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _checks.whole(type(self).__name__, "num_channels", num_channels)
        self.implementation = _checks.implementation(type(self).__name__, implementation)
        self.num_channels = num_channels
        empty = torch.empty(num_channels, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _check(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_channels:
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(input.shape)}; it must be [N, {self.num_channels}, ...]"
            )


class BiasAct(Biased):
    r"""Bias, activation, gain and clamp in one pass: :func:`gankern.functional.bias_act` with a bias of its own, which
    starts at zero. For use after a convolution without one.

    Args:
        num_channels: of dimension 1.
        activation, negative_slope, gain, clamp: as the function's. "prelu" has one slope, the parameter ``slope``,
            which starts at 0.25.
        bias: whether there is one.
        implementation: see :mod:`gankern.functional`.

    Shape: [N, num_channels, ...] to the same.

    >>> BiasAct(8, "leaky_relu")(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        num_channels: int,
        activation: str | None = "linear",
        *,
        negative_slope: float = 0.2,
        gain: float = 1.0,
        clamp: float | None = None,
        bias: bool = True,
        implementation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, bias, implementation, device, dtype)
        check_options("BiasAct", activation, negative_slope, gain, prelu=True)
        if clamp is not None:
            _checks.number("BiasAct", "clamp", clamp, above=0)
        self.activation, self.negative_slope, self.gain, self.clamp = activation, negative_slope, gain, clamp
        self.register_parameter("slope", slope_of_prelu(activation, device, dtype))

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        return GF.bias_act(
            input,
            self.bias,
            activation=self.activation,
            negative_slope=self.negative_slope,
            slope=getattr(self, "slope", None),  # older pickles have none
            gain=self.gain,
            clamp=self.clamp,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        clamp = "" if self.clamp is None else f", clamp={self.clamp}"
        return f"{self.num_channels}, {self.activation}{slope}, gain={self.gain}{clamp}, bias={self.bias is not None}"
