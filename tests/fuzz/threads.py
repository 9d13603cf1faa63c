"""Cases of other families beside each other, each in a thread of its own: as right as alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import penalties
import primitives
from drawing import Draw, Problem


def case(seed: int) -> Problem:
    draw = Draw(seed)
    families = [draw.choice((primitives, primitives, penalties)) for _ in range(4)]
    # A critic draws its weights and its dropout with torch's one generator, which threads share: without those.
    families = [primitives if family is penalties and i else family for i, family in enumerate(families)]
    with ThreadPoolExecutor(4) as pool:
        problems = list(pool.map(lambda pair: pair[0].case(pair[1]), [(f, draw.randrange(10**6)) for f in families]))
    return next((p for p in problems if p), None)
