"""The Triton kernels without running them: number of launches, compiled code, and the tiles that `tune` tries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the Triton backend needs triton")

from sgmim_fast import backends  # noqa: E402
from sgmim_fast.kernels import configs, launch, primitives  # noqa: E402 - they import triton
from sgmim_fast.ops import target  # noqa: E402
from sgmim_fast.ops.primitives import Request  # noqa: E402

ROOT = Path(__file__).parents[2]
not_interpreted = pytest.mark.skipif(launch.INTERPRETED, reason="with TRITON_INTERPRET=1 there is nothing to compile")


@pytest.mark.parametrize(("gemms", "most"), [("triton", 48), ("library", 86)])
def test_launches_of_the_branch(tmp_path, gemms, most):
    """Records all launches of forward and backward in bfloat16. The library's gemms, which are faster, are one launch
    each. Casts of weights, two launches for all, are included."""
    path = tmp_path / "cost.json"
    options = ["--dtype", "bfloat16", "--batch", "2", "--json", path]
    command = [sys.executable, ROOT / "benchmarks" / "cost_model.py", *options]
    environment = os.environ | {"SGMIM_FAST_TRITON_PRODUCTS": gemms}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["encoder"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == {"swin_base", "vit_base"}
    for row in rows.values():
        assert 0 < row["fused"]["launches"] <= most
        assert row["fused"]["us"] < row["visible"]["us"] < row["dense"]["us"]


def test_the_cost_model_knows_an_h200():
    """Predictions for the library's gemms are within a tenth of those measured on an H200."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import cost_model
    finally:
        sys.path.pop(0)
    measured = ROOT / "benchmarks" / "results" / "gpu-nvidia-h200-kernels.json"
    assert 1 <= cost_model.compare(measured, cost_model.GPUS["h200"]) < 1.1


