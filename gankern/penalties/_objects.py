"""Penalties that remember their options."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor

from gankern.penalties import _functions


class Penalty:
    """A penalty with its options: ``GradientPenalty(weight=10)(critic, real, fake)``. Options of the call go first.

    ``function`` is the function of the package that it calls, and says what the options are. Unknown ones raise a
    TypeError when the object is made.
    """

    function: ClassVar[Any]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls) -> None:
        parameters = inspect.signature(cls.function).parameters.values()
        cls.__signature__ = inspect.Signature([p for p in parameters if p.kind is p.KEYWORD_ONLY])

    def __init__(self, **options: Any) -> None:
        for name in options:
            if name not in self.__signature__.parameters:
                there_are = ", ".join(self.__signature__.parameters)
                raise TypeError(f"{type(self).__name__}: no option is called {name!r}; there are {there_are}")
        self.options = options

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        return type(self).function(*arguments, **{**self.options, **options})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"


class GradientPenalty(Penalty):
    """:func:`gradient_penalty` with its options.

    >>> import torch
    >>> penalty = GradientPenalty(weight=0.1, method="double_backward")
    >>> penalty
    GradientPenalty(weight=0.1, method='double_backward')
    >>> penalty(torch.nn.Linear(3, 1), *torch.randn(2, 4, 3)).shape
    torch.Size([])
    """

    function = staticmethod(_functions.gradient_penalty)


class R1Penalty(Penalty):
    """:func:`r1_penalty` with its options; called with critic and real samples."""

    function = staticmethod(_functions.r1_penalty)


class R2Penalty(Penalty):
    """:func:`r2_penalty` with its options; called with critic and generated samples."""

    function = staticmethod(_functions.r2_penalty)


class ZeroCentered(Penalty):
    """:func:`zero_centered` with its options; called with critic, real and generated samples."""

    function = staticmethod(_functions.zero_centered)


class Lipschitz(Penalty):
    """:func:`lipschitz` with its options; called with critic, real and generated samples."""

    function = staticmethod(_functions.lipschitz)


class Dragan(Penalty):
    """:func:`dragan` with its options; called with critic and real samples."""

    function = staticmethod(_functions.dragan)


class Drift(Penalty):
    """:func:`drift` with its options; called with the critic's outputs."""

    function = staticmethod(_functions.drift)
