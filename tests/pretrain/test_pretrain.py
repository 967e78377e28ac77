"""Runs of a very small model in this process: exact, resumable, logged, exported."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
pytest.importorskip("sgmim_fast.data", reason="pre-training needs the extra [train]")
import timm
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pretraining import Pairs, arguments, fresh_accelerate, same, tiny, weights
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from sgmim_fast import cli, data
from sgmim_fast.data.seeds import mix
from sgmim_fast.engine import checkpoint, log
from sgmim_fast.engine.launch import SIGNALS, RunLock
from sgmim_fast.engine.loader import Layout
from sgmim_fast.engine.settings import with_changes
from sgmim_fast.engine.trainer import Stepper, Trainer
from sgmim_fast.errors import UserError
from sgmim_fast.pretrain.build import draw_masks, find, load
from sgmim_fast.pretrain.task import Pretraining


@pytest.fixture(autouse=True)
def on_the_cpu():
    with fresh_accelerate():
        yield


def trainer(run, config=None, dataset=None, saved=None):
    run.mkdir(exist_ok=True)
    return Trainer(Pretraining(config or tiny()), run, Accelerator(), dataset or Pairs(), saved)


def pretrain(run, *words, **changes):
    """Runs `sgmim-fast pretrain` with the small configuration."""
    return cli.main(["pretrain", f"--out={run}", *words, *arguments(**changes)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 16 steps."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    with fresh_accelerate():
        assert pretrain(run, "--set", "run.tensorboard=true") == 0
    return run


def test_leaves_everything_behind(finished):
    found = {path.relative_to(finished).as_posix() for path in finished.rglob("*.*")}
    assert {
        *("config.yaml", "log.jsonl", "losses.png", "encoder.safetensors", "encoder.md"),
        *("pictures/step-00000016.png", "checkpoints/step-00000016/model.safetensors"),
    } <= found
    assert any(name.startswith("tensorboard/events") for name in found)
    assert find(finished).config == tiny(run__tensorboard=True)
    for name in ("losses.png", "pictures/step-00000016.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_log_has_every_number(finished):
    lines = log.read(finished)
    assert [line["step"] for line in lines] == [3, 6, 8, 9, 12, 15, 16]
    for line in lines:
        assert line["loss"] == pytest.approx(line["image_loss"] + line["structure_loss"], rel=1e-5)
        assert line["images_per_second"] > 0 and line["grad_norm"] > 0 and line["memory_gib"] > 0
        assert line["skipped_steps"] == line["skipped_files"] == 0
    # Total batch 4: 0.1 * 4 / 512 from step 4 on, and a tenth of it from epoch 1.5, step 12, on.
    assert [line["lr"] for line in lines[2:]] == pytest.approx([0.1 / 128] * 3 + [0.01 / 128] * 2, rel=1e-9)
    assert lines[-1]["seconds_left"] == 0 and lines[-1]["epoch"] == 2


def test_image_loss_falls(finished):
    losses = [line["image_loss"] for line in log.read(finished)]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    assert pretrain(tmp_path / "run", optim__epochs=0.5) == 0
    out = capsys.readouterr().out
    assert re.search(r"^step  *4/4  epoch 0\.50  loss \d\.\d{4} \(image \d\.\d{4}, structure \d\.\d{4}\)", out, re.M), (
        out
    )
    assert "GiB" in out and "images/s" in out and " left" in out


def test_exported_encoder_loads_in_timm(finished):
    """It loads for classification, for features, and for another image size."""
    path = str(finished / "encoder.safetensors")
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    given = json.loads(meta["timm_arguments"])
    model = timm.create_model(meta["timm_name"], **given, checkpoint_path=path).eval()
    images = torch.randn(2, 3, 64, 64)
    saved = find(finished)
    plain = with_changes(saved.config, {"model.accelerate": False}, "test")  # fused blocks agree up to rounding
    encoder = load(saved._replace(config=plain)).encoder
    with torch.no_grad():
        assert model(images).shape == (2, 1000)
        assert torch.equal(model.forward_features(images)[:, 1:], encoder(images))
        fitted = {"pretrained": True, "pretrained_cfg_overlay": {"file": path, "custom_load": False}}
        features = timm.create_model(meta["timm_name"], **given, **fitted, features_only=True).eval()
        assert features(images)[-1].shape == (2, 48, 4, 4)
        larger = timm.create_model(meta["timm_name"], **{**given, "img_size": 96}, **fitted, num_classes=7).eval()
        assert larger(torch.randn(1, 3, 96, 96)).shape == (1, 7)
    assert torch.equal(larger.blocks[0].mlp.fc1.weight, encoder.model.blocks[0].mlp.fc1.weight)


def test_model_card_says_how_to_load_it(finished, monkeypatch):
    card = (finished / "encoder.md").read_text()
    assert "16 of 16 steps" in card and "procedural scenes" in card and "sgmim_fast 0" in card
    assert "Images are RGB" in card and "mean 0.485, 0.456, 0.406 and the standard deviation\n0.229, 0.224" in card
    losses = checkpoint.facts(checkpoint.choose(finished))
    assert f"total {losses['loss']:.4f}, image {losses['image_loss']:.4f}" in card
    monkeypatch.chdir(finished)
    for code in re.findall(r"```python\n(.*?)```", card, re.S):
        exec(code, names := {"timm": timm})
    assert names["file"]["file"] == "encoder.safetensors"


def test_export_and_reconstruct_commands(finished, tmp_path, capsys):
    assert cli.main(["export", str(finished), str(tmp_path / "a" / "out.safetensors"), "--checkpoint=best"]) == 0
    assert (tmp_path / "a" / "out.md").is_file() and (tmp_path / "a" / "out.safetensors").is_file()
    assert cli.main(["reconstruct", str(finished), str(tmp_path / "seen.png"), "--count=2"]) == 0
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert cli.main(["export", str(finished), str(tmp_path / "out.bin")]) == 2
    assert "expected .safetensors" in capsys.readouterr().err
    words = ["reconstruct", str(finished), str(tmp_path / "seen.png")]
    for given, missing in (("images", "structure"), ("structure", "images")):
        assert cli.main([*words, f"--{given}={tmp_path}"]) == 2
        assert f"--{missing} is missing; expected --images DIR with --structure DIR\n" in capsys.readouterr().err
    for unwritable in (tmp_path / "folder.safetensors", Path("/proc/out.safetensors")):
        if unwritable.parent == tmp_path:
            unwritable.mkdir()
        assert cli.main(["export", str(finished), str(unwritable)]) == 2
        err = capsys.readouterr().err
        assert f"cannot write {unwritable}: " in err and err.count("\n") == 1


def test_resumed_run_is_the_same_to_the_bit(finished, tmp_path):
    """16 steps at once give the weights of 8 steps, a stop, and 8 more steps, with nothing but the files."""

    class Stops(Trainer):
        def _save(self, score):
            super()._save(score)
            if self.done == 8:
                os.kill(os.getpid(), signal.SIGTERM)

    run, config = tmp_path / "run", find(finished).config
    run.mkdir()
    dataset = data.Scenes(32, 64, seed=0)
    first = Stops(Pretraining(config), run, Accelerator(), dataset, None)
    first.train()
    assert checkpoint.choose(run).name == "step-00000009"  # the signal arrived after step 8
    # Lines logged after the checkpoint are replaced, not duplicated.
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 10}\n{"step": 1')
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(["pretrain", f"--resume={run}"]) == 0
    assert same(weights(run, 16), weights(finished, 16))
    parts = [checkpoint.read(checkpoint.choose(folder), "optimizer") for folder in (run, finished)]
    assert same(*parts)
    assert [line["step"] for line in log.read(run)] == [3, 6, 8, 9, 12, 15, 16]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_ends(tmp_path, number):
    class Killed(Trainer):
        def _step(self, batches):
            super()._step(batches)
            if self.done == 5:
                os.kill(os.getpid(), number)

    run = tmp_path / "run"
    run.mkdir()
    before = signal.getsignal(number)
    killed = Killed(Pretraining(tiny()), run, Accelerator(), Pairs(), None)
    assert killed.train() == number.name and not killed.finished
    assert checkpoint.choose(run).name == "step-00000005"
    assert signal.getsignal(number) == before


def test_accumulation_is_one_large_batch(tmp_path):
    """Two backward passes of 4 images have the gradient of one of 8."""
    found = []
    for name, changes in (("large", {"optim__batch": 8}), ("accumulated", {"optim__accumulate": 2})):
        one = trainer(tmp_path / name, tiny(optim__epochs=0.25, **changes), Pairs(unknown=0))
        assert one.steps == 1 and one.layout.total == 8
        one.train()
        found.append(checkpoint.read(checkpoint.choose(tmp_path / name), "optimizer"))
    for name, value in found[0].items():
        if name.startswith("exp_avg/"):  # mean of the gradients
            torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("clip", [5.0, 0.02, 0.0])
def test_one_step_by_hand(clip):
    """Clipping by norm, and AdamW's first step, which moves every parameter by lr against the sign of its gradient."""
    config = tiny(optim__clip=clip, optim__warmup_epochs=0, optim__lr=1.28)
    layout = Layout(4)
    stepper = Stepper(Pretraining(config), Accelerator(), layout, 8)
    model = copy.deepcopy(stepper.plain)
    items = [Pairs()[i] for i in range(4)]
    batch = torch.utils.data.default_collate(items)
    done = stepper(0, iter([batch]))

    torch.manual_seed(mix(0, "step", 0, 0))
    mask = draw_masks(config.mask, 64, 4, 0, 0, torch.device("cpu"))
    structure, valid = data.standardize_valid(batch["structure"])
    losses = model(batch["image"], structure, mask, return_losses=True, structure_valid=valid)
    losses.total.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    assert done.values.tolist() == pytest.approx([*(loss.item() for loss in losses), norm], rel=1e-5)
    scale = min(1.0, clip / norm) if clip else 1.0
    assert done.lr == pytest.approx(1.28 * 4 / 512)
    state = stepper.optimizer.optimizer.state
    decay = {id(p): g["weight_decay"] for g in stepper.optimizer.param_groups for p in g["params"]}
    for (name, old), new in zip(model.named_parameters(), stepper.plain.parameters(), strict=True):
        gradient = scale * old.grad
        torch.testing.assert_close(state[new]["exp_avg"], 0.1 * gradient, rtol=1e-4, atol=1e-7, msg=name)
        expected = old * (1 - 0.01 * decay[id(new)]) - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(new, expected.detach(), rtol=1e-4, atol=2e-6, msg=name)


