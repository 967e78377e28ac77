"""Losses on held-out data: the choice of pairs, the value, and that computing it does not change training."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pretraining import Pairs, arguments, fresh_accelerate, same, tiny, weights
from torch.utils.data import default_collate

from sgmim_fast import cli
from sgmim_fast.data import DataError, FolderPairs, Scenes, standardize_valid
from sgmim_fast.data.seeds import mix
from sgmim_fast.engine import log
from sgmim_fast.errors import UserError
from sgmim_fast.pretrain import build
from sgmim_fast.pretrain.task import held_out_losses


@pytest.fixture
def folders(tmp_path):
    """Writes 20 oblong pairs."""
    rng = np.random.default_rng(0)
    for kind, suffix in (("images", "jpg"), ("maps", "png")):
        (tmp_path / kind).mkdir()
        for number in range(20):
            depth = rng.integers(1, 65535, (80, 120), dtype=np.uint16)
            pixels = Image.fromarray(depth if kind == "maps" else (depth >> 8).astype(np.uint8))
            pixels.save(tmp_path / kind / f"{number:02}.{suffix}")
    return {"data__images": str(tmp_path / "images"), "data__structure": str(tmp_path / "maps"), "data__scenes": 0}


def names(dataset) -> list[str]:
    return [dataset[index]["name"] for index in range(len(dataset))]


def create(**changes):
    config = tiny(**changes)
    build.check(config)
    return build.hold_out(config, build.create_dataset(config))


@pytest.mark.parametrize("kind", ["scenes", "folders"])
def test_a_share(kind, folders):
    changes = folders if kind == "folders" else {}
    whole = build.create_dataset(tiny(**changes))
    train, val = create(data__val=0.25, **changes)
    assert len(val) == len(whole) // 4
    if kind == "scenes":  # further scenes can be generated
        assert names(train) == names(whole) and not set(names(val)) & set(names(whole))
    else:
        assert sorted(names(train) + names(val)) == sorted(names(whole))
    assert names(create(data__val=0.25, **changes)[1]) == names(val)
    before = [val[index] for index in range(len(val))]
    train.set_epoch(3)  # changes the crops of training data only
    for index, item in enumerate(before):
        assert torch.equal(val[index]["image"], item["image"])
        assert torch.equal(val[index]["structure"], item["structure"])
    if kind == "folders":
        assert names(create(data__val=0.25, run__seed=1, **changes)[1]) != names(val)
        first = train[0]["image"]
        train.set_epoch(4)
        assert not torch.equal(train[0]["image"], first)


def test_nothing_broken_is_replaced_across_the_split(folders, tmp_path):
    train, val = create(data__val=0.25, **folders)
    for name in names(train):
        (tmp_path / "images" / name).write_bytes(b"broken")
    assert len(names(val)) == 5
    with pytest.raises(DataError):
        train[0]


def test_one_image_at_least_on_either_side(folders):
    assert len(create(data__val=0.001, **folders)[1]) == 1
    with pytest.raises(UserError, match=r"data\.val is 0\.99 of 20 images, which leaves none to train on"):
        create(data__val=0.99, **folders)


def test_folders_of_its_own(folders, tmp_path):
    """Training data are scenes. The folders are read without random crops."""
    train, val = create(data__val_images=folders["data__images"], data__val_structure=folders["data__structure"])
    assert isinstance(train, Scenes) and isinstance(val, FolderPairs) and len(val) == 20
    val.set_epoch(0)
    first = val[3]["image"]
    val.set_epoch(1)
    assert torch.equal(val[3]["image"], first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__val": 1.0}, "data.val is 1.0; expected a share of the data, 0 or more and less than 1"),
        ({"data__val_structure": "maps"}, "data.val_images is missing; expected --val-images DIR with --val-structure"),
        ({"data__val_images": "x"}, "data.val_structure is missing; expected --val-structure DIR with --val-images"),
        ({"data__val": 0.1, "data__val_images": "x"}, "data.val is 0.1 with data.val_images; expected one of them"),
        ({"data__val": 0.1, "data__shards": "x.tar"}, "data.val does not split shards; expected --val-images DIR"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        create(**changes)


def accelerator(rank: int = 0, processes: int = 1):
    """Simulates accelerate's Accelerator, without other processes in reductions."""
    from accelerate import Accelerator

    found = Accelerator(cpu=True)

    class Alone:
        process_index, num_processes, device, autocast = rank, processes, found.device, found.autocast

        def reduce(self, total, how):
            return total

    return Alone()


