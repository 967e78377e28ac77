"""The Triton kernels without a GPU: the ops' own tests in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the ops' tests run the kernels on the GPU"),
]
HERE = Path(__file__).parent


@pytest.mark.parametrize("op", ["gather_patches", "standardize_structure"])
def test_in_the_interpreter(op):
    """A part of what `TRITON_INTERPRET=1 python -m pytest -k triton-cpu` runs, which takes too long for every day."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton-cpu",
        HERE / f"test_{op}.py",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout.splitlines()[-1]
