"""What a process does with the memory that tensors on the CPU have freed."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
MOST = 2**31 - 1  # bytes, its largest value


def keep_freed_memory() -> bool:
    """Lets the C library keep freed memory for later tensors, in place of returning it to the system.

    A training step on the CPU allocates and frees the same tensors over and over. glibc maps what is larger than 32 MiB
    anew each time, and the system clears it page by page: 4 to 8 % of a step's time (`benchmarks/NOTES.md`). After this
    call what a step has freed serves the next one, so that the process holds what its largest step needed. It is the
    process's matter, not a library's: importing `sgmim_fast` does not do it; the commands that train on a CPU and the
    benchmarks do.

    Returns:
        Whether there is glibc, which alone knows these settings; without it nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all([mallopt(parameter, MOST) == 1 for parameter in (MMAP_THRESHOLD, TRIM_THRESHOLD)])
