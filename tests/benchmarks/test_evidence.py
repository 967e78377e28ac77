"""The parts of benchmarks/evidence.py, a miniature of it, and (slow) that guidance still helps."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sgmim_fast.data", reason="the benchmark needs the extra [train]")
pytest.importorskip("yaml", reason="the benchmark needs the extra [train]")
pytest.importorskip("skimage", reason="the benchmark needs the extra [train]")
ROOT = Path(__file__).parents[2]

sys.path.insert(0, str(ROOT / "benchmarks"))
from evidence import pretrain as pretraining  # noqa: E402
from evidence import probe, real, report, scenes  # noqa: E402
from evidence import run as evidence  # noqa: E402
from evidence.pretrain import METHODS, Settings, draw_step, pretrain  # noqa: E402

TINY = Settings(size=32, width=32, depth=1, steps=3, batch=8)
OBSERVED = 0.20  # of RMSE; frozen encoder, 256 labelled scenes: benchmarks/evidence/EVIDENCE.md
COUNTS = {"pretrain": 12, "labelled": 10, "validation": 6, "test": 6}


@pytest.fixture(scope="module")
def sets():
    return scenes.make_scenes(COUNTS, 32, 0)


def test_sets_share_no_scene_and_keep_their_range(sets):
    assert {name: len(split.images) for name, split in sets.items()} == COUNTS
    images = torch.cat([split.images for split in sets.values()]).flatten(1)
    assert torch.cdist(images, images).add(torch.eye(len(images)) * 99).min() > 1
    depth = torch.cat([split.depth for split in sets.values()])
    assert depth.min() >= scenes.NEAREST and depth.max() == scenes.FARTHEST
    labels = torch.cat([split.labels for split in sets.values()])
    assert labels.unique().tolist() == list(range(scenes.CLASSES))


def test_degraded_structure_is_another_but_in_order():
    """Maps vary slowly, so that blurring changes little: ranks are kept, proportions are not."""
    along = torch.linspace(1, 9, 48)
    depth = along.expand(20, 1, 48, 48).contiguous()
    degraded = scenes.degrade(depth, torch.Generator().manual_seed(0))
    assert degraded.shape == depth.shape and degraded.isfinite().all()
    ranks = degraded.mean(2).argsort(-1).argsort(-1).double()[:, 0]
    order = torch.arange(48.0).double().expand(20, -1)
    similar = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(ranks, order, strict=True)])
    assert similar.min() > 0.9
    exact = scenes.structure_for(depth, "exact")
    assert 0.2 < (degraded - exact).square().mean().sqrt() < 0.8
    same = scenes.degrade(depth, torch.Generator().manual_seed(0))
    assert torch.equal(same, degraded)


def test_structure_of_another_scene(sets):
    depth = sets["pretrain"].depth
    exact, other = (scenes.structure_for(depth, kind) for kind in ("exact", "other"))
    assert all(torch.equal(other[i], exact[i - 1]) for i in range(len(depth)))


def test_every_method_has_the_same_steps():
    """Images, flips and masks depend on seed and step. Methods differ only in where the structure is shown."""
    expected = draw_step(100, TINY, 3, 5)
    for method in METHODS.values():
        step = draw_step(100, TINY, 3, 5, method.shown)
        assert torch.equal(step.indices, expected.indices) and step.flipped == expected.flipped
        assert torch.equal(step.mask.mask, expected.mask.mask)
    counts = {name: draw_step(100, TINY, 3, 5, method.shown).mask.structure for name, method in METHODS.items()}
    masked = expected.mask.mask
    assert torch.equal(counts["SG-MIM"], masked) and torch.equal(counts["shown: visible"], ~masked)
    assert counts["shown: all"].all() and not counts["nothing shown"].any()
    assert (counts["shown: random 40 %"].flatten(1).sum(1) == 16 - math.ceil(0.6 * 16)).all()
    others = [draw_step(100, TINY, seed, step) for seed, step in ((3, 6), (4, 5))]
    assert not any(torch.equal(other.indices, expected.indices) for other in others)


def test_methods_start_from_the_same_encoder_and_part(sets):
    images, depth = sets["pretrain"].images, sets["pretrain"].depth
    still = TINY._replace(steps=0)
    start, *others = (pretrain(METHODS[name], still, images, depth, 1).state_dict() for name in METHODS)
    assert all(torch.equal(value, other[name]) for other in others for name, value in start.items())
    ends = {
        name: pretrain(METHODS[name], TINY, images, depth, 1).model.blocks[0].mlp.fc1.weight.detach()
        for name in METHODS
    }
    for name, end in ends.items():
        assert torch.equal(end, start["model.blocks.0.mlp.fc1.weight"]) == (name == "scratch")
        assert [other for other in ends if torch.equal(ends[other], end)] == [name]


def test_every_other_method_starts_from_the_same_encoder_too(sets):
    images, depth = sets["pretrain"].images, sets["pretrain"].depth
    start = pretraining.create_encoder(TINY, 1).model.state_dict()
    for name, method in {**pretraining.VISIBLE_ONLY, **pretraining.REASONS}.items():
        still = pretrain(method, TINY._replace(steps=0), images, depth, 1)
        assert still.visible_only == method.decoder
        assert all(torch.equal(value, start[key]) for key, value in still.model.state_dict().items()), name
        ended = pretrain(method, TINY, images, depth, 1, steps=2)
        assert not torch.equal(ended.model.norm.weight, start["norm.weight"]), name


def test_equal_time_is_so_many_steps(sets, monkeypatch):
    seconds = {"SG-MIM": 6.0, "visible only, time": 2.0}
    named = {method: name for name, method in evidence.EVERY.items()}
    monkeypatch.setattr(evidence, "step_seconds", lambda method, *data: seconds[named[method]])
    plan = evidence.QUICK._replace(methods=("SG-MIM", "visible only", "visible only, time"))
    assert evidence.equal_times(plan, sets["pretrain"]).steps == (("visible only, time", 3 * plan.settings.steps),)


def test_the_same_seed_gives_the_same_bits(sets):
    images, depth = sets["pretrain"].images, sets["pretrain"].depth
    first, again = (pretrain(METHODS["SG-MIM"], TINY, images, depth, 2).state_dict() for _ in range(2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_learning_rate():
    rates = [pretraining.learning_rate(TINY._replace(lr=1.0), step, 24) for step in range(24)]
    assert rates[0] == 0.5 and rates[12] == pytest.approx(0.5) and max(rates) == rates[1] and rates[-1] < 0.01


def test_ridge_recovers_a_linear_map_and_its_biases():
    tokens = torch.randn(200, 4, 6)
    weight, bias = torch.randn(6, 3), torch.randn(4, 3)
    (predict,) = probe.ridge(tokens, tokens @ weight + bias, [1e-9])
    unseen = torch.randn(5, 4, 6)
    torch.testing.assert_close(predict(unseen), unseen @ weight + bias, rtol=1e-3, atol=1e-3)


def test_ridge_is_the_closed_form():
    tokens, targets = torch.randn(30, 1, 5).double(), torch.randn(30, 1, 2).double()
    (predict,) = probe.ridge(tokens, targets, [0.3])
    x = tokens[:, 0] / (tokens[:, 0].std(0) + 1e-6)
    x, y = x - x.mean(0), targets[:, 0] - targets[:, 0].mean(0)
    weight = torch.linalg.solve(x.T @ x + 0.3 * 30 * torch.eye(5).double(), x.T @ y)
    torch.testing.assert_close(predict(tokens)[:, 0], x @ weight + targets[:, 0].mean(0))


def test_the_penalty_is_chosen_on_validation():
    """For few rows of noise the strongest penalty predicts best, for many exact rows the weakest."""
    tokens, noise = torch.randn(20, 1, 15), torch.randn(20, 1, 1)
    others, truth = torch.randn(500, 1, 15), torch.randn(500, 1, 1)
    predictors = probe.ridge(tokens, noise, [1e-5, 10.0])
    assert probe.choose(predictors, others, lambda p: (p - truth).square().mean().item()) is predictors[1]
    exact = probe.ridge(others, others.sum(-1, keepdim=True), [1e-5, 10.0])
    wanted = tokens.sum(-1, keepdim=True)
    assert probe.choose(exact, tokens, lambda p: (p - wanted).square().mean().item()) is exact[0]


def test_depth_metrics_by_hand():
    truth = torch.tensor([[2.0, 4.0], [5.0, torch.nan]])
    found = probe.depth_metrics(torch.tensor([[3.0, 1.0], [12.0, 1.0]]), truth)  # 12 is clipped to 10
    assert found["rmse"] == pytest.approx((math.sqrt((1 + 9) / 2) + 5) / 2)
    assert found["abs_rel"] == pytest.approx(((0.5 + 0.75) / 2 + 1) / 2)


def test_mean_iou_by_hand():
    truth, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert probe.mean_iou(predicted, truth) == pytest.approx((2 / 3 + 1 / 3 + 1 / 2) / 3)


def test_patches_and_classes(sets):
    labels = sets["test"].labels
    patches = probe.to_patches(labels)
    assert patches.shape == (6, 16, 64)
    assert torch.equal(patches[2, 5].view(8, 8), labels[2, 8:16, 8:16])
    assert torch.equal(probe.to_labels(probe.one_hot(labels)), patches.long())


def test_finetuning_learns_and_leaves_the_encoder_alone(sets):
    encoder = pretraining.create_encoder(TINY, 0)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    seen = {**sets, "test": sets["labelled"]}
    poor, good = (probe.finetune(encoder, seen, 10, 0, TINY, steps, batch=8) for steps in (1, 40))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert set(good) == {"rmse", "abs_rel", "miou"}
    assert good["rmse"] < poor["rmse"] and good["miou"] > poor["miou"]


def test_rows_of_a_job(sets):
    plan = evidence.QUICK._replace(settings=TINY, labelled=(4, 10))
    rows = evidence.do(evidence.Job("SimMIM", 0), plan, sets)
    assert [(row["how"], row["labelled"]) for row in rows] == [
        *(("frozen", 4), ("frozen", 10), ("fine-tuned", 4), ("fine-tuned", 10)),
    ]
    assert all(0 < row["rmse"] < 10 and 0 < row["miou"] < 1 for row in rows)
    assert len(evidence.do(evidence.Job("degraded", 0), plan, sets)) == 2
    assert {job.method for job in evidence.jobs(plan)} == set(METHODS)


def test_table_plot_and_differences(tmp_path):
    rows = [
        {"method": method, "seed": seed, "how": "frozen", "labelled": 64, "rmse": base + seed}
        for method, base in (("SimMIM", 2.0), ("SG-MIM", 1.0))
        for seed in (0, 1)
    ]
    rows[-1]["rmse"] -= 0.5
    assert "| SimMIM | 2 | 2.500 ± 0.707 |" in report.table(rows)
    assert "| frozen | 64 | SG-MIM | -1.250 ± 0.354 | 2 |" in report.differences(rows, "SimMIM")
    report.plot(rows, tmp_path / "made" / "plot.png")
    assert (tmp_path / "made" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_disparity_of_tokens():
    depth = torch.arange(256.0).view(1, 1, 16, 16)
    depth[..., :8, :4] = torch.nan
    depth[..., :8, 8:] = torch.nan
    depth[..., 0, 8] = 1
    found = real.token_disparity(depth)
    assert found.shape == (1, 4) and found[0, 1].isnan()
    assert found[0, 0] == depth[0, 0, :8, 4:8].mean() and found[0, 3] == depth[0, 0, 8:, 8:].mean()


def test_parts_of_the_photograph(monkeypatch):
    monkeypatch.setattr(real, "CROPS", {"pretrain": 4, "train": 6, "validation": 3, "test": 3})
    columns = real.COLUMNS
    assert columns["pretrain"] == columns["train"] and columns["train"][1] == columns["validation"][0]
    assert columns["validation"][1] == columns["test"][0]
    sets = real.crops(32)
    assert sets["test"].depth.isnan().any() and not sets["test"].depth.isinf().any()
    plan = evidence.QUICK._replace(real=True, finetune_steps=0)
    (row,) = evidence.do(evidence.Job("SG-MIM", 0), plan, sets)
    assert row["labelled"] == 6 and row["rmse"] > 0 and row["rmse_of_mean"] > 0


@pytest.mark.slow
def test_nothing_is_begun_after_the_minutes(capsys):
    plan = evidence.QUICK._replace(methods=("scratch", "SimMIM"), seeds=4)
    rows = evidence.run(plan, 1, minutes=0)
    methods = {(row["method"], row["seed"]) for row in rows}
    out = capsys.readouterr().out
    assert ("SimMIM", 0) in methods and len(methods) < 8 and "left out after 0 minutes: " in out
    assert len(out.split("left out")[1].split(",")) == 8 - len(methods)


@pytest.mark.slow
def test_the_script(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "evidence.py"), "--quick", "--seeds=1"]
    files = [f"--json={tmp_path / 'a.json'}", f"--plot={tmp_path / 'a.png'}"]
    done = subprocess.run([*command, *files], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| fine-tuned | seeds |" in done.stdout and (tmp_path / "a.png").exists() and (tmp_path / "a.json").exists()


@pytest.mark.slow(minutes=1)
def test_guidance_helps():
    """SG-MIM's frozen features predict depth better than SimMIM's, by at least half of the margin in EVIDENCE.md."""
    plan = evidence.Plan(methods=("SimMIM", "SG-MIM"), labelled=(256,), seeds=1, finetune_steps=0)
    rows = evidence.run(plan, 2)
    rmse = {row["method"]: row["rmse"] for row in rows}
    assert len(rows) == len(rmse) == 2
    assert rmse["SG-MIM"] < rmse["SimMIM"] - OBSERVED / 2


def test_only_methods_that_there_are(capsys):
    with pytest.raises(SystemExit, match="2"):
        evidence.main(["--quick", "--methods", "SG-MIM,salient"])
    assert "--methods has salient; expected some of scratch, SimMIM, SG-MIM" in capsys.readouterr().err
