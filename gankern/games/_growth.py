"""When a growing model grows: each resolution is trained, then the next one fades in (Karras 2018, §A.1)."""


def stage(step: int, phase: int, size: int) -> tuple[int, float]:
    """The resolution, and the weight of its newest block, of a step (from 0), in phases of so many steps.

    4×4 is trained for one phase; every further resolution up to ``size`` fades in over one and is trained for one.

    >>> [stage(step, phase=2, size=16) for step in (0, 2, 3, 4, 6, 7, 99)]
    [(4, 1.0), (8, 0.0), (8, 0.5), (8, 1.0), (16, 0.0), (16, 0.5), (16, 1.0)]
    """
    number, within = divmod(step, phase)
    resolution = 4 << (number + 1) // 2
    if resolution > size:
        return size, 1.0
    return resolution, within / phase if number % 2 else 1.0
