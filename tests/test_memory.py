"""`keep_freed_memory`: freed memory is not mapped again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from sgmim_fast import keep_freed_memory

FAULTS = """
import resource, sys, torch
from sgmim_fast import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):  # what is freed is a little too small for the next, aligned one, until two of them meet
    torch.ones(1 << 24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc")
def test_freed_memory_is_used_again():
    """Runs in a process of its own, since the setting cannot be undone."""
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("give back", "keep")
    )
    assert kept < 100 and given_back > 100  # 16384 page faults each time, or 32 with huge pages


def test_without_glibc(monkeypatch):
    import ctypes

    class Other:
        def __init__(self, name):
            pass

    monkeypatch.setattr(ctypes, "CDLL", Other)
    assert not keep_freed_memory()
