"""`sgmim-fast env` or `python -m sgmim_fast.env`: prints versions, the machine, and why a backend is missing."""

from __future__ import annotations

import argparse
import os
import platform

import torch

from sgmim_fast import _native, backends, tuned


def report() -> dict[str, dict[str, str]]:
    """Collects information for a bug report. Loads the compiled libraries, like the first op.

    Returns:
        {"versions", "machine", "build", "backends"}, each a dict from name to text. A backend's text is "available" or
        "missing: " and the reason.
    """
    names = ("sgmim_fast", "torch", "timm", "triton", "numpy")
    built = _native.build_info() or {"all": {"skipped": "setup.py has not run in this folder"}}
    usable = backends.available()  # loads the library that reports the instruction set, needed by _machine
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: tuned.version(name) or "not installed" for name in names},
        },
        "machine": _machine(),
        "build": {part: ", ".join(f"{k}: {v}" for k, v in facts.items()) for part, facts in built.items()},
        "backends": {name: "available" if ok else f"missing: {reason}" for name, (ok, reason) in usable.items()},
    }


def main() -> None:
    """Prints `report`."""
    for title, facts in report().items():
        print(title)
        for name, text in facts.items():
            print(f"  {name:<16}{text}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`sgmim-fast env` has no arguments."""


def run(args: argparse.Namespace) -> None:
    """Prints `report`."""
    main()


def _machine() -> dict[str, str]:
    ops = torch.ops.sgmim_fast_cpu
    facts = {
        "system": platform.platform(),
        "cpu": tuned.cpu_model(),
        "cores": str(os.cpu_count()),
        "threads": f"{torch.get_num_threads()} used by torch",
        "instruction set": f"{ops.isa() if hasattr(ops, 'isa') else 'none'} (kernels here), "
        f"{torch.backends.cpu.get_cpu_capability()} (torch)",
        "cuda of torch": torch.version.cuda or "none",
        "gpu": "none that torch sees",
    }
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        facts["gpu"] = ", ".join(f"{g.name} (sm_{g.major}{g.minor}, {g.total_memory / 2**30:.0f} GiB)" for g in gpus)
    facts["tuned"] = tuned.describe("cuda" if torch.cuda.is_available() else "cpu")
    return facts


if __name__ == "__main__":
    main()
