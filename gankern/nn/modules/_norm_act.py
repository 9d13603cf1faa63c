"""What layers of a normalisation with an activation behind it share, whatever they normalise over."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gankern.functional import _checks
from gankern.functional._norm_act import check_options
from gankern.nn.modules.bias_act import slope_of_prelu


class WithActivation(nn.Module):
    """Beside torch's class of the normalisation: the options of the activation, and PReLU's slope."""

    activation: str | None
    negative_slope: float
    slope: nn.Parameter | None
    implementation: str | None

    def _check(
        self,
        features: str,
        count: int,
        momentum: float | None,
        eps: float,
        activation: str | None,
        negative_slope: float,
        implementation: str | None,
    ) -> None:
        """Checks a constructor's arguments; ``features`` is the name of the first."""
        name = type(self).__name__
        _checks.whole(name, features, count)
        check_options(name, 0.0 if momentum is None else momentum, eps, activation, negative_slope)
        _checks.implementation(name, implementation)

    def _put_behind(
        self,
        activation: str | None,
        negative_slope: float,
        implementation: str | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        self.activation = activation
        self.negative_slope = negative_slope
        self.register_parameter("slope", slope_of_prelu(activation, device, dtype))
        self.implementation = implementation

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"activation={self.activation!r}"]
        if self.activation == "leaky_relu":
            parts.append(f"negative_slope={self.negative_slope}")
        return ", ".join(parts)


def behind(layer: Any) -> dict[str, Any]:
    """What a layer hands to its function behind the normalisation's own arguments."""
    return {
        "activation": layer.activation,
        "negative_slope": layer.negative_slope,
        "slope": getattr(layer, "slope", None),  # older pickles have none
        "implementation": layer.implementation,
    }
