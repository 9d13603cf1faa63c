"""Looking things up by name, with an error that says what was probably meant."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from gankern.core.arguments import shown

Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable[..., Any])


def look_up(table: Mapping[str, Value], name: str, what: str) -> Value:
    """Return ``table[name]``, or raise a ValueError that offers the nearest names (a TypeError where it is no name).

    >>> look_up({"hinge": 1, "wasserstein": 2}, "hing", "loss")
    Traceback (most recent call last):
    ValueError: unknown loss 'hing'; did you mean hinge? There are: hinge, wasserstein
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a name, got {shown(name)}. There are: {', '.join(table)}")
    if name in table:
        return table[name]
    near = get_close_matches(name.lower().replace("-", "_"), table, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(f"unknown {what} {name!r}{hint} There are: {', '.join(table)}")


def with_options_of(other: Callable[..., Any], **defaults: Any) -> Callable[[Function], Function]:
    """Makes a function that hands its ``**options`` to another one say by its signature which they are: those of the
    other's parameters with a default that the function does not have itself. ``defaults`` are the ones that differ.

    >>> def scaled(x, *, factor=2.0, offset=0.0): ...
    >>> @with_options_of(scaled, offset=1.0)
    ... def halved(x, **options): ...
    >>> inspect.signature(halved)
    <Signature (x, *, factor=2.0, offset=1.0)>
    """

    def give(function: Function) -> Function:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        theirs = [
            p.replace(kind=p.KEYWORD_ONLY, default=defaults.get(p.name, p.default))
            for p in inspect.signature(other).parameters.values()
            if p.name not in names and p.default is not p.empty
        ]
        function.__signature__ = inspect.signature(function).replace(parameters=[*own, *theirs])  # type: ignore[attr-defined]
        return function

    return give
