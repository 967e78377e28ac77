"""`sgmim-fast finetune` and `evaluate`: runs that end, stop and resume, their files, and errors for wrong input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate", reason="fine-tuning needs the extra [downstream]")
pytest.importorskip("segmentation_models_pytorch", reason="fine-tuning needs the extra [downstream]")
pytest.importorskip("torchmetrics", reason="fine-tuning needs the extra [downstream]")
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from finetune_runs import TINY, arguments, finetune
from layouts import write_ade20k, write_kitti, write_nyu_folders
from PIL import Image
from pretraining import finish, fresh_accelerate, same, start, weights

from sgmim_fast import SGMIM, cli, create_encoder
from sgmim_fast.checkpoints import export_timm
from sgmim_fast.engine import checkpoint, log, settings
from sgmim_fast.engine.trainer import Trainer
from sgmim_fast.finetune.build import learning_rate
from sgmim_fast.finetune.config import PRESETS, Config, Optim
from sgmim_fast.finetune.task import Finetuning


@pytest.fixture(autouse=True)
def on_the_cpu():
    with fresh_accelerate():
        yield


@pytest.fixture(scope="module")
def depth(tmp_path_factory):
    """A finished run of 8 steps."""
    run = tmp_path_factory.mktemp("runs") / "depth"
    with fresh_accelerate():
        assert finetune(run) == 0
    return run


def test_what_a_run_leaves(depth):
    for name in ("config.yaml", "log.jsonl", "metrics.jsonl", "losses.png", "pictures/step-00000008.png"):
        assert (depth / name).is_file(), name
    assert [line["step"] for line in log.read(depth)] == [3, 4, 6, 8]
    metrics = log.read(depth, log.METRICS)
    assert [line["step"] for line in metrics] == [4, 8]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    facts = checkpoint.facts(checkpoint.choose(depth))
    assert facts["score"] == metrics[-1]["rmse"] and facts["command"] == "finetune"
    best = min(metrics, key=lambda line: line["rmse"])
    assert checkpoint.choose(depth, "best").name == f"step-{best['step']:08d}"


def test_evaluate_finds_what_the_run_found(depth, tmp_path, capsys):
    file, picture = tmp_path / "found.json", tmp_path / "found.png"
    assert cli.main(["evaluate", str(depth), f"--json={file}", f"--picture={picture}"]) == 0
    found, last = json.loads(file.read_text()), log.read(depth, log.METRICS)[-1]
    assert found["step"] == 8 and "abs_rel" in capsys.readouterr().out
    assert {name: found[name] for name in last} == pytest.approx(last, rel=1e-5)
    with Image.open(picture) as image:
        assert min(image.size) > 100
    # Settings of evaluation do not affect training: they are read from the run's configuration, and can be changed.
    assert cli.main(["evaluate", str(depth), "--set=evaluation.flip=false", f"--json={file}"]) == 0
    assert json.loads(file.read_text())["rmse"] != found["rmse"]


@pytest.mark.parametrize("change", ["data.size=[96,96]", "data.task=segmentation"])
def test_evaluation_of_another_model_is_one_line(depth, capsys, change):
    assert cli.main(["evaluate", str(depth), f"--set={change}"]) == 2
    err = capsys.readouterr().err
    assert f"do not fit the model: {change.partition('=')[0]}: " in err and err.count("\n") == 1


def test_resumed_run_is_the_same_to_the_bit(depth, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (depth / "checkpoints" / "step-00000004").rename(run / "checkpoints" / "step-00000004")
    try:
        assert cli.main(["finetune", "depth", f"--resume={run}"]) == 0
    finally:
        (run / "checkpoints" / "step-00000004").rename(depth / "checkpoints" / "step-00000004")
    assert same(weights(run, 8), weights(depth, 8))


def test_a_checkpoint_that_was_not_tested_is_not_the_best(tmp_path):
    """SIGTERM saves a checkpoint at once."""

    class Stopped(Trainer):
        def _step(self, batches):
            super()._step(batches)
            if self.done == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "run"
    run.mkdir()
    config = settings.with_changes(Config(), settings.from_mapping(TINY, "TINY"), "TINY")
    task = Finetuning(config)
    assert Stopped(task, run, Accelerator(), task.create_dataset(), None).train() == "SIGTERM"
    assert checkpoint.choose(run).name == "step-00000005" and checkpoint.choose(run, "best").name == "step-00000004"
    assert [line["step"] for line in log.read(run, log.METRICS)] == [4]


def test_segmentation_with_upernet_learns_from_an_exported_encoder(tmp_path):
    """Name and arguments of the encoder are read from a run or a file, which is not needed to resume."""
    torch.manual_seed(0)
    arguments = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2), "window_size": 2}
    encoder = create_encoder("swin_tiny_patch4_window7_224", img_size=64, **arguments)
    pretrained = tmp_path / "pretrained"
    pretrained.mkdir()
    file = pretrained / "encoder.safetensors"
    export_timm(SGMIM(encoder, encoder_stride=32), file)
    run = tmp_path / "run"
    changes = {"model__arguments": {}, "model__encoder": str(pretrained)}
    assert finetune(run, "segmentation", **changes, optim__epochs=1) == 0
    found = log.read(run, log.METRICS)[-1]
    assert 0 <= found["mIoU"] <= found["aAcc"] <= 1
    saved = checkpoint.find(run, None, Config, "finetune")
    model = Finetuning(saved.config).create_model()
    assert torch.equal(model.features.model.patch_embed.proj.weight, encoder.model.patch_embed.proj.weight)
    file.unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    accepted = ["--accept-changes", "--set=optim.epochs=2"]
    assert cli.main(["finetune", "segmentation", f"--resume={run}", *accepted]) == 0
    assert cli.main(["evaluate", str(run)]) == 0


def test_a_frozen_encoder_stays_as_it_is(tmp_path):
    run = tmp_path / "run"
    assert finetune(run, model__freeze=True, optim__epochs=1) == 0
    task = Finetuning(checkpoint.find(run, None, Config, "finetune").config)
    torch.manual_seed(0)
    saved = weights(run, 4)
    fresh = task.create_model().state_dict()
    assert saved.keys() == fresh.keys()
    assert any(not torch.equal(saved[name], fresh[name]) for name in saved if name.startswith("head."))
    # The seed of the parameters is that of the run's first step.
    from sgmim_fast.data.seeds import mix

    torch.manual_seed(mix(0, "model"))
    fresh = task.create_model().state_dict()
    assert all(torch.equal(saved[name], fresh[name]) for name in saved if name.startswith("features."))


def test_folders_of_depth(tmp_path, capsys):
    """The user's own images and 16-bit maps in millimetres, with missing values. Images of any size are tested."""
    generator = torch.Generator().manual_seed(0)
    for part, count, size in (("train", 4, (80, 96)), ("test", 2, (72, 100))):
        for kind in ("images", "maps"):
            (tmp_path / part / kind).mkdir(parents=True)
        for i in range(count):
            image = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(image).save(tmp_path / part / "images" / f"{i}.png")
            depth = torch.randint(500, 9000, size, generator=generator).numpy().astype("uint16")
            depth[:10] = 0
            Image.fromarray(depth).save(tmp_path / part / "maps" / f"{i}.png")
    words = [
        *(f"--images={tmp_path}/train/images", f"--maps={tmp_path}/train/maps"),
        *(f"--test-images={tmp_path}/test/images", f"--test-maps={tmp_path}/test/maps"),
    ]
    run = tmp_path / "run"
    assert finetune(run, "depth", *words, data__source="folders", data__scale=1000, optim__epochs=1) == 0
    found = log.read(run, log.METRICS)[-1]
    assert found["images"] == 2 and 0 < found["rmse"] < 10
    assert finetune(tmp_path / "dry", "depth", *words, "--dry-run", data__source="folders", data__scale=1000) == 0
    assert (tmp_path / "dry" / "items.png").is_file()
    assert "is padding" not in capsys.readouterr().out
    large = {"data__source": "folders", "data__scale": 1000, "data__size": [128, 128]}
    assert finetune(tmp_path / "dry", "depth", *words, "--dry-run", **large) == 0
    assert "53% of the crops of 128x128 is padding: images measure 80x96 to 80x96" in capsys.readouterr().out
    for kind in ("images", "maps"):
        shutil.copy(tmp_path / "train" / kind / "0.png", tmp_path / "train" / kind / "4.png")
    assert cli.main(["finetune", "depth", f"--resume={run}"]) == 2
    assert "was trained with different files: images: 4 (" in capsys.readouterr().err
    assert cli.main(["finetune", "depth", f"--resume={run}", "--accept-changes"]) == 0


