"""How the C library keeps memory."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # names of mallopt's parameters, as in malloc.h


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for what comes next, until the process ends.

    It would give large blocks back to the system, which clears every page anew when they are asked for again: a part
    of each step on a CPU. Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(MMAP_MAX, 0)
