"""Memory of a process on a CPU: what a step frees, the next one finds again.

glibc maps what is large (32 MB and more, whatever it learns) afresh each time and gives it back when it is freed; every
4 KB of it then cost a page fault again in each step (docs/performance.md). A training process asks for the same memory
in each of its steps, so it keeps it. It may come to hold some more than its steps ever need at once: 2% to 4% after a
dozen steps of `proxy_100m` (glibc 2.36), and no more after that.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED = 1 << 30  # bytes of what is still mapped: what is not asked for again in each step
_KEPT = -1  # free bytes at the top of the heap that are not given back: all


def keep_freed() -> bool:
    """From here on what this process frees stays with it; what is free now, as after building a model, is given back.

    False where the C library is not glibc: nothing changes.
    """
    found = set_thresholds(_MAPPED, _KEPT)
    if found:
        ctypes.CDLL(None).malloc_trim(0)
    return found


def set_thresholds(mapped: int, kept: int) -> bool:
    """Map what is of `mapped` bytes or more; give back what is free at the heap's top beyond `kept` (-1: never)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(option, value) == 1 for option, value in ((_M_MMAP_THRESHOLD, mapped), (_M_TRIM_THRESHOLD, kept))
    )