@not_interpreted
@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100", "h200"])
def test_cost_of_a_step(gpu, tmp_path):
    """Every launch of a step has a kernel's name and a roofline below its time. Acceleration makes it faster."""
    path = tmp_path / "cost.json"
    options = ["--gpu", gpu, "--step", "--encoder", "vit_base", "--dtype", "bfloat16", "--batch", "8", "--json", path]
    command = [sys.executable, ROOT / "benchmarks" / "cost_model.py", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(path.read_text())["rows"]
    assert row["accelerated step"]["us"] < row["eager step"]["us"]
    for kernel in row["accelerated step"]["kernels"].values():
        assert 0 <= kernel["roofline us"] < kernel["us"]


def test_caught_launches_do_not_run():
    found = []
    with target.caught(lambda *call: found.append(call), target.Target("sm_90", 132)):
        launch.launch("kernel", (0,))
        launch.launch("kernel", (2, 3), 1, BLOCK=4)
        assert target.target(torch.device("cpu")) == ("sm_90", 132)
    assert found == [("kernel", (2, 3), (1,), {"BLOCK": 4})]


TF32_SETTINGS = {
    "allow": "torch.backends.cuda.matmul.allow_tf32 = True",
    "forbid": "torch.backends.cuda.matmul.allow_tf32 = False",
    "high": "torch.set_float32_matmul_precision('high')",
    "highest": "torch.set_float32_matmul_precision('highest')",
    "tf32": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "ieee": "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "all tf32": "torch.backends.fp32_precision = 'tf32'",
    "all ieee": "torch.backends.fp32_precision = 'ieee'",
}


def test_tf32_follows_the_last_setting_of_either_api():
    """Tests every order of two settings, each in its own process. As in PyTorch, a setting for gemms takes precedence
    over one for all backends."""
    script = f"""
import os, sys, torch
from sgmim_fast.kernels.launch import tf32
settings = {TF32_SETTINGS!r}
assert tf32() == "ieee"
for first in settings:
    for second in settings:
        if os.fork() == 0:
            exec(settings[first]); exec(settings[second])
            own = [name for name in (first, second) if not name.startswith("all ")]
            last = own[-1] if own else second
            wanted = "tf32" if last in ("allow", "high", "tf32", "all tf32") else "ieee"
            print(first, "|", second, "|", tf32(), wanted, flush=True)
            os._exit(tf32() != wanted)
        assert os.wait()[1] == 0, (first, second)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(TF32_SETTINGS) ** 2


@pytest.mark.parametrize("size", [2, 4])
def test_tiles_that_are_tried(size):
    """Tiles differ, fit the smallest of the architectures, and leave each thread enough work."""
    tiles = configs.tiles(size)
    assert len(set(tiles)) == len(tiles) >= 4
    for m, n, k, warps, stages in tiles:
        assert 16 <= m * n // (32 * warps) <= 128
        assert stages * (m + n) * k * size <= configs.SHARED[80]


def test_a_variant_sends_gemms_through_its_tile():
    """All other gemms use the library, as they do before and after."""
    args = torch.zeros(64, 32), torch.zeros(96, 32), torch.zeros(96), None, None, None, None, 1e-5, None
    launched = []

    def tiles(way: str) -> list[tuple[int, ...]]:
        launched.clear()
        with target.caught(lambda *call: launched.append(call[3]), target.Target("sm_90", 132)):
            backends.implementation("norm_linear", "forward", way)(*args)
        names = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"
        return [tuple(options[name] for name in names) for options in launched]

    (variant, *_) = primitives.variants(Request((torch.float32,), (32,)))
    assert tiles("triton") == tiles("triton") == []
    assert tiles(f"triton:{variant}") == [configs.tiles(4)[0]]
    assert tiles("triton") == []
    assert primitives.variants(Request((torch.float32,), window=(36, 32))) == []  # no gemm is ours


TABLE = Path(__file__).with_name("kernel_table.json")


def worse(table: dict, new: dict) -> list[str]:
    """Returns what a table of kernels lost compared with an older one: half of the blocks per multiprocessor, a kind of
    instruction, or registers to the stack. For another Triton, which has another assembler, only kinds of instructions
    count."""
    lost = []
    same = table["triton"].split(".")[:2] == new["triton"].split(".")[:2]
    for name, old in table["rows"].items():
        row = new["rows"].get(name)
        if row is None:
            lost.append(f"{name} is gone")
            continue
        for kind in set(old) - {"blocks", "stack"}:
            if row[kind] < old[kind]:
                lost.append(f"{name} has no {kind} any more")
        if same and 2 * row["blocks"] <= old["blocks"]:
            lost.append(f"{name}: {row['blocks']} blocks, {old['blocks']} before")
        if same and row["stack"] > old["stack"] + 32:
            lost.append(f"{name}: {row['stack']} bytes of stack, {old['stack']} before")
    return lost + [f"{name} is new" for name in new["rows"].keys() - table["rows"].keys()]


@not_interpreted
@pytest.mark.slow(minutes=2)
def test_kernels_compile_within_their_limits_and_lose_nothing(tmp_path):
    """Checks spills and shared memory against `configs`, and everything else against `kernel_table.json`, for one
    architecture: all three take six minutes on one core. To update the table after an intended change:
    python -m sgmim_fast.kernels.compile --json tests/kernels/kernel_table.json
    """
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "sgmim_fast.kernels.compile", "--arch", "90", "--json", found]
    done = subprocess.run(command, capture_output=True, text=True)
    *lines, summary = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join(line for line in lines if "more than" in line or "FAILED" in line)
    assert len(lines) > 100 and ", 0 failed or over their limits" in summary
    table = json.loads(TABLE.read_text())
    table["rows"] = {name: row for name, row in table["rows"].items() if name.startswith("sm_90 ")}
    assert not (lost := worse(table, json.loads(found.read_text()))), "\n".join(lost)


def test_what_a_kernel_loses_is_seen():
    old = {"blocks": 4, "stack": 0, "wgmma": 1, "tcgen05": 0, "mma": 0, "bulk": 0}
    table = {"triton": "3.8.0", "rows": {"sm_90 k": old}}

    def lost(triton="3.8.1", **changes):
        return worse(table, {"triton": triton, "rows": {"sm_90 k": old | changes}})

    assert not lost() and not lost(blocks=3) and not lost(stack=32) and not lost(bulk=1)
    assert lost(blocks=2) == ["sm_90 k: 2 blocks, 4 before"] and not lost("3.9.0", blocks=2)
    assert lost("3.9.0", wgmma=0, mma=1) == ["sm_90 k has no wgmma any more"]
    assert lost(stack=40) == ["sm_90 k: 40 bytes of stack, 0 before"]
    assert worse(table, {"triton": "3.8.0", "rows": {}}) == ["sm_90 k is gone"]


def test_the_table_has_what_hopper_is_for():
    """Gemms with large tiles use wgmma on Hopper, and mma on an A100."""
    rows = json.loads(TABLE.read_text())["rows"]
    for architecture, kind in (("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05")):
        large = [row for name, row in rows.items() if name.startswith(f"{architecture} gemm._gemm_kernel 128x")]
        assert large and all(row[kind] for row in large)


@not_interpreted
def test_blocks_of_a_multiprocessor():
    """Registers, shared memory and threads limit the number, up to 32, as in NVIDIA's occupancy calculator."""
    from sgmim_fast.kernels import compile as ahead

    def blocks(registers, shared, warps, capability=90):
        launch = ahead.Launch(None, (), (), (), (("num_warps", warps),))
        return ahead.blocks_per_multiprocessor({"registers": registers, "shared": shared}, launch, capability)

    assert blocks(255, 0, 8) == 1 and blocks(128, 0, 8) == 2 and blocks(64, 0, 4) == 8
    assert blocks(32, 100 << 10, 4) == 2 and blocks(32, 100 << 10, 4, 80) == 1 and blocks(32, 40 << 10, 4, 80) == 4
    assert blocks(16, 0, 8) == 8 and blocks(16, 0, 1) == 32 and blocks(16, 0, 8, 86) == 6


@not_interpreted
def test_limits_are_noticed(monkeypatch):
    """The report fails for a kernel that exceeds its limit."""
    from sgmim_fast.kernels import compile as ahead

    monkeypatch.setattr(ahead, "SHAPES", ahead.SHAPES[:1])
    found = next(x for x in ahead.launches(["bfloat16"], 90) if x.kernel.fn.__name__ == "_gemm_kernel")
    for facts, since, good in (
        ({"registers": 255, "stack": 0, "shared": 1024}, (0, 0), True),
        ({"registers": 255, "stack": 4096, "shared": 1024}, (0, 0), False),
        ({"registers": 255, "stack": 4096, "shared": 1024}, (99, 0), True),  # Triton is older than that of the table
        ({"registers": 32, "stack": 0, "shared": 1 << 20}, (99, 0), False),
    ):
        monkeypatch.setattr(ahead.configs, "STACK_SINCE", since)
        facts |= dict.fromkeys(("blocks", *ahead.INSTRUCTIONS), 1)
        monkeypatch.setattr(ahead, "compile_for", lambda *_, facts=facts: facts)
        assert ahead.report(found, 90)[0] == good
