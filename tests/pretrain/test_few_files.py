"""The number of files that a reader has to open to follow a run of pre-training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
from pretraining import arguments, fresh_accelerate

import sgmim_fast
from sgmim_fast import cli

PACKAGE = Path(sgmim_fast.__file__).parent
MOST = 12
OPTIMIZED = 1  # flag of functions; class bodies and modules do not have it


def test_a_run_enters_few_files(tmp_path):
    entered = set()

    def enter(frame, event, _):
        if event == "call" and frame.f_code.co_flags & OPTIMIZED:
            entered.add(Path(frame.f_code.co_filename))

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        with fresh_accelerate():
            assert cli.main(["pretrain", *arguments(run__pictures_every=8), "--out", str(tmp_path / "run")]) == 0
    finally:
        sys.setprofile(before)
    files = {path.relative_to(PACKAGE).as_posix() for path in entered if path.is_relative_to(PACKAGE)}
    files = {file for file in files if file.partition("/")[0] in ("engine", "pretrain")}
    assert {"engine/trainer.py", "pretrain/task.py"} <= files
    assert len(files) <= MOST, sorted(files)
