"""The C library's allocator, which decides more of CPU training's speed than most kernels do."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Makes glibc keep freed blocks for the next allocation, for the rest of the process.

    By default glibc hands large blocks back to the system when they are freed, so every large result page-faults
    anew: for a tensor of tens of megabytes that costs more than most operations on it. Memory use stays at its peak
    afterwards. Returns whether it took effect: False where the C library is not glibc.

    >>> import gankern
    >>> took_effect = gankern.keep_freed_memory()
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def give_back_freed_memory() -> None:
    """Hands to the system what :func:`keep_freed_memory` keeps; what is allocated next lies in other pages."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def refuse_more_than_there_is() -> int | None:
    """Limits the process to the memory that is available now.

    What needs more then fails with an error of its own, instead of bringing the system to end the whole process.
    Returns the limit in bytes, or None where there is none (not Linux).
    """
    try:
        import resource

        with open("/proc/meminfo") as file:
            (available,) = (int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (ImportError, OSError, ValueError):
        return None
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[5]) * resource.getpagesize()  # what the limit counts and is there already
    limit = own + int(0.95 * available)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return limit


def settings() -> dict[str, str]:
    """What decides allocation speed here: torch's huge-page switch, glibc's variables, the kernel's huge pages."""
    names = (
        "THP_MEM_ALLOC_ENABLE",
        "MALLOC_MMAP_MAX_",
        "MALLOC_TRIM_THRESHOLD_",
        "MALLOC_MMAP_THRESHOLD_",
        "LD_PRELOAD",
    )
    found = {name: os.environ[name] for name in names if name in os.environ}
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            found["transparent_hugepage"] = file.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        pass  # not Linux, or a kernel without them: nothing to report
    return found
