"""Two records of the same cases: what became faster, what slower, and what cannot be told from noise."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from gankern.measure.benchmark import OURS, OWN, Contender, Result
from gankern.measure.report.record import Key, Record, key

# A change of less than this is not looked at: runs of one build differ by as much on machines that others use too.
LEAST_CHANGE = 0.1


@dataclass(frozen=True)
class Change:
    """One case and mode in both records."""

    key: Key
    before_ms: float
    after_ms: float
    # How the time relative to the peers of the same run changed: 1.2 is 20 % slower. Without peers, the time itself.
    factor: float
    verdict: str  # "slower", "faster", "no difference"


def compare(before: Record, after: Iterable[Result]) -> list[Change]:
    """The changes of all cases that the record and the later results both hold, in the order of ``after``.

    Machines differ from hour to hour. So gankern's time is taken relative to the peers that ran beside it, and a case
    is slower only if both this and the time itself are: each by more than 10 %, the time with quartiles that do not
    meet.
    """
    old = before.by_key()
    return [_change(old[key(result)], result) for result in after if key(result) in old]


def _change(before: Result, after: Result) -> Change:
    earlier, later = before.contenders[OURS], after.contenders[OURS]
    time = later.ms / earlier.ms
    peers = [
        (before.contenders[name].median, contender.median)
        for name, contender in after.contenders.items()
        if name not in OWN and name in before.contenders
    ]
    shared = [new / old for old, new in peers if old and new]
    factor = time / statistics.median(shared) if shared else time  # the peers' own change is the machine's
    verdict = "no difference"
    if min(factor, time) > 1 + LEAST_CHANGE and _below(earlier, later):
        verdict = "slower"
    elif max(factor, time) < 1 / (1 + LEAST_CHANGE) and _below(later, earlier):
        verdict = "faster"
    return Change(key(after), earlier.ms, later.ms, factor, verdict)


def _below(one: Contender, other: Contender) -> bool:
    """Whether all between one's quartiles took less time than all between the other's."""
    return one.quartiles is not None and other.quartiles is not None and one.quartiles[1] < other.quartiles[0]
