"""Checkpoints are complete or absent, and are never lost through a full disk, a kill or damage."""

from __future__ import annotations

import json
import os
import resource

import pytest
import torch

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
from sgmim_fast.engine import checkpoint
from sgmim_fast.engine.checkpoint import CheckpointError


def write(folder, step, loss=1.0, size=1000):
    weights = {"a": torch.full((size,), float(step)), "b": torch.arange(3)}
    return checkpoint.write(folder, step, {"model": weights, "optimizer": {}}, {"loss": loss})


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 10, 20 and 30. Step 20 has the lowest loss."""
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        write(tmp_path / "checkpoints", step, loss)
    return tmp_path


def test_reads_what_was_written(run):
    path = checkpoint.choose(run)
    assert path.name == "step-00000030"
    read = checkpoint.read(path, "model")
    assert torch.equal(read["a"], torch.full((1000,), 30.0)) and torch.equal(read["b"], torch.arange(3))
    assert checkpoint.facts(path)["step"] == 30 and set(checkpoint.facts(path)["files"]) == {
        "model.safetensors",
        "optimizer.safetensors",
    }
    names = {"best": 20, "step-00000010": 10, "10": 10, "step-20": 20}
    assert {name: checkpoint.facts(checkpoint.choose(run, name))["step"] for name in names} == names
    with pytest.raises(CheckpointError, match="no checkpoint 'step-7', only best, step-00000010, step-00000020"):
        checkpoint.choose(run, "step-7")


def test_keeps_the_newest_and_the_best(run):
    folder = run / "checkpoints"
    for step in (40, 50):
        newest = write(folder, step, loss=5.0)
    checkpoint.tidy(folder, 2, newest)
    assert [path.name for path in checkpoint.steps(folder)] == [f"step-{step:08d}" for step in (20, 40, 50)]
    checkpoint.tidy(folder, 1, write(folder, 30))  # the run was resumed from step 20
    assert [path.name for path in checkpoint.steps(folder)] == [f"step-{step:08d}" for step in (20, 30)]


def test_the_same_step_is_written_again(run):
    write(run / "checkpoints", 30, loss=0.5)
    assert checkpoint.facts(checkpoint.choose(run))["loss"] == 0.5
    assert sorted(os.listdir(run / "checkpoints")) == [f"step-{step:08d}" for step in (10, 20, 30)]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"", "model.safetensors is not what was written"),
        ("optimizer.safetensors", None, "optimizer.safetensors is missing"),
        ("checkpoint.json", b'{"step": 3', r"checkpoint.json: "),
    ],
)
def test_damage_is_named_and_a_sound_one_offered(run, file, content, message):
    path = checkpoint.choose(run) / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"step-00000030 is damaged .*{message}.*--checkpoint step-00000020"):
        checkpoint.choose(run)
    assert checkpoint.choose(run, "step-00000020").name == "step-00000020"


def test_one_flipped_bit_is_damage(run):
    path = checkpoint.choose(run) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not what was written"):
        checkpoint.choose(run)


@pytest.mark.parametrize("limit", [50_000, 100], ids=["in the weights", "in the first bytes"])
def test_a_full_disk_leaves_the_one_before(run, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # further writing fails, as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*step-00000040 .*step-00000030 is intact"):
            write(run / "checkpoints", 40, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(run / "checkpoints")) == [f"step-{step:08d}" for step in (10, 20, 30)]
    assert checkpoint.choose(run).name == "step-00000030"


def test_a_kill_while_writing_leaves_the_one_before(run, monkeypatch):
    """Files of a killed process are not read as a checkpoint, and the next save removes them."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "_flush", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        write(run / "checkpoints", 40)
    assert ".writing-00000040" in os.listdir(run / "checkpoints")
    assert checkpoint.choose(run).name == "step-00000030"
    write(run / "checkpoints", 40)
    assert sorted(os.listdir(run / "checkpoints")) == [f"step-{step:08d}" for step in (10, 20, 30, 40)]


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        checkpoint.choose(tmp_path)


def test_facts_are_json(run):
    text = (checkpoint.choose(run) / "checkpoint.json").read_text()
    assert json.loads(text)["loss"] == 2.0