@pytest.mark.parametrize(
    ("source", "write", "best"),
    [("nyu", write_nyu_folders, "rmse"), ("kitti", write_kitti, "rmse"), ("ade20k", write_ade20k, "mIoU")],
    ids=["nyu", "kitti", "ade20k"],
)
def test_published_layouts_from_end_to_end(tmp_path, source, write, best):
    """Whole images are tested, in windows of the training size."""
    root = write(tmp_path)
    changes = {"data__source": source, "optim__batch": 2, "optim__epochs": 1, "data__size": [64, 128]}
    changes |= {"evaluation__flip": False, "evaluation__stride": [64, 128]}
    task = "segmentation" if source == "ade20k" else "depth"
    assert finetune(tmp_path / "run", task, f"--root={root}", **changes) == 0
    found = log.read(tmp_path / "run", log.METRICS)[-1]
    assert math.isfinite(found[best])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_out_of_range_is_named_in_one_line(tmp_path, capsys, workers):
    """Also if a data loading process finds it."""
    for kind in ("images", "maps"):
        (tmp_path / kind).mkdir()
    for i in range(20):  # 8 of them are checked when the data set is created, the second one is not
        Image.new("RGB", (64, 64), (10 * i, 0, 0)).save(tmp_path / "images" / f"{i:02}.png")
        Image.new("L", (64, 64), 9 if i == 1 else 1).save(tmp_path / "maps" / f"{i:02}.png")
    words = [f"--{part}={tmp_path}/{kind}" for kind in ("images", "maps") for part in (kind, f"test-{kind}")]
    changes = {"data__source": "folders", "data__classes": 3, "data__workers": workers}
    assert finetune(tmp_path / "run", "segmentation", *words, **changes) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("sgmim-fast finetune: ") and "01.png" in err and "9" in err and "Traceback" not in err


