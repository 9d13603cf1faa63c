"""Looking things up by name, with an error that says what was probably meant."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from gankern.core.arguments import shown

Value = TypeVar("Value")


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
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"unknown {what} {name!r}; {hint}There are: {', '.join(table)}")