class Reads(TorchDispatchMode):
    """Counts values read by Python, for which the host waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device():
    stepper = Stepper(Pretraining(tiny(optim__accumulate=2)), Accelerator(), Layout(4, 2), 8)
    batches = iter([torch.utils.data.default_collate([Pairs()[i] for i in range(4)])] * 4)
    stepper(0, batches)
    with Reads() as reads:
        done = stepper(1, batches)
        assert reads.count == 0
        done.values[0].item()
        assert reads.count == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_finite_loss_is_skipped(tmp_path, value):
    """The step is counted, and leaves weights and moments unchanged."""
    stepper = Stepper(Pretraining(tiny()), Accelerator(), Layout(4), 8)
    good, bad = (
        torch.utils.data.default_collate([Pairs(broken=broken)[i] for i in range(4)]) for broken in ({}, {2: value})
    )
    stepper(0, iter([good]))
    before = copy.deepcopy(stepper.plain.state_dict())
    moments = copy.deepcopy(stepper.optimizer.optimizer.state_dict()["state"])
    done = stepper(1, iter([bad]))
    assert not done.values.isfinite().all()
    assert same(stepper.plain.state_dict(), before)
    for number, state in stepper.optimizer.optimizer.state_dict()["state"].items():
        assert same(state, moments[number])
    stepper(2, iter([good]))
    assert not same(stepper.plain.state_dict(), before)
    assert all(p.isfinite().all() for p in stepper.plain.parameters())

    one = trainer(tmp_path / "run", dataset=Pairs(broken={3: value}))  # once in each of two epochs
    one.train()
    assert one.window.skipped_steps == 2
    assert log.read(tmp_path / "run")[-1]["skipped_steps"] == 2
    assert all(p.isfinite().all() for p in load(find(tmp_path / "run")).parameters())


def test_many_in_a_row_end_the_run_and_name_the_files(tmp_path):
    dataset = Pairs(broken=dict.fromkeys(range(32), math.nan))
    with pytest.raises(
        UserError, match=r"6 steps in a row up to step 6 had a loss or gradient that is not finite.*pair \d+, pair \d+"
    ):
        trainer(tmp_path / "run", tiny(run__nonfinite=4), dataset).train()
    assert len((tmp_path / "run" / "nonfinite.txt").read_text().splitlines()) == 4
    trainer(tmp_path / "other", tiny(run__nonfinite=17), dataset).train()  # 16 steps


def test_standing_in_for_broken_files_is_counted(tmp_path):
    class Skips(Pairs):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"skipped": "torn.jpg\tis torn" if index == 3 else ""}

    trainer(tmp_path / "run", dataset=Skips()).train()
    assert log.read(tmp_path / "run")[-1]["skipped_files"] == 1  # once, although it is read in both epochs
    assert (tmp_path / "run" / "skipped-files.txt").read_text() == "torn.jpg\tis torn\n"


def test_plain_simmim_and_swin(tmp_path):
    """Without guidance, and with windows."""
    swin = {
        "model__encoder": "swin_tiny_patch4_window7_224",
        "model__arguments": {"embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    }
    settings = {"model__stride": 8, "mask__unit": 8, "data__size": 32, "optim__epochs": 0.25, "data__flip": False}
    config = tiny(**swin, **settings, model__guidance=False)
    one = trainer(tmp_path / "run", config, Pairs(size=32))
    one.train()
    line = log.read(tmp_path / "run")[-1]
    assert line["structure_loss"] == 0 and line["loss"] == line["image_loss"] > 0


# One line, exit code 2.
WRONG = [
    (["--preset=tiny_dem"], {}, "did you mean tiny_demo?"),
    ([], {"model__encoder": "swin_bas_patch4_window7_224"}, "did you mean swin_base_patch4_window7_224"),
    ([], {"model__encoder": "resnet50"}, "timm_name must name one of timm's Swin"),
    (
        [],
        {"data__size": 70},
        "data.size is 70, no multiple of the encoder's stride (model.stride) 16; next that fit: 64 or 80",
    ),
    ([], {"mask__unit": 24}, "no multiple of the mask unit (mask.unit) 24; next that fit: 48 or 96"),
    ([], {"model__stride": 32, "mask__unit": 32}, "encoder_stride is 32; expected 16"),
    ([], {"mask__ratio": 1.0}, "mask.ratio is 1.0; expected a share between 0 and 1"),
    ([], {"run__seed": -1}, "run.seed is -1; expected 0 or more"),
    ([], {"optim__batch": 0}, "optim.batch is 0; expected at least 1"),
    ([], {"mask__shown": "some"}, "mask.shown is 'some'"),
    ([], {"model__arguments": {"depht": 1}}, "depht"),
    ([], {"model__arguments": {"img_size": 64}}, "expected data.size"),
    ([], {"optim__batch": 64}, "the data has 32 images, fewer than the 64 of a step"),
    ([], {"data__scenes": 0}, "the images come from none of"),
    (["--images=here"], {}, "the images come from several of"),
    (["--images=nowhere", "--structure=nowhere"], {"data__scenes": 0}, "nowhere"),
    (["--precision=half"], {}, "expected one of float32, bfloat16, float16"),
    (["--checkpoint=best"], {}, "--checkpoint requires --resume"),
    (["--resume=nowhere"], {}, "nowhere has no checkpoint"),
    ([], {"run__fsdp": True}, "expected several"),
    ([], {"optim__betas": [0.9, 1.5]}, "optim.betas is (0.9, 1.5); expected 0 or more, less than 1"),
    ([], {"optim__eps": -1}, "optim.eps is -1.0; expected 0 or more"),
    ([], {"optim__lr": ".nan"}, "optim.lr is nan; expected 0 or more"),
    ([], {"optim__epochs": ".inf"}, "optim.epochs is inf; expected a finite number"),
    ([], {"optim__milestones": "[.inf]"}, "optim.milestones is (inf,); expected a finite number"),
    ([], {"model__arguments": {"depth": 1, "num_heads": 0}}, "'num_heads': 0"),
    ([], {"model__arguments": {"depth": 1, "patch_size": 0}}, "'patch_size': 0"),
    ([], {"model__arguments": {"depth": 1, "act_layer": "foo"}}, "'act_layer': 'foo'"),
    ([], {"model__arguments": {"depth": 1, "drop_path_rate": 1.5}}, "model.arguments.drop_path_rate is 1.5; expected"),
    (
        [],
        {
            "model__encoder": "swin_tiny_patch4_window7_224",
            "model__arguments": {"embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2], "window_size": 6},
            **{"model__stride": 8, "mask__unit": 8},
        },
        "stage 0 has 16 tokens along a side, no multiple of its window 6",
    ),
]


@pytest.mark.parametrize(("words", "changes", "message"), WRONG, ids=[message[:40] for *_, message in WRONG])
def test_wrong_input_is_one_line(tmp_path, capsys, words, changes, message):
    assert pretrain(tmp_path / "run", *words, **changes) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and "Traceback" not in out + err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__scale": [0.5, 2]}, "data.scale is (0.5, 2.0); expected 0 < smallest <= largest <= 1"),
        ({"data__ratio": [2, 1]}, "data.ratio is (2.0, 1.0); expected 0 < smallest <= largest"),
    ],
)
def test_wrong_crops_are_one_line(tmp_path, capsys, change, message):
    folders = {"data__images": "a", "data__structure": "b", "data__scenes": 0}
    assert pretrain(tmp_path / "run", **folders, **change) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_no_epoch_is_one_step():
    """Also without a warm-up, which would replace the start of the schedule."""
    config = tiny(optim__epochs=0, optim__warmup_epochs=0, optim__schedule="cosine")
    assert Stepper(Pretraining(config), Accelerator(), Layout(4), 8).steps == 1
    assert Pretraining(config).learning_rate(0, 8, 1, 4) == pytest.approx(0.1 * 4 / 512)


@pytest.mark.parametrize("change", ["data.size=96", 'model.arguments={"depth": 2, "embed_dim": 48, "num_heads": 3}'])
def test_changes_that_the_weights_do_not_fit_are_one_line(finished, capsys, change):
    assert cli.main(["pretrain", f"--resume={finished}", "--accept-changes", f"--set={change}"]) == 2
    err = capsys.readouterr().err
    assert f"do not fit the model: {change.partition('=')[0]}: " in err and err.count("\n") == 1


def test_a_finished_run_is_not_overwritten(finished, capsys):
    assert pretrain(finished) == 2
    assert f"resume it with --resume {finished}" in capsys.readouterr().err


def test_other_settings_on_resuming_are_listed(finished, capsys):
    resume = f"--resume={finished}"
    assert cli.main(["pretrain", resume, "--set=optim.lr=0.2", "--set=mask.ratio=0.5"]) == 2
    err = capsys.readouterr().err
    assert "mask.ratio: 0.6 -> 0.5; optim.lr: 0.1 -> 0.2" in err and err.count("\n") == 1
    assert cli.main(["pretrain", "--resume=auto", f"--out={finished}", *arguments(optim__lr=0.2)]) == 2
    assert f"{finished} was trained with different settings" in capsys.readouterr().err
    assert cli.main(["pretrain", resume, "--set=optim.batch=8"]) == 2
    assert "the run had 4 images in a step and would resume with 8" in capsys.readouterr().err
    assert cli.main(["pretrain", resume, "--set=run.log_every=1"]) == 0  # nothing left to do


def test_damaged_checkpoint_is_named(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoints" / "step-00000016" / "optimizer.safetensors").write_bytes(b"torn")
    assert cli.main(["pretrain", f"--resume={run}"]) == 2
    err = capsys.readouterr().err
    assert "step-00000016 is damaged (optimizer.safetensors" in err and "--checkpoint step-00000008" in err
    assert cli.main(["pretrain", f"--resume={run}", "--checkpoint=step-00000008"]) == 0
    assert same(weights(run, 16), weights(finished, 16))


def test_dry_run_checks_and_draws(tmp_path, capsys):
    assert pretrain(tmp_path, "--dry-run") == 0
    assert "settings and data fit" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["pairs.png"]


def test_dry_run_leaves_nothing_in_the_current_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "--dry-run", *arguments()]) == 0
    picture = Path(re.search(r"(\S+\.png) shows", capsys.readouterr().out)[1])
    assert os.listdir(tmp_path) == [] and picture.is_file()
    shutil.rmtree(picture.parent)


def test_dry_run_refuses_what_the_run_refuses(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = [([*words, *arguments(**changes)], message) for words, changes, message in WRONG]
    wrong += [
        (["--precision=float16", *arguments()], "float16, which needs a GPU"),
        ([f"--out={finished}", *arguments()], "already has a run"),
        ([f"--resume={finished}", "--set=optim.lr=0.2"], "optim.lr: 0.1 -> 0.2"),
        ([f"--resume={finished}", "--set=optim.batch=8"], "the run had 4 images in a step"),
        (["--out=/proc/nowhere", *arguments()], "cannot write to /proc/nowhere"),
    ]
    for words, message in wrong:
        AcceleratorState._reset_state(reset_partial_state=True)
        assert cli.main(["pretrain", "--dry-run", *words]) == 2, words
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_dry_run_refuses_what_broken_files_leave(folders, capsys, monkeypatch):
    """There are fewer pairs than a step needs, or none for the losses. This is found before pairs are drawn."""
    monkeypatch.chdir(folders)
    words = [
        f"--images={folders / 'images'}",
        f"--structure={folders / 'maps'}",
        "--dry-run",
        f"--out={folders / 'run'}",
    ]
    for batch, code in ((7, 0), (8, 2)):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert cli.main(["pretrain", *words, *arguments(data__scenes=0, optim__batch=batch)]) == code
    captured = capsys.readouterr()
    assert "the data has 7 images, fewer than the 8 of a step" in captured.err and "3.jpg" in captured.out
    (folders / "run" / "pairs.png").unlink()
    for other in (folders / "maps/a").iterdir():
        other.write_bytes(b"torn")
    AcceleratorState._reset_state(reset_partial_state=True)
    whole = [f"--images={folders / 'good'}", f"--structure={folders / 'fine'}"]
    rng = np.random.default_rng(1)
    for path in (folders / "good", folders / "fine"):
        path.mkdir()
        for i in range(8):
            np.save(path / f"{i}.npy", rng.random((70, 90), dtype=np.float32))
    for i in range(8):
        (folders / "good" / f"{i}.jpg").write_bytes((folders / "images/a/0.jpg").read_bytes())
    val = [f"--val-images={folders / 'images'}", f"--val-structure={folders / 'maps'}"]
    assert cli.main(["pretrain", *whole, *val, *words[2:], *arguments(data__scenes=0)]) == 2
    assert "none of" in capsys.readouterr().err
    assert os.listdir(folders / "run") == []


def test_too_few_shards_are_refused_at_once(folders, capsys):
    pytest.importorskip("webdataset", reason="shards need the extra [train]")
    with tarfile.open(folders / "train-0.tar", "w") as tar:
        for i in (0, 1):
            tar.add(folders / f"images/a/{i}.jpg", f"{i}.jpg")
            tar.add(folders / f"maps/a/{i}.npy", f"{i}.depth.npy")
    words = [f"--shards={folders / 'train-0.tar'}", f"--out={folders / 'run'}"]
    changes = {"data__scenes": 0, "data__epoch_images": 12, "data__workers": 2}
    for more in ([], ["--dry-run"]):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert cli.main(["pretrain", *words, *more, *arguments(**changes)]) == 2
        assert "1 shards cannot be split over 1 processes with 2 workers each" in capsys.readouterr().err
    assert not (folders / "run").exists()


def test_one_command_starts_and_goes_on(finished, tmp_path, capsys, monkeypatch):
    """The run is stopped in its first steps, stopped later, ended, and started once more."""
    run = tmp_path / "run"
    step, stops = Trainer._step, [2, 5]

    def stopping(self, batches):
        step(self, batches)
        if stops and self.done == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_step", stopping)
    command = ["pretrain", f"--out={run}", *arguments(run__tensorboard=True)]
    for code, resume in ((75, "auto"), (75, str(run)), (0, "auto"), (0, str(run))):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert cli.main([*command, f"--resume={resume}"]) == code
        out = capsys.readouterr().out
        assert ("stopped by SIGTERM after step" in out) == bool(code)
        assert not (run / "run.lock").exists()
    assert same(weights(run, 16), weights(finished, 16))
    assert cli.main([*command, "--resume=auto", "--set=optim.lr=0.2"]) == 2
    assert "optim.lr: 0.1 -> 0.2" in capsys.readouterr().err
    assert cli.main([*command, "--resume=auto", "--checkpoint=step-00000007"]) == 2
    assert "has no checkpoint 'step-00000007'" in capsys.readouterr().err
    assert cli.main([*command, f"--resume={finished}"]) == 2
    assert "a run is resumed in its own folder" in capsys.readouterr().err


def test_auto_takes_the_folder_of_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ("data.scenes=32", "optim.epochs=0.5", "run.pictures=1", "optim.warmup_epochs=0")
    command = ["pretrain", "--preset=tiny_demo", "--resume=auto", *(f"--set={each}" for each in settings)]
    assert cli.main(command) == 0 and cli.main(command) == 0
    assert checkpoint.choose(tmp_path / "runs" / "tiny_demo").name == "step-00000001"


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", ["create_dataset", "finish"])
def test_a_signal_outside_of_the_training(tmp_path, capsys, monkeypatch, moment, number):
    """It arrives outside of the training loop: before the first step, and while the encoder is exported."""
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretraining, moment, lambda *_: os.kill(os.getpid(), number))
        assert pretrain(run, optim__epochs=0.5) == 75
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().out
    assert not (run / "run.lock").exists() and run.exists() == (moment == "finish")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert pretrain(run, "--resume=auto", optim__epochs=0.5) == 0
    assert (run / "encoder.safetensors").is_file()


def test_a_run_in_use_is_left_alone(finished, tmp_path, capsys):
    with RunLock(finished):
        before = sorted(path.name for path in finished.rglob("*"))
        for words in ([], ["--resume=auto"], [f"--resume={finished}"], ["--dry-run"]):
            assert pretrain(finished, *words) == 2
            assert f"{finished} is in use by process {os.getpid()} on" in capsys.readouterr().err
        assert sorted(path.name for path in finished.rglob("*")) == before


@pytest.fixture
def folders(tmp_path):
    """Eight photographs with maps, one with unknown pixels; a photograph without a map; and a truncated one."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for folder in ("images/a", "maps/a"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(tmp_path / f"images/a/{i}.jpg")
        np.save(tmp_path / f"maps/a/{i}.npy", rng.random((70, 90), dtype=np.float32))
    depth = np.load(tmp_path / "maps/a/0.npy")
    depth[:20] = np.nan
    np.save(tmp_path / "maps/a/0.npy", depth)
    (tmp_path / "images" / "alone.png").write_bytes((tmp_path / "images/a/0.jpg").read_bytes())
    (tmp_path / "images/a/3.jpg").write_bytes(b"torn")
    return tmp_path


