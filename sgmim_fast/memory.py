"""Reuses the freed memory of CPU tensors."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
MOST = 2**31 - 1  # bytes, its largest value


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for later tensors instead of returning it to the system.

    Training steps allocate and free the same tensors repeatedly. For allocations above 32 MiB, glibc maps new pages
    each time, which the kernel clears: 4 to 8 % of a step on a CPU (`benchmarks/NOTES.md`). After this call, the
    process keeps the memory of its largest step. As this affects the whole process, importing `sgmim_fast` does not do
    it; the commands that train on a CPU and the benchmarks do.

    Returns:
        True if it succeeded, False without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all([mallopt(parameter, MOST) == 1 for parameter in (MMAP_THRESHOLD, TRIM_THRESHOLD)])
