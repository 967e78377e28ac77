"""Images are normalised as in the encoder's pre-training, in training, evaluation and the analysis of frequencies."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("accelerate", reason="fine-tuning needs the extra [downstream]")
pytest.importorskip("segmentation_models_pytorch", reason="fine-tuning needs the extra [downstream]")
pytest.importorskip("torchmetrics", reason="fine-tuning needs the extra [downstream]")
from finetune_runs import TINY, finetune
from layouts import write_ade20k
from pretraining import fresh_accelerate
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from sgmim_fast import cli, create_encoder
from sgmim_fast.checkpoints import export_timm
from sgmim_fast.engine import checkpoint, settings
from sgmim_fast.finetune.config import Config
from sgmim_fast.finetune.task import Finetuning
from sgmim_fast.fourier.encoders import load

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)


@pytest.fixture(autouse=True)
def on_the_cpu():
    with fresh_accelerate():
        yield


def exported(path, channels=3, **numbers):
    encoder = create_encoder("vit_tiny_patch16_224", img_size=64, in_chans=channels, **TINY["model"]["arguments"])
    export_timm(encoder, path, **numbers)
    return str(path)


def task(encoder, facts=None, **changes):
    given = {"model.encoder": encoder, "model.arguments": {}, **changes}
    config = settings.with_changes(Config(), settings.from_mapping(TINY, "TINY"), "TINY")
    return Finetuning(settings.with_changes(config, given, "test"), facts)


@pytest.mark.parametrize("source", ["scenes", "ade20k"])
@pytest.mark.parametrize("part", ["train_set", "test_set"])
def test_images_have_the_numbers_of_the_file(tmp_path, source, part):
    own = exported(tmp_path / "own.safetensors", mean=MEAN, std=STD)
    usual = exported(tmp_path / "usual.safetensors")
    changes = {"data.source": source, "data.task": "segmentation"}
    changes |= {"data.root": str(write_ade20k(tmp_path)), "data.augment": {"colors": False}}
    found, expected = (getattr(task(file, **changes), part)[0]["image"] for file in (own, usual))
    mean, std, usual_mean, usual_std = (
        torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    inside = expected.flatten(1).ne(0).all(0).view(expected.shape[1:])  # pixels of the padding are 0 in both
    restored = (found * std + mean - usual_mean) / usual_std
    torch.testing.assert_close(restored[:, inside], expected[:, inside], rtol=1e-4, atol=1e-5)


def test_a_run_keeps_them(tmp_path):
    """They are in its checkpoints, so it needs no file to resume, and to be evaluated."""
    file = tmp_path / "own.safetensors"
    changes = {"model__arguments": {}, "model__encoder": exported(file, mean=MEAN, std=STD), "optim__epochs": 1}
    assert finetune(tmp_path / "run", **changes) == 0
    file.unlink()
    facts = checkpoint.facts(checkpoint.choose(tmp_path / "run"))
    again = task(str(file), facts)
    assert again.normalisation == {"mean": MEAN, "std": STD}
    assert again.test_set[0]["image"].equal(task(exported(file, mean=MEAN, std=STD)).test_set[0]["image"])
    del facts["encoder"]["mean"], facts["encoder"]["std"]  # as in runs of older versions
    assert task("", facts).normalisation == {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}


def test_frequencies_have_them_too(tmp_path):
    found = load(exported(tmp_path / "own.safetensors", mean=MEAN, std=STD))
    assert (found.mean, found.std) == (MEAN, STD)
    assert load(exported(tmp_path / "usual.safetensors")).mean == IMAGENET_DEFAULT_MEAN


@pytest.mark.parametrize("numbers", [{}, {"mean": [0] * 5, "std": [1] * 5}], ids=["imagenet", "own"])
def test_other_channels_are_refused(tmp_path, capsys, numbers):
    file = exported(tmp_path / "five.safetensors", 5, **numbers)
    commands = [["finetune", "depth", "--preset=tiny_demo", f"--encoder={file}"], ["fourier", file, "--scenes=1"]]
    for words in commands:
        assert cli.main([*words, f"--out={tmp_path / 'out.png'}"]) == 2
        err = capsys.readouterr().err
        assert "takes images of 5 channels; expected an encoder of 3" in err and err.count("\n") == 1
    assert finetune(tmp_path / "run", model__arguments={"in_chans": 5}) == 2
    assert "takes images of 5 channels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0, 0], [1, 1, 1]),
        ([0, 0, "a"], [1, 1, 1]),
        ([0, 0, 0], [1, 1, 0]),
        (["x"], []),
        ([float("nan")] * 3, [1] * 3),
        ([10**400] * 3, [1] * 3),
    ],
)
def test_invalid_numbers_are_refused(tmp_path, capsys, mean, std):
    file = exported(tmp_path / "wrong.safetensors", mean=mean, std=std)
    assert finetune(tmp_path / "run", model__encoder=file) == 2
    err = capsys.readouterr().err
    assert f"{file}: mean is" in err and err.count("\n") == 1


def test_training_alone_cannot_have_others(tmp_path, capsys):
    assert finetune(tmp_path / "run", data__augment=json.dumps({"mean": [0, 0, 0]})) == 2
    assert "data.augment has mean; expected none" in capsys.readouterr().err