# One line, exit code 2.
WRONG = [
    ("depth", {"model__encoder": "nowhere.safetensors"}, "nowhere.safetensors"),
    ("depth", {"model__encoder": "vit_tiny_patch16_22"}, "did you mean vit_tiny_patch16_224"),
    ("depth", {"data__source": "ade20k"}, "data.source is ade20k, which is for segmentation"),
    ("segmentation", {"data__source": "nyu"}, "data.source is nyu, which is for depth"),
    ("depth", {"data__source": "nyu"}, "data.root is missing; expected --root DIR"),
    ("depth", {"data__source": "folders"}, "data.test_images is missing; expected --test-images DIR"),
    ("depth", {"data__source": "kitti", "data__root": "/nowhere"}, "/nowhere"),
    ("depth", {"data__size": [64, 96]}, "procedural scenes are square"),
    ("depth", {"optim__layer_decay": 1.5}, "optim.layer_decay is 1.5"),
    ("depth", {"run__fsdp": True}, "run.fsdp is true"),
    ("depth", {"optim__betas": [2, 2]}, "optim.betas is (2.0, 2.0)"),
    ("depth", {"optim__power": -1}, "optim.power is -1.0; expected 0 or more"),
    ("depth", {"model__arguments": {"num_heads": 0}}, "'num_heads': 0"),
    ("depth", {"model__arguments": {"norm_layer": "foo"}}, "'norm_layer': 'foo'"),
    ("depth", {"data__min_depth": 5, "data__max_depth": 3}, "expected 0 < smallest < largest"),
    ("depth", {"optim__batch": 100}, "fewer than the 100 of a step"),
    ("depth", {"data__size": [56, 56], "model__head": "deconv"}, "multiples of 16"),
    ("depth", {"data__size": [48, 48]}, "multiples of 32"),
]


@pytest.mark.parametrize(("task", "changes", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_settings_are_one_line(tmp_path, capsys, task, changes, message):
    assert finetune(tmp_path / "run", task, **changes) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_runs_of_one_command_are_not_the_other_ones(depth, tmp_path, capsys):
    assert cli.main(["export", str(depth), str(tmp_path / "out.safetensors")]) == 2
    assert "is a run of sgmim-fast finetune; expected one of sgmim-fast pretrain" in capsys.readouterr().err
    assert cli.main(["finetune", "segmentation", f"--resume={depth}"]) == 2
    assert "data.task: depth -> segmentation" in capsys.readouterr().err
    assert cli.main(["finetune", "depth", "--preset=tiny_demo", f"--encoder={tmp_path}"]) == 2
    assert "has no encoder.safetensors" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
def test_two_processes_test_what_they_save(tmp_path):
    """Each process computes its share of the test set, with the batch norm statistics of the first one."""
    run, file = tmp_path / "run", tmp_path / "found.json"
    settings = arguments(optim__epochs=1, optim__batch=2)
    command = ("-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "sgmim_fast.cli")
    out, _ = finish(start(*command, "finetune", "depth", f"--out={run}", *settings))
    assert "2 processes" in out
    assert cli.main(["evaluate", str(run), f"--json={file}"]) == 0
    found, last = json.loads(file.read_text()), log.read(run, log.METRICS)[-1]
    assert {name: found[name] for name in last} == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve(name):
    config = settings.preset(Config(), PRESETS, name)
    Finetuning(config).check()
    assert settings.with_changes(Config(preset=name), settings.from_mapping(PRESETS[name], name), name) == config


def test_triangle_of_the_mim_depth_protocol():
    """Numbers computed by hand: from 3e-5 to 5e-4 and back, each half to the power of 0.9."""
    rates = [learning_rate(Optim(), step, 200, 8) for step in (0, 50, 100, 150, 199)]
    rise = 4.7e-4 * 0.5**0.9
    fall = 5e-4 - 4.7e-4 * 0.99**0.9
    assert rates == pytest.approx([3e-5, 3e-5 + rise, 5e-4, 5e-4 - rise, fall])


def test_poly_and_cosine():
    poly = Optim(schedule="poly", power=1.0, lr=1.0, min_lr=0.0, warmup_epochs=1)
    assert [learning_rate(poly, step, 100, 4) for step in (0, 3, 4, 50)] == pytest.approx([0.2, 0.97 * 0.8, 0.96, 0.5])
    cosine = Optim(schedule="cosine", lr=1.0, min_lr=0.1)
    assert [learning_rate(cosine, step, 100, 4) for step in (0, 50)] == pytest.approx([1.0, 0.55])
    assert learning_rate(cosine, 100, 100, 4) == pytest.approx(0.1)
