"""A record of measurements as `gankern bench --json` writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gankern.measure.benchmark import Contender, Result

Key = tuple[str, str, str, str, str, tuple[str, float] | None]


@dataclass(frozen=True)
class Record:
    path: Path
    environment: dict[str, Any]
    settings: dict[str, Any]
    results: tuple[Result, ...]
    # Of whole steps: milliseconds by step, layers and what they are spent on.
    breakdowns: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def by_key(self) -> dict[Key, Result]:
        return {key(result): result for result in self.results}


def key(result: Result) -> Key:
    """What makes two results comparable."""
    return result.primitive, result.case, result.mode, result.dtype, result.device, result.along


def load(path: Path) -> Record:
    """The record in a file; a ValueError that says what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON file: {error}") from error
    try:
        results = tuple(_result(r) for r in content["results"])
        return Record(path, content["environment"], content["settings"], results, content.get("breakdowns", {}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no record of `gankern bench --json` ({error!r})") from error


def _result(content: dict[str, Any]) -> Result:
    content = {name: value for name, value in content.items() if name != "verdict"}  # it follows from the rest
    contenders = {name: Contender(**values) for name, values in content.pop("contenders").items()}
    along = content.pop("along", None)
    return Result(contenders=contenders, along=along and tuple(along), **content)
