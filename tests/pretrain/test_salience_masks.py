"""Runs with salience-based masks: independent of interruptions and of the distribution over processes."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
pytest.importorskip("sgmim_fast.data", reason="pre-training needs the extra [train]")
from pretraining import Pairs, fresh_accelerate, same, tiny, weights
from test_pretrain import pretrain, trainer

from sgmim_fast import cli
from sgmim_fast.engine import log
from sgmim_fast.engine.settings import resolve
from sgmim_fast.pretrain import build
from sgmim_fast.pretrain.config import PRESETS, Config
from sgmim_fast.pretrain.task import INSTEAD

SALIENCE = {"mask__masking": "salience", "mask__ratio": 0.6}


@pytest.fixture(autouse=True)
def on_the_cpu():
    with fresh_accelerate():
        yield


def test_a_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {**SALIENCE, "data__val": 0.2}
    assert pretrain(whole, **changes) == 0
    assert pretrain(parts, **{**changes, "optim__epochs": 1, "optim__milestones": [1.5]}) == 0
    assert cli.main(["pretrain", f"--resume={parts}", "--set=optim.epochs=2", "--accept-changes"]) == 0
    assert same(weights(whole, 16), weights(parts, 16))
    assert (whole / "pictures" / "step-00000016.png").is_file()
    assert all(math.isfinite(line["val_loss"]) for line in log.read(whole, log.METRICS))


def test_masks_belong_to_images_not_to_batches():
    config = tiny(**SALIENCE)
    model, device = build.create_model(config), torch.device("cpu")
    images = torch.randn(8, 3, 64, 64)
    drawn = build.draw_step(config, 8, 3, 5, device)
    whole = build.masks_of(drawn, config, model, images)
    parts = [build.masks_of(drawn.part(i, 2), config, model, images[i : i + 2]) for i in range(0, 8, 2)]
    assert torch.equal(torch.cat([part.mask for part in parts]), whole.mask)
    other = build.masks_of(build.draw_step(config, 8, 3, 6, device), config, model, images)
    assert not torch.equal(other.mask, whole.mask)
    counts = whole.mask.flatten(1).sum(1)
    assert all(math.ceil(0.5 * 16) <= count <= math.ceil(0.7 * 16) for count in counts.tolist())


def test_the_settings_reach_the_masks():
    model = build.create_model(tiny())
    images, device = torch.randn(4, 3, 64, 64), torch.device("cpu")
    for changes, expected in (
        ({"mask__adaptive": "none"}, {10}),
        ({"mask__spread": 0.0}, {10}),
        ({"mask__spread": 0.3, "mask__threshold": 1.0}, {5}),  # nothing exceeds 1
        ({"mask__spread": 0.3, "mask__threshold": 0.0}, {14, 15}),  # all except the least salient patch exceed 0
    ):
        config = tiny(**SALIENCE, **changes)
        mask = build.masks_of(build.draw_step(config, 4, 0, 0, device), config, model, images)
        assert set(mask.mask.flatten(1).sum(1).tolist()) <= expected, changes


def test_an_image_that_is_not_finite_is_left_out(tmp_path):
    one = trainer(tmp_path / "run", tiny(**SALIENCE), Pairs(broken={3: math.nan}))
    one.train()
    assert log.read(tmp_path / "run")[-1]["skipped_steps"] == 2  # once in each of two epochs
    assert all(p.isfinite().all() for p in one.stepper.plain.parameters())


def test_the_ratio_is_that_of_the_port_unless_it_is_given():
    def configured(**changes):
        return resolve(Config(), PRESETS, "tiny_demo", None, changes, INSTEAD).mask

    assert configured().ratio == 0.6
    assert configured(**{"mask.masking": "salience"}).ratio == 0.75
    assert configured(**{"mask.masking": "salience", "mask.ratio": "0.5"}).ratio == 0.5
    assert configured(**{"mask.masking": "random"}).ratio == 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask__masking": "saliency"}, "expected one of random, salience"),
        ({"mask__spread": 0.5}, "mask.spread is 0.5 around mask.ratio 0.6"),
        ({"mask__threshold": 2}, "mask.threshold is 2.0; expected a number between 0 and 1"),
        ({"mask__adaptive": "batches"}, "expected one of image, batch, none"),
        ({"mask__spread": 0.39}, "mask.ratio is 0.6 of 16 mask units, which leaves none visible"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, capsys, changes, message):
    assert pretrain(tmp_path / "run", **{**SALIENCE, **changes}) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