@pytest.mark.parametrize("count", [1, 4, 7])
def test_mean_over_the_images(count):
    """Compares with one call for all images, with the same masks. Model and random state are not changed."""
    config = tiny(data__val=0.2)
    with fresh_accelerate():
        torch.manual_seed(0)
        model = build.create_model(config)
        pairs = Pairs(count)
        state = torch.get_rng_state()
        found = held_out_losses(model, pairs, config, accelerator())
        assert model.training and torch.equal(torch.get_rng_state(), state)
    batch = default_collate([pairs[index] for index in range(count)])
    structure, valid = standardize_valid(batch["structure"])
    seed = mix(config.run.seed, "held out")
    drawn = build.draw_masks(config.mask, config.data.size, count, seed, 0, torch.device("cpu"))
    with torch.no_grad():
        expected = model.eval()(batch["image"], structure, drawn, return_losses=True, structure_valid=valid)
    # Known pixels are counted per batch.
    assert found[:3] == pytest.approx([loss.item() for loss in expected], rel=1e-2)
    assert found[1] == pytest.approx(expected.image.item(), rel=1e-5)


@pytest.mark.parametrize("count", [1, 9, 24])
def test_every_process_computes_as_often(count):
    """Together, the processes have each image once."""
    config = tiny()
    sums, calls = torch.zeros(2), []
    with fresh_accelerate():
        torch.manual_seed(0)
        model = build.create_model(config)
        alone = held_out_losses(model, Pairs(count), config, accelerator())
        for rank in range(3):
            number = 0

            def called(*_):
                nonlocal number
                number += 1

            hook = model.register_forward_hook(called)
            part, totals = accelerator(rank, 3), []
            part.reduce = lambda total, how, totals=totals: totals.append(total) or total.clamp(min=1e-9)
            held_out_losses(model, Pairs(count), config, part)
            hook.remove()
            calls.append(number)
            sums += totals[0][[1, 3]]
    assert len(set(calls)) == 1 and calls[0] >= 1
    assert sums[1] == count and (sums[0] / count).item() == pytest.approx(alone[1], rel=1e-5)


