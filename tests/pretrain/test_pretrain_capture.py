"""Pre-training with captured steps gives the weights of eager ones, with a simulated graph on the CPU."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
pytest.importorskip("sgmim_fast.data", reason="pre-training needs the extra [train]")
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fake_graph import FakeGraph, values_unread
from pretraining import Pairs, fresh_accelerate, same, tiny, weights

from sgmim_fast import backends
from sgmim_fast.engine import checkpoint, log
from sgmim_fast.engine.trainer import Trainer
from sgmim_fast.pretrain.build import find
from sgmim_fast.pretrain.task import Pretraining


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    for name in ("sgmim_fast.capture", "sgmim_fast.engine.trainer"):
        monkeypatch.setattr(sys.modules[name], "Graph", FakeGraph)
    with fresh_accelerate(), backends.use("torch"), values_unread():
        yield


def train(run, config, saved=None, broken=None):
    run.mkdir(exist_ok=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16" if config.run.precision == "bfloat16" else "no")
    trainer = Trainer(Pretraining(config), run, accelerator, Pairs(broken=broken), saved)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim__accumulate": 2, "optim__batch": 2},
        {"run__precision": "bfloat16", "model__arguments": {"depth": 2, "drop_path_rate": 0.5}},
        {"mask__shown": "0.3", "model__guidance": False},
    ],
)
def test_the_same_weights_to_the_bit(tmp_path, changes, capsys):
    """Also if a step without a finite loss is skipped."""
    one = train(tmp_path / "captured", tiny(**changes), broken={5: float("inf")})
    assert one.stepper.captured.captures == 1 and one.stepper.captured.reasons == []
    assert capsys.readouterr().out.count("forward and backward run as a CUDA graph") == 1
    assert log.read(tmp_path / "captured")[-1]["graphs"] == 1
    other = train(tmp_path / "eager", tiny(**changes, run__capture=False), broken={5: float("inf")})
    assert other.stepper.captured is None
    assert one.window.skipped_steps == other.window.skipped_steps > 0
    assert same(*(weights(tmp_path / name, 16) for name in ("captured", "eager")))


def test_resumed_it_is_the_same_to_the_bit(tmp_path):
    """The first steps after resuming are eager; in the uninterrupted run they are captured."""
    train(tmp_path / "whole", tiny())
    train(tmp_path / "run", tiny(optim__epochs=1))
    run = train(tmp_path / "run", tiny(), find(tmp_path / "run"))
    assert run.done == 16 and run.stepper.captured.captures == 1
    assert same(*(weights(tmp_path / name, 16) for name in ("whole", "run")))
    parts = [checkpoint.read(checkpoint.choose(tmp_path / name), "optimizer") for name in ("whole", "run")]
    assert same(*parts)
