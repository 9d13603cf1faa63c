"""What torch.compile takes as a constant. Imported by what it traces, since importing Dynamo takes seconds."""

from __future__ import annotations

from typing import Any

from torch.compiler import assume_constant_result

from gankern.ops import convolution_choice


@assume_constant_result
def way_for(*args: Any) -> str:
    """:func:`gankern.ops.convolution_choice.way_for`."""
    return convolution_choice.way_for(*args)
