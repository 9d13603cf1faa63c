"""Cases: one set-up a primitive that serves verification, speed, memory and the command line alike.

Each module here, one a primitive, holds a list CASES; what several share is in modules with an underscore. `gankern
verify` runs those with ``verify``, `gankern bench` and benchmarks/ those with ``bench``; shapes are those of real
models.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gankern.core.dispatch import Primitive

Outputs = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Work:
    """The least that an algorithm for one mode must do: bytes to and from memory, and vector operations (counted by
    lane; a fused multiply-add is one)."""

    bytes: int
    operations: int = 0


@dataclass(frozen=True)
class Case:
    primitive: str
    name: str
    # Deterministic inputs of a dtype on a device; gradients are taken for those that require them.
    make: Callable[[torch.dtype, str], list[Tensor]]
    # (implementation, inputs) -> outputs; nothing else decides the result. Buffers among the inputs may be updated,
    # inputs that require gradients may not.
    run: Callable[[str | None, Sequence[Tensor]], Outputs]
    # The best that there is without gankern, each an eager formulation; bench also tries each under torch.compile.
    peers: Mapping[str, Callable[[Sequence[Tensor]], Outputs]] = field(default_factory=dict)
    # Mode ("forward", "backward", "double backward") -> least work, in fp32, from the inputs' shapes.
    work: Callable[[Sequence[Tensor]], Mapping[str, Work]] = lambda inputs: {}
    verify: bool = True
    bench: bool = True
    quick: bool = False  # also part of the quick runs
    # Of a scaling run: what varies from case to case, and its value here. Such a case has no other part.
    along: tuple[str, float] | None = None
    # Of tensors so small that the host's work is all there is: what a call costs. Such a case has no other part.
    host: bool = False
    # Implementations that do not take these inputs, for a reason that device and dtype do not tell.
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.along is not None or self.host:
            object.__setattr__(self, "verify", False)
            object.__setattr__(self, "bench", False)

    def implementations(self, device: str, dtype: torch.dtype) -> list[str]:
        """Those that take its inputs there, besides the reference."""
        refusals = Primitive.registry[self.primitive].refusals(device, dtype)
        return [n for n, reason in refusals.items() if reason is None and n not in ("reference", *self.without)]


def all_cases() -> list[Case]:
    """The cases of every primitive, in the primitives' alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return [case for name in names for case in importlib.import_module(f"{__name__}.{name}").CASES]


# Heights and widths along which the layers of feature maps [16, 64, H, W] are scaled.
SIDES = (2, 4, 8, 16, 32, 64, 128)


LARGE = [(16, 128, 64, 64), (64, 128, 32, 32), (16, 512, 4, 4)]


def of_large_maps(case: Callable[..., Case]) -> list[Case]:
    """``case(name, shape, channels_last, ...)`` of the feature maps of critics in both memory formats, the first one of
    the quick runs too; and of maps of rising height."""
    return [
        *(
            case(
                "x".join(map(str, shape)) + (" channels_last" if last else ""),
                shape,
                last,
                verify=False,
                quick=shape == LARGE[0] and not last,
            )
            for shape in LARGE
            for last in (False, True)
        ),
        *(case(f"16x64x{side}x{side}", (16, 64, side, side), along=("height", side)) for side in SIDES),
    ]
