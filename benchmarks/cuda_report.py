"""Lists registers, spills and shared memory of every CUDA kernel, from the ptxas log of the build.

Run `make cuda-report`, or `python benchmarks/cuda_report.py [ptxas.log]` after a build. Exit code 1 if a kernel spills.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Kernel(NamedTuple):
    """One kernel on one architecture. Sizes are in bytes; shared memory excludes dynamic shared memory."""

    name: str
    arch: str
    registers: int
    spilled: int
    stack: int
    shared: int


def parse(log: str) -> list[Kernel]:
    """Parses the kernels of a log of `ptxas -v`. Raises ValueError if one is not understood."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'\n.*\n"
        r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers(.*)"
    )
    kernels = []
    for name, arch, stack, stores, loads, registers, rest in pattern.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        sizes = int(registers), int(stores) + int(loads), int(stack), int(shared[1]) if shared else 0
        kernels.append(Kernel(name, arch, *sizes))
    entries = log.count("Compiling entry function")
    if entries != len(kernels):
        raise ValueError(f"{entries} kernels in the log, {len(kernels)} understood")
    return kernels


def readable(names: list[str]) -> dict[str, str]:
    """Demangles names. Returns mangled name -> kernel<template arguments>."""
    lines = names
    if tool := shutil.which("c++filt"):
        lines = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    short = [re.sub(r"^void |sgmim::|\(anonymous namespace\)::|\(bool\)|\(int\)", "", line) for line in lines]
    return dict(zip(names, (re.sub(r"\(.*", "", line) for line in short), strict=True))


def table(kernels: list[Kernel]) -> str:
    """Formats one line per kernel and architecture."""
    names = readable(sorted({kernel.name for kernel in kernels}))
    lines = [f"{'kernel':<64}{'arch':>8}{'registers':>11}{'spilled':>9}{'stack':>7}{'shared':>8}"]
    for k in sorted(kernels, key=lambda k: (names[k.name], int(re.sub(r"\D", "", k.arch)))):
        lines.append(f"{names[k.name]:<64}{k.arch:>8}{k.registers:>11}{k.spilled:>9}{k.stack:>7}{k.shared:>8}")
    return "\n".join(lines)


def main() -> int:
    log = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "objects" / "ptxas.log"
    if not log.exists():
        print("no CUDA kernels have been compiled in build/; python -m sgmim_fast.env says why", file=sys.stderr)
        return 1
    kernels = parse(log.read_text())
    print(table(kernels))
    spilling = [kernel for kernel in kernels if kernel.spilled]
    print(f"{len(kernels)} kernels, {len(spilling)} that spill registers")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