def test_folders_of_photographs(folders, capsys):
    """With a broken file, in bfloat16, followed by a picture of reconstructions."""
    words = [f"--images={folders / 'images'}", f"--structure={folders / 'maps'}", "--precision=bfloat16"]
    assert pretrain(folders / "run", *words, data__scenes=0) == 0
    out = capsys.readouterr().out
    assert "8 pairs" in out and "1 images without a map (alone.png)" in out
    assert "alone.png" in (folders / "run" / "data-report.txt").read_text()
    assert "3.jpg" in (folders / "run" / "skipped-files.txt").read_text()
    line = log.read(folders / "run")[-1]
    assert math.isfinite(line["loss"]) and line["skipped_steps"] == 0 and line["skipped_files"] >= 1
    assert cli.main(["reconstruct", str(folders / "run"), str(folders / "seen.png"), *words[:2], "--count=3"]) == 0
    assert (folders / "seen.png").is_file()
    assert (
        cli.main(["pretrain", "--preset=swin_base_100ep", "--dry-run", f"--images={folders / 'maps'}", *words[1:]]) == 2
    )
    err = capsys.readouterr().err
    assert str(folders / "maps") in err and err.count("\n") == 1


def test_simmim_needs_no_maps(folders, capsys):
    """Its pictures need none either. With guidance, maps are required."""
    run, images = folders / "run", f"--images={folders / 'images'}"
    changes = {"data__scenes": 0, "optim__epochs": 1}
    assert pretrain(run, images, **changes, model__guidance=False) == 0
    line = log.read(run)[-1]
    assert line["structure_loss"] == 0 and line["image_loss"] > 0 and (run / "encoder.safetensors").is_file()
    assert cli.main(["reconstruct", str(run), str(folders / "seen.png"), images, "--count=2"]) == 0
    capsys.readouterr()
    assert pretrain(folders / "other", images, **changes) == 2
    assert "--set model.guidance=false for SimMIM" in capsys.readouterr().err


