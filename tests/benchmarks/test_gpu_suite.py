"""The rehearsal of `benchmarks/gpu_suite.py`: all of its steps on a simulated device (`fake_gpu`), once to the end, and
once killed half-way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sgmim_fast import backends

ROOT = Path(__file__).parents[2]
STEPS = ("swin_base", "vit_base", "swinv2_base", "compiled", "max-autotune")
pytestmark = [
    pytest.mark.slow(minutes=2),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run it on"),
    pytest.mark.skipif(backends.triton_interpreted(), reason="its Triton kernels' launches are caught"),
    pytest.mark.skipif(not backends.available()["cpu"][0], reason=backends.available()["cpu"][1]),
]


@pytest.fixture
def start(tmp_path):
    """Starts the suite. Tests are only collected, and compute-sanitizer is a script that runs its command."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift 2; done\nexec "$@"\n')
    tool.chmod(0o755)
    folders = [ROOT / "tests" / "fake_gpu", ROOT / "tests", ROOT / "benchmarks"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "PATH": os.pathsep.join([str(tool.parent), os.environ["PATH"]]),
        "PYTEST_ADDOPTS": "--collect-only",
        "TORCHDYNAMO_DISABLE": "1",
        "TMPDIR": str(tmp_path),  # for caches of compilers
    }
    command = [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", "--no-build", "--batch", "2", "--seconds=3000"]
    log = (tmp_path / "log").open("w")
    return lambda **variables: subprocess.Popen(
        [*command, "--out", tmp_path / "out"], env=environment | variables, stdout=log, stderr=subprocess.STDOUT
    )


def test_to_its_end(start, tmp_path):
    """Every step runs, and every file exists with its rows. The results of simulated launches are flagged as wrong."""
    start().wait()
    out, text = tmp_path / "out", (tmp_path / "log").read_text()
    assert "Traceback" not in text.splitlines()[-1] and (out / "gpu-fake-h200-suite.json").exists(), text[-3000:]
    suite = json.loads((out / "gpu-fake-h200-suite.json").read_text())
    results = {step["step"]: step["result"] for step in suite["steps"]}
    logs = {step: (out / f"gpu-fake-h200-{step}.log").read_text()[-2000:] for step in results}
    garbage = {"warm-guidance", "guidance", "ops", "windows"}  # from simulated launches
    for step, result in results.items():
        assert result == ("exit code 1" if step in garbage else "passed"), (step, result, logs[step])
    assert suite["CUDA kernels trusted"] is True and suite["launches"] and suite["gates"]
    for step in STEPS:
        rows = json.loads((out / f"gpu-fake-h200-step-{step}.json").read_text())["rows"]
        assert rows and not any(row["wrong"] for row in rows) and all(row["host_ms"] > 0 for row in rows)
        assert {"dense", "accelerated-captured"} <= {row["name"] for row in rows}
    rows = json.loads((out / "gpu-fake-h200.json").read_text())["rows"]
    wrong = {row["name"]: bool(row["wrong"]) for row in rows if row["encoder"] == "swin_base"}
    assert wrong["fused-triton"] and not wrong["visible"]
    rows = json.loads((out / "gpu-fake-h200-ops.json").read_text())["rows"]
    assert {row["op"] for row in rows} == set(backends.MODULES)
    assert {"flex", "triton", "torch"} == {row["backend"] for row in rows if row["op"] == "window_attention"}
    rows = json.loads((out / "gpu-fake-h200-windows.json").read_text())["rows"]
    assert {(row["encoder"], row["op"]) for row in rows} == {
        (e, "window_attention") for e in ("swinv2_base", "swin_base")
    }
    assert json.loads((out / "gpu-fake-h200-tuned.json").read_text())["rows"]
    assert json.loads((out / "gpu-fake-h200-model.json").read_text())["rows"]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_killed_half_way(start, tmp_path, by):
    """The suite is killed as soon as a shape has rows. They and those of earlier steps are complete on disk. Steps that
    write no rows are omitted here, since the test above has them."""
    suite, out = start(FAKE_GPU_ONLY="--json"), tmp_path / "out"
    rows = out / "gpu-fake-h200-step-vit_base.json"
    end = time.monotonic() + 1500
    while not rows.exists():
        assert suite.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.05)
    suite.send_signal(by)
    assert suite.wait() in (-signal.SIGKILL, 143)
    assert (
        json.loads(rows.read_text())["rows"]
        and json.loads((out / rows.name.replace("vit", "swin")).read_text())["rows"]
    )
    found = json.loads((out / "gpu-fake-h200-suite.json").read_text())
    assert [s["step"] for s in found["steps"]][-1] == "step-swin_base" and found["gates"]
