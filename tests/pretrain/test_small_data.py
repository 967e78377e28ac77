"""Training with few images: an average of the weights, a probe of frozen features, loggers selected by name."""

from __future__ import annotations

import json
import math
import sys
import types

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
pytest.importorskip("sgmim_fast.data", reason="pre-training needs the extra [train]")
from accelerate import Accelerator
from PIL import Image
from pretraining import fresh_accelerate, same, tiny, weights
from safetensors.torch import load_file
from test_pretrain import pretrain, trainer

from sgmim_fast import cli
from sgmim_fast.engine import log
from sgmim_fast.engine.average import Average
from sgmim_fast.pretrain import build, probe
from sgmim_fast.pretrain.task import Pretraining


@pytest.fixture(autouse=True)
def on_the_cpu():
    with fresh_accelerate():
        yield


def average_of(run, step):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "average.safetensors")


def test_the_average_by_hand():
    model = torch.nn.Linear(2, 1, bias=False)
    average, expected = Average(model, 0.9), model.weight.detach().clone()
    for step in range(100):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    now = model.weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight.detach(), now)
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    assert torch.equal(model.weight.detach(), now)


def test_a_run_with_an_average(tmp_path):
    """The average changes no step, is resumed with the same bits, and is exported."""
    whole, parts, plain = (tmp_path / name for name in ("whole", "parts", "plain"))
    assert pretrain(whole, optim__ema=0.9) == 0 and pretrain(plain) == 0
    assert same(weights(whole, 16), weights(plain, 16))
    assert pretrain(parts, optim__ema=0.9, optim__epochs=1) == 0
    assert cli.main(["pretrain", f"--resume={parts}", "--set=optim.epochs=2", "--accept-changes"]) == 0
    assert same(average_of(whole, 16), average_of(parts, 16))
    assert not same(average_of(whole, 16), weights(whole, 16))
    exported = load_file(whole / "encoder.safetensors")
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(exported[name], average_of(whole, 16)[f"encoder.model.{name}"])
    assert same(dict(build.load(build.find(whole)).named_parameters()), average_of(whole, 16))


def test_the_average_is_what_is_tested(tmp_path):
    one = trainer(tmp_path / "run", tiny(optim__ema=0.9, data__val=0.25, data__scenes=16))
    for tensor in one.stepper.average.tensors:
        tensor.fill_(math.nan)
    dataset = one.task.create_dataset()
    assert len(dataset) and not math.isfinite(one._evaluate())
    assert all(p.isfinite().all() for p in one.stepper.plain.parameters())


def labelled(path, count=12, classes=0):
    """Writes images and maps that depend on them: the brightness, or in which half of the range it is."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (path / name).mkdir(parents=True)
    for i in range(count):
        cells = rng.integers(0, 256, (4, 4))
        pixels = cells.repeat(16, 0).repeat(16, 1).astype(np.uint8)
        Image.fromarray(np.stack([pixels] * 3, 2)).save(path / "images" / f"{i}.png")
        label = (pixels > 127).astype(np.uint8) if classes else (pixels.astype(np.uint16) + 1) * 100
        Image.fromarray(label).save(path / "labels" / f"{i}.png")
    return path


class Brightness(torch.nn.Module):
    """An encoder whose features contain everything, or nothing."""

    def __init__(self, blind=False):
        super().__init__()
        self.blind = blind

    def forward(self, x, mask):
        cells = torch.nn.functional.avg_pool2d(x[:, :1], 16).flatten(2).mT
        features = torch.cat([cells, cells.mean(1, keepdim=True).expand_as(cells), cells.square()], 2)
        return torch.randn_like(features) if self.blind else features


@pytest.mark.parametrize("kind", ["depth", "semantic"])
def test_the_probe_tells_good_features_from_none(tmp_path, kind):
    path = labelled(tmp_path / "labelled", 40, classes=2 * (kind == "semantic"))
    options = {"data__probe_kind": kind, "data__probe_classes": 2 if kind == "semantic" else None}
    config = tiny(data__probe=str(path), **options)
    pairs, found = probe.create(config), []
    for blind in (False, True):
        model = torch.nn.Module()
        model.encoder = Brightness(blind)
        found.append(next(iter(probe.measure(model, pairs, config, Accelerator()).values())))
    good, none = (0.9, 0.7) if kind == "semantic" else (0.7, 0.1)
    assert found[0] > good and found[1] < none, found
    assert model.training  # its mode is restored


def test_a_probed_run(tmp_path):
    path = labelled(tmp_path / "labelled")
    assert pretrain(tmp_path / "run", f"--probe={path}", "--set=data.val=0.2") == 0
    lines = log.read(tmp_path / "run", log.METRICS)
    assert len(lines) == 2 and all({"probe_r2", "val_loss"} <= line.keys() for line in lines)
    # Without held-out data, the probe is the score.
    assert pretrain(tmp_path / "alone", f"--probe={path}") == 0
    line = log.read(tmp_path / "alone", log.METRICS)[-1]
    facts = json.loads((tmp_path / "alone" / "checkpoints" / "step-00000016" / "checkpoint.json").read_text())
    assert facts["score"] == pytest.approx(1 - line["probe_r2"])


class Board(types.ModuleType):
    """Replaces wandb."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.lines, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, line, step):
        self.lines.append((step, line))

    def finish(self):
        self.finished += 1


def test_wandb(tmp_path, monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    run = tmp_path / "run"
    assert pretrain(run, "--set=run.wandb=mine", "--set=data.val=0.2", optim__epochs=1) == 0
    assert cli.main(["pretrain", f"--resume={run}", "--set=optim.epochs=2", "--accept-changes"]) == 0
    first, second = board.started
    assert first["project"] == "mine" and first["name"] == "run" and first["id"] == second["id"]
    assert board.finished == 2
    assert [step for step, line in board.lines if "loss" in line] == [line["step"] for line in log.read(run)]
    assert {step for step, line in board.lines if "val_loss" in line} == {8, 16}


def test_wandb_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert pretrain(tmp_path / "run", "--set=run.wandb=mine") == 2
    assert "run.wandb needs Weights & Biases: pip install" in capsys.readouterr().err


def test_the_preset_fits_together():
    from sgmim_fast.pretrain.config import preset

    config = preset("small_data")
    Pretraining(config).check()
    assert config.optim.ema and config.optim.layer_decay < 1 and config.data.val


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ([], {"optim__ema": 1.0}, "optim.ema is 1.0; expected 0 (none) or more, less than 1"),
        ([], {"optim__ema": 0.9, "run__fsdp": True}, "optim.ema is 0.9 with run.fsdp"),
        (["--probe=nowhere"], {}, "data.probe is nowhere without images/"),
        (["--probe=here"], {"data__probe_kind": "semantic"}, "data.probe_classes is missing"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, words, changes, message):
    assert pretrain(tmp_path / "run", *words, **changes) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