def test_images_over_the_demo(folders, capsys):
    """The given images replace the source of any preset."""
    words = [f"--images={folders / 'images'}", f"--structure={folders / 'maps'}", "--batch=4", "--epochs=1"]
    assert cli.main(["pretrain", "--preset=tiny_demo", f"--out={folders / 'run'}", "--dry-run", *words]) == 0
    assert "6 pairs" in capsys.readouterr().out
    (folders / "demo.yaml").write_text(
        f"preset: tiny_demo\ndata: {{images: {folders}/images, structure: {folders}/maps}}"
    )
    assert cli.main(["pretrain", f"--config={folders / 'demo.yaml'}", "--dry-run", "--batch=4"]) == 0
    assert cli.main(["pretrain", "--preset=tiny_demo", "--dry-run", *words, "--set=data.scenes=9"]) == 2
    assert "from several of" in capsys.readouterr().err


def test_shards(folders):
    pytest.importorskip("webdataset", reason="shards need the extra [train]")
    with tarfile.open(folders / "train-0.tar", "w") as tar:
        for i in (0, 1, 2, 4, 5, 6, 7):
            tar.add(folders / f"images/a/{i}.jpg", f"{i}.jpg")
            tar.add(folders / f"maps/a/{i}.npy", f"{i}.depth.npy")
    shards = f"--shards={folders / 'train-{0..0}.tar'}"
    run = folders / "run"
    assert pretrain(run, shards, data__scenes=0, data__epoch_images=12, run__checkpoint_every=3) == 0
    assert [line["step"] for line in log.read(run)] == [3, 6]  # two epochs of three steps
    assert cli.main(["pretrain", f"--resume={run}", "--checkpoint=step-00000003"]) == 0
    assert log.read(run)[-1]["step"] == 6


def test_shards_whose_workers_have_less_than_a_batch(folders):
    pytest.importorskip("webdataset", reason="shards need the extra [train]")
    for shard in (0, 1):
        with tarfile.open(folders / f"train-{shard}.tar", "w") as tar:
            tar.add(folders / f"images/a/{shard}.jpg", "0.jpg")
            tar.add(folders / f"maps/a/{shard}.npy", "0.depth.npy")
    given = {"data__scenes": 0, "data__epoch_images": 6, "data__workers": 2, "optim__batch": 4}
    assert pretrain(folders / "run", f"--shards={folders}/train-{{0..1}}.tar", **given) == 0
    assert log.read(folders / "run")[-1]["step"] == 2  # two epochs of one step
