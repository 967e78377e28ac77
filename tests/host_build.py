"""Compiles the C++ sources of the tests into build/tests with ninja, which recompiles only changed sources."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
NINJA = """\
flags = -std=c++17 -O1 -Wall -Wextra -Werror
rule compile
  command = c++ $flags $more -MD -MF $out.d $in -o $out
  depfile = $out.d
  deps = gcc
build {module}: compile {tests}/cuda_bodies.cpp
  more = -shared -fPIC -fvisibility=hidden {include} -isystem {pybind11} -isystem {python}
build cuda_races: compile {tests}/cuda_races.cpp
  more = -g -pthread -fsanitize=thread {include}
"""


def build(target: str) -> Path:
    """Compiles "cuda_bodies", a Python module, or "cuda_races", a program. Skips the test if a tool is missing."""
    pybind11 = pytest.importorskip("pybind11")
    if not (shutil.which("c++") and shutil.which("ninja")):
        pytest.skip("needs c++ and ninja")
    folder = ROOT / "build" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    module = f"cuda_bodies{sysconfig.get_config_var('EXT_SUFFIX')}"
    rules = NINJA.format(
        module=module,
        tests=ROOT / "tests",
        include=f"-I{ROOT / 'csrc'}",
        pybind11=pybind11.get_include(),
        python=sysconfig.get_path("include"),
    )
    wanted = module if target == "cuda_bodies" else target
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in parallel
        if not (folder / "build.ninja").exists() or (folder / "build.ninja").read_text() != rules:
            (folder / "build.ninja").write_text(rules)
        done = subprocess.run(["ninja", "-C", folder, wanted], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return folder / wanted


def load_bodies() -> ModuleType:
    """Compiles and imports the module of cuda_bodies.cpp."""
    spec = importlib.util.spec_from_file_location("cuda_bodies", build("cuda_bodies"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
