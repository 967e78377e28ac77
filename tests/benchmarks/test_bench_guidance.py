"""The output of benchmarks/bench_guidance.py for a small shape, and its errors for paths at which it could not draw."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_guidance
from tools import branch, measure
from tools.kernel_classes import sentence as sentence_of
from tools.shapes import Shape

pytest.importorskip("matplotlib")

SMALL = Shape("small", width=32, stride=16, patch=4, image=32, unit=16)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_guidance, "SHAPES", {"swin_base": SMALL})
    monkeypatch.setattr(bench_guidance, "dense_seconds", lambda *_: 1e-3)  # whatever else this machine computes


def test_by_default(small, tmp_path, capfd):
    assert bench_guidance.main(["--seconds", "0.01", "--json", "rows.json"]) == 0
    out, err = capfd.readouterr()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert not [row["name"] for row in rows if "compiled" in row["name"]]
    for dtype in ("float32", "bfloat16"):
        ms = {row["name"]: row["median_ms"] for row in rows if row["dtype"] == dtype}
        sentence = next(line for line in out.splitlines() if line.startswith(f"small in {dtype}, batch 16: "))
        if "fused-cpu" in ms:
            ratio = ms["dense"] / ms["fused-cpu"]
            assert f"{ms['fused-cpu']:.0f} ms with sgmim_fast (cpu), {ratio:.1f} times as fast as the dense" in sentence
            (row,) = (row for row in rows if row["name"] == "fused-cpu" and row["dtype"] == dtype)
            assert sum(row["above_gemms"].values()) == pytest.approx(ms["fused-cpu"] / ms["gemm-floor"] - 1)
            assert sentence_of("fused-cpu", row["above_gemms"]) in out
            assert f"gemms of the visible cells alone take {ms['gemm-floor']:.0f} ms" in sentence
        else:
            assert "python -m sgmim_fast.env says why" in sentence
    assert (tmp_path / "guidance.png").stat().st_size > 1000
    assert all(line.partition(" s  small, ")[0].strip().isdigit() for line in err.splitlines()), err  # nothing else
    assert err.count("timing") == 2  # per phase, not per round


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_columns_that_disagree_get_no_speed(small, monkeypatch, capfd, dtype):
    """In either dtype, the gradients of the visible-only column are too large by a tenth."""
    losses = branch.visible_losses

    def wrong(*args):
        found = losses(*args)
        return found._replace(total=found.total + 0.1 * (found.total - found.total.detach()))

    monkeypatch.setattr(branch, "visible_losses", wrong)
    assert bench_guidance.main(["--seconds", "0.01", "--dtype", dtype]) == 1
    out = capfd.readouterr().out
    assert "The columns disagree; no speed is given." in out and "visible: " in out and "fused-cpu: " not in out


def test_where_a_dtype_is_slow(small, monkeypatch, capfd):
    """As with bfloat16 on a CPU without instructions for it, fewer images are measured, and a line says so."""
    monkeypatch.setattr(bench_guidance, "dense_seconds", lambda *_: 2.9)
    assert bench_guidance.main(["--seconds", "0.01", "--dtype", "bfloat16"]) == 0
    assert "small, bfloat16, batch 1, cpu (a dense step of 16 would take 46 s here)" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "absent/x.png"], "argument --plot: absent/x.png: there is no folder absent"),
        (["--plot", "x.gifx"], "argument --plot: x.gifx: expected one of .*png"),
        (["--json", "absent/x.json"], "argument --json: absent/x.json: there is no folder absent"),
        (["--encoder", "swin"], "there is no 'swin', only swin_base"),
        (["--dtype", "float64"], "there is no 'float64', only float32, bfloat16, float16"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_refused_before_anything_is_measured(small, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(bench_guidance, "build", None)
    with pytest.raises(SystemExit, match="2"):
        bench_guidance.main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_without_matplotlib(small, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measure, "can_plot", lambda: False)
    monkeypatch.setattr(bench_guidance, "can_plot", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        bench_guidance.main(["--plot", "x.png"])
    assert "argument --plot: drawing needs matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert bench_guidance.main(["--seconds", "0.01", "--dtype", "float32"]) == 0
    assert not list(tmp_path.iterdir())
