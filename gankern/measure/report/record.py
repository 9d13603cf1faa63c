"""A record of measurements as `gankern bench --json` writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, ItemsView
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gankern.core.files import UnusableFile
from gankern.measure.benchmark import OURS, Contender, Result
from gankern.measure.host import HostCost

Key = tuple[str, str, str, str, str, tuple[str, float] | None]


@dataclass(frozen=True)
class Record:
    path: Path
    environment: dict[str, Any]
    settings: dict[str, Any]
    results: tuple[Result, ...]
    # Of whole steps: milliseconds by step, layers and what they are spent on.
    breakdowns: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    host: tuple[HostCost, ...] = ()  # of `gankern bench --host`

    def by_key(self) -> dict[Key, Result]:
        return {key(result): result for result in self.results}


def key(result: Result) -> Key:
    """What makes two results comparable."""
    return result.primitive, result.case, result.mode, result.dtype, result.device, result.along


def load(path: Path) -> Record:
    """The record in a file; an ``UnusableFile``, which is a ValueError, that says what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableFile(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnusableFile(f"{path}: is no JSON file: {error}") from error
    try:
        _check(content, "the record", _RECORD)
        _check(content["settings"], "settings", _SETTINGS)
        results = tuple(_result(r, f"results[{i}]") for i, r in enumerate(content["results"]))
        breakdowns = content.get("breakdowns", {})
        _check_breakdowns(breakdowns)
        host = tuple(_host(cost, f"host[{i}]") for i, cost in enumerate(content.get("host") or ()))
    except ValueError as error:
        raise UnusableFile(f"{path}: is no record of `gankern bench --json`: {error}") from error
    return Record(path, content["environment"], content["settings"], results, breakdowns, host)


def _number(value: Any, least: float = -math.inf) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and value >= least  # False of nan too


def _positive(value: Any) -> bool:
    return _number(value, least=1e-300)


def _count(value: Any) -> bool:
    return _number(value, least=0)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _line(value: Any) -> bool:
    """A name: it stands in tables, in pictures and in the names of files."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= 300


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_positive, value)) and value[0] <= value[1]


def _along(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _line(value[0]) and _positive(value[1])


# What a record holds, by name: what its value must be, in words, and how that is seen; and whether it may be null.
Table = dict[str, tuple[str, Callable[[Any], bool], bool]]
_RECORD: Table = {
    "environment": ("a dictionary", lambda value: isinstance(value, dict), False),
    "settings": ("a dictionary", lambda value: isinstance(value, dict), False),
    "results": ("a list", lambda value: isinstance(value, list), False),
    "host": ("a list", lambda value: isinstance(value, list), True),
}
_SETTINGS: Table = {name: ("a positive number", _positive, True) for name in ("copy_bandwidth", "multiply_add_rate")}
_RESULT: Table = {
    **dict.fromkeys(("primitive", "case", "mode", "dtype", "device", "implementation"), ("a name", _line, False)),
    "contenders": ("a dictionary", lambda value: isinstance(value, dict), False),
    "peer": ("a name", _line, True),
    "ratio": ("a positive number", _positive, True),
    "interval": ("two positive numbers", _pair, True),
    "bytes": ("a number", _count, True),
    "operations": ("a number", _count, True),
    "limit": ("a number", _count, True),
    "along": ("a name and a number", _along, True),
}
_CONTENDER: Table = {
    "median": ("a positive number", _positive, True),
    "quartiles": ("two positive numbers", _pair, True),
    "peak_bytes": ("a number", _number, True),
    "failure": ("a text", _text, True),
}
_HOST: dict[str, tuple[str, Callable[[Any], bool], bool]] = {
    **dict.fromkeys(("primitive", "case", "mode", "device"), ("a name", _line, False)),
    "implementation": ("a name", _line, True),
    "microseconds": ("a dictionary", lambda value: isinstance(value, dict), False),
}


def _check(content: Any, where: str, table: Table) -> None:
    """Raises a ValueError unless a dictionary has what a table says."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} is a {type(content).__name__}, not a dictionary")
    for name, (wanted, is_right, may_be_null) in table.items():
        value = content.get(name)
        if not (is_right(value) or (may_be_null and value is None)):
            problem = f"must be {wanted}" if name in content else "is missing"
            raise ValueError(f"{name} of {where} {problem}")


def _result(content: Any, where: str) -> Result:
    _check(content, where, _RESULT)
    # The verdict follows from the rest.
    if unknown := content.keys() - _RESULT.keys() - {"verdict"}:
        raise ValueError(f"{where} has {', '.join(sorted(unknown))[:100]}, which no result has")
    contenders = {}
    for name, values in content["contenders"].items():
        if not _line(name):
            raise ValueError(f"a contender of {where} has no name")
        _check(values, f"{name} in {where}", _CONTENDER)
        if unknown := values.keys() - _CONTENDER.keys():
            raise ValueError(f"{name} in {where} has {', '.join(sorted(unknown))[:100]}, which no contender has")
        if (values.get("median") is None) != (values.get("quartiles") is None):
            raise ValueError(f"{name} in {where} has a median or quartiles, but not both")
        contenders[name] = Contender(**values)
    if OURS not in contenders or contenders[OURS].median is None:
        raise ValueError(f"{where} has no time of {OURS}")
    peer, along = content.get("peer"), content.get("along")
    if peer is not None and (peer not in contenders or contenders[peer].median is None):
        raise ValueError(f"{where} has no time of its peer {peer}")
    if len({value is None for value in (peer, content.get("ratio"), content.get("interval"))}) != 1:
        raise ValueError(f"{where} must have peer, ratio and interval, or none of them")
    rest = {name: value for name, value in content.items() if name in _RESULT}
    return Result(**rest | {"contenders": contenders, "along": along and tuple(along)})


def _host(content: Any, where: str) -> HostCost:
    _check(content, where, _HOST)
    if unknown := content.keys() - _HOST.keys():
        raise ValueError(f"{where} has {', '.join(sorted(unknown))[:100]}, which no cost of a call has")
    for name, microseconds in _items(content["microseconds"], f"microseconds of {where}"):
        if not _positive(microseconds):
            raise ValueError(f"{name} in microseconds of {where} must be a positive number")
    if OURS not in content["microseconds"] or len(content["microseconds"]) < 2:
        raise ValueError(f"{where} must have the times of {OURS} and of a peer")
    return HostCost(**content)


def _check_breakdowns(breakdowns: Any) -> None:
    """By step and layers the milliseconds of each kind, of all the same kinds."""
    kinds = None
    for step, layers in _items(breakdowns, "breakdowns"):
        for name, spent in _items(layers, f"breakdowns of {step}"):
            for kind, milliseconds in _items(spent, f"breakdowns of {step}, {name}"):
                if not _count(milliseconds):
                    raise ValueError(f"{kind} in breakdowns of {step}, {name} must be a number")
            if (kinds := kinds or spent.keys()) != spent.keys() or not spent:
                raise ValueError(f"breakdowns of {step}, {name} are of other kinds than the first one's")


def _items(value: Any, where: str) -> ItemsView[str, Any]:
    if not isinstance(value, dict) or not all(map(_line, value)):
        raise ValueError(f"{where} must be a dictionary of names")
    return value.items()
