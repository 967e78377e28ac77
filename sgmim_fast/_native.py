"""Loads the two compiled libraries, each once, and stores the reason if a library cannot be loaded.

`_C` contains the C++ ops (`torch.ops.sgmim_fast_cpu`), `_C_cuda` the CUDA ops (`torch.ops.sgmim_fast_cuda`). setup.py
builds them and writes to `_build_info.json` which of them it skipped and why.

Environment: `SGMIM_FAST_LIBRARY=path` loads another CPU library instead of `_C`, e.g. one built with sanitizers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_loaded: dict[str, tuple[bool, str]] = {}
_errors: dict[str, Exception] = {}


def build_info() -> dict[str, dict[str, str]]:
    """Returns for "cpu" and "cuda" how setup.py built the library, or the reason under "skipped"; {} if it did not run
    in this folder."""
    path = _HERE / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def load_cpu() -> tuple[bool, str]:
    """Loads the C++ ops at the first call. Returns (True, "") or (False, the reason)."""
    if "cpu" not in _loaded:
        _loaded["cpu"] = _load("cpu", os.environ.get("SGMIM_FAST_LIBRARY") or _find("_C"))
    return _loaded["cpu"]


def load_cuda() -> tuple[bool, str]:
    """Loads the CUDA ops at the first call. Needs a torch with CUDA, but no GPU. Returns the same as `load_cpu`."""
    if "cuda" not in _loaded:
        _loaded["cuda"] = _cuda_mismatch() or _load("cuda", _find("_C_cuda"))
    return _loaded["cuda"]


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for architectures such as "8.0;9.0+PTX" runs on a GPU of this compute capability."""
    for name in architectures.split(";"):
        built, _, ptx = name.partition("+")
        own = built[-1] in "af"  # code for exactly this architecture (a) or its family (f)
        major, minor = map(int, built.rstrip("af").split("."))
        if built.endswith("a"):
            fits = (major, minor) == capability
        else:  # machine code runs on the same major version, PTX on all newer GPUs
            fits = (major, minor) <= capability and (major == capability[0] or (bool(ptx) and not own))
        if fits:
            return True
    return False


def uncovered_gpu() -> str:
    """Returns the reason why the CUDA library does not run on the current GPU; "" if it does."""
    built, capability = build_info().get("cuda", {}).get("architectures", ""), torch.cuda.get_device_capability()
    if not built or covers(built, capability):
        return ""
    number = ".".join(map(str, capability))
    return (
        f"the GPU has compute capability {number}, the CUDA library is built for {built}: "
        f"install sgmim_fast again with TORCH_CUDA_ARCH_LIST={number}"
    )


def load_error(part: str) -> Exception | None:
    """Returns the exception that loading "cpu" or "cuda" raised, for `raise ... from`; None if there was none."""
    return _errors.get(part)


def _find(name: str) -> str | None:
    """Returns the path of a library, whose suffix depends on the platform (`.abi3.so` on Linux); None if missing."""
    return next((str(path) for path in sorted(_HERE.glob(f"{name}.*so"))), None)


def _cuda_mismatch() -> tuple[bool, str] | None:
    built, running = build_info().get("cuda", {}).get("toolkit", ""), torch.version.cuda
    if running is None:
        return False, "this torch is built without CUDA"
    if built and built.partition(".")[0] != running.partition(".")[0]:
        return False, f"the CUDA library is built with CUDA {built}, torch with {running}: install sgmim_fast again"
    return None


def _load(part: str, path: str | None) -> tuple[bool, str]:
    if path is None:
        facts = build_info().get(part, {"skipped": "nothing has been built here: pip install -e ."})
        return False, facts.get("skipped") or "the library that setup.py built is gone: install sgmim_fast again"
    try:
        torch.ops.load_library(path)
    except Exception as error:  # OSError from the loader, RuntimeError from a registration
        _errors[part] = error
        return False, f"{path} could not be loaded: {error.__cause__ or error}"  # the cause has the loader's message
    return True, ""
