"""The C++ kernels compile for AArch64, for which there is only the baseline: 16-byte vectors, no intrinsics."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
COMPILER = "aarch64-linux-gnu-g++"  # Debian's package g++-aarch64-linux-gnu
# As in setup.py. Without this macro, torch's headers declare other functions.
VERSION = re.search(r"-DTORCH_TARGET_VERSION=\w+", (ROOT / "setup.py").read_text())[0]


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"needs {COMPILER}")
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/cpu/*.cpp")), ids=lambda path: path.stem)
def test_it_compiles(source, tmp_path):
    include = ["-I", ROOT / "csrc", "-isystem", Path(torch.__file__).parent / "include"]
    flags = ["-std=c++17", VERSION, "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    command = [COMPILER, *flags, *include, "-c", source, "-o", tmp_path / "object.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
