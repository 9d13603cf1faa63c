"""Records of stages, and attempts that survive the loss of their process."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 16 << 20  # of a record
AGAIN = 75  # status of a stage's process that is to be started again


class Record:
    """A JSON file that is rewritten whenever something is added."""

    def __init__(self, out: Path, stage: str, seconds: float = math.inf) -> None:
        self.path = out / f"{stage}.json"
        self.content: dict[str, Any] = {"stage": stage, "results": []}
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that the stage still has."""
        return self.end - time.monotonic()

    def add(self, **row: Any) -> None:
        """Adds a row; the file is complete after each."""
        self.content["results"].append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        """Replaces the file by a new one, so that a process that is killed leaves a whole record."""
        text = json.dumps(self.content, indent=1)
        if len(text) > MAX_BYTES:
            raise RuntimeError(f"{self.path}: the record is larger than {MAX_BYTES} bytes")
        beside = self.path.with_suffix(".part")
        beside.write_text(text)
        beside.replace(self.path)


def attempt(function: Callable[[], Any]) -> Any:
    """What the function returns, or the first line of what it raised: a contender's failure is a result. In a stage's
    process it is kept in the journal, so it must be JSON."""
    return _tried(function) if Journal.current is None else Journal.current.attempt(function)


def _tried(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # a peer may fail in any way, and the others are still worth their figures
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


class Journal:
    """The results of a stage's attempts, in their order, which is the same each time: a file with a line for each
    begin, [number], and each end, [number, number of the next one, result]. After a lost process its successor takes
    the results from here; the attempt that was under way gets the reason, [reason], as its result."""

    current: ClassVar[Journal | None] = None

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, 0
        self.ended: dict[int, tuple[int, Any]] = {}
        self.lost, self.reason = self.under_way(path), ""
        for line in self._lines(path):
            if len(line) == 3:
                self.ended[line[0]] = line[1], line[2]
            elif isinstance(line[0], str):
                self.reason = line[0]

    @staticmethod
    def _lines(path: Path) -> list[Any]:
        found = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # a line that was cut, and the empty ones between
                found.append(json.loads(line))
        return found

    @classmethod
    def under_way(cls, path: Path) -> int | None:
        """The number of the innermost attempt that has not ended."""
        lines = cls._lines(path)
        ended = {line[0] for line in lines if len(line) == 3}
        begun = [line[0] for line in lines if len(line) == 1 and isinstance(line[0], int)]
        return max((number for number in begun if number not in ended), default=None)

    @staticmethod
    def write(path: Path, *line: Any) -> None:
        """Adds a line, even after one that was cut."""
        with path.open("a") as file:
            file.write(f"\n{json.dumps(line)}\n")

    def attempt(self, function: Callable[[], Any]) -> Any:
        number, self.number = self.number, self.number + 1
        if number in self.ended:
            self.number, result = self.ended[number]
            return result
        self.write(self.path, number)
        result = self.reason if number == self.lost else _tried(function)
        self.write(self.path, number, self.number, result)
        if isinstance(result, str) and number != self.lost and _device_is_lost():
            print(f"the device is lost to this process: {result}", flush=True)
            os._exit(AGAIN)
        return result


def _device_is_lost() -> bool:
    """Whether nothing runs on the GPU any more in this process, as after a kernel that wrote out of bounds."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized() and isinstance(_tried(torch.cuda.synchronize), str)


def compiled_before(function: Callable[..., Any], work: Sequence[tuple[Any, ...]], seconds: float) -> dict[str, Any]:
    """As :func:`in_processes`, but only once for a stage that is started again."""
    found = attempt(partial(in_processes, function, work, seconds))
    return found if isinstance(found, dict) else {"errors": [found]}


def in_processes(function: Callable[..., Any], work: Sequence[tuple[Any, ...]], seconds: float) -> dict[str, Any]:
    """Calls the function with each of the arguments in several processes, for at most so many seconds: how long it
    took, how many calls ended, and what failed. It fills caches, so no failure matters."""
    begin, done, errors = time.monotonic(), 0, []
    count = max(1, min(12, (os.cpu_count() or 1) - 2, len(work)))
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        for pending in [pool.apply_async(function, given) for given in work]:
            try:
                pending.get(max(0.0, begin + seconds - time.monotonic()))
                done += 1
            except multiprocessing.TimeoutError:
                continue
            except Exception as error:  # of a process: it will be seen where the same is measured
                errors.append(f"{type(error).__name__}: {str(error)[:200]}")
    return {"seconds": time.monotonic() - begin, "calls": len(work), "done": done, "errors": errors[:10]}
