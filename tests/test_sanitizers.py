"""The C++ ops under sanitizers: no access out of bounds, and no data races between several threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(minutes=3)
ROOT = Path(__file__).parents[1]
TESTS = sorted(path for path in ROOT.glob("tests/ops/test_*.py") if (ROOT / f"csrc/cpu/{path.stem[5:]}.cpp").exists())
TESTS.append(ROOT / "tests" / "ops" / "test_every_op.py")


def build(folder: Path, sanitizers: str) -> Path:
    """Builds the CPU library with these sanitizers (the values of SGMIM_FAST_SANITIZE)."""
    if not shutil.which("g++"):
        pytest.skip("needs g++, whose sanitizers' libraries are preloaded")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    environment = os.environ | {"SGMIM_FAST_SANITIZE": sanitizers, "CXX": "g++"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "sgmim_fast" / "_C.abi3.so"


def runtime(name: str) -> str:
    """Returns the path of a sanitizer's runtime library."""
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"g++ has no {name}")
    return path


def test_ops(tmp_path):
    """The ops' tests pass under AddressSanitizer and UBSan."""
    library = build(tmp_path, "1")
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",  # the interpreter leaks
        "UBSAN_OPTIONS": "halt_on_error=1",
        "SGMIM_FAST_LIBRARY": str(library),
        "SGMIM_FAST_EXAMPLES": "10",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # a thread that spins takes its core from what else runs
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    # -s: a captured stream would lose the report. Without opcheck, which traces: PyTorch's own code, and slow here.
    kernels = "(cpu-cpu or wgrad or test_linear.py) and not opcheck and not lower_instruction_sets"
    command = [sys.executable, "-m", "pytest", "-qxs", "-p", "no:cacheprovider", "-k", kernels]
    done = subprocess.run([*command, *TESTS], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        output = done.stdout + done.stderr
        report = re.search(r".*(ERROR: AddressSanitizer|: runtime error:)", output)
        pytest.fail(output[report.start() :][:4000] if report else output[-4000:], pytrace=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100, done.stdout[-500:]


def test_threads(tmp_path):
    """Three Python threads train at once, on their own backends, under ThreadSanitizer. A real race is detected."""
    environment = os.environ | {
        "LD_PRELOAD": runtime("libtsan.so"),
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",  # skips the interpreter and torch
        "SGMIM_FAST_LIBRARY": str(build(tmp_path, "thread")),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    # ThreadSanitizer needs a fixed address space layout, since it is older than the layout of new kernels.
    command = ["setarch", os.uname().machine, "-R", sys.executable, str(ROOT / "tests" / "training_threads.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "setarch: failed to set personality" in done.stderr:
        pytest.skip("this machine does not let addresses be chosen")
    assert done.returncode == 0 and "ThreadSanitizer" not in done.stderr, (done.stdout + done.stderr)[-4000:]
    done = subprocess.run([*command, "race"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
