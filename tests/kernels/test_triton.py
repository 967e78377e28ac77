"""The Triton kernels without a GPU: the tests of the ops in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")
pytestmark = [
    pytest.mark.slow(minutes=1),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the ops' tests run the kernels on the GPU"),
]
TESTS = Path(__file__).parents[1]
# File -> tests: a part of `TRITON_INTERPRET=1 python -m pytest -k triton-cpu`, which takes long.
PARTS = {
    "gather_patches": "",
    "standardize_structure": "",
    "selective_mask": "",
    "masked_patch_embed": "",
    "linear_l1": "and (value or (gradients and ragged))",
    "relational_guidance": "and large_logits",
    "structure_embed": "and (partial or layouts)",
    "norm_attention": "and float32",
    "norm_linear": "",
    "norm_mlp": "",
    "window_attention": "and ((vit and None and dtype2) or grid3-window3-shift3-dtype1 or shift4-dtype1-True)",
    "position_bias": "and not float32",
    "sums": "and column_sums",
    "token_salience": "and not shape7",
    "model_places": "",
    "every_op": "and partial_gradients and (everything or ragged)",
}


@pytest.mark.parametrize("names", [list(PARTS)[i::4] for i in range(4)], ids=" ".join)
def test_in_the_interpreter(names):
    """Each process runs several files, since its start takes seconds."""
    wanted = " or ".join(f"(test_{name}.py {PARTS[name]})" for name in names)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", f"triton-cpu and ({wanted})"]
    files = [next(TESTS.rglob(f"test_{name}.py")) for name in names]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *files], cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert set(names) == set(re.findall(r"/test_(\w+)\.py::.* PASSED", done.stdout))