def test_run(tmp_path, capsys):
    """Losses of every epoch select the best checkpoint. Pictures are of held-out scenes. No step is changed."""
    changes = {"optim__epochs": 3, "run__checkpoint_every": 5, "run__keep": 1}
    for name, share in (("with", 1 / 8), ("without", 0)):
        given = changes | {"data__val": share}
        with fresh_accelerate():
            assert cli.main(["pretrain", *arguments(**given), "--out", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    run = tmp_path / "with"
    tests = log.read(run, log.METRICS)
    assert [line["step"] for line in tests] == [5, 8, 10, 15, 16, 20, 24]
    assert same(weights(run, 24), weights(tmp_path / "without", 24))
    assert "evaluation after step 8: val_loss " in out and "on held-out data: image loss " in out
    facts = [json.loads(path.read_text()) for path in (run / "checkpoints").glob("*/checkpoint.json")]
    scores = {fact["step"]: fact["score"] for fact in facts}
    saved = {line["step"]: line["val_loss"] for line in tests if line["step"] in (5, 10, 15, 20, 24)}
    assert scores.items() <= saved.items() and min(scores.values()) == min(saved.values())
    lines = log.read(run)
    assert all(0 <= line["waiting"] <= 1 for line in lines)
    assert "waiting for data" in out and " left" in out and "images/s" in out


def test_resumed_it_goes_on(tmp_path):
    given = {"data__val": 1 / 8, "run__checkpoint_every": 6, "run__keep": 3}
    for name in ("whole", "parts"):
        with fresh_accelerate():
            assert cli.main(["pretrain", *arguments(**given), "--out", str(tmp_path / name)]) == 0
    for step in (12, 16):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step-{step:08d}")
    with fresh_accelerate():
        assert cli.main(["pretrain", "--resume", str(tmp_path / "parts")]) == 0
    first, second = (log.read(tmp_path / name, log.METRICS) for name in ("whole", "parts"))
    assert first == second


def test_other_files_on_resuming_are_refused(folders, tmp_path, capsys):
    """They change the choice of held-out images, although the steps of an epoch are as many as before."""

    def pretrain(*words):
        with fresh_accelerate():
            return cli.main(["pretrain", f"--resume={run}", *words]), "".join(capsys.readouterr())

    run = tmp_path / "run"
    given = folders | {"data__val": 0.2, "optim__epochs": 1, "run__checkpoint_every": 2}
    assert pretrain(f"--out={run}", *arguments(**given))[0] == 0
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    for name in ("images/{}.jpg", "maps/{}.png"):
        shutil.copy(tmp_path / name.format("19"), tmp_path / name.format("20"))
    code, out = pretrain()
    assert code == 2 and f"{run} was trained with different files: images: 16 (" in out and " -> 17 (" in out
    code, out = pretrain("--accept-changes")
    assert code == 0 and f"{run} continues with different files: images: 16 (" in out
    assert pretrain()[0] == 0  # its last checkpoint has the new files
    (tmp_path / "images" / "00.jpg").rename(tmp_path / "images" / "x.jpg")
    (tmp_path / "maps" / "00.png").rename(tmp_path / "maps" / "x.png")
    code, out = pretrain()
    assert code == 2 and "images: 17 (" in out and " -> 17 (" in out
    path = run / "checkpoints" / "step-00000004" / "checkpoint.json"  # as of an earlier version
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "data"}))
    assert pretrain()[0] == 0


def test_started_again_before_the_first_checkpoint(tmp_path):
    """A run that was killed before it saved a checkpoint leaves lines of steps that are repeated."""
    (tmp_path / "run").mkdir()
    for name in (log.STEPS, log.METRICS):
        (tmp_path / "run" / name).write_text('{"step": 3, "val_loss": 9.0}\n')
    given = {"data__val": 1 / 8, "optim__epochs": 1}
    with fresh_accelerate():
        assert cli.main(["pretrain", "--resume=auto", *arguments(**given), "--out", str(tmp_path / "run")]) == 0
    assert [line["step"] for line in log.read(tmp_path / "run", log.METRICS)] == [8]


def test_a_few_pixels_far_away():
    """A map that is flat except for these pixels outweighs all others unless it is clipped."""
    flat = 1 + 1e-3 * torch.rand(1, 1, 64, 64)
    flat[:, :, :3, :3] = 9
    loud, _ = standardize_valid(flat)
    quiet, valid = standardize_valid(flat, 3.0)
    assert loud.abs().mean() > 10 and quiet.abs().mean() < 1.5
    assert torch.equal(quiet, loud.clamp(-3, 3)) and valid.all()
    with pytest.raises(UserError, match=r"data\.limit is 0\.0; expected more than 0, or null for none"):
        build.check(tiny(data__limit=0))


def test_smoothed_curves(tmp_path):
    line = [float(i) for i in range(50)]
    assert log.smooth(line) == pytest.approx(line)  # straight lines do not change
    noisy = [x + (-1) ** i for i, x in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(log.smooth(noisy)[3:-3], line[3:-3], strict=True)) < 0.4
    assert log.smooth([]) == [] and log.smooth([1.0]) == [1.0]
    tests = [{"step": 10, "val_image_loss": 0.5}]
    lines = [{"step": i, "image_loss": None if i == 3 else 1.0, "lr": 0.1} for i in range(20)]
    for name, given in (("a.png", lines), ("b.png", [])):
        log.curves(given, tmp_path / name, ("image_loss",), tests)
        assert (tmp_path / name).stat().st_size > 1000
